"""Models as chains of blocks, and the noise of inverting them."""

from edgetrain.chain.chain import MODES, Block, Chain, Mode, State, chain_of, parts_of, restore_state, saved_state
from edgetrain.chain.freezing import freeze
from edgetrain.chain.measure_noise import measure_noise
from edgetrain.chain.noise import BlockNoise, Noise, Way

__all__ = [
    "MODES",
    "Block",
    "BlockNoise",
    "Chain",
    "Mode",
    "Noise",
    "State",
    "Way",
    "chain_of",
    "freeze",
    "measure_noise",
    "parts_of",
    "restore_state",
    "saved_state",
]
