"""Operations on weights alone are computed once: ``gamma.view(1, -1, 1, 1)``, a standardised or composed weight.

Float operands are taken in float64 and the result goes back to their type.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.fx
from torch import Tensor

from edgetrain.chain.tracing import substitute
from edgetrain.chain.vocabulary import RANDOM
from edgetrain.export.folds.draft import Draft, name_of
from edgetrain.export.folds.report import Fold


@torch.no_grad()
def fold_constants(draft: Draft) -> None:
    """Puts a buffer in the place of every operation whose operands are all parameters, buffers or numbers."""
    count = 0
    for node in list(draft.graph.nodes):
        sources = node.all_input_nodes
        tensors = {source: draft.tensor(source) for source in sources}
        name = name_of(node)
        if not sources or not name or name.rstrip("_") in RANDOM or any(t is None for t in tensors.values()):
            continue
        value = _value(node, {source: tensor for source, tensor in tensors.items() if tensor is not None})
        if not isinstance(value, Tensor):
            continue
        buffer = draft.free_name(f"constant_{count}")
        count += 1
        draft.root.register_buffer(buffer, value)
        draft.grow(buffer, [str(source.target) for source in sources])
        with draft.graph.inserting_before(node):
            constant = draft.graph.get_attr(buffer)
        draft.done.append(Fold("constant", str(sources[0].target), f"{name} computed once, {buffer}"))
        draft.replace(node, constant)


def _value(node: torch.fx.Node, tensors: dict[torch.fx.Node, Tensor]) -> Any:
    """What ``node`` gives; None where it does not take float64."""
    kinds = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}

    def operand(part: Any) -> Any:
        if not isinstance(part, torch.fx.Node):
            return part
        tensor = tensors[part].detach()
        return tensor.double() if tensor.is_floating_point() else tensor

    args, kwargs = substitute((tuple(node.args), dict(node.kwargs)), operand)
    function = getattr(Tensor, str(node.target)) if node.op == "call_method" else node.target
    try:
        value = function(*args, **kwargs)  # type: ignore[operator]
    except (RuntimeError, TypeError):
        return None
    if isinstance(value, Tensor) and value.is_floating_point() and len(kinds) == 1:
        return value.to(kinds.pop()).contiguous().clone()
    return None
