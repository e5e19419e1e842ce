"""Halves that are joined and split again: ``chunk(cat(a, b), 2)`` is ``(a, b)``.

Between two reversible blocks the stream is joined and split along the channels for the sake of the block's interface.
Where a and b have the same number of channels both operations go; how many a result has is followed through the graph
from the layers that set it. Where the halves of something else are taken, ``split`` with their size takes the place of
``chunk``, whose size an exported graph would compute from the shape each time.
"""

from __future__ import annotations

import operator

import torch
import torch.fx
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from edgetrain.export.folds.after import is_sum
from edgetrain.export.folds.draft import Draft, name_of
from edgetrain.export.folds.layers import channels_out
from edgetrain.export.folds.plain_layers import BatchUnshuffle
from edgetrain.export.folds.report import Fold

_KEEP = {
    *("max_pool2d", "avg_pool2d", "batch_norm"),
    *("relu", "leaky_relu", "relu6", "silu", "gelu", "sigmoid", "tanh", "hardtanh", "hardswish"),
}
"""Functions whose result has as many channels as their input."""


def fold_halves(draft: Draft) -> None:
    """Takes every half straight from where it was made."""
    channels: dict[torch.fx.Node, int] = {}
    for node in list(draft.graph.nodes):
        joined = joined_parts(halved(node))
        if joined is not None and joined[0] in channels and channels[joined[0]] == channels.get(joined[1]):
            half = joined[int(node.args[1])]
            draft.done.append(Fold("halves", node.name, f"is {half.name}, joined and split again"))
            draft.replace(node, half)
            continue
        count = _channels(draft, node, channels)
        if count is not None:
            channels[node] = count
    draft.drop_unused()
    for node in list(draft.graph.nodes):
        if name_of(node) == "chunk" and all(halved(user) is not None for user in node.users):
            source = node.all_input_nodes[0]
            if channels.get(source, 1) % 2 == 0:
                _split(draft, node, source, channels[source] // 2)


def _split(draft: Draft, node: torch.fx.Node, source: torch.fx.Node, half: int) -> None:
    with draft.graph.inserting_before(node):
        split = draft.graph.call_function(torch.split, (source, [half, half], 1))
    draft.replace(node, split)


def halved(node: torch.fx.Node) -> torch.fx.Node | None:
    """What ``node`` is one of two halves of along the channels."""
    if node.target is not operator.getitem or node.args[1] not in (0, 1):
        return None
    source = node.args[0]
    if not isinstance(source, torch.fx.Node) or name_of(source) != "chunk":
        return None
    plain = tuple(source.args[1:]) == (2, 1) and not source.kwargs
    return source.args[0] if plain and isinstance(source.args[0], torch.fx.Node) else None


def joined_parts(node: torch.fx.Node | None) -> tuple[torch.fx.Node, torch.fx.Node] | None:
    """The two tensors that ``node`` joins along the channels."""
    if node is None or name_of(node) != "cat" or len(node.args) != 2 or node.args[1] != 1 or node.kwargs:
        return None
    parts = node.args[0]
    if not isinstance(parts, (list, tuple)) or len(parts) != 2 or not all(isinstance(p, torch.fx.Node) for p in parts):
        return None
    return parts[0], parts[1]  # type: ignore[return-value]


def _channels(draft: Draft, node: torch.fx.Node, known: dict[torch.fx.Node, int]) -> int | None:
    """Channels of the result of ``node``, from those of its operands."""
    inputs = [known.get(source) for source in node.all_input_nodes]
    module = draft.module(node)
    if (layer := draft.weighted(node)) is not None:
        return channels_out(layer)
    if isinstance(module, nn.PixelUnshuffle):
        return inputs[0] * module.downscale_factor**2 if inputs[0] is not None else None
    if isinstance(module, (BatchUnshuffle, _BatchNorm, nn.ReLU, nn.LeakyReLU, nn.MaxPool2d, nn.AvgPool2d)):
        return inputs[0]
    if (whole := halved(node)) is not None:
        total = known.get(whole)
        return None if total is None or total % 2 else total // 2
    if joined_parts(node) is not None:
        return None if None in inputs else sum(count for count in inputs if count is not None)
    if is_sum(node):
        return inputs[0] if inputs[0] == inputs[1] else None
    if node.target is F.pad and inputs[0] is not None:
        margins = node.args[1]
        over_channels = margins[4:6] if isinstance(margins, (list, tuple)) and len(margins) <= 6 else None
        return None if over_channels is None else inputs[0] + sum(over_channels)
    return inputs[0] if name_of(node) in _KEEP else None
