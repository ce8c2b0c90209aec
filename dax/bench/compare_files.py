"""The files of a comparison, report.html, report.png and report.json in one folder; whether a folder may be used."""

import io
import json
from pathlib import Path

from dax.bench.compare_cells import write_atomically
from dax.bench.compare_record import Comparison
from dax.errors import DaxError

JSON, PAGE, SHEET = "report.json", "report.html", "report.png"


def check_folder(folder: Path, overwrite: bool = False) -> None:
    """DaxError("cannot_write") for a folder that holds something else, or a report that nobody said may be replaced.

    A folder with finished cells and no report is one that was cut off: it goes on. `overwrite` replaces a report; its
    finished cells serve the new one.
    """
    try:
        if not folder.exists():
            if not folder.parent.is_dir():
                raise DaxError("cannot_write", f"{folder}: there is no folder {folder.parent}")
            folder.mkdir()
        if not folder.is_dir():
            raise DaxError("cannot_write", f"{folder}: is not a folder")
        inside = {path.name for path in folder.iterdir()}
        if inside and "cells" not in inside:
            stranger = sorted(inside)[0]
            raise DaxError("cannot_write", f"{folder}: holds {stranger!r} and no report of DAX; name another folder")
        if JSON in inside and not overwrite:
            raise DaxError("cannot_write", f"{folder}: holds a report; pass --overwrite (its finished clips are kept)")
        (folder / "cells").mkdir(exist_ok=True)
    except OSError as error:
        raise DaxError("cannot_write", f"{folder}: {error.strerror or error}") from None


def write_report(folder: Path, comparison: Comparison, clips: dict[str, list]) -> Path:
    """Write page, picture and record; returns the page's path. The record comes last: where it is, all of it is."""
    from dax.bench.compare_page import page
    from dax.bench.compare_sheet import sheet

    write_atomically(folder / PAGE, page(comparison, clips).encode())
    picture = io.BytesIO()
    sheet(comparison, clips, comparison.shown()[-1].fidelity.worst_prompt).save(picture, format="PNG", optimize=True)
    write_atomically(folder / SHEET, picture.getvalue())
    write_atomically(folder / JSON, json.dumps(comparison.model_dump(), indent=1).encode())
    return folder / PAGE


def text(comparison: Comparison) -> str:
    """The comparison for a terminal."""
    from dax.bench.compare_page import decibels
    from dax.bench.report import table

    rows = [
        {
            "plan": each.name,
            "denoise": each.seconds["denoise"],
            "forwards": round(sum(each.computed.values())),
            "work": f"{100 * each.work:.0f} %",
            "psnr": decibels(each.fidelity.psnr_db, ""),
            "p10": decibels(each.fidelity.psnr_p10_db, ""),
            "ssim": each.fidelity.ssim,
            "vmaf": each.fidelity.vmaf,
            "vmaf_p10": each.fidelity.vmaf_p10,
            "error": each.fidelity.latent_error,
            "judge": each.judge["all"] if each.judge else None,
        }
        for each in comparison.variants
    ]
    scored = {"vmaf": "VMAF", "vmaf_p10": "VMAF p10"} if comparison.scored else {}
    columns = {
        "plan": "plan", "denoise": "denoise s", "forwards": "forwards", "work": "work", "psnr": "PSNR dB", "p10": "p10",
        "ssim": "SSIM", **scored, "error": "latent error", "judge": "judge %",
    }  # fmt: skip
    return table(rows, columns)
