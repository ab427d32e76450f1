"""The pictures of the pages: SVG that stands in the page, is described in words, and tells its values to a mouse."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from hqqplus.evaluation.markup import Html, element
from hqqplus.evaluation.report import _apart, number

WIDTH, HEIGHT = 440, 280
_LEFT, _TOP, _BOTTOM = 52, 14, 44
# Width of a character of the labels, about, and the height of their line.
_CHARACTER, _LINE = 7.2, 17
# Characters that fit: beside the figures of a bar, and behind a line.
_LONGEST_NAME, _LONGEST_LABEL = 36, 22
# Beyond that nothing was measured, and sums of it would overflow.
_MOST = 1e100
# So many points of a line can be told apart at this width.
_MOST_POINTS = 400
_MARKS = ("circle", "square", "diamond", "triangle")

Point = tuple[float, float | None]


@dataclass(frozen=True)
class Series:
    """Values over places: `points` are (x, y), y None or not finite where there is no such number.

    Attributes:
        name: of the series, for people.
        color: class of the style sheet.
        label: what stands behind its last point.
        line: connects the points; `thin` is for what is noisy, `link` for what only belongs together.
        marks: "all", "last" or "none" of the points have a mark.
        hollow: marks are rings.
        shape: number of the kind of mark.
        notes: what a mark says to a mouse, one for each point; else it is made of name and value.
    """

    name: str
    points: Sequence[Point]
    color: str
    label: str | None = None
    line: str | None = "curve"
    marks: str = "all"
    hollow: bool = False
    shape: int = 0
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Reference:
    """A value without a place, as a dashed line with `label` behind it. One that is not finite has a label alone."""

    label: str
    value: float | None
    color: str


@dataclass(frozen=True)
class Chart:
    """Series over a common axis.

    Attributes:
        key: unique on the page.
        title, description: what is seen, in words, for who does not see it.
        log: logarithmic values.
        zero: values begin at zero.
        whole: places are whole numbers.
        pad: part of the width that is left free on both sides.
    """

    key: str
    title: str
    description: str
    series: Sequence[Series]
    references: Sequence[Reference] = field(default_factory=tuple)
    x_label: str = "training step"
    log: bool = False
    zero: bool = False
    whole: bool = True
    pad: float = 0.0

    def svg(self) -> Html | None:
        """The picture; None where no value can be drawn."""
        shown = [(x, y) for series in self.series for x, y in _drawable(series.points, self.log)]
        values = [y for _, y in shown]
        values += [line.value for line in self.references if line.value is not None and _shows(line.value, self.log)]
        if not shown:
            return None
        frame = _Frame(self, [x for x, _ in shown], values)
        return element(
            "svg",
            element("title", self.title, id=f"{self.key}-title"),
            element("desc", self.description, id=f"{self.key}-description"),
            list(frame.axes()),
            list(frame.references()),
            [list(frame.series(series)) for series in self.series],
            list(frame.labels()),
            **{"viewBox": f"0 0 {WIDTH} {HEIGHT}"},
            role="img",
            aria_labelledby=f"{self.key}-title {self.key}-description",
        )


def bars(key: str, title: str, rows: Sequence[tuple[str, float, str, str | None]]) -> Html:
    """Lengths below one another: (name, length, what it says, colour or None). Lengths are finite and not negative."""
    room, step = 46, 46
    longest = max((length for _, length, _, _ in rows), default=0.0) or 1.0
    parts = []
    for index, (name, length, said, color) in enumerate(rows):
        y = index * step
        parts += [
            element("text", _cut(name, _LONGEST_NAME), x=0, y=y + 13, class_="strong"),
            element("text", said, x=WIDTH, y=y + 13, text_anchor="end"),
            element("rect", x=0, y=y + 20, width=WIDTH, height=9, rx=4.5, class_="track"),
        ]
        if length > 0:
            wide = max(_round(WIDTH * length / longest), 9.0)
            # Not the class of the track: colours are for what is measured.
            parts.append(element("rect", x=0, y=y + 20, width=wide, height=9, rx=4.5, class_=_classes("bar", color)))
    said_all = "; ".join(f"{name}: {said}" for name, _, said, _ in rows)
    return element(
        "svg",
        element("title", title, id=f"{key}-title"),
        element("desc", said_all, id=f"{key}-description"),
        parts,
        **{"viewBox": f"0 0 {WIDTH} {max(room, step * len(rows) - 14)}"},
        role="img",
        aria_labelledby=f"{key}-title {key}-description",
    )


# --- inside a chart --------------------------------------------------------------------------------------------------


class _Frame:
    """Where values of a chart are in the picture."""

    def __init__(self, chart: Chart, xs: Sequence[float], ys: Sequence[float]) -> None:
        self.chart = chart
        self._labels = list(self._wanted_labels())
        longest = max((len(text) for text, _, _ in self._labels), default=0)
        self.right = WIDTH - (12 + _CHARACTER * longest if longest else 14)
        self.bottom = HEIGHT - _BOTTOM
        self.x_low, self.x_high = _range(xs, False, chart.pad)
        self.y_low, self.y_high = _range([self._scaled(y) for y in ys], chart.zero and not chart.log)

    def _wanted_labels(self) -> Iterator[tuple[str, float | None, str]]:
        """(text, value that it belongs to, colour)."""
        for line in self.chart.references:
            yield _cut(line.label, _LONGEST_LABEL), line.value, line.color
        for series in self.chart.series:
            if series.label is not None and series.points:
                drawn = _drawable(series.points, self.chart.log)
                yield _cut(series.label, _LONGEST_LABEL), drawn[-1][1] if drawn else None, series.color

    def _scaled(self, y: float) -> float:
        return math.log10(y) if self.chart.log else y

    def x(self, value: float) -> float:
        share = (value - self.x_low) / (self.x_high - self.x_low)
        return _round(_LEFT + share * (self.right - _LEFT))

    def y(self, value: float) -> float:
        share = (self._scaled(value) - self.y_low) / (self.y_high - self.y_low)
        return _round(self.bottom - share * (self.bottom - _TOP))

    def axes(self) -> Iterator[Html]:
        for tick in _log_ticks(self.y_low, self.y_high) if self.chart.log else _ticks(self.y_low, self.y_high, 5):
            y = self.y(tick)
            yield element("path", d=f"M{_LEFT} {y}H{self.right}", class_="grid")
            yield element("text", _tick(tick), x=_LEFT - 8, y=y + 4.5, text_anchor="end")
        for tick in _ticks(self.x_low, self.x_high, max(2, int((self.right - _LEFT) / 60)), self.chart.whole):
            yield element("text", _tick(tick), x=self.x(tick), y=self.bottom + 19, text_anchor="middle")
        yield element("text", self.chart.x_label, x=_LEFT, y=HEIGHT - 5)

    def references(self) -> Iterator[Html]:
        for line in self.chart.references:
            if line.value is not None and _shows(line.value, self.chart.log):
                path = f"M{_LEFT} {self.y(line.value)}H{self.right}"
                yield element("path", element("title", line.label), d=path, class_=f"reference {line.color}")

    def series(self, series: Series) -> Iterator[Html]:
        log = self.chart.log
        if series.line is not None:
            for part in _unbroken(series.points, log):
                steps = [f"{self.x(x)} {self.y(y)}" for x, y in _thinned(part)]
                if len(steps) > 1:
                    yield element("path", d="M" + "L".join(steps), class_=_classes(series.line, series.color))
        notes = series.notes or [_note(series.name, point) for point in series.points]
        last = max((i for i, (_, y) in enumerate(series.points) if _shows(y, log)), default=-1)
        for index, (x, y) in enumerate(series.points):
            title = element("title", notes[index])
            if not math.isfinite(x) or abs(x) >= _MOST:
                continue
            if y is None or not _shows(y, log):
                yield self._lost(x, title, series.color)
            elif series.marks == "all" or (series.marks != "none" and index == last):
                kind = "hollow" if series.hollow else "mark"
                yield _mark(series.shape, self.x(x), self.y(y), title, _classes(kind, series.color))

    def _lost(self, x: float, title: Html, color: str) -> Html:
        """A value that is no number stands at the upper edge, as a cross."""
        if not self.x_low <= x <= self.x_high:
            x = min(max(x, self.x_low), self.x_high)
        x, y = self.x(x), _TOP
        return element("path", title, d=f"M{x - 4} {y - 4}l8 8m0 -8l-8 8", class_=_classes("lost", color))

    def labels(self) -> Iterator[Html]:
        """Behind the lines, moved apart where they would overlap; of what is not finite at the upper edge."""
        if not self._labels:
            return
        placed = sorted(
            (self._height_of(value), text, color) for text, value, color in self._labels
        )  # from the bottom up
        heights = _apart([height for height, _, _ in placed], _LINE)
        # Many of them may have moved below the axis, or above the picture.
        heights = _within(heights, 0.0, self.bottom - _TOP)
        for height, (_, text, color) in zip(heights, placed, strict=True):
            y = _round(self.bottom - height + 4.5)
            yield element("text", text, x=self.right + 8, y=y, class_=_classes("label", color))

    def _height_of(self, value: float | None) -> float:
        whole = self.bottom - _TOP
        return self.bottom - self.y(value) if value is not None and _shows(value, self.chart.log) else whole


def _within(heights: Sequence[float], low: float, high: float) -> list[float]:
    """Ascending heights, moved together into a range as far as they fit there."""
    if not heights:
        return []
    over, under = max(0.0, heights[-1] - high), max(0.0, low - heights[0])
    return [height - over + (under if not over else 0.0) for height in heights]


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _classes(*names: str | None) -> str:
    return " ".join(name for name in names if name)


def _round(value: float) -> float:
    """A tenth of a pixel: more would be length without sight."""
    return round(value, 1)


def _shows(value: float | None, log: bool) -> bool:
    """Whether there is a place for `value`."""
    return value is not None and math.isfinite(value) and abs(value) < _MOST and (value > 1 / _MOST or not log)


def _drawable(points: Sequence[Point], log: bool) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if y is not None and _shows(y, log) and math.isfinite(x) and abs(x) < _MOST]


def _unbroken(points: Sequence[Point], log: bool) -> Iterator[list[tuple[float, float]]]:
    """Runs of neighbours that can be drawn: a line does not cross what is no number."""
    for drawn, part in itertools.groupby(points, key=lambda point: _shows(point[1], log)):
        if drawn and (found := _drawable(list(part), log)):
            yield found


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of many points the least and the largest value of each stretch: what an eye would see of them."""
    if len(points) <= _MOST_POINTS:
        return list(points)
    width = math.ceil(2 * len(points) / _MOST_POINTS)
    kept: list[tuple[float, float]] = []
    for start in range(0, len(points), width):
        part = range(start, min(start + width, len(points)))
        extremes = {min(part, key=lambda i: points[i][1]), max(part, key=lambda i: points[i][1])}
        kept += [points[index] for index in sorted(extremes)]
    return [points[0], *kept[1:-1], points[-1]]


def _range(values: Sequence[float], zero: bool, room: float = 0.06) -> tuple[float, float]:
    """Bounds around values, with that share of room, none of it below a zero that is asked for."""
    low, high = min(values), max(values)
    if zero and low >= 0:
        return 0.0, (1 + room) * high if high > 1 / _MOST else 1.0
    span, largest = high - low, max(abs(low), abs(high))
    # What differs by less than floats can tell apart is one value, in the middle.
    around = room * span if span > max(1e-9 * largest, 1 / _MOST) else 0.02 * largest or 0.5
    return low - around, high + around


def _ticks(low: float, high: float, count: int, whole: bool = False) -> list[float]:
    """About `count` round numbers from `low` to `high`."""
    rough = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next((factor * power for factor in (1, 2, 2.5, 5) if factor * power >= rough * 0.999), 10 * power)
    if whole:
        step = max(1.0, step if step != 2.5 else 5.0)
    first = math.ceil(low / step - 1e-9)
    ticks = [float(f"{index * step:.12g}") for index in range(first, first + 4 * count + 4)]
    return [tick for tick in ticks if low - 1e-9 * step <= tick <= high + 1e-9 * step]


def _log_ticks(low: float, high: float) -> list[float]:
    """Round numbers between 10^low and 10^high."""
    if high - low < math.log10(5):
        # Less than a decade: powers of ten would leave the axis bare.
        return [tick for tick in _ticks(10**low, 10**high, 5) if tick > 0]
    factors = (1, 2, 5) if high - low < 2.5 else (1,)
    step = max(1, math.ceil((high - low) / 6)) if factors == (1,) else 1
    powers = range(math.floor(low), math.ceil(high) + 1)
    ticks = [factor * 10.0**power for power in powers if power % step == 0 for factor in factors]
    return [tick for tick in ticks if low - 1e-9 <= math.log10(tick) <= high + 1e-9]


def _tick(value: float) -> str:
    size = abs(value)
    if size >= 1e7 or 0 < size < 1e-4:
        return f"{value:.0e}"
    return f"{value:,.6g}"


def _note(name: str, point: Point) -> str:
    x, y = point
    return f"{name}, {_tick(x)}: {'not finite' if y is None or not math.isfinite(y) else number(y)}"


def _mark(shape: int, x: float, y: float, title: Html, classes: str) -> Html:
    kind = _MARKS[shape % len(_MARKS)]
    if kind == "circle":
        return element("circle", title, cx=x, cy=y, r=4, class_=classes)
    paths = {
        "square": f"M{_round(x - 4)} {_round(y - 4)}h8v8h-8z",
        "diamond": f"M{x} {_round(y - 5.5)}l5.5 5.5l-5.5 5.5l-5.5 -5.5z",
        "triangle": f"M{x} {_round(y - 5)}l5 9h-10z",
    }
    return element("path", title, d=paths[kind], class_=classes)
