"""Invertible layers: each gives its input back from its output, and its gradients with it."""

from edgetrain.nn.activation import InvertibleLeakyReLU
from edgetrain.nn.batchnorm import InvertibleBatchNorm
from edgetrain.nn.coupling import CouplingConv, CouplingLayer, CouplingStack
from edgetrain.nn.invertible import Invertible
from edgetrain.nn.pooling import BatchPool, ChannelPool
from edgetrain.nn.reversible import HybridBlock, ReversibleBlock
from edgetrain.nn.sequential import InvertibleSequential

__all__ = [
    "BatchPool",
    "ChannelPool",
    "CouplingConv",
    "CouplingLayer",
    "CouplingStack",
    "HybridBlock",
    "Invertible",
    "InvertibleBatchNorm",
    "InvertibleLeakyReLU",
    "InvertibleSequential",
    "ReversibleBlock",
]
