"""An affine map per channel into the layer after it: batch norm before a convolution, input normalisation.

    W (s x + t) + b = (W s) x + (b + sum over in, k of W t)

exact where the layer pads nothing, or repeats pixels (reflect, replicate, circular). Zeros that a layer pads itself are
not shifted, and its outputs at the border would miss a part of the sum; only t = 0 goes then. ``(x - mean) / std`` in
front of a padded convolution therefore keeps its subtraction and loses its division: conv_{W/std}(x - mean). Exact
alternatives keep as many operations (a further input channel of ones, which is padded with zeros as well; padding by
hand with the mean), so they would not pay.
"""

from __future__ import annotations

import torch.fx

from edgetrain.export.folds.affine import Affine, affine_of
from edgetrain.export.folds.after import describe_affine
from edgetrain.export.folds.draft import Draft, Weighted
from edgetrain.export.folds.layers import border_reason, channels_in, map_input
from edgetrain.export.folds.report import Fold


def fold_before(draft: Draft) -> None:
    """Folds every affine map in front of a layer, the nearest first."""
    for node in list(draft.graph.nodes):
        layer = draft.weighted(node)
        while layer is not None:
            source = node.args[0]
            affine = affine_of(draft, source) if isinstance(source, torch.fx.Node) else None
            if affine is None or not isinstance(source, torch.fx.Node) or reason_before(draft, source, affine):
                break
            vectors = affine.per_channel(layer, channels_in(layer))
            assert vectors is not None
            map_input(layer, *vectors)
            draft.done.append(Fold(kind_before(affine), describe_affine(source, affine), f"into {node.target}"))
            draft.grow(f"{node.target}.weight", affine.sources)
            if layer.bias is not None:
                draft.grow(f"{node.target}.bias", (f"{node.target}.weight", *affine.sources))
            draft.replace(source, affine.x)


def kind_before(affine: Affine) -> str:
    """What the fold of ``affine`` is called."""
    if affine.batch_norm:
        return "batch norm"
    return "input normalisation" if affine.x.op == "placeholder" else "scale"


def reason_before(draft: Draft, node: torch.fx.Node, affine: Affine) -> str | None:
    """Why ``affine``, computed by ``node``, cannot go into what comes after it; None if it can."""
    users = list(node.users)
    if len(users) != 1:
        return f"its result is used {len(users)} times"
    if users[0].op == "output":
        return "the network ends with it"
    layer = draft.weighted(users[0])
    if layer is None or users[0].args[0] is not node:
        return f"it precedes {draft.lacks_weights(users[0])}"
    return _reason(draft, users[0], layer, affine)


def _reason(draft: Draft, node: torch.fx.Node, layer: Weighted, affine: Affine) -> str | None:
    if draft.times_called(node) > 1:
        return f"{node.target} is called {draft.times_called(node)} times"
    vectors = affine.per_channel(layer, channels_in(layer))
    if vectors is None:
        return f"it is no map per channel of {node.target}'s {channels_in(layer)} inputs"
    border = border_reason(layer, vectors[1]) if affine.shifts else None
    return None if border is None else f"{node.target} {border}"
