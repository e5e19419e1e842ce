"""What a report says, as values: every output (terminal, Markdown, JSON, HTML, pictures) is made from these.

Bytes are ints, times are seconds, None is "not known". ``Report.model_validate_json(report.model_dump_json())`` gives
the same report back.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

Kind = Literal["context", "weights", "optimizer", "batch", "gradients", "kept", "hidden", "temporaries", "slack"]

KINDS: dict[Kind, str] = {
    "context": "context",
    "weights": "weights",
    "optimizer": "optimiser",
    "batch": "batch",
    "gradients": "gradients",
    "kept": "kept activations",
    "hidden": "hidden activations",
    "temporaries": "temporaries",
    "slack": "allocator slack",
}
"""What memory serves as, in the order in which it is stacked, with its name for people."""


class Facts(BaseModel):
    """A frozen value without unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Instant(Facts):
    """The peak of one instruction; the fields of :data:`KINDS` add up to ``total_bytes``.

    Attributes:
        instruction: in words: ``forward 3 keep=input``.
        block: its name, "" where the instruction is of none.
    """

    instruction: str
    block: str
    context: int
    weights: int
    optimizer: int
    batch: int
    gradients: int
    kept: int
    hidden: int
    temporaries: int
    slack: int

    @property
    def total_bytes(self) -> int:
        """All kinds."""
        return sum(self.nbytes(kind) for kind in KINDS)

    def nbytes(self, kind: Kind) -> int:
        """Of one kind."""
        found: int = getattr(self, kind)
        return found


class BlockRow(Facts):
    """One block.

    Attributes:
        left_bytes: what its forward pass adds to what is there, until its backward pass.
        seconds: of all its instructions in a step.
        snr: smallest ratio of signal to noise that it meets; None: exact, or not asked for.
    """

    name: str
    mode: str
    left_bytes: int | None
    seconds: float | None
    snr: float | None
    reason: str


class Point(Facts):
    """A plan for all blocks, in the plane of peak and time.

    Attributes:
        name: ``chosen``, ``uniform recompute``, ...; "" for one that is only on the front.
    """

    name: str
    peak_bytes: int
    seconds: float
    reason: str = ""


class Fit(Facts):
    """One mode for all blocks on one device.

    Attributes:
        needed_bytes: all that the step needs of the device's memory.
        fits: None where nobody knows how much the device has.
        largest_batch: the largest power of two up to 4096 that fits, 0 where two samples do not; None likewise.
        images_per_s: at the report's batch size; None where the profile has no rates.
    """

    mode: str
    needed_bytes: int
    fits: bool | None
    largest_batch: int | None
    images_per_s: float | None


class DeviceRow(Facts):
    """The model on one device profile.

    Attributes:
        available_bytes: for a training step; None: unknown.
        at_most: whether an overhead of the device is unknown, which would come off.
        trains: with PyTorch, with the exported step, or not at all.
    """

    device: str
    available_bytes: int | None
    at_most: bool
    trains: str
    fits: tuple[Fit, ...]


class Level(Facts):
    """A prediction beside what checks it.

    Attributes:
        unit: ``B`` or ``s``.
    """

    name: str
    predicted: float
    against: str
    found: float
    unit: Literal["B", "s"]

    @property
    def error(self) -> float:
        """Part of ``found`` by which the prediction is too high."""
        return self.predicted / self.found - 1


class Epoch(Facts):
    """One epoch of a run; accuracies are 0..1."""

    epoch: int
    loss: float
    accuracy: float
    test_accuracy: float | None
    images_per_s: float


class Missing(Facts):
    """A section that cannot be shown, and why."""

    section: str
    reason: str


class Report(Facts):
    """All sections; an empty one is named in ``missing``.

    Attributes:
        title: model, plan file or run directory.
        input_shape: of a batch, (n, c, h, w).
        peak_bytes: of torch's allocator; ``reserved_bytes`` what the device's allocator takes for it.
        budget_bytes: what peak, or reserved bytes, must not exceed.
        times: where seconds come from.
        memory: one entry per instruction.
        front: leanest first; ``marked`` the chosen plan and the uniform ones.
    """

    title: str
    device: str | None
    input_shape: tuple[int, ...]
    micro_batches: int
    optimizer: str | None
    peak_bytes: int | None
    reserved_bytes: int | None
    budget_bytes: int | None
    context_bytes: int
    step_seconds: float | None
    times: str | None
    memory: tuple[Instant, ...] = ()
    blocks: tuple[BlockRow, ...] = ()
    front: tuple[Point, ...] = ()
    marked: tuple[Point, ...] = ()
    devices: tuple[DeviceRow, ...] = ()
    levels: tuple[Level, ...] = ()
    epochs: tuple[Epoch, ...] = ()
    missing: tuple[Missing, ...] = ()

    @property
    def peak_instant(self) -> Instant | None:
        """The first instruction at the peak."""
        return max(self.memory, key=lambda instant: instant.total_bytes, default=None)

    @property
    def limit_bytes(self) -> int | None:
        """The budget as a line over :attr:`memory`: the context is outside of it."""
        return None if self.budget_bytes is None else self.budget_bytes + self.context_bytes
