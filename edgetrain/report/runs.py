"""What a run directory holds: its plan, a record per epoch, and what it took."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from edgetrain.errors import DataError
from edgetrain.planner import Plan
from edgetrain.report.facts import Epoch


@dataclass(frozen=True)
class Run:
    """A run of ``edgetrain train``.

    Attributes:
        step_seconds: measured, mean over the last epoch; loading and decoding included.
        peak_bytes: most that the run added to its process, on CUDA to the allocator; None: not recorded.
        model: as ``--model`` named it; None: not recorded, or not all of it is trained in every step.
        num_classes: width of the output; ``pooling`` as ``--pooling`` named it.
    """

    plan: Plan
    epochs: tuple[Epoch, ...]
    step_seconds: float | None
    peak_bytes: int | None
    model: str | None
    num_classes: int | None = None
    pooling: str | None = None


def read_run(folder: Path) -> Run:
    """The run in ``folder``.

    Raises:
        DataError: the folder holds no plan, or a record that cannot be read.
        ModelError: its plan is of another version.
    """
    if not (folder / "plan.json").is_file():
        raise DataError(
            found=f"{folder} without plan.json",
            expected="the folder of a run: plan.json and metrics.jsonl",
            action="name what edgetrain train --out wrote",
        )
    plan = Plan.read(folder / "plan.json")
    try:
        epochs = tuple(_epoch(line) for line in _lines(folder / "metrics.jsonl"))
        result = json.loads((folder / "result.json").read_text()) if (folder / "result.json").is_file() else {}
        is_whole = not any(result.get(key) for key in ("sample_modules", "freeze", "finetuning"))
        is_whole = is_whole and result.get("objective") != "attention-transfer"  # its plan has taps, the model none
        peak, model = result.get("peak_bytes"), result.get("model") if is_whole else None
        num_classes = result.get("embedding") or (len(result["classes"]) if "classes" in result else None)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            found=f"a record in {folder} that cannot be read ({error})",
            expected="metrics.jsonl and result.json as edgetrain train writes them",
            action="run it again, or take the damaged file away",
        ) from error
    seconds = plan.input_shape[0] / epochs[-1].images_per_s if epochs else None
    return Run(plan, epochs, seconds, peak, model, num_classes, result.get("pooling"))


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.is_file() else []


def _epoch(line: str) -> Epoch:
    record = json.loads(line)
    return Epoch(
        epoch=record["epoch"],
        loss=record["loss"],
        accuracy=record["accuracy"],
        test_accuracy=record["test_accuracy"],
        images_per_s=record["images_per_second"],
    )
