"""The comparisons of one export, each checked when it is made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgetrain.export.images import ImageSet
from edgetrain.export.precision import Precision
from edgetrain.export.verify import (
    BOUNDS,
    REFERENCE,
    REFERENCE_IMAGES,
    RUNTIME,
    Comparison,
    Logits,
    check,
    compare,
    open_session,
    run_reference,
    run_session,
)

if TYPE_CHECKING:
    from onnx import ModelProto

ROUNDINGS = 4
"""Each of two forms may be off by the rounding of float32, and one order of sums by twice that of another."""
TRAINED, FOLDED, GRAPH = "training module", "folded module", "ONNX"


class Proof:
    """The comparisons of one export, in their order.

    Args:
        shown: what every form of the network is run on.
        rounding: gives the difference between the training module in float32 and in float64, relative to the largest
            logit. A float32 form may be :data:`ROUNDINGS` times as far from another as that, if that is more than its
            bound: in a deep network the order of the sums decides more than the bound. Asked only where needed.
    """

    def __init__(self, shown: ImageSet, rounding: Callable[[], float]) -> None:
        self.comparisons: list[Comparison] = []
        self._rounding = rounding
        self._pixels = shown.pixels.numpy()
        self._labels = None if shown.labels is None else shown.labels.numpy()

    def step(
        self, expected: Logits, actual: Logits, *, before: str, after: str, evaluator: str, precision: Precision
    ) -> None:
        """Adds a comparison of logits (n, classes) and checks it; fewer ``actual`` are of the first images.

        Raises:
            ExportError: they differ by more than ``precision`` allows.
        """
        labels = None if self._labels is None else self._labels[: len(actual)]
        comparison = compare(
            expected[: len(actual)],
            actual,
            before=before,
            after=after,
            evaluator=evaluator,
            bound=BOUNDS[precision],
            labels=labels,
        )
        if precision == "fp32" and not comparison.holds:
            comparison = replace(comparison, bound=max(comparison.bound, ROUNDINGS * self._rounding()))
        self.comparisons.append(check(comparison))

    def graph(self, path: Path, graph: ModelProto, expected: Logits, *, before: str, precision: Precision) -> Logits:
        """Runs ``graph`` in both evaluators; gives ONNX Runtime's logits."""
        after = f"{precision} {GRAPH}"
        logits = run_session(open_session(path), self._pixels)
        self.step(expected, logits, before=before, after=after, evaluator=RUNTIME, precision=precision)
        few = run_reference(graph, self._pixels[:REFERENCE_IMAGES])
        self.step(expected, few, before=before, after=after, evaluator=REFERENCE, precision=precision)
        return logits
