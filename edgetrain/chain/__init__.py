"""Models as chains of blocks, and the noise of inverting them."""

from edgetrain.chain.chain import MODES, Block, Chain, Mode, State, chain_of, parts_of, restore_state, saved_state
from edgetrain.chain.freezing import freeze
from edgetrain.chain.measure_noise import measure_noise
from edgetrain.chain.noise import BFLOAT16_NSR, BlockNoise, Noise, Way
from edgetrain.chain.sampling import Keep, SampledNetwork, Stage
from edgetrain.chain.tapping import Group, Tapped, groups_of

__all__ = [
    "BFLOAT16_NSR",
    "MODES",
    "Block",
    "BlockNoise",
    "Chain",
    "Group",
    "Keep",
    "Mode",
    "Noise",
    "SampledNetwork",
    "Stage",
    "State",
    "Tapped",
    "Way",
    "chain_of",
    "freeze",
    "groups_of",
    "measure_noise",
    "parts_of",
    "restore_state",
    "saved_state",
]
