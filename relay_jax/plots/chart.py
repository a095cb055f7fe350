"""Line charts as SVG text, for pages: sharp at any size, in the colours of the page, no drawing.

Colours are classes (`c0`, `c1`, ...) of the page's style, so that a
chart is legible in the dark too. Matplotlib's pictures are for
files; a page of a run that is training is made anew every few
minutes, and these take a millisecond.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from relay_jax.runtime.flops import si

WIDTH, HEIGHT = 400, 270
LEFT, RIGHT, TOP, BOTTOM = 52, 388, 10, 226  # the frame
POINTS = 300  # of a line, at most: more than there are pixels to show them
COLOURS = 6  # of the page's style


@dataclass(frozen=True, kw_only=True)
class Line:
    """x, y: of its points, x rising; what is not finite, or not positive on a logarithmic axis,
    is left out."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    dashed: bool = False


@dataclass(frozen=True, kw_only=True)
class Chart:
    """mark: an x with a dotted line, and what it is."""

    x_label: str
    y_label: str
    lines: Sequence[Line]
    log_x: bool = False
    log_y: bool = False
    mark: tuple[float, str] | None = None

    def svg(self) -> Markup:
        """An <svg> element; '' without a point to show."""
        lines = [_points(line, self.log_x, self.log_y) for line in self.lines]
        points = [point for line in lines for point in line]
        if not points:
            return Markup("")
        xs, ys = zip(*points, strict=True)
        marked = [self.mark[0]] if self.mark else []
        x = Axis.over([*xs, *marked], self.log_x, LEFT, RIGHT)
        y = Axis.over(list(ys), self.log_y, BOTTOM, TOP)
        parts = [
            Markup(f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img"><title>{{}}</title>').format(
                f"{self.y_label} against {self.x_label}"
            )
        ]
        for value in x.ticks():
            at = x.place(value)
            parts.append(_segment("grid", at, TOP, at, BOTTOM))
            parts.append(_text(at, BOTTOM + 17, si_text(value), "middle"))
        for value in y.ticks():
            at = y.place(value)
            parts.append(_segment("grid", LEFT, at, RIGHT, at))
            parts.append(_text(LEFT - 6, at + 4, si_text(value), "end"))
        parts.append(_text((LEFT + RIGHT) / 2, HEIGHT - 6, self.x_label, "middle"))
        if self.mark:
            at = x.place(self.mark[0])
            parts.append(_segment("mark", at, TOP, at, BOTTOM))
            near_end = at > (LEFT + RIGHT) / 2
            shift, anchor = (-6, "end") if near_end else (6, "start")
            parts.append(_text(at + shift, TOP + 14, self.mark[1], anchor))
        for number, (line, drawn) in enumerate(zip(self.lines, lines, strict=True)):
            path = " ".join(f"{x.place(a):.1f},{y.place(b):.1f}" for a, b in drawn)
            kind = f"line c{number % COLOURS}" + (" dashed" if line.dashed else "")
            parts.append(Markup(f'<polyline class="{kind}" points="{path}"/>'))
        return Markup("").join([*parts, Markup("</svg>")])

    @property
    def legend(self) -> list[tuple[str, str]]:
        """(class of the colour, name) of each line."""
        return [(f"c{n % COLOURS}", line.name) for n, line in enumerate(self.lines)]


@dataclass(frozen=True)
class Axis:
    """low, high: of the values; start, end: their places; log: by ratios."""

    low: float
    high: float
    start: float
    end: float
    log: bool

    @classmethod
    def over(cls, values: Sequence[float], log: bool, start: float, end: float) -> "Axis":
        """An axis that shows all values, with some room."""
        low, high = min(values), max(values)
        if log:
            room = 1.05 if high > 1.5 * low else 1.3
            return cls(low / room, high * room, start, end, log)
        room = 0.04 * (high - low) or 0.5 * abs(high) or 1.0
        # A count from 0 begins at 0.
        return cls(0.0 if low == 0 else low - room, high + room, start, end, log)

    def place(self, value: float) -> float:
        """Where a value lies."""
        scale = math.log if self.log else float
        share = (scale(value) - scale(self.low)) / (scale(self.high) - scale(self.low))
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round values between low and high, about five."""
        if self.log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for digits in ((1,), (1, 3), (1, 2, 5), range(1, 10)):
                values = [d * 10.0**p for p in powers for d in digits]
                inside = [v for v in values if self.low <= v <= self.high]
                if len(inside) >= 3:
                    return inside[:: -(-len(inside) // 8)]
        span = self.high - self.low
        raw = span / 5
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(d * power for d in (1, 2, 5, 10) if d * power >= raw)
        first = math.ceil(self.low / step)
        return [n * step for n in range(first, math.floor(self.high / step) + 1)]


def si_text(value: float) -> str:
    """A tick in few characters: 60k, 0.05."""
    return si(value).replace(" ", "") if abs(value) >= 999.5 else f"{value:.3g}"


def _points(line: Line, log_x: bool, log_y: bool) -> list[tuple[float, float]]:
    points = [
        (float(x), float(y))
        for x, y in zip(line.x, line.y, strict=True)
        if x is not None and y is not None and math.isfinite(x) and math.isfinite(y)
    ]
    points = [(x, y) for x, y in points if (x > 0 or not log_x) and (y > 0 or not log_y)]
    # Means of neighbours, so that a noisy curve keeps its course.
    size = -(-len(points) // POINTS)
    if size <= 1:
        return points
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(g[-1][0], sum(y for _, y in g) / len(g)) for g in groups]


def _segment(kind: str, x1: float, y1: float, x2: float, y2: float) -> Markup:
    return Markup(f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>')


def _text(x: float, y: float, text: str, anchor: str) -> Markup:
    return Markup(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>')
