"""The rows of `dax bench parallel` as one SVG that stands alone, on light and on dark: speed-up by number of GPUs.

Above, the fastest way of each kind beside the ideal; below, every way as a share of it. A dot was measured, a bar
predicted.
"""

from html import escape
from math import log2

from dax.bench.plots import linear_axis, text
from dax.bench.report import headline
from dax.errors import DaxError

WIDTH, UPPER, ROW = 900, 330, 21  # pixels: of all, the upper part's height, a row's height in the lower one
SPREAD = 15  # pixels between two kinds at one number of GPUs
COLOURS = 5
STYLE = """
svg { color-scheme: light dark; --ground: #fff; --ink: #16181d; --soft: #5c6370; --rule: #e2e5ea;
  --c0: #2563eb; --c1: #e0620d; --c2: #0f9d58; --c3: #9333ea; --c4: #d6336c; }
@media (prefers-color-scheme: dark) { svg { --ground: #191c23; --ink: #eceef2; --soft: #9aa2b1; --rule: #2b303a;
  --c0: #6ea0ff; --c1: #ff9a52; --c2: #4fd18b; --c3: #c18bff; --c4: #ff7aa5; } }
text { font: 12.5px system-ui, "DejaVu Sans", sans-serif; fill: var(--ink); }
.title { font-weight: 600; font-size: 13px; } .tick, .axis { fill: var(--soft); font-size: 11.5px; }
.ground { fill: var(--ground); } .grid { stroke: var(--rule); } .ideal { stroke: var(--soft); stroke-dasharray: 5 4; }
.bar { stroke-width: 2.5; } .dot { stroke: var(--ground); stroke-width: 1; }
""" + "".join(f".dot.c{i} {{ fill: var(--c{i}); }} .bar.c{i} {{ stroke: var(--c{i}); }} " for i in range(COLOURS))


def drawn(record: dict) -> str:
    """SVG of a record's rows, without those that were not timed, or too short for it: a layer of less than no time.

    DaxError("check_failed") if none is left.
    """
    rows = [{"gpus": record["gpus"]} | row for row in record["rows"]]  # a row of several numbers has its own
    timed = [row for row in rows if (row.get("speedup") or 0) > 0 and row["parallel"]]
    if not timed:
        raise DaxError("check_failed", "bench parallel: no way was timed, so there is nothing to draw")
    title = f"{headline(record)}, plan {record['plan']}"
    kinds = {kind: f"c{index % COLOURS}" for index, kind in enumerate(dict.fromkeys(map(kind_of, timed)))}
    lower, height = shares(timed, kinds, top=UPPER + 40)
    body = "".join([text(24, 26, title, "title"), *speedups(timed, kinds), *lower])
    size = f'viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" role="img" aria-label="{escape(title)}"'
    ground = f'<rect class="ground" width="{WIDTH}" height="{height}"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{STYLE}</style>{ground}{body}</svg>'


def kind_of(row: dict) -> str:
    """What of the work is divided: "cfg x ulysses"."""
    return " x ".join(name for name in ("cfg", "ulysses", "rows") if row["parallel"][name] > 1)


def speedups(timed: list[dict], kinds: dict[str, str]) -> list[str]:
    """The upper part, with a legend. Both axes are logarithmic, so that the ideal is a straight line."""
    counts = sorted({row["gpus"] for row in timed})
    left, right, top, bottom, most = 64, WIDTH - 270, 74, UPPER - 44, log2(counts[-1])
    low = min(0.0, *(log2(row[key]) for row in timed for key in ("speedup", "predicted") if row.get(key)))

    def px(gpus: float) -> float:
        return left + (right - left) * log2(gpus) / most

    def py(speedup: float) -> float:
        return bottom - (bottom - top) * (log2(speedup) - low) / (most - low)

    parts = [
        text(24, top - 18, "times one GPU", "axis"),
        text((px(1) + right) / 2, bottom + 40, "GPUs", "axis", "middle"),
    ]
    for count in (1, *counts):
        parts += [
            line("grid", px(1), py(count), right + 40, py(count)),
            text(left - 12, py(count) + 4, str(count), "tick", "end"),
        ]
        parts.append(text(px(count), bottom + 20, str(count), "tick", "middle"))
    parts.append(line("ideal", px(1), py(1), right, py(counts[-1])))
    for count in counts:
        best = [max(found, key=lambda row: row["speedup"]) for kind in kinds if (found := of(timed, kind, count))]
        for index, row in enumerate(best):
            colour, x = kinds[kind_of(row)], px(count) + SPREAD * (index - (len(best) - 1) / 2)
            if row.get("predicted"):
                parts.append(line(f"bar {colour}", x - 6, py(row["predicted"]), x + 6, py(row["predicted"])))
            parts.append(dot(colour, x, py(row["speedup"])))
        fastest = max(row["speedup"] for row in best)
        parts.append(
            text(px(count), py(min(row["speedup"] for row in best)) + 24, f"{fastest:.2f} at best", "label", "middle")
        )
    return parts + legend(kinds, right + 76, top)


def legend(kinds: dict[str, str], x: float, y: float) -> list[str]:
    parts = [text(x - 6, y - 18, "fastest of each kind", "axis")]
    for kind, colour in kinds.items():
        parts += [dot(colour, x, y), text(x + 14, y + 4, kind, "label")]
        y += ROW
    key = [dot("c0", x, y + 8), text(x + 14, y + 12, "measured", "tick"), line("bar c0", x - 6, y + 29, x + 6, y + 29)]
    key += [text(x + 14, y + 33, "predicted", "tick"), line("ideal", x - 8, y + 50, x + 8, y + 50)]
    return [*parts, *key, text(x + 14, y + 54, "ideal: as many times as GPUs", "tick")]


def shares(timed: list[dict], kinds: dict[str, str], top: float) -> tuple[list[str], int]:
    """(the lower part, where it ends): for each way a line with its label, percent of the ideal, and times one GPU."""
    left, right = 390, WIDTH - 150
    percents = [100 * row[key] / row["gpus"] for row in timed for key in ("speedup", "predicted") if row.get(key)]
    low, high, ticks = linear_axis(min(percents), max([100.0, *percents]))

    def px(percent: float) -> float:
        return left + (right - left) * (percent - low) / (high - low)

    heads = text(24, top, "every way", "axis"), text(right + 20, top, "times one (predicted)", "axis")
    parts, y = (
        [*heads, text((left + right) / 2, top, "% of the ideal", "axis", "middle")],
        top + 18,
    )
    begin = y - 8
    for count in sorted({row["gpus"] for row in timed}):
        rows = [row for row in timed if row["gpus"] == count]
        parts.append(text(24, y + 4, f"{count} GPUs", "title"))
        for row in sorted(rows, key=lambda row: -row["speedup"]):
            y += ROW
            colour, told = kinds[kind_of(row)], f"{row['speedup']:.3f}"
            parts += [text(24, y + 4, row["label"], "label"), line("grid", left, y, right, y)]
            if row.get("predicted"):
                x, told = px(100 * row["predicted"] / count), f"{told} ({row['predicted']:.3f})"
                parts.append(line(f"bar {colour}", x, y - 6, x, y + 6))
            parts.append(dot(colour, px(100 * row["speedup"] / count), y))
            parts.append(text(right + 20, y + 4, told, "label"))
        y += ROW + 8
    end = y - ROW
    for tick in ticks:
        parts.insert(0, line("ideal" if tick == 100 else "grid", px(tick), begin, px(tick), end))
        parts.append(text(px(tick), end + 16, f"{tick:.6g}", "tick", "middle"))
    return parts, round(end + 36)


def of(timed: list[dict], kind: str, count: int) -> list[dict]:
    return [row for row in timed if kind_of(row) == kind and row["gpus"] == count]


def line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def dot(colour: str, x: float, y: float) -> str:
    return f'<circle class="dot {colour}" cx="{x:.1f}" cy="{y:.1f}" r="4.5"/>'
