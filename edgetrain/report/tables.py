"""The sections of a report as tables of text: what terminal, Markdown and page show alike."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from edgetrain.report.facts import KINDS, DeviceRow, Instant, Level, Point, Report
from edgetrain.units import GIB, MIB, format_mib


@dataclass(frozen=True)
class Table:
    """One section.

    Attributes:
        key: short name: ``memory``, ``blocks``, ...
        note: a sentence below the title.
        columns: a name that ends in ``>`` belongs to a column of numbers.
        missing: why there are no rows; "" where there are some.
    """

    key: str
    title: str
    note: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    missing: str = ""

    @property
    def headers(self) -> tuple[tuple[str, bool], ...]:
        """Name of each column, and whether it holds numbers."""
        return tuple((name.rstrip(">"), name.endswith(">")) for name in self.columns)


def tables_of(report: Report) -> tuple[Table, ...]:
    """All sections, those that cannot be shown with their reason."""
    why = {missing.section: missing.reason for missing in report.missing}
    why["steps"] = why.get("memory", "")
    return tuple(
        Table(key, title, note, columns, tuple(rows), "" if rows else why.get(key, "nothing to show"))
        for key, title, note, columns, rows in _sections(report)
    )


def summary_lines(report: Report) -> tuple[str, ...]:
    """What fits, in a few lines."""
    shape = "x".join(str(size) for size in report.input_shape)
    parts = f", {report.micro_batches} micro-batches" if report.micro_batches > 1 else ""
    lines = [f"batch {shape}{parts}, {report.optimizer}, {report.device or 'no device named'}"]
    if report.peak_bytes is not None:
        reserved = "" if report.reserved_bytes is None else f", reserved {format_mib(report.reserved_bytes)}"
        needed = report.peak_bytes if report.reserved_bytes is None else report.reserved_bytes
        verdict = ""
        if report.budget_bytes is not None:
            left = report.budget_bytes - needed
            verdict = f" of {format_mib(report.budget_bytes)}: " + (
                f"fits, {format_mib(left)} left" if left >= 0 else f"does not fit, {format_mib(-left)} missing"
            )
        lines.append(f"peak {format_mib(report.peak_bytes)}{reserved}{verdict}")
    if report.step_seconds is not None:
        rate = report.input_shape[0] / report.step_seconds
        lines.append(f"step {format_ms(report.step_seconds)}, {rate:.1f} images/s ({report.times})")
    peak = report.peak_instant
    if peak is not None:
        lines.append(f"the peak is in: {where(peak)}")
    return tuple(lines)


def where(instant: Instant) -> str:
    """An instruction with the name of its block."""
    return f"{instant.instruction} ({instant.block})" if instant.block else instant.instruction


def mib(nbytes: float | None) -> str:
    """MiB without the unit; "-" where unknown."""
    return "-" if nbytes is None else f"{nbytes / MIB:.1f}"


def format_ms(seconds: float | None) -> str:
    """Milliseconds; "-" where unknown."""
    return "-" if seconds is None else f"{1e3 * seconds:.1f} ms"


_Section = tuple[str, str, str, tuple[str, ...], list[tuple[str, ...]]]


def _sections(report: Report) -> Iterator[_Section]:
    yield (
        "memory",
        "Memory over the step",
        "what lives when most is allocated; the allocator's slack is drawn as it is then",
        ("kind", "MiB>", "share>"),
        _peak_rows(report.peak_instant),
    )
    yield (
        "steps",
        "Every instruction",
        "MiB at the peak of each instruction; resident: context, weights, optimiser, batch, allocator slack",
        ("instruction", "block", "resident>", "gradients>", "kept>", "hidden>", "temporary>", "total>"),
        [_instant_row(instant) for instant in report.memory],
    )
    yield (
        "blocks",
        "Blocks",
        "left: what the forward pass of a block adds until its backward pass; time: of all its instructions",
        ("block", "mode", "left MiB>", "ms>", "SNR>", "reason"),
        [
            (
                row.name,
                row.mode.replace("_", " "),
                mib(row.left_bytes),
                "-" if row.seconds is None else f"{1e3 * row.seconds:.2f}",
                "-" if row.snr is None else f"{row.snr:.1e}",
                row.reason,
            )
            for row in report.blocks
        ],
    )
    yield (
        "front",
        "Time against peak",
        "plans that nothing beats in both, the chosen one and the uniform ones",
        ("plan", "peak MiB>", "step ms>", "against the chosen"),
        [_point_row(point) for point in [*report.marked, *report.front]] if report.marked else [],
    )
    yield (
        "run",
        "The run",
        "loss and accuracy by epoch",
        ("epoch>", "loss>", "accuracy>", "test accuracy>", "images/s>"),
        [
            (
                str(epoch.epoch),
                f"{epoch.loss:.4f}",
                f"{epoch.accuracy:.2%}",
                "-" if epoch.test_accuracy is None else f"{epoch.test_accuracy:.2%}",
                f"{epoch.images_per_s:.0f}",
            )
            for epoch in report.epochs
        ],
    )
    yield (
        "devices",
        "The same model on every device",
        "a row for keeping everything and one for the leanest uniform mode, at this batch; largest batch: a power of "
        "two up to 4096; images/s: by the rates of the profile; <=: an overhead of the device is unknown; *: PyTorch "
        "does not train there",
        ("device", "there is GiB>", "mode", "needs MiB>", "fits", "largest batch>", "images/s>"),
        [line for row in report.devices for line in _device_rows(row)],
    )
    yield (
        "levels",
        "Error of each prediction level",
        "each level against the next; positive: the prediction is high",
        ("prediction", "predicted>", "against", "found>", "error>"),
        [_level_row(level) for level in report.levels],
    )


def _peak_rows(peak: Instant | None) -> list[tuple[str, ...]]:
    if peak is None:
        return []
    rows = [
        (name, mib(peak.nbytes(kind)), f"{peak.nbytes(kind) / peak.total_bytes:.1%}")
        for kind, name in KINDS.items()
        if peak.nbytes(kind)
    ]
    return [*rows, ("total", mib(peak.total_bytes), "100.0%")]


def _instant_row(instant: Instant) -> tuple[str, ...]:
    resident = instant.context + instant.weights + instant.optimizer + instant.batch + instant.slack
    numbers = (resident, instant.gradients, instant.kept, instant.hidden, instant.temporaries, instant.total_bytes)
    return (instant.instruction, instant.block, *map(mib, numbers))


def _point_row(point: Point) -> tuple[str, ...]:
    name = point.name.replace("_", " ") or "on the front"
    return name, mib(point.peak_bytes), f"{1e3 * point.seconds:.1f}", point.reason


def _device_rows(row: DeviceRow) -> list[tuple[str, ...]]:
    words = {True: "yes", False: "no", None: "?"}
    name = row.device if row.trains == "pytorch" else f"{row.device}*"
    there = "-" if row.available_bytes is None else f"{'<= ' if row.at_most else ''}{row.available_bytes / GIB:.2f}"
    return [
        (
            name if first else "",
            there if first else "",
            fit.mode.replace("_", " "),
            f"{fit.needed_bytes / MIB:.0f}",
            words[fit.fits],
            "-" if fit.largest_batch is None else str(fit.largest_batch),
            "-" if fit.images_per_s is None else f"{fit.images_per_s:.1f}",
        )
        for first, fit in ((fit is row.fits[0], fit) for fit in row.fits)
    ]


def _level_row(level: Level) -> tuple[str, ...]:
    def text(value: float) -> str:
        return format_mib(value) if level.unit == "B" else format_ms(value)

    return level.name, text(level.predicted), level.against, text(level.found), f"{level.error:+.1%}"
