"""The report of a comparison as one HTML page that needs nothing else: no network, no library, no second file.

Everything typed by people (prompts, plan names) is escaped by jinja2; the page's policy allows only its own script and
style, by their digests, and media from data URIs, so that a hostile prompt can neither run nor call out.
"""

import base64
import hashlib
import tempfile
from pathlib import Path

from dax.bench.compare_record import Attribution, Comparison, Variant
from dax.bench.costs import COST_OF
from dax.bench.plots import Series, bars, curves, stacked
from dax.bench.quality import CAP_DB

ASSETS = Path(__file__).parent / "page"
MAX_SIDE = 480  # pixels of an embedded video's longer side
ERROR_TOP = 32  # of 255: the mean error of a pixel that the map shows brightest
HEAT = ((0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164))
STAGES = ("text", "denoise", "decode")


def page(comparison: Comparison, clips: dict[str, list]) -> str:
    """The HTML of a comparison; `clips` are [T, H, W, 3] uint8, one per prompt and variant."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    assets = {name: (ASSETS / f"page.{name}").read_text(encoding="utf-8").strip() for name in ("css", "js")}
    shown = comparison.shown()
    rows = [comparison.reference, comparison.noise, *shown[1:]]
    colour = {each.name: f"c{index % 7}" for index, each in enumerate(shown)} | {comparison.noise.name: "floor"}
    environment = Environment(
        loader=FileSystemLoader(ASSETS), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    height, width = clips[comparison.reference.name][0].shape[1:3]
    worst = shown[-1].fidelity.worst_prompt
    return environment.get_template("page.html").render(
        c=comparison,
        policy=policy(assets["css"], assets["js"]),
        css=Markup(assets["css"]),
        js=Markup(assets["js"]),
        size=f"{width} × {height} × {len(clips[comparison.reference.name][0])}",
        frames=len(clips[comparison.reference.name][0]),
        first=worst,
        cards=[card(each, comparison) for each in shown[1:]],
        rows=[{**vars(each), "peak": peak(each)} for each in rows],
        plans=shown[1:],
        colour=colour,
        db=decibels,
        cost_of=COST_OF,
        judged=any(each.judge for each in shown),
        grids=[shots(rows, clips, i, colour, comparison.request["fps"]) for i in range(len(comparison.prompts))],
        shrunk=f", shrunk to {MAX_SIDE} pixels" if max(height, width) > MAX_SIDE else "",
        error_top=ERROR_TOP,
        plots=[{**plot, "svg": Markup(plot["svg"])} for plot in plots(comparison, colour) if plot["svg"]],
        attributions=[attribution_plot(each, comparison, Markup) for each in comparison.attribution],
        differences=plan_differences(shown),
    )


def policy(css: str, js: str) -> str:
    """The content security policy: this style, this script, media inside the page, and nothing else."""
    style, script = (
        "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'" for text in (css, js)
    )
    return (
        f"default-src 'none'; style-src {style}; script-src {script}; media-src data:; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def decibels(value: float, unit: str = " dB") -> str:
    if value >= CAP_DB:
        return "identical" if unit else "="
    return f"{value:.1f}{unit}"


def peak(variant: Variant) -> float | None:
    known = [value for value in variant.peak_gib.values() if value is not None]
    return max(known) if known else None


def card(variant: Variant, comparison: Comparison) -> dict:
    """A plan in three lines: fidelity, beside the floor, and work."""
    under = comparison.noise.fidelity.psnr_db - variant.fidelity.psnr_db
    verdict = (
        "the reference's clips, bit for bit"
        if variant.fidelity.psnr_worst_db >= CAP_DB
        else f"{under:.1f} dB under the noise floor of {decibels(comparison.noise.fidelity.psnr_db)}"
        if under > 0
        else f"inside the noise floor of {decibels(comparison.noise.fidelity.psnr_db)}"
    )
    forwards, whole = (sum(each.computed.values()) for each in (variant, comparison.reference))
    work = [f"{forwards:.0f} of {whole:.0f} forwards"]
    work.append(f"{100 * variant.work:.0f} % of the work")
    if variant.speedup:
        work.append(f"{variant.speedup:.2f} × as fast here")
    if variant.judge:
        work.append(f"judge {variant.judge['all']:.0f} % (reference {comparison.reference.judge['all']:.0f} %)")
    return {"name": variant.name, "fidelity": variant.fidelity, "verdict": verdict, "work": " · ".join(work)}


def shots(variants: list[Variant], clips: dict[str, list], index: int, colour: dict, fps: int) -> list[dict]:
    """What the player shows of one prompt: per variant a video and, but for the reference, the video of its error."""
    import numpy as np

    reference = np.asarray(clips[variants[0].name][index])
    found = []
    for each in variants:
        clip = np.asarray(clips[each.name][index])
        found.append(
            {
                "name": each.name,
                "colour": colour[each.name],
                "note": "reference" if each.role == "reference" else decibels(each.cells[index].psnr_db),
                "video": video_uri(clip, fps),
                "error": None if each.role == "reference" else video_uri(error_map(reference, clip), fps),
            }
        )
    return found


def error_map(reference, clip):
    """The mean absolute error of every pixel in false colours, [T, H, W, 3] uint8; brightest from ERROR_TOP on."""
    import numpy as np

    error = np.abs(reference.astype(np.float32) - clip).mean(-1) / ERROR_TOP
    at = np.clip(error, 0, 1) * (len(HEAT) - 1)
    places = np.arange(len(HEAT))
    return np.stack([np.interp(at, places, [colour[c] for colour in HEAT]) for c in range(3)], -1).round().astype("u1")


def video_uri(frames, fps: int) -> str:
    """The clip as H.264 in a data URI, its longer side at most MAX_SIDE pixels."""
    from dax.generate.video import write

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        write(path, shrink(frames), fps, {})
        return "data:video/mp4;base64," + base64.b64encode(path.read_bytes()).decode()


def shrink(frames):
    """Frames whose longer side is at most MAX_SIDE, by averaging areas; sides stay even."""
    import numpy as np
    from PIL import Image

    height, width = frames.shape[1:3]
    scale = MAX_SIDE / max(height, width)
    if scale >= 1:
        return frames
    size = tuple(max(2, round(side * scale / 2) * 2) for side in (width, height))
    return np.stack([np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BOX)) for frame in frames])


def plots(comparison: Comparison, colour: dict) -> list[dict]:
    """The curves: latents by step, frames by number, clips by prompt, and time by stage."""
    plans, noise = comparison.shown()[1:], comparison.noise.cells

    def means(field: str) -> list[Series]:
        found = []
        for each in plans:
            values = zip(*(getattr(cell, field) for cell in each.cells))
            found.append(Series(each.name, colour[each.name], [sum(v) / len(v) for v in values]))
        return found

    def band(field: str) -> tuple[list[float], list[float]]:
        values = list(zip(*(getattr(cell, field) for cell in noise)))
        return [min(v) for v in values], [max(v) for v in values]

    clip_db = [Series(each.name, colour[each.name], [cell.psnr_db for cell in each.cells]) for each in plans]
    clip_floor = [[cell.psnr_db for cell in noise]] * 2
    times = [(each.name, [(f"stage-{s}", each.seconds[s]) for s in STAGES]) for each in comparison.shown()]
    return [
        {
            "title": "Latents, step by step",
            "note": "relative L2 against the reference after every step, mean over prompts, logarithmic",
            "svg": curves(means("latent_error"), band("latent_error"), "step", "relative L2 of the latents", True, 1),
        },
        {
            "title": "Frames",
            "note": f"PSNR in dB of every frame, mean over prompts; {CAP_DB:.0f} is identical",
            "svg": curves(means("frame_psnr_db"), band("frame_psnr_db"), "frame", "PSNR of the frames", False, 1),
        },
        {
            "title": "Prompts",
            "note": "PSNR in dB of every clip",
            "svg": curves(clip_db, tuple(clip_floor), "prompt", "PSNR of the clips", False, 1, dots=True),
        },
        {
            "title": "Seconds per clip",
            "note": "text (grey), denoising (blue), decoding (green); medians",
            "svg": stacked(times, "seconds by stage", "s"),
        },
    ]


def attribution_plot(each: Attribution, comparison: Comparison, markup) -> dict:
    """Bars of the latents' final error: every knob alone, all together, and what independence would give."""
    rows = [
        (knob.part, "alone", knob.latent_error, f"{100 * knob.latent_error:.2g} %, {decibels(knob.psnr_db)}")
        for knob in each.knobs
        if knob.variant
    ]
    note = f"{100 * each.together:.2g} %, {decibels(each.together_psnr_db)}"
    rows.append(("all together", "together", each.together, note))
    if each.if_independent is not None:
        rows.append(("if independent", "predicted", each.if_independent, f"{100 * each.if_independent:.2g} %"))
    count = len(each.prompts)
    floor = [cell.latent_error[-1] for cell in comparison.noise.cells]
    refused = "".join(f"; {knob.part} alone: {knob.refused}" for knob in each.knobs if knob.refused)
    return {
        "title": each.plan,
        "note": f"relative L2 of the final latents, prompt{'s 1 to' if count > 1 else ''} {count}{refused}",
        "svg": markup(bars(rows, (min(floor), max(floor)), f"what the knobs of {each.plan} cost")),
    }


def plan_differences(shown: list[Variant]) -> list[dict]:
    """One row per key in which any plan is not the reference: its value there and in every plan (None: the same)."""
    reference = shown[0]
    keys = [key for key in flat(reference.plan) if any(key in each.differs for each in shown)]
    keys += sorted({key for each in shown for key in each.differs} - set(keys))
    return [
        {
            "key": key,
            "reference": str(flat(reference.plan).get(key, "")),
            "plans": [str(each.differs[key]) if key in each.differs else None for each in shown[1:]],
        }
        for key in keys
    ]


def flat(plan: dict, prefix: str = "") -> dict:
    found = {}
    for key, value in plan.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {prefix + key: value}
    return found
