"""An affine map per channel into the layer before it: batch norm, a classifier's factor, a layer's scale.

    s (W x + b) + t = (s W) x + (s b + t)

and through an addition, s (u + v) + t = (s u + t) + s v, where both summands come from such layers. The layer must be
called once and its result used once: whoever else reads it wants it as it was.

After a coupling, y1 = x1 + F(x2), the other half and the next coupling read x1, so its scale has no layer to go into.
As a Dirac delta it would make one convolution of both halves, conv([x1, x2]) with the kernel [diag(s) I, s F], which
takes k^2 c/2 more multiplications for each element to save one addition and one multiplication. Measured, neither this
nor a factor on x1 nor scales carried on into later weights is faster than the batch norm (docs/folding.md), which stays
and is named.
"""

from __future__ import annotations

import operator

import torch
import torch.fx
from torch import nn

from edgetrain.export.folds.affine import Affine, affine_of
from edgetrain.export.folds.draft import Draft, describe, name_of
from edgetrain.export.folds.layers import channels_out, map_output
from edgetrain.export.folds.report import Fold


def fold_after(draft: Draft) -> None:
    """Folds every affine map that follows a layer."""
    for node in list(draft.graph.nodes):
        affine = affine_of(draft, node)
        if affine is not None and reason_after(draft, affine) is None:
            where, layers = describe_affine(node, affine), _layers(draft, affine.x)
            into = ", ".join(str(layer.target) for layer in layers)
            draft.done.append(Fold("batch norm" if affine.batch_norm else "scale", where, f"into {into}"))
            _absorb(draft, affine.x, affine, shifted=True)
            draft.replace(node, affine.x)


def reason_after(draft: Draft, affine: Affine) -> str | None:
    """Why ``affine`` cannot go into what comes before it; None if it can."""
    return _reason(draft, affine.x, affine) if affine.x.op != "placeholder" else "it follows the input"


def describe_affine(node: torch.fx.Node, affine: Affine) -> str:
    """The path of the batch norm, or the constants of the arithmetic."""
    if node.op == "call_module":
        return str(node.target)
    if affine.batch_norm:
        return affine.sources[0].rpartition(".")[0] or affine.sources[0]
    return f"{describe(node)} {', '.join(affine.sources)}".strip()


def _reason(draft: Draft, node: torch.fx.Node, affine: Affine) -> str | None:
    layer = draft.weighted(node)
    if layer is None and not is_sum(node):
        return _reason_without_weights(draft, node)
    if len(node.users) > 1:
        return f"the result of {describe(node)} is used {len(node.users)} times"
    if layer is None:
        reasons = [_reason(draft, part, affine) for part in node.args if isinstance(part, torch.fx.Node)]
        return next((f"it follows an addition: {reason}" for reason in reasons if reason is not None), None)
    if draft.times_called(node) > 1:
        return f"{node.target} is called {draft.times_called(node)} times"
    if affine.per_channel(layer, channels_out(layer)) is None:
        return f"it is no map per channel of {node.target}'s {channels_out(layer)}"
    return None


def _reason_without_weights(draft: Draft, node: torch.fx.Node) -> str:
    if (cost := coupling_cost(draft, node)) is not None:
        return (
            "it follows a coupling, whose identity path has no layer: as a Dirac delta it would take "
            f"{cost} more multiplications for each element, to save 2 operations"
        )
    return f"it follows {draft.lacks_weights(node)}"


def coupling_cost(draft: Draft, node: torch.fx.Node) -> int | None:
    """Multiplications for each element by which a kernel over both halves is larger; None where this is no coupling."""
    if name_of(node) != "cat":
        return None
    (parts, *_) = node.args
    layers = [
        draft.weighted(branch)
        for part in parts  # type: ignore[union-attr]
        if isinstance(part, torch.fx.Node) and is_sum(part)
        for branch in part.all_input_nodes
    ]
    convolutions = [layer for layer in layers if layer is not None and not isinstance(layer, nn.Linear)]
    return convolutions[0].weight[0].numel() if convolutions else None


def is_sum(node: torch.fx.Node) -> bool:
    """Whether ``node`` adds two different results."""
    parts = [part for part in node.args if isinstance(part, torch.fx.Node)]
    plain = node.target in (operator.add, torch.add, "add") and not node.kwargs
    return plain and len(node.args) == len(set(parts)) == 2


def _layers(draft: Draft, node: torch.fx.Node) -> list[torch.fx.Node]:
    return [node] if draft.weighted(node) is not None else [n for p in node.all_input_nodes for n in _layers(draft, p)]


def _absorb(draft: Draft, node: torch.fx.Node, affine: Affine, *, shifted: bool) -> None:
    """Applies ``affine`` to the result of ``node``, its shift only if ``shifted``."""
    layer = draft.weighted(node)
    if layer is None:
        for k, part in enumerate(node.all_input_nodes):
            _absorb(draft, part, affine, shifted=shifted and k == 0)
        return
    vectors = affine.per_channel(layer, channels_out(layer))
    assert vectors is not None
    scale, shift = vectors
    map_output(layer, scale, shift if shifted else torch.zeros_like(shift))
    draft.grow(f"{node.target}.weight", affine.sources)
    if layer.bias is not None:
        draft.grow(f"{node.target}.bias", affine.sources)
