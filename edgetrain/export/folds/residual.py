"""A residual of one convolution becomes a plain convolution: its identity path is a Dirac delta.

    s x + t + (W * x + b) = (diag(s) I + W) * x + (b + t)

with I one at the kernel's centre from channel i to channel i: the inverse reading of the Dirac parameterisation
(Zagoruyko and Komodakis 2017). s and t are those of a batch norm on the identity path (Ding et al. 2021, RepVGG), or 1
and 0. An addition less and not one multiplication more, for any padding, since the centre never reads it. The
convolution must preserve the shape, be called once, and its result be used by the addition alone.
"""

from __future__ import annotations

import torch
import torch.fx
from torch import Tensor

from edgetrain.export.folds.affine import affine_of
from edgetrain.export.folds.after import describe_affine, is_sum
from edgetrain.export.folds.draft import Draft, Weighted
from edgetrain.export.folds.layers import add_diagonal, channels_out, keeps_shape
from edgetrain.export.folds.report import Fold


def fold_residuals(draft: Draft) -> None:
    """Folds every ``x + layer(x)`` and every ``batch_norm(x) + layer(x)``."""
    for node in list(draft.graph.nodes):
        if is_sum(node) and not _fold(draft, node, node.all_input_nodes[0], node.all_input_nodes[1]):
            _fold(draft, node, node.all_input_nodes[1], node.all_input_nodes[0])


def _fold(draft: Draft, node: torch.fx.Node, branch: torch.fx.Node, identity: torch.fx.Node) -> bool:
    """Whether ``branch`` is a layer that could take ``identity`` in, and has done so."""
    layer = draft.weighted(branch)
    if layer is None or len(branch.users) > 1 or draft.times_called(branch) > 1 or not keeps_shape(layer):
        return False
    if branch.args[0] is identity:
        ones = torch.ones(channels_out(layer), dtype=torch.double)
        add_diagonal(layer, ones, torch.zeros_like(ones))
        draft.done.append(Fold("Dirac delta", node.name, f"the identity path beside {branch.target}, into it"))
    else:
        vectors = _on_identity_path(draft, layer, branch.args[0], identity)
        if vectors is None:
            return False
        add_diagonal(layer, *vectors)
        affine = affine_of(draft, identity)
        assert affine is not None
        kind, into = "batch norm" if affine.batch_norm else "scale", f"into {branch.target}, as a Dirac delta"
        draft.done.append(Fold(kind, describe_affine(identity, affine), into))
        draft.grow(f"{branch.target}.weight", affine.sources)
        if layer.bias is not None:
            draft.grow(f"{branch.target}.bias", affine.sources)
    draft.replace(node, branch)
    if not identity.users:
        draft.graph.erase_node(identity)
    return True


def _on_identity_path(
    draft: Draft, layer: Weighted, x: object, identity: torch.fx.Node
) -> tuple[Tensor, Tensor] | None:
    """``(s, t)`` where ``identity`` is ``s x + t`` and nobody else reads it."""
    affine = affine_of(draft, identity)
    if affine is None or affine.x is not x or len(identity.users) > 1:
        return None
    return affine.per_channel(layer, channels_out(layer))
