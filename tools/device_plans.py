"""The planner's own choices for some devices, with their schedules.

python tools/device_plans.py            # prints them
python tools/device_plans.py --write    # and writes tests/planner/device_plans/, which a test compares
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import edgetrain

FOLDER = Path(__file__).resolve().parent.parent / "tests" / "planner" / "device_plans"


@dataclass(frozen=True)
class Case:
    """A network on a device.

    Attributes:
        budget: None: what the profile says.
    """

    device: str
    model: str
    input_shape: tuple[int, int, int]
    batch_size: int
    budget: str | None = None
    allow_ghost_batchnorm: bool = False

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.device}-{self.model}"


CASES = (
    # 32 x 240 x 240 at 32 channels in fp32: one activation and one gradient alone are 450 MiB, so the batch is split
    Case("gtx750", "hybrid18", (3, 240, 240), 32, "400MiB", allow_ghost_batchnorm=True),
    Case("gtx750", "resnet18", (3, 32, 32), 128, "240MiB"),
    Case("orin-nano-4gb", "resnet18", (3, 224, 224), 16, "1280MiB"),
    Case("xavier-nx", "hybrid18", (3, 128, 128), 128, "2GiB"),
)


def text_of(case: Case) -> str:
    """Summary without seconds, modes and schedule; the same on every machine."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"allow_ghost_batchnorm": case.allow_ghost_batchnorm}
    plan = edgetrain.plan(
        edgetrain.create_model(case.model, num_classes=10),
        input_shape=case.input_shape,
        batch_size=case.batch_size,
        budget=case.budget,
        device=case.device,
        **options,
    )
    lines = [line for line in plan.summary().splitlines() if not line.startswith("step ")]
    shape = "x".join(map(str, case.input_shape))
    return "\n".join([f"{case.model}, {case.batch_size} x {shape} on {case.device}", *lines, plan.program.table(), ""])


def main() -> None:
    """Prints, and writes if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    for case in CASES:
        text = text_of(case)
        print(text)
        if arguments.write:
            FOLDER.mkdir(exist_ok=True)
            (FOLDER / f"{case.name}.txt").write_text(text)


if __name__ == "__main__":
    main()
