"""Curves and bars as inline SVG: text in, text out, no library. Colours are CSS classes of the page (page/page.css).

Every plot can carry a band, the noise floor: what lies inside it is no larger than a harmless change.
"""

from dataclasses import dataclass
from html import escape
from math import ceil, floor, log10

WIDTH, HEIGHT = 640, 260
LEFT, RIGHT, TOP, BOTTOM = 56, 120, 12, 40
LINE = 15  # pixels between two labels


@dataclass(frozen=True)
class Series:
    """One curve: its label, its colour's class, and a value for every x."""

    label: str
    colour: str
    values: list[float]


def curves(
    series: list[Series], band: tuple[list[float], list[float]] | None, x: str, y: str, log: bool = False,
    first: int = 0, dots: bool = False,
) -> str:  # fmt: skip
    """A line per series over 0, 1, 2, ... with the band (low, high) behind them; with `dots`, points unjoined.

    log     the y axis is logarithmic; values of 0 are left out
    first   what the first x is called
    """
    every = [value for each in series for value in each.values] + (band[0] + band[1] if band else [])
    every = [value for value in every if value > 0 or not log]
    if not series or not every:
        return ""
    low, high, ticks = log_axis(min(every), max(every)) if log else linear_axis(min(every), max(every))
    count = max(len(each.values) for each in series)
    inner = WIDTH - LEFT - RIGHT

    def px(index: int) -> float:
        return LEFT + (inner * (index + 0.5) / count if dots else inner * index / max(count - 1, 1))

    def py(value: float) -> float:
        share = (log10(value) - low) / (high - low) if log else (value - low) / (high - low)
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - share)

    parts = [grid(tick, py(tick)) for tick in ticks]
    for index in range(0, count, max(1, ceil(count / 10))):
        parts.append(text(px(index), HEIGHT - BOTTOM + 18, str(index + first), "tick", "middle"))
    parts.append(text(LEFT + inner / 2, HEIGHT - 4, x, "axis", "middle"))
    if band:
        parts.append(band_of(band, px, py, log, dots))
    ends = []
    for each in series:
        points = [(px(i), py(value)) for i, value in enumerate(each.values) if value > 0 or not log]
        if not points:
            continue
        if dots:
            parts += [f'<circle class="fill {each.colour}" cx="{a:.1f}" cy="{b:.1f}" r="4.5"/>' for a, b in points]
        else:
            path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
            parts.append(f'<polyline class="line {each.colour}" points="{path}"/>')
        ends.append((points[-1][1], each))
    if band:
        shown = [value for value in (band[0][-1], band[1][-1]) if value > 0 or not log]
        ends.append((sum(map(py, shown)) / len(shown), Series("noise floor", "floor", [])) if shown else (TOP, None))
    parts += labels([end for end in ends if end[1] is not None])
    return svg(parts, y)


def bars(rows: list[tuple[str, str, float, str]], band: tuple[float, float] | None, caption: str) -> str:
    """One horizontal bar per row (label, colour's class, value, what is written behind it), the band across all."""
    left, right, step = 150, 130, 30
    high = max([value for _, _, value, _ in rows] + ([band[1]] if band else [])) or 1.0
    height = step * len(rows) + 10

    def px(value: float) -> float:
        return left + (WIDTH - left - right) * value / high

    parts = []
    if band:
        wide = max(px(band[1]) - px(band[0]), 2)
        parts.append(f'<rect class="band" x="{px(band[0]):.1f}" y="0" width="{wide:.1f}" height="{height}"/>')
    for index, (label, colour, value, note) in enumerate(rows):
        y = 8 + step * index
        wide = max(px(value) - left, 1)
        parts.append(text(left - 10, y + 14, label, "label", "end"))
        parts.append(f'<rect class="fill {colour}" x="{left}" y="{y}" width="{wide:.1f}" height="19" rx="3"/>')
        parts.append(text(px(value) + 8, y + 14, note, "label"))
    return svg(parts, caption, height)


def stacked(rows: list[tuple[str, list[tuple[str, float]]]], caption: str, unit: str) -> str:
    """One bar per row (label, [(colour's class, value), ...]), its pieces in a row, the total at its end."""
    left, right, step = 150, 90, 30
    high = max(sum(value for _, value in pieces) for _, pieces in rows) or 1.0
    parts = []
    for index, (label, pieces) in enumerate(rows):
        x, y = float(left), 8 + step * index
        parts.append(text(left - 10, y + 14, label, "label", "end"))
        for colour, value in pieces:
            wide = (WIDTH - left - right) * value / high
            parts.append(f'<rect class="fill {colour}" x="{x:.1f}" y="{y}" width="{wide:.1f}" height="19"/>')
            x += wide
        parts.append(text(x + 8, y + 14, f"{sum(value for _, value in pieces):.3g} {unit}", "label"))
    return svg(parts, caption, step * len(rows) + 10)


def svg(parts: list[str], caption: str, height: int = HEIGHT) -> str:
    return (
        f'<svg class="plot" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(caption)}">'
        + "".join(parts)
        + "</svg>"
    )


def text(x: float, y: float, words: str, kind: str, anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def grid(tick: float, y: float) -> str:
    line = f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
    return line + text(LEFT - 8, y + 4, f"{tick:.6g}", "tick", "end")


def band_of(band, px, py, log: bool, wide: bool) -> str:
    """The area between the two curves of the band; over the whole width where x is a set of things, not a course."""
    pairs = [(i, a, b) for i, (a, b) in enumerate(zip(*band)) if (a > 0 and b > 0) or not log]
    if not pairs:
        return ""
    if wide:
        top, bottom = py(max(b for _, _, b in pairs)), py(min(a for _, a, _ in pairs))
        return (
            f'<rect class="band" x="{LEFT}" y="{top:.1f}" width="{WIDTH - LEFT - RIGHT}" '
            f'height="{max(bottom - top, 2):.1f}"/>'
        )
    there = [f"{px(i):.1f},{py(b):.1f}" for i, _, b in pairs]
    back = [f"{px(i):.1f},{py(a):.1f}" for i, a, _ in reversed(pairs)]
    return f'<polygon class="band" points="{" ".join(there + back)}"/>'


def labels(ends: list) -> list[str]:
    """The series' names at the right end of their curves, moved apart where they would cover each other."""
    ends = sorted(ends, key=lambda end: end[0])
    y, parts = TOP - LINE, []
    room = HEIGHT - BOTTOM - LINE * len(ends)
    for index, (wanted, each) in enumerate(ends):
        y = max(y + LINE, min(wanted, room + LINE * (index + 1)))
        parts.append(text(WIDTH - RIGHT + 8, y + 4, each.label, f"name fill {each.colour}"))
    return parts


def linear_axis(low: float, high: float) -> tuple[float, float, list[float]]:
    """(low, high, ticks) of a round axis around the values."""
    span = (high - low) or abs(high) or 1.0
    step = 10 ** floor(log10(span / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= 5)
    first, last = floor(low / step), ceil(high / step)
    if first == last:
        last += 1
    return first * step, last * step, [step * k for k in range(first, last + 1)]


def log_axis(low: float, high: float) -> tuple[float, float, list[float]]:
    """(log10 of the low end, of the high end, ticks): decades, with 2 and 5 between where there are few."""
    first, last = floor(log10(low)), ceil(log10(high))
    last = max(last, first + 1)
    factors = (1, 2, 5) if last - first <= 2 else (1,)
    ticks = [f * 10.0**k for k in range(first, last + 1) for f in factors if k < last or f == 1]
    return first, last, ticks


def scatter(points, front, chosen, target: float, x: str, y: str) -> str:
    """A standalone SVG: every measured (cost, PSNR), the front that none beats joined, the chosen one, the target."""
    low, high, ticks = linear_axis(min(v for _, v in points), max([target, *(v for _, v in points)]))

    def px(value: float) -> float:
        return LEFT + (WIDTH - LEFT - 24) * min(value, 1.05) / 1.05

    def py(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - (value - low) / (high - low))

    line, soft = 'stroke="#2563eb" stroke-width="2" fill="none"', 'fill="#5c6370" font-size="11.5"'
    parts = [f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>']
    for tick in ticks:
        parts.append(f'<path d="M{LEFT} {py(tick):.1f}H{WIDTH - 24}" stroke="#e2e5ea"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{py(tick) + 4:.1f}" text-anchor="end" {soft}>{tick:.6g}</text>')
    for share in (0, 0.25, 0.5, 0.75, 1):
        at = f'x="{px(share):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle"'
        parts.append(f"<text {at} {soft}>{100 * share:.0f} %</text>")
    parts.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 4}" text-anchor="middle" {soft}>{escape(x)}</text>')
    parts.append(f'<text x="{LEFT}" y="{TOP - 1}" {soft}>{escape(y)}</text>')
    parts.append(f'<path d="M{LEFT} {py(target):.1f}H{WIDTH - 24}" stroke="#e0620d" stroke-dasharray="5 4"/>')
    parts.append(f'<polyline points="{" ".join(f"{px(a):.1f},{py(b):.1f}" for a, b in front)}" {line}/>')
    parts += [f'<circle cx="{px(a):.1f}" cy="{py(b):.1f}" r="4" fill="#2563eb"/>' for a, b in points]
    parts.append(f'<circle cx="{px(chosen[0]):.1f}" cy="{py(chosen[1]):.1f}" r="7" fill="#e0620d"/>')
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" font-family="system-ui, sans-serif"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{"".join(parts)}</svg>'
