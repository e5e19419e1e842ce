"""A network while it is being folded: a copy of its modules, and its operations as a graph.

The folds change the copy's weights and the graph; what they ask again and again is answered here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch.fx
from torch import Tensor, nn

from edgetrain.export.folds.plain_layers import BatchUnshuffle
from edgetrain.export.folds.report import Fold

Weighted = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d | nn.Linear
"""The layers that folds go into."""

_HARMLESS = {"reset_parameters", "extra_repr", "_version"}
"""Of a layer: may differ without a difference in what it computes."""


@dataclass
class Draft:
    """A network being folded.

    Attributes:
        root: holds the modules that the graph calls; a copy, whose weights the folds change.
        graph: what the network does, in the order of execution; no operation of it works in place.
        origins: for each parameter or buffer of ``root``, the original ones that went into it.
        done: the folds so far.
        skipped: what stays, with its reason.
    """

    root: nn.Module
    graph: torch.fx.Graph
    origins: dict[str, tuple[str, ...]]
    done: list[Fold] = field(default_factory=list)
    skipped: list[Fold] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.count_calls()

    def count_calls(self) -> None:
        """Counts how often each module is called."""
        called = [node for node in self.graph.nodes if node.op == "call_module"]
        # a module may have several paths
        self._calls = Counter(id(self.root.get_submodule(str(node.target))) for node in called)

    def module(self, node: torch.fx.Node) -> nn.Module | None:
        """The layer that ``node`` calls; None where it is another operation."""
        module = self.root.get_submodule(str(node.target)) if node.op == "call_module" else None
        return module if module is not None and is_layer(module) and not has_hooks(module) else None

    def weighted(self, node: torch.fx.Node) -> Weighted | None:
        """The convolution or linear layer that ``node`` calls."""
        module = self.module(node)
        return module if isinstance(module, Weighted) else None

    def lacks_weights(self, node: torch.fx.Node) -> str:
        """Why nothing can go into ``node``, which is no layer with weights."""
        whole = node.op == "call_module" and self.module(node) is None
        return f"{describe(node)}, which {'stays whole' if whole else 'has no weights'}"

    def times_called(self, node: torch.fx.Node) -> int:
        """How often the module of ``node`` is called in the network."""
        return self._calls[id(self.root.get_submodule(str(node.target)))]

    def replace(self, node: torch.fx.Node, value: torch.fx.Node) -> None:
        """Everything that used ``node`` uses ``value``, and ``node`` goes."""
        node.replace_all_uses_with(value)
        self.graph.erase_node(node)

    def drop_unused(self) -> None:
        """Takes away what nobody reads; nothing in evaluation mode has an effect besides its result."""
        for node in reversed(list(self.graph.nodes)):
            if not node.users and node.op not in ("placeholder", "output"):
                self.graph.erase_node(node)

    def grow(self, name: str, sources: Iterable[str]) -> None:
        """Notes that the parameters or buffers ``sources`` have gone into the parameter ``name``."""
        added = [origin for source in sources for origin in self.origins.get(source, (source,))]
        self.origins[name] = tuple(dict.fromkeys([*self.origins.get(name, ()), *added]))

    def free_name(self, name: str) -> str:
        """``name``, or one like it that ``root`` does not have yet."""
        while hasattr(self.root, name):
            name += "_"
        return name

    def tensor(self, node: object) -> Tensor | None:
        """The parameter, buffer or attribute that ``node`` reads."""
        if not isinstance(node, torch.fx.Node) or node.op != "get_attr":
            return None
        path, _, name = str(node.target).rpartition(".")
        value = getattr(self.root.get_submodule(path), name, None)
        return value if isinstance(value, Tensor) else None


def layer_class(module: nn.Module) -> type[nn.Module] | None:
    """torch's class of which ``module`` is one, be it as a subclass that changes nothing but its construction."""
    lineage = type(module).__mro__
    known = next(kind for kind in lineage if kind.__module__.startswith("torch.nn.modules."))
    if known in (nn.Module, nn.Sequential):
        return None
    changed = {name for kind in lineage[: lineage.index(known)] for name in vars(kind) if hasattr(known, name)}
    return None if {name for name in changed if not name.startswith("__")} - _HARMLESS else known


def is_layer(module: nn.Module) -> bool:
    """Whether ``module`` stays a call: torch's own layers, and batch pooling."""
    return layer_class(module) is not None or type(module) is BatchUnshuffle


def has_hooks(module: nn.Module) -> bool:
    """Whether more happens on a call than ``forward``."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def describe(node: torch.fx.Node) -> str:
    """What a person calls the operation: the path of its module or the name of its function."""
    if node.op == "placeholder":
        return "the input"
    if node.op in ("call_module", "call_method", "get_attr"):
        return str(node.target)
    return str(getattr(node.target, "__name__", node.target))


def name_of(node: torch.fx.Node) -> str:
    """The function's or method's name; of a module, the class is asked instead."""
    return describe(node) if node.op in ("call_function", "call_method") else ""
