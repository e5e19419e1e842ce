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
    exact: dict[str, Tensor] = {}
    for node in list(draft.graph.nodes):
        sources = node.all_input_nodes
        tensors = {source: draft.tensor(source) for source in sources}
        name = name_of(node)
        if not sources or not name or name.rstrip("_") in RANDOM or any(t is None for t in tensors.values()):
            continue
        kinds = {t.dtype for t in tensors.values() if t is not None and t.is_floating_point()}
        value = _value(node, {s: exact.get(str(s.target), t) for s, t in tensors.items() if t is not None})
        if value is None or len(kinds) != 1:
            continue
        buffer = draft.free_name(f"constant_{count}")
        count += 1
        exact[buffer] = value
        draft.root.register_buffer(buffer, value.to(kinds.pop()))
        draft.grow(buffer, [str(source.target) for source in sources])
        with draft.graph.inserting_before(node):
            constant = draft.graph.get_attr(buffer)
        draft.done.append(Fold("constant", str(sources[0].target), f"{name} computed once, {buffer}"))
        draft.replace(node, constant)


def _value(node: torch.fx.Node, tensors: dict[torch.fx.Node, Tensor]) -> Tensor | None:
    """What ``node`` gives in float64; None where it does not take that, or gives no tensor of floats."""

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
    return value.contiguous().clone() if isinstance(value, Tensor) and value.is_floating_point() else None
