"""A trained model as a plain inference module: every training-time parameterisation disappears.

The model is copied and put into evaluation mode, then

1. parametrised tensors are computed once              (:mod:`edgetrain.export.folds.parametrisations`)
2. layers of this package become plain operations      (:mod:`edgetrain.export.folds.plain_layers`)
3. ``forward`` becomes one graph of layers of torch    (:mod:`edgetrain.export.folds.inlining`)
4. operations on weights alone are computed once       (:mod:`edgetrain.export.folds.constants`),
   and functions that take the result become layers    (:mod:`edgetrain.export.folds.functional`)
5. affine maps go into the layer before them           (:mod:`edgetrain.export.folds.after`)
6. residuals of one convolution go into it             (:mod:`edgetrain.export.folds.residual`)
7. affine maps go into the layer after them            (:mod:`edgetrain.export.folds.before`)
8. halves that are joined and split again stay split   (:mod:`edgetrain.export.folds.halves`)

Each file states its algebra. New weights are computed in float64. A batch norm that stays is named with the reason.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from edgetrain.export.folds.affine import affine_of, is_batch_norm
from edgetrain.export.folds.after import describe_affine, fold_after, reason_after
from edgetrain.export.folds.before import fold_before, reason_before
from edgetrain.export.folds.constants import fold_constants
from edgetrain.export.folds.draft import Draft, describe, layer_class
from edgetrain.export.folds.functional import layers_of_functions
from edgetrain.export.folds.halves import fold_halves
from edgetrain.export.folds.inlining import Inliner
from edgetrain.export.folds.parametrisations import fold_parametrisations
from edgetrain.export.folds.plain_layers import plain_layer
from edgetrain.export.folds.report import Fold, FoldReport
from edgetrain.export.folds.residual import fold_residuals
from edgetrain.nn import Invertible

__all__ = ["Fold", "FoldReport", "Plain", "fold"]


class Plain(torch.fx.GraphModule):
    """A folded network: layers of torch under their old paths, and a ``forward`` of plain operations."""

    @property
    def report(self) -> FoldReport:
        """What was folded, and what was not and why."""
        return cast(FoldReport, self.meta["report"])

    @property
    def origins(self) -> dict[str, tuple[str, ...]]:
        """For each parameter and buffer, the names of those of the unfolded model that went into it."""
        return cast(dict[str, tuple[str, ...]], self.meta["origins"])


@torch.no_grad()
def fold(model: nn.Module) -> Plain:
    """What ``model`` computes in evaluation mode, as a plain module; ``model`` is left as it is.

    Results agree to 1e-6 in float32 and 1e-12 in float64, relative to the largest; ``docs/folding.md`` says what
    holds for deep networks in float32. A folded model is returned as it is.

    *Danger*: batch norm over (n, c) is folded into a linear layer of c outputs. If the layer is applied to
    (n, c, c) instead, where batch norm acts on the middle axis, the result is another one; this is not checked.

    Args:
        model: takes one tensor. What ``forward`` does must not depend on its values; modules where it does stay as
            they are, with what is foldable inside folded.
    """
    if isinstance(model, Plain):
        return model
    root = copied(model).eval().requires_grad_(False)
    origins: dict[str, tuple[str, ...]] = {name: (name,) for name in _tensor_names(root)}
    done = fold_parametrisations(root, origins)
    root, plain = _plain(root)
    done += plain
    inliner = Inliner(root)
    draft = Draft(inliner.root, inliner.graph, _below(inliner.root is not root, origins), [*done, *inliner.done])
    draft.drop_unused()  # the operands of assertions
    for step in (fold_constants, layers_of_functions, fold_after, fold_residuals, fold_after, fold_before, fold_halves):
        step(draft)
    draft.drop_unused()
    _name_what_stays(draft)
    _fold_inside(draft, inliner.skipped)
    return _finished(draft)


def copied(model: nn.Module) -> nn.Module:
    """A copy that shares nothing; tensors that older parametrisations left behind are copied without their graph."""
    attributes = [value for module in model.modules() for value in module.__dict__.values()]
    memo: dict[int, Any] = {
        id(value): value.detach().clone() for value in attributes if isinstance(value, Tensor) and not value.is_leaf
    }
    # what the last training pass left for its inverse is no part of the network
    records = [module.saved for module in model.modules() if isinstance(module, Invertible)]
    memo.update({id(record): None for record in records if record is not None})
    return copy.deepcopy(model, memo)


def _plain(root: nn.Module) -> tuple[nn.Module, list[Fold]]:
    """``root`` with plain layers in the place of this package's."""
    done = []
    made: dict[nn.Module, nn.Module | None] = {}
    for path, module in list(root.named_modules(remove_duplicate=False)):
        if path and not _holds(root, path, module):
            continue
        if module not in made:
            made[module] = plain_layer(module)
            known = layer_class(module)
            if known is not None and known is not type(module):
                done.append(Fold("plain layer", path, f"{type(module).__name__} as {known.__name__}"))
                module.__class__ = known
        layer = made[module]
        if layer is None:
            continue
        done.append(Fold("plain layer", path or type(module).__name__, f"{type(module).__name__} as plain operations"))
        layer.eval()
        if path:
            root.set_submodule(path, layer)
        else:
            root = layer
    return root, done


def _holds(root: nn.Module, path: str, module: nn.Module) -> bool:
    """Whether ``module`` is still there: a layer around it may have become plain together with it."""
    try:
        return root.get_submodule(path) is module
    except AttributeError:
        return False


def _below(wrapped: bool, origins: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    return {f"network.{name}": sources for name, sources in origins.items()} if wrapped else origins


def _name_what_stays(draft: Draft) -> None:
    """Notes each batch norm that is left, and each normalisation of the input, with the reasons."""
    for node in draft.graph.nodes:
        affine = affine_of(draft, node)
        if affine is None and is_batch_norm(draft, node):
            own = "it normalises with the statistics of its input"
            reason = own if node.op == "call_module" else f"{own}, or with factors that are computed from it"
            draft.skipped.append(Fold("batch norm", describe(node), reason))
        elif affine is not None and (affine.batch_norm or affine.x.op == "placeholder"):
            reasons = (reason_after(draft, affine), reason_before(draft, node, affine))
            kind = "batch norm" if affine.batch_norm else "input normalisation"
            reason = "; ".join(reason for reason in reasons if reason is not None)
            draft.skipped.append(Fold(kind, describe_affine(node, affine), reason))


def _fold_inside(draft: Draft, closed: list[Fold]) -> None:
    """Folds the sequences inside modules that stay whole, and names the batch norms that are left there.

    A sequence is taken to be run from its first layer to its last, which is what it is for.
    """
    for note in closed:
        draft.skipped.append(note)
    for node in draft.graph.nodes:
        if node.op != "call_module" or draft.module(node) is not None:
            continue
        path = str(node.target)
        whole = draft.root.get_submodule(path)
        for name, inner in list(whole.named_modules()):
            if not name or not isinstance(inner, nn.Sequential) or not _holds(whole, name, inner):
                continue
            folded, prefix = fold(inner), f"{path}.{name}."
            whole.set_submodule(name, nn.Sequential(folded))  # still a sequence, should forward loop over it
            for key, sources in folded.origins.items():
                draft.grow(f"{prefix}0.{key}", [prefix + source for source in sources])
            draft.done += [Fold(f.kind, prefix + f.where, f.reason) for f in folded.report.done]
            draft.skipped += [Fold(f.kind, prefix + f.where, f.reason) for f in folded.report.skipped]
        inside = [name for name, m in whole.named_modules() if isinstance(m, _BatchNorm) and not _in_plain(whole, name)]
        draft.skipped += [
            Fold("batch norm", f"{path}.{name}".rstrip("."), f"inside {path}, which stays whole") for name in inside
        ]


def _in_plain(whole: nn.Module, name: str) -> bool:
    """Whether a folded sequence, which has named its own, is around ``name``."""
    parts = name.split(".")
    return any(isinstance(whole.get_submodule(".".join(parts[:k])), Plain) for k in range(1, len(parts)))


def _tensor_names(module: nn.Module) -> list[str]:
    """Names of the parameters and buffers, all of those that are shared."""
    parameters = module.named_parameters(remove_duplicate=False)
    return [name for name, _ in (*parameters, *module.named_buffers(remove_duplicate=False))]


def _finished(draft: Draft) -> Plain:
    plain = Plain(draft.root, draft.graph, class_name="Plain")
    plain.eval()
    plain.meta["report"] = FoldReport(tuple(draft.done), tuple(draft.skipped))
    plain.meta["origins"] = {name: draft.origins.get(name, (name,)) for name in _tensor_names(plain)}
    return plain
