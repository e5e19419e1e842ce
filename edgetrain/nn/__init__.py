"""Invertible layers, each of which gives its input back from its output and its gradients with it; Dirac weights."""

from edgetrain.nn.activation import InvertibleLeakyReLU
from edgetrain.nn.batchnorm import InvertibleBatchNorm
from edgetrain.nn.coupling import CouplingConv, CouplingLayer, CouplingStack
from edgetrain.nn.dirac import (
    DiracConv2d,
    DiracParametrization,
    DiracProjection,
    IdentityPlus,
    dirac_,
    dirac_projection_,
    identity_plus_,
)
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
    "DiracConv2d",
    "DiracParametrization",
    "DiracProjection",
    "HybridBlock",
    "IdentityPlus",
    "Invertible",
    "InvertibleBatchNorm",
    "InvertibleLeakyReLU",
    "InvertibleSequential",
    "ReversibleBlock",
    "dirac_",
    "dirac_projection_",
    "identity_plus_",
]
