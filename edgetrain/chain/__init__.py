"""Models as chains of blocks."""

from edgetrain.chain.chain import MODES, Block, Chain, Mode, State, chain_of, restore_state, saved_state

__all__ = ["MODES", "Block", "Chain", "Mode", "State", "chain_of", "restore_state", "saved_state"]
