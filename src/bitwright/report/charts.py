"""Inline SVG charts: no script, no network, colours from the page's style sheet so that they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 760
"""User units across every chart; the page scales them to its column."""


@dataclass(frozen=True)
class Bar:
    """One row of `bars`: a label, a value, the text beside it and the class that colours it."""

    label: str
    value: float
    text: str
    style: str = "series-1"
    hint: str = ""


@dataclass(frozen=True)
class Line:
    """One line of `lines`; points that are not finite leave a gap."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    style: str = "series-1"


@dataclass(frozen=True)
class Dot:
    """One row of `dots`: an estimate and the interval around it."""

    label: str
    value: float
    low: float
    high: float
    text: str
    style: str = "series-2"


@dataclass(frozen=True)
class Mark:
    """One point of a `Track`: where it is, the interval of its height, and what is said of it."""

    x: float
    y: float
    low: float
    high: float
    hint: str


@dataclass(frozen=True)
class Track:
    """The points of one name in `scatter`, in the order in which a line joins them."""

    name: str
    marks: Sequence[Mark]
    style: str = "series-2"


def number(value: float) -> str:
    """Write a number with four significant digits and no noise.

    >>> number(0.123456), number(12.0), number(1234567.0)
    ('0.1235', '12', '1.235e+06')
    """
    return f"{value:.4g}"


def bars(rows: Sequence[Bar], maximum: float, *, label_width: int = 210, title: str = "") -> str:
    """Draw horizontal bars, one row per entry, on a common scale from 0 to ``maximum``.

    >>> "<svg" in bars([Bar("conv1", 8, "8 bits")], 8)
    True
    """
    pitch, text_width = 20, 150
    room = WIDTH - label_width - text_width
    parts = []
    for i, row in enumerate(rows):
        y = i * pitch
        length = max(2.0, room * min(1.0, row.value / maximum if maximum > 0 else 0.0))
        hint = f"<title>{escape(row.hint)}</title>" if row.hint else ""
        parts.append(
            f"<g>{hint}{_text(label_width - 8, y + 14, _fit(row.label, label_width), 'label', 'end')}"
            f'<rect class="track" x="{label_width}" y="{y + 3}" width="{room}" height="14" rx="3"/>'
            f'<rect class="{row.style}" x="{label_width}" y="{y + 3}" width="{length:.1f}" height="14" rx="3"/>'
            f"{_text(label_width + room + 8, y + 14, row.text, 'value')}</g>"
        )
    return _svg(WIDTH, pitch * len(rows) + 4, parts, title)


def lines(
    series: Sequence[Line],
    *,
    x_label: str,
    y_label: str,
    width: int = WIDTH,
    height: int = 220,
    limit: float | None = None,
    title: str = "",
) -> str:
    """Draw one or more lines over a common axis; ``limit`` adds a dashed horizontal one.

    >>> "polyline" in lines([Line("loss", [0, 1], [2.0, 1.0])], x_label="epoch", y_label="loss")
    True
    """
    points = [(x, y) for line in series for x, y in zip(line.xs, line.ys, strict=True) if math.isfinite(y)]
    if not points:
        return ""
    xs, ys = [x for x, _ in points], [y for _, y in points] + ([] if limit is None else [limit])
    frame = _Frame(min(xs), max(xs), min(ys), max(ys), height, right=width - 12)
    parts = frame.axes(x_label, y_label)
    if limit is not None:
        y = frame.y(limit)
        parts.append(f'<line class="limit" x1="{frame.left}" x2="{frame.right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(frame.right, y - 4, f"budget {number(limit)}", "tick", "end"))
    for line in series:
        parts += [_polyline(frame, run, line) for run in _runs(line)]
    return _svg(width, height, parts, title) + (_legend(series) if len(series) > 1 else "")


def heat(rows: Mapping[str, Sequence[float]], xs: Sequence[float], *, x_label: str, title: str = "") -> str:
    """Draw expected widths as a map: a row per site, a column per step, colour from 1 bit (light) to 8 bits (dark).

    >>> heat({"conv1": [8.0, 2.0]}, [0, 1], x_label="step").count("<rect")
    2
    """
    left, pitch = 210, 14
    room = WIDTH - left - 60
    columns = _sample(len(xs), 120)
    step = room / max(1, len(columns))
    parts = []
    for i, (label, values) in enumerate(rows.items()):
        y = i * pitch
        parts.append(_text(left - 8, y + 11, _fit(label, left), "label small", "end"))
        for k, column in enumerate(columns):
            hint = f"<title>{escape(label)}, {escape(x_label)} {number(xs[column])}: {values[column]:.2f} bits</title>"
            cell = f'x="{left + k * step:.1f}" y="{y}" width="{step + 0.3:.1f}" height="{pitch - 1}"'
            parts.append(f'<rect class="{width_class(values[column])}" {cell}>{hint}</rect>')
        parts.append(_text(left + room + 6, y + 11, f"{values[-1]:.1f}", "tick"))
    foot = pitch * len(rows) + 14
    parts.append(_text(left, foot, f"{x_label} {number(xs[0])}", "tick"))
    parts.append(_text(left + room, foot, number(xs[-1]), "tick", "end"))
    return _svg(WIDTH, foot + 6, parts, title)


def scatter(
    tracks: Sequence[Track], *, x_label: str, y_label: str, x_text: Callable[[float], str] = number, height: int = 330, title: str = ""
) -> str:
    """Draw points with their intervals, each name at the right with a thread to its last point, and the front: more height for more x.

    >>> "front" in scatter([Track("a", [Mark(1, 2, 1.5, 2.5, "")])], x_label="cost", y_label="accuracy")
    True
    """
    marks = [mark for track in tracks for mark in track.marks]
    if not marks:
        return ""
    xs = [mark.x for mark in marks]
    pad = 0.06 * (max(xs) - min(xs)) or 0.06 * abs(xs[0]) or 1.0
    low, high = min(mark.low for mark in marks), max(mark.high for mark in marks)
    frame = _Frame(min(xs) - pad, max(xs) + pad, low, high, height, right=WIDTH - 140)
    parts = [*frame.axes(x_label, y_label, x_text), _front(frame, marks)]
    ends = [frame.y(track.marks[-1].y) for track in tracks]
    for track, label_y in zip(tracks, _spread(ends, frame.top + 6, frame.bottom), strict=True):
        parts.append(_track(frame, track, label_y))
    return _svg(WIDTH, height, parts, title)


def cloud(series: Sequence[Line], *, x_label: str, y_label: str, height: int = 330, title: str = "") -> str:
    """Draw pairs of positive numbers as points on logarithmic axes, with the line on which both are equal.

    >>> cloud([Line("policies", [0.1, 0.2], [0.1, 0.3])], x_label="foretold", y_label="measured").count("<circle")
    2
    """
    points = [(math.log10(x), math.log10(y)) for line in series for x, y in zip(line.xs, line.ys, strict=True) if x > 0 and y > 0]
    if not points:
        return ""
    xs, ys = [x for x, _ in points], [y for _, y in points]
    frame = _Frame(min(xs), max(xs), min(ys), max(ys), height)
    parts = frame.axes(x_label, y_label, _power, _power)
    low, high = max(frame.x0, frame.y0), min(frame.x1, frame.y1)
    if low < high:
        ends = f'x1="{frame.x(low):.1f}" y1="{frame.y(low):.1f}" x2="{frame.x(high):.1f}" y2="{frame.y(high):.1f}"'
        parts.append(f'<line class="limit" {ends}><title>as foretold</title></line>')
    for line in series:
        for x, y in zip(line.xs, line.ys, strict=True):
            if x > 0 and y > 0:
                place = f'cx="{frame.x(math.log10(x)):.1f}" cy="{frame.y(math.log10(y)):.1f}" r="4"'
                parts.append(f'<circle class="{line.style}" {place}><title>{number(x)}, {number(y)}</title></circle>')
    return _svg(WIDTH, height, parts, title) + _legend(series)


def _power(exponent: float) -> str:
    """Return a tick of a logarithmic axis."""
    return f"{10.0**exponent:.2g}"


def _track(frame: _Frame, track: Track, label_y: float) -> str:
    points = [(frame.x(mark.x), frame.y(mark.y)) for mark in track.marks]
    (x, y), edge = points[-1], frame.right + 14
    parts = [f'<polyline class="thread" points="{x:.1f},{y:.1f} {frame.right:.1f},{label_y:.1f} {edge - 4:.1f},{label_y:.1f}"/>']
    if len(points) > 1:
        joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline class="line {track.style}" points="{joined}"/>')
    for mark, (x, y) in zip(track.marks, points, strict=True):
        parts.append(
            f'<line class="whisker {track.style}" x1="{x:.1f}" x2="{x:.1f}" y1="{frame.y(mark.low):.1f}" y2="{frame.y(mark.high):.1f}"/>'
            f'<circle class="{track.style}" cx="{x:.1f}" cy="{y:.1f}" r="4"><title>{escape(mark.hint)}</title></circle>'
        )
    return f"<g>{''.join(parts)}{_text(edge, label_y + 4, _fit(track.name, 126), 'label')}</g>"


def _front(frame: _Frame, marks: Sequence[Mark]) -> str:
    """Return the steps of what nothing beats: no other point is at most as far right and higher."""
    best, points = -math.inf, ""
    for mark in sorted(marks, key=lambda mark: (mark.x, -mark.y)):
        if mark.y > best:
            x = frame.x(mark.x)
            points += f"{x:.1f},{frame.y(best):.1f} " if points else ""
            points += f"{x:.1f},{frame.y(mark.y):.1f} "
            best = mark.y
    return f'<polyline class="front" points="{points}{frame.right:.1f},{frame.y(best):.1f}"/>'


def _spread(wanted: Sequence[float], top: float, bottom: float, gap: float = 14.0) -> list[float]:
    """Return heights near the wanted ones, in the same order from top to bottom, at least ``gap`` apart.

    >>> _spread([50.0, 51.0, 10.0], 0.0, 100.0)
    [50.0, 64.0, 10.0]
    """
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed, least = list(wanted), top
    for i in order:
        placed[i] = least = max(wanted[i], least)
        least += gap
    most = bottom
    for i in reversed(order):
        placed[i] = most = min(placed[i], most)
        most -= gap
    return placed


def dots(rows: Sequence[Dot], *, unit: str, title: str = "", mark: float | None = None) -> str:
    """Draw estimates with their intervals on a common scale; ``mark`` adds an upright line to compare them with.

    >>> "<circle" in dots([Dot("sdq", 97.0, 96.0, 98.0, "97.0")], unit="%")
    True
    """
    if not rows:
        return ""
    left, pitch = 210, 22
    marks = [] if mark is None else [mark]
    low, high = min([row.low for row in rows] + marks), max([row.high for row in rows] + marks)
    frame = _Frame(low, high, 0, 1, pitch * len(rows) + 34, left=left, right=WIDTH - 90)
    ticks = [(frame.x(tick), f"{number(tick)} {unit}") for tick in _ticks(low, high)]
    parts = [_text(x, frame.height - 6, text, "tick", "middle") for x, text in ticks]
    parts += [f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{frame.height - 20}"/>' for x, _ in ticks]
    parts += [f'<line class="limit" x1="{frame.x(x):.1f}" x2="{frame.x(x):.1f}" y1="0" y2="{frame.height - 20}"/>' for x in marks]
    for i, row in enumerate(rows):
        y = i * pitch + 11
        parts.append(
            f"{_text(left - 12, y + 4, _fit(row.label, left), 'label', 'end')}"
            f'<line class="whisker {row.style}" x1="{frame.x(row.low):.1f}" x2="{frame.x(row.high):.1f}" y1="{y}" y2="{y}"/>'
            f'<circle class="{row.style}" cx="{frame.x(row.value):.1f}" cy="{y}" r="4.5"><title>{escape(row.text)}</title></circle>'
            f"{_text(WIDTH - 80, y + 4, row.text, 'value')}"
        )
    return _svg(WIDTH, frame.height, parts, title)


def width_class(bits: float) -> str:
    """Return the class that colours a width: ``w1`` to ``w8``, ``w9`` for 16 and 32.

    >>> width_class(2), width_class(2.4), width_class(32)
    ('w2', 'w2', 'w9')
    """
    return f"w{min(9, max(1, round(bits)))}"


class _Frame:
    """The scales of one chart: data to user units."""

    def __init__(self, x0: float, x1: float, y0: float, y1: float, height: int, left: int = 64, right: int = WIDTH - 12):
        pad = (y1 - y0) * 0.05 or abs(y1) * 0.05 or 1.0
        self.x0, self.x1 = x0, x1 if x1 > x0 else x0 + 1.0
        self.y0, self.y1 = y0 - pad, y1 + pad
        self.left, self.right, self.height = left, right, height
        self.top, self.bottom = 10, height - 34

    def x(self, value: float) -> float:
        return self.left + (value - self.x0) / (self.x1 - self.x0) * (self.right - self.left)

    def y(self, value: float) -> float:
        return self.bottom - (value - self.y0) / (self.y1 - self.y0) * (self.bottom - self.top)

    def axes(
        self, x_label: str, y_label: str, x_text: Callable[[float], str] = number, y_text: Callable[[float], str] = number
    ) -> list[str]:
        parts = []
        for tick in _ticks(self.y0, self.y1):
            y = self.y(tick)
            parts.append(f'<line class="grid" x1="{self.left}" x2="{self.right}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(_text(self.left - 6, y + 4, y_text(tick), "tick", "end"))
        parts += [_text(self.x(tick), self.bottom + 15, x_text(tick), "tick", "middle") for tick in _ticks(self.x0, self.x1)]
        parts.append(_text((self.left + self.right) / 2, self.height - 4, x_label, "axis", "middle"))
        middle = (self.top + self.bottom) / 2
        turned = _text(0, 0, y_label, "axis", "middle")
        return [*parts, f'<g transform="translate(12 {middle:.0f}) rotate(-90)">{turned}</g>']


def _text(x: float, y: float, text: str, style: str, anchor: str = "start") -> str:
    """Return a text element; the text is escaped here."""
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _ticks(low: float, high: float) -> list[float]:
    """Return three to six round values between ``low`` and ``high``."""
    if high <= low:
        return [low]
    raw = (high - low) / 4
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * m for m in (1, 2, 2.5, 5, 10) if unit * m >= raw)
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 12) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _runs(line: Line) -> list[list[tuple[float, float]]]:
    """Split a line where it has gaps."""
    runs: list[list[tuple[float, float]]] = [[]]
    keep = set(_sample(len(line.xs), 600))
    for i, (x, y) in enumerate(zip(line.xs, line.ys, strict=True)):
        if not math.isfinite(y):
            runs.append([])
        elif i in keep:
            runs[-1].append((x, y))
    return [run for run in runs if run]


def _polyline(frame: _Frame, run: Sequence[tuple[float, float]], line: Line) -> str:
    x, y = run[-1]
    if len(run) == 1:
        return f'<circle class="{line.style}" cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="3"><title>{number(y)}</title></circle>'
    points = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in run)
    hint = f"<title>{escape(line.name)}: {number(y)}</title>"
    end = f'<circle class="{line.style}" cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="3">{hint}</circle>'
    return f'<polyline class="line {line.style}" points="{points}"/>{end}'


def _sample(count: int, most: int) -> list[int]:
    """Return at most ``most`` indices spread over ``count``, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})


def _legend(series: Sequence[Line]) -> str:
    keys = "".join(f'<span><i class="swatch {line.style}"></i>{escape(line.name)}</span>' for line in series)
    return f'<p class="legend">{keys}</p>'


def _fit(label: str, width: int) -> str:
    """Shorten a label from the left, where module paths repeat themselves."""
    most = width // 7
    return label if len(label) <= most else "…" + label[-(most - 1) :]


def _svg(width: int, height: float, parts: Sequence[str], title: str) -> str:
    named = f"<title>{escape(title)}</title>" if title else ""
    return f'<svg viewBox="0 0 {width} {height:.0f}" role="img" preserveAspectRatio="xMidYMin meet">{named}{"".join(parts)}</svg>'
