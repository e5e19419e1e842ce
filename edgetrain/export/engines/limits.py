"""How much memory builder and engine may take, from the profile of the device.

    workspace limit = budget - bytes of the graph's weights

The budget is the one given, else the profile's ``default_budget``, else what the profile leaves available. The
workspace limit bounds the scratch of every kernel that is tried. An engine holds its weights and its activations,
scratch among them, at once; :func:`check_fits` holds their sum against the budget once the builder has said it.

A kernel also needs shared memory of a multiprocessor. Its limit matters where the engine is built on one chip for
another: the smaller of the two holds. NVIDIA's DLA pools are left at nothing: engines here run on the GPU alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

from edgetrain.errors import BudgetError
from edgetrain.export.engines.builders import Capability
from edgetrain.units import KIB, format_mib

if TYPE_CHECKING:
    from edgetrain.profiles import Profile

# CUDA C++ programming guide, technical specifications per compute capability: maximum shared memory per thread block
_SHARED_KIB: dict[Capability, int] = {
    **dict.fromkeys([(5, 0), (5, 2), (5, 3), (6, 0), (6, 1), (6, 2)], 48),
    **dict.fromkeys([(7, 0), (7, 2)], 96),
    (7, 5): 64,
    **dict.fromkeys([(8, 0), (8, 7)], 163),
    **dict.fromkeys([(8, 6), (8, 9), (12, 0), (12, 1)], 99),
    **dict.fromkeys([(9, 0), (10, 0)], 227),
}


@dataclass(frozen=True)
class Limits:
    """In bytes; None: unknown, and the builder's own default holds.

    Attributes:
        budget_bytes: for all of the engine: weights and activations, scratch among them.
        workspace_bytes: for the scratch of a kernel.
        shared_bytes: of a multiprocessor, for a block of threads.
    """

    budget_bytes: int | None
    workspace_bytes: int | None
    shared_bytes: int | None

    def text(self) -> str:
        """For a message: the workspace limit."""
        return (
            "the builder's own limits"
            if self.workspace_bytes is None
            else (f"{format_mib(self.workspace_bytes)} of workspace")
        )


def limits_for(
    profile: Profile | None, capabilities: tuple[Capability, ...], *, weight_bytes: int, budget_bytes: int | None = None
) -> Limits:
    """What an engine may take.

    Args:
        profile: of the device that will run it; None: unknown.
        capabilities: of every chip that it is built for or stands in for.
        weight_bytes: of the graph.
        budget_bytes: takes the place of the profile's.

    Raises:
        BudgetError: the weights alone do not fit.
    """
    if budget_bytes is None and profile is not None:
        budget_bytes = own_budget_bytes(profile)
    shared = [_SHARED_KIB[capability] * KIB for capability in capabilities if capability in _SHARED_KIB]
    shared_bytes = min(shared) if len(shared) == len(capabilities) else None
    if budget_bytes is None:
        return Limits(None, None, shared_bytes)
    if weight_bytes >= budget_bytes:
        raise BudgetError(
            found=f"the graph's weights take {format_mib(weight_bytes)}",
            expected=f"less than the budget of {format_mib(budget_bytes)}",
            action="export with fp16 or int8, take a smaller network, or pass a larger budget",
        )
    return Limits(budget_bytes, budget_bytes - weight_bytes, shared_bytes)


def own_budget_bytes(profile: Profile) -> int | None:
    """The budget where none is given; None: the profile does not say."""
    return profile.default_budget_bytes or profile.available_bytes


def set_limits(trt: ModuleType, config: Any, limits: Limits) -> tuple[str, ...]:
    """Gives them to the builder's configuration; releases before 8.4 know the workspace alone.

    Returns:
        What a person should know: a builder that does not take a size says so in its log and goes on without.
    """
    pools = getattr(trt, "MemoryPoolType", None)
    if pools is None:
        if limits.workspace_bytes is not None:
            config.max_workspace_size = limits.workspace_bytes
        return ()
    wanted = {
        "WORKSPACE": limits.workspace_bytes,
        # what kernels may take while they are tried; this pool takes powers of two alone
        "TACTIC_DRAM": None if limits.budget_bytes is None else 1 << (limits.budget_bytes.bit_length() - 1),
        "TACTIC_SHARED_MEMORY": limits.shared_bytes,
    }
    notes = []
    for name, size_bytes in wanted.items():
        if size_bytes is None or not hasattr(pools, name):
            continue
        pool = getattr(pools, name)
        config.set_memory_pool_limit(pool, size_bytes)
        if config.get_memory_pool_limit(pool) != size_bytes:
            notes.append(f"the builder keeps its own limit of {name} and did not take {format_mib(size_bytes)}")
    return tuple(notes)


def check_fits(limits: Limits, memory_bytes: dict[str, int]) -> None:
    """Holds what the builder said of the engine's memory against the budget.

    Args:
        memory_bytes: by kind; in the device's memory together are ``weights`` and ``activation``, which includes
            ``scratch``.

    Raises:
        BudgetError: it needs more.
    """
    needed = memory_bytes.get("weights", 0) + max(memory_bytes.get(kind, 0) for kind in ("activation", "scratch"))
    if limits.budget_bytes is not None and needed > limits.budget_bytes:
        raise BudgetError(
            found=f"the engine needs {format_mib(needed)}",
            expected=f"at most the budget of {format_mib(limits.budget_bytes)}",
            action="build for a smaller batch, export with fp16 or int8, or pass a larger budget",
        )
