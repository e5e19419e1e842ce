"""The charts of a report as SVG: memory over the step, time against peak, loss and accuracy.

Drawn here and not by a charting library: a drawing that is part of the page is there without JavaScript and on paper,
follows the reader's light or dark colours by CSS, and takes kilobytes where the smallest library takes megabytes
(plotly 7.1: 4.8 MB). Every part carries its facts: a ``title`` for the pointer and for screen readers, and ``data-``
attributes that tests and the page's script read. Colours are those of Okabe and Ito (2008), which people with any
colour vision tell apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape

from edgetrain.report.facts import KINDS, Kind, Point, Report
from edgetrain.report.tables import format_ms, where
from edgetrain.units import MIB, format_mib

COLOURS: dict[Kind, str] = {
    "context": "#999999",
    "weights": "#0072b2",
    "optimizer": "#56b4e9",
    "batch": "#000000",
    "gradients": "#d55e00",
    "kept": "#009e73",
    "hidden": "#f0e442",
    "temporaries": "#cc79a7",
    "slack": "#e69f00",
}
"""Okabe and Ito's eight, and grey."""

WIDTH, HEIGHT = 760, 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 14, 40

STYLE = """
.chart { --ink: #1b1b1b; --rule: #d8d8d8; --paper: #ffffff; --batch: #000000; font: 12px system-ui, sans-serif; }
@media (prefers-color-scheme: dark) {
  .chart { --ink: #ececec; --rule: #44474c; --paper: #16181b; --batch: #f5f5f5; }
}
@media print { .chart { --ink: #000000; --rule: #cccccc; --paper: #ffffff; --batch: #000000; } }
.chart text { fill: var(--ink); }
@media (max-width: 600px) { .chart { font-size: 20px; } }
.chart .rule { stroke: var(--rule); stroke-width: 1; }
.chart .limit { stroke: var(--ink); stroke-width: 1.5; stroke-dasharray: 6 4; }
.chart .line { fill: none; stroke-width: 2; }
.chart .batch { fill: var(--batch); }
.chart .hit { fill: transparent; }
.chart .hit:hover, .chart .hit:focus, .chart .hit.on { fill: var(--ink); fill-opacity: 0.16; outline: none; }
.chart .mark { stroke: var(--paper); stroke-width: 1.5; }
.chart .mark:hover, .chart .mark:focus { stroke: var(--ink); outline: none; }
"""


def memory_picture(report: Report) -> str:
    """Memory over the step, stacked by kind, against the budget; "" where there is none.

    x is the number of the instruction, in the order in which they run; each is drawn at its peak. A budget that is more
    than four times what is needed is left to the text.
    """
    if not report.memory:
        return ""
    steps = report.memory
    limit, most = report.limit_bytes, max(instant.total_bytes for instant in steps)
    if limit is not None and limit - report.context_bytes > 4 * (most - report.context_bytes):
        limit = None  # a line far above would leave nothing to see
    # where the context is most of it, the axis begins inside of it
    floor = 0.95 * report.context_bytes if report.context_bytes > most / 4 else 0.0
    top = floor + (max(most, limit or 0) - floor) * 1.06
    frame = _Frame((0, len(steps)), (floor, top), "instruction", "MiB", y_scale=MIB)
    parts = frame.axes()
    below = [round(floor)] * len(steps)
    for kind in KINDS:
        sizes = [instant.nbytes(kind) for instant in steps]
        if any(sizes):
            shown = [size - round(floor) if kind == "context" else size for size in sizes]
            above = [b + size for b, size in zip(below, shown, strict=True)]
            colour = 'class="batch"' if kind == "batch" else f'fill="{COLOURS[kind]}"'
            parts.append(f'<path {colour} data-kind="{kind}" d="{_band(frame, below, above)}"/>')
            below = above
    if limit is not None:
        y = frame.y(limit)
        parts.append(f'<line class="limit" data-bytes="{limit}" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>')
        label = "budget" if not report.context_bytes else "budget and context"
        parts.append(
            f'<text x="{WIDTH - _RIGHT - 4}" y="{y - 5:.1f}" text-anchor="end">{label} {format_mib(limit)}</text>'
        )
    if floor:
        parts.append(f'<text x="{_LEFT + 4}" y="{HEIGHT - _BOTTOM - 5}">the axis begins at {format_mib(floor)}</text>')
    for k, instant in enumerate(steps):
        x, width = frame.x(k), frame.x(k + 1) - frame.x(k)
        kinds = ", ".join(
            f"{name} {format_mib(instant.nbytes(kind))}" for kind, name in KINDS.items() if instant.nbytes(kind)
        )
        text = f"{k}: {where(instant)}: {format_mib(instant.total_bytes)} ({kinds})"
        parts.append(
            f'<rect class="hit" data-bytes="{instant.total_bytes}" data-block="{escape(instant.block)}" '
            f'x="{x:.2f}" y="{_TOP}" width="{width:.2f}" height="{HEIGHT - _TOP - _BOTTOM}">'
            f"<title>{escape(text)}</title></rect>"
        )
    return _svg("memory", f"Memory over the step of {report.title}", parts)


def front_picture(report: Report) -> str:
    """Time against peak: the front as a line, the chosen and the uniform plans as marks; "" where there is none."""
    points = [*report.front, *report.marked]
    if not report.marked:
        return ""
    frame = _Frame(
        _spread([p.peak_bytes for p in points]),
        _spread([p.seconds for p in points]),
        "peak, MiB",
        "ms",
        x_scale=MIB,
        y_scale=1e-3,
    )
    parts = frame.axes()
    line = " ".join(f"{frame.x(p.peak_bytes):.1f},{frame.y(p.seconds):.1f}" for p in report.front)
    parts.append(f'<polyline class="line" stroke="{COLOURS["weights"]}" points="{line}"/>')
    parts += [_mark(frame, point, COLOURS["weights"], 3) for point in report.front]
    for point in reversed(report.marked):  # the chosen one on top
        chosen = point.name == "chosen"
        parts.append(_mark(frame, point, COLOURS["gradients" if chosen else "slack"], 8 if chosen else 5))
        right = frame.x(point.peak_bytes) > WIDTH * 0.7
        x = frame.x(point.peak_bytes) + (-10 if right else 10)
        anchor = "end" if right else "start"
        y = frame.y(point.seconds) + (16 if chosen else -6)
        parts.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(_name(point))}</text>')
    return _svg("front", "Time against peak", parts)


def run_picture(report: Report) -> str:
    """Loss, and accuracy in per cent of the chart's height, by epoch; "" where nothing was trained."""
    if not report.epochs:
        return ""
    epochs = report.epochs
    top = max(epoch.loss for epoch in epochs) * 1.05
    frame = _Frame((epochs[0].epoch, max(epochs[-1].epoch, epochs[0].epoch + 1)), (0, top), "epoch", "loss")
    parts = frame.axes()
    curves: list[tuple[str, str, list[tuple[int, float | None, str]]]] = [
        ("loss", COLOURS["gradients"], [(e.epoch, e.loss, f"{e.loss:.4f}") for e in epochs]),
        ("accuracy", COLOURS["weights"], [(e.epoch, top * e.accuracy, f"{e.accuracy:.2%}") for e in epochs]),
        (
            "test accuracy",
            COLOURS["kept"],
            [
                (e.epoch, None if e.test_accuracy is None else top * e.test_accuracy, f"{e.test_accuracy or 0:.2%}")
                for e in epochs
            ],
        ),
    ]
    for row, (name, colour, values) in enumerate(curves):
        known = [(x, y, text) for x, y, text in values if y is not None]
        if not known:
            continue
        line = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y, _ in known)
        parts.append(f'<polyline class="line" stroke="{colour}" points="{line}"/>')
        for x, y, text in known:
            parts.append(
                f'<circle class="mark" cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="4" fill="{colour}">'
                f"<title>epoch {x}: {name} {text}</title></circle>"
            )
        parts.append(f'<text x="{WIDTH - _RIGHT - 8}" y="{_TOP + 16 + 16 * row}" text-anchor="end">{name}</text>')
        parts.append(
            f'<rect x="{WIDTH - _RIGHT - 112}" y="{_TOP + 7 + 16 * row}" width="12" height="10" fill="{colour}"/>'
        )
    return _svg("run", "Loss and accuracy by epoch", parts)


def legend(report: Report) -> list[tuple[Kind, str, str]]:
    """The kinds that occur, each with its name and colour."""
    occurring = (kind for kind in KINDS if any(instant.nbytes(kind) for instant in report.memory))
    return [(kind, KINDS[kind], COLOURS[kind]) for kind in occurring]


def standalone(picture: str, colours: Sequence[tuple[Kind, str, str]] = ()) -> str:
    """A picture as a file of its own, with a legend of ``colours`` below it."""
    parts = []
    for k, (_, name, colour) in enumerate(colours):
        x, y = _LEFT + (k % 5) * 138, HEIGHT + 6 + 20 * (k // 5)
        parts.append(f'<rect x="{x}" y="{y}" width="12" height="12" fill="{colour}" stroke="#777777"/>')
        parts.append(f'<text x="{x + 17}" y="{y + 11}">{name}</text>')
    height = HEIGHT + (10 + 20 * math.ceil(len(colours) / 5) if colours else 0)
    picture = picture.replace(f'viewBox="0 0 {WIDTH} {HEIGHT}"', f'viewBox="0 0 {WIDTH} {height}"', 1)
    picture = picture.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    picture = picture.replace("</desc>", f"</desc><style>{STYLE}</style>", 1)
    return picture.removesuffix("</svg>") + "\n".join([*parts, "</svg>"])


class _Frame:
    """Axes: from values to points of the drawing."""

    def __init__(
        self,
        x_range: tuple[float, float],
        y_range: tuple[float, float],
        x_name: str,
        y_name: str,
        *,
        x_scale: float = 1,
        y_scale: float = 1,
    ) -> None:
        self._x, self._y, self._names, self._scales = x_range, y_range, (x_name, y_name), (x_scale, y_scale)

    def x(self, value: float) -> float:
        low, high = self._x
        return _LEFT + (value - low) / (high - low) * (WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        low, high = self._y
        return HEIGHT - _BOTTOM - (value - low) / (high - low) * (HEIGHT - _TOP - _BOTTOM)

    def axes(self) -> list[str]:
        """Rules with their figures, and the names of the axes."""
        parts = []
        for value in _ticks(self._y, self._scales[1]):
            y = self.y(value)
            parts.append(f'<line class="rule" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(
                f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value / self._scales[1]:.4g}</text>'
            )
        bottom = HEIGHT - _BOTTOM
        for value in _ticks(self._x, self._scales[0]):
            x, figure = self.x(value), f"{value / self._scales[0]:.4g}"
            parts.append(f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{figure}</text>')
        parts.append(f'<text x="{(WIDTH + _LEFT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{self._names[0]}</text>')
        turned = f"translate(14 {(_TOP + bottom) / 2}) rotate(-90)"
        parts.append(f'<text transform="{turned}" text-anchor="middle">{self._names[1]}</text>')
        return parts


def _band(frame: _Frame, below: Sequence[int], above: Sequence[int]) -> str:
    """The outline of a band of steps between two heights."""
    upper = [f"{frame.x(k + side):.2f},{frame.y(y):.2f}" for k, y in enumerate(above) for side in (0, 1)]
    lower = [f"{frame.x(k + side):.2f},{frame.y(y):.2f}" for k, y in enumerate(below) for side in (0, 1)]
    return "M" + " L".join([*upper, *reversed(lower)]) + "Z"


def _mark(frame: _Frame, point: Point, colour: str, radius: int) -> str:
    reason = f" ({point.reason})" if point.reason else ""
    text = f"{_name(point)}: {format_mib(point.peak_bytes)}, {format_ms(point.seconds)}{reason}"
    return (
        f'<circle class="mark" data-name="{escape(point.name)}" data-bytes="{point.peak_bytes}" '
        f'data-seconds="{point.seconds!r}" cx="{frame.x(point.peak_bytes):.1f}" cy="{frame.y(point.seconds):.1f}" '
        f'r="{radius}" fill="{colour}"><title>{escape(text)}</title></circle>'
    )


def _name(point: Point) -> str:
    return point.name.replace("_", " ") or "on the front"


def _spread(values: Sequence[float]) -> tuple[float, float]:
    """A range with some air around ``values``."""
    air = 0.08 * (max(values) - min(values)) or 0.1 * max(values)
    return max(0.0, min(values) - air), max(values) + air


def _ticks(span: tuple[float, float], scale: float) -> Iterable[float]:
    """Round values, about five, inside ``span``."""
    low, high = span[0] / scale, span[1] / scale
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    return [k * step * scale for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _svg(key: str, title: str, parts: Sequence[str]) -> str:
    return (
        f'<svg class="chart" data-chart="{key}" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" tabindex="0" '
        f'aria-label="{escape(title)}"><desc>{escape(title)}</desc>\n' + "\n".join(parts) + "\n</svg>"
    )
