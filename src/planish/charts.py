"""Charts as SVG text, and the markup that they and the report are written in.

    element("td", name, class_="n")     <td class="n">name, escaped</td>
    dumbbells, frontier, heatmap        numbers -> one <svg>

Whatever isn't Markup already is escaped, so that a name from a file can't become a tag. Colours are the page's
(CSS classes); sizes are those of a view box 480 wide. Pure functions; nothing here knows of runs or models.
"""

import html
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 480.0, 236.0
LEFT, RIGHT, TOP, BOTTOM = 62.0, 468.0, 14.0, 192.0
LEVELS = 9  # steps of the colour scale, classes l0 to l8

_CHILDLESS = {"meta", "path", "line"}
# what XML can't hold, and halves of characters, which UTF-8 can't
_UNWRITABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

Scale = Callable[[float], float]


class Markup(str):
    """Text that is HTML already."""


def escape(content: object) -> Markup:
    """Any value as text between tags or in an attribute; Markup stays as it is."""
    if isinstance(content, Markup):
        return content
    return Markup(html.escape(_UNWRITABLE.sub("\ufffd", str(content))))


def element(tag: str, *children: object, **attributes: object) -> Markup:
    """A tag around children, escaped where they aren't Markup.

    `class_` is the attribute class, `text_anchor` is text-anchor; None leaves an attribute out.
    """
    given = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{escape(_number(value))}"'
        for name, value in attributes.items()
        if value is not None
    )
    if tag in _CHILDLESS:
        return Markup(f"<{tag}{given}/>")
    return Markup(f"<{tag}{given}>{join(*children)}</{tag}>")


def join(*children: object) -> Markup:
    """Children one after the other."""
    return Markup("".join(escape(child) for child in children))


def _number(value: object) -> object:
    """Coordinates to a tenth of a unit."""
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else value


def figure(value: float) -> str:
    """A number as readers write it: 0.0912, 22.8, 3.1·10⁻⁵."""
    if not math.isfinite(value):
        return "–"
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    mantissa, _, exponent = f"{value:.2e}".partition("e")
    power = "10" + str(int(exponent)).translate(_SUPERSCRIPT)
    return power if mantissa == "1.00" else f"{float(mantissa):g}·{power}"


def linear_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers within [low, high], at most `most` of them."""
    raw = (high - low) / most
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10, 20) if unit * factor >= raw)
    ticks = [index * step for index in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return [float(f"{tick:.10g}") for tick in ticks][:most]


def log_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers within [low, high] > 0 for a logarithmic axis; those of a linear one where it is short."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for mantissas in ((1, 1.5, 2, 3, 4, 5, 7), (1, 2, 5), (1, 3), (1,)):
        ticks = [float(f"{m}e{power}") for power in powers for m in mantissas if low <= float(f"{m}e{power}") <= high]
        if len(ticks) <= most:
            return ticks if len(ticks) > 2 else linear_ticks(low, high, most)
    return ticks[:: -(-len(ticks) // most)]


def _padded(values: Sequence[float]) -> tuple[float, float]:
    """The range of a logarithmic axis: that of the values and a twelfth on either side."""
    low, high = min(values), max(values)
    margin = max((high / low) ** (1 / 12), 1.02)
    return low / margin, high * margin


def _linear(low: float, high: float, start: float, end: float) -> Scale:
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _log(low: float, high: float, start: float, end: float) -> Scale:
    scale = _linear(math.log(low), math.log(high), start, end)
    return lambda value: scale(math.log(value))


def _rules(y: Scale, ticks: Sequence[float]) -> list[Markup]:
    """Horizontal rules with their numbers."""
    rules = [element("line", x1=LEFT, x2=RIGHT, y1=y(tick), y2=y(tick), class_="rule") for tick in ticks]
    return rules + [element("text", figure(t), x=LEFT - 9, y=y(t), dy="0.35em", text_anchor="end") for t in ticks]


def _below(x: Scale, ticks: Sequence[float], label: str) -> list[Markup]:
    """Numbers and the name of the horizontal axis."""
    numbers = [element("text", figure(t), x=x(t), y=BOTTOM + 20, text_anchor="middle") for t in ticks]
    return [*numbers, element("text", label, x=(LEFT + RIGHT) / 2, y=HEIGHT - 3, text_anchor="middle")]


def _chart(label: str, *parts: object) -> Markup:
    return element("svg", *parts, viewBox=f"0 0 {WIDTH:g} {HEIGHT:g}", class_="chart", role="img", aria_label=label)


def dumbbells(pairs: Sequence[tuple[float, float]], unit: str) -> Markup:
    """Each pair (before, after) as a ring and a dot joined by a line, on a logarithmic axis.

    Args:
        pairs: positive numbers; others are left out. At least one pair has such.
        unit: what the pairs are counted in, such as "block".
    """
    real = [value for pair in pairs for value in pair if value > 0]
    low, high = _padded(real)
    x, y = _linear(-0.7, len(pairs) - 0.3, LEFT, RIGHT), _log(low, high, BOTTOM, TOP)
    radius = min(4.5, max(2.0, (RIGHT - LEFT) / len(pairs) * 0.36))
    marks = []
    for index, (before, after) in enumerate(pairs):
        tip = element("title", f"{unit} {index}: {figure(before)} → {figure(after)}")
        at = x(index)
        if before > 0 and after > 0:
            marks.append(element("line", x1=at, x2=at, y1=y(before), y2=y(after), class_="stem"))
        if before > 0:
            marks.append(element("circle", tip, cx=at, cy=y(before), r=radius, class_="before"))
        if after > 0:
            marks.append(element("circle", tip, cx=at, cy=y(after), r=radius, class_="after"))
    every = whole_ticks(len(pairs))
    return _chart(f"loss of each {unit}", *_rules(y, log_ticks(low, high)), *marks, *_below(x, every, unit))


def whole_ticks(count: int, most: int = 8) -> list[int]:
    """Indices to number of 0 .. count - 1."""
    step = next(s for s in (1, 2, 5, 10, 20, 25, 50, 100, 200, 500, count) if -(-count // s) <= most or s == count)
    return list(range(0, count, step))


@dataclass(frozen=True, kw_only=True)
class Point:
    """A run in the plane of cost (x > 0) and loss (y > 0), of which less is better."""

    x: float
    y: float
    number: int
    title: str


def undominated(points: Sequence[Point]) -> list[Point]:
    """The Pareto front by growing x: points that none is as good as in one way and better in the other."""
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (point.x, point.y)):
        if not front or point.y < front[-1].y:
            front.append(point)
    return front


def frontier(points: Sequence[Point], x_label: str, y_label: str) -> Markup:
    """Numbered points and the staircase of those that none dominates; both axes are logarithmic."""
    (left, right), (low, high) = _padded([p.x for p in points]), _padded([p.y for p in points])
    x, y, front = _log(left, right, LEFT, RIGHT), _log(low, high, BOTTOM, TOP), undominated(points)
    stairs = f"M{x(front[0].x):.1f} {TOP}" + "".join(f"H{x(p.x):.1f}V{y(p.y):.1f}" for p in front) + f"H{RIGHT}"
    marks = []
    for point in sorted(points, key=lambda point: point in front):
        best = point in front
        number = element("text", point.number, x=x(point.x), y=y(point.y), dy="0.35em", text_anchor="middle")
        dot = element("circle", cx=x(point.x), cy=y(point.y), r=11.0)
        marks.append(element("g", element("title", point.title), dot, number, class_="best" if best else "beaten"))
    line = element("path", d=stairs, class_="front")
    axes = [*_rules(y, log_ticks(low, high)), *_below(x, log_ticks(left, right), x_label)]
    return _chart(f"{y_label} against {x_label}", *axes, line, *marks)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One cell of a heat map: its level on the colour scale (None is no value) and what it says when pointed at."""

    level: int | None
    title: str


def level(value: float, low: float, high: float) -> int:
    """Step of the colour scale, 0 to LEVELS - 1, of a value in [low, high]."""
    if high <= low:
        return LEVELS // 2
    return min(LEVELS - 1, int((value - low) / (high - low) * LEVELS))


def heatmap(cells: Mapping[tuple[int, int], Cell], rows: int, columns: int, label: str) -> Markup:
    """Cells by (row, column) as a grid without text, which stretches to any size."""
    tiles = []
    for (row, column), cell in cells.items():
        kind = "none" if cell.level is None else f"l{cell.level}"
        tip = element("title", cell.title)
        tiles.append(f'<rect x="{column}" y="{row}" width="1" height="1" class="{kind}">{tip}</rect>')
    return element(
        "svg", Markup("".join(tiles)), viewBox=f"0 0 {columns} {rows}", class_="heat", preserveAspectRatio="none",
        role="img", aria_label=label,
    )  # fmt: skip
