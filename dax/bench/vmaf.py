"""VMAF of clips against the reference's, by a program of libvmaf that is on this machine; no package of DAX brings one.

Two programs know it: `vmaf`, libvmaf's own, and an `ffmpeg` built with it. Both read raw pictures from YUV4MPEG2 files
and write one JSON with a score for every frame, 0 to 100. A clip held against itself gets less than 100 where nothing
moves, as in every clip's first frame.
Source: Li, Aaron, Katsavounidis, Moorthy, Manohara, "Toward a practical perceptual video quality metric", 2016.
"""

import json
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from math import isfinite
from pathlib import Path

from dax.bench.child import ending
from dax.bench.compare_cells import Cells
from dax.bench.quality import check_same_shape
from dax.errors import DaxError

MODEL = "vmaf_v0.6.1"  # libvmaf's default: trained on 1080p seen from three times its height
TIMEOUT_S = 600  # of one clip; 81 frames of 720p take two cores about 10 s
REFERENCE, CLIP, SCORES = "reference.y4m", "clip.y4m", "scores.json"  # in a folder of their own
ARGUMENTS = {
    "vmaf": f"-q -r {REFERENCE} -d {CLIP} -m version={MODEL} --json -o {SCORES} --threads {{threads}}",
    "ffmpeg": f"-nostdin -v error -i {CLIP} -i {REFERENCE} -f null - -lavfi "
    f"libvmaf=model='version={MODEL}':log_fmt=json:log_path={SCORES}:n_threads={{threads}}",
}
VERSION = {"vmaf": "--version", "ffmpeg": "-version"}
BRINGS_ONE = "`pip install imageio-ffmpeg` brings one"


@dataclass(frozen=True)
class Tool:
    """A program that computes VMAF. `name` says model, program and version: scores of two names are never mixed."""

    kind: str
    path: str
    name: str


def find_tool() -> Tool:
    """`vmaf` or an `ffmpeg` with libvmaf from PATH, else the ffmpeg of the package imageio-ffmpeg.

    DaxError("unsupported") says what was found instead and what to install.
    """
    without = []
    for kind, path in programs():
        if kind == "ffmpeg" and " libvmaf " not in said(path, "-hide_banner", "-filters"):
            without.append(path)
            continue
        version = said(path, VERSION[kind]).partition("Copyright")[0].partition("\n")[0].strip()
        return Tool(kind, path, f"{MODEL} by {kind} {version.removeprefix('ffmpeg version').strip()}")
    found = f" ({', '.join(without)}: built without it)" if without else ""
    raise DaxError("unsupported", f"no `vmaf` and no `ffmpeg` with libvmaf is here{found}; {BRINGS_ONE}")


def programs() -> list[tuple[str, str]]:
    """(kind, path) of everything that may know VMAF, best first."""
    found = {path: kind for kind in ARGUMENTS if (path := shutil.which(kind))}
    if find_spec("imageio_ffmpeg"):
        from imageio_ffmpeg import get_ffmpeg_exe

        try:
            found.setdefault(get_ffmpeg_exe(), "ffmpeg")
        except RuntimeError:  # the package without its program
            pass
    return [(kind, path) for path, kind in found.items()]


def said(path: str, *arguments: str) -> str:
    """What a program prints; nothing if it cannot be run."""
    try:
        ended = subprocess.run([path, *arguments], capture_output=True, text=True, errors="replace", timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return ended.stdout + ended.stderr


def vmaf_clips(store: Cells, pairs: dict[str, str], log) -> tuple[dict[str, float], str | None, str | None]:
    """({key: VMAF of its clip}, by what, None), or ({}, None, why not): every clip has a score or none has.

    pairs   {key of a finished cell: key of its reference's}

    Computed from the clips the store holds, whenever they were made, and kept beside them under the tool's name.
    """
    try:
        tool = find_tool()
        log(f"VMAF of {len(pairs)} clips, {tool.name}")
        scores = {
            key: store.figure(key, tool.name, partial(vmaf, tool, store.frames(reference), store.frames(key)))
            for key, reference in pairs.items()
        }
    except DaxError as error:
        return {}, None, f"VMAF: {error}"
    return scores, tool.name, None


def vmaf(tool: Tool, reference, other) -> float:
    """Mean VMAF over the frames of a clip [T, H, W, 3] uint8, 0 to 100. One run of the tool, on two files of
    1.5 T H W bytes.

    DaxError("check_failed") with the tool's own words if it fails, takes longer than TIMEOUT_S or skips frames.
    """
    check_same_shape(reference, other)
    command = [tool.path, *ARGUMENTS[tool.kind].format(threads=len(os.sched_getaffinity(0))).split()]
    try:
        with tempfile.TemporaryDirectory(prefix="dax-vmaf-") as folder:
            write_y4m(Path(folder, REFERENCE), reference)
            write_y4m(Path(folder, CLIP), other)
            ended = subprocess.run(
                command, cwd=folder, capture_output=True, text=True, errors="replace", timeout=TIMEOUT_S
            )
            if ended.returncode:
                raise ValueError(ending(ended, 0))
            scores = read_scores(Path(folder, SCORES), len(other))
    except subprocess.TimeoutExpired:
        why = f"took more than {TIMEOUT_S} s"
    except (OSError, ValueError) as error:
        why = str(error)
    else:
        return sum(scores) / len(scores)
    frames, height, width = other.shape[:3]
    raise DaxError("check_failed", f"{tool.path} on clips of {height} x {width} x {frames}: {why}")


def read_scores(path: Path, frames: int) -> list[float]:
    """Every frame's score. ValueError unless there are as many as frames, all of them numbers."""
    try:
        scores = [float(frame["metrics"]["vmaf"]) for frame in json.loads(path.read_text())["frames"]]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError("wrote no scores that can be read") from None
    if len(scores) != frames or not all(map(isfinite, scores)):
        raise ValueError(f"{sum(map(isfinite, scores))} scores for {frames} frames")
    return scores


def write_y4m(path: Path, frames) -> None:
    """A clip [T, H, W, 3] uint8 with even sides as YUV4MPEG2: 4:2:0, 8 bits, BT.709, limited range.

    Luma is 16 to 235, chroma 16 to 240, the mean of the four pixels it stands for. The stated rate of 25 a second
    changes no score. ValueError for other shapes.
    """
    import numpy as np

    if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8 or any(n % 2 for n in frames.shape[1:3]):
        raise ValueError(f"y4m: {frames.dtype} {list(frames.shape)} is not [T, even, even, 3] of uint8")
    _, height, width, _ = frames.shape
    with path.open("wb") as file:
        file.write(f"YUV4MPEG2 W{width} H{height} F25:1 Ip A1:1 C420jpeg XCOLORRANGE=LIMITED\n".encode())
        for frame in frames:
            red, green, blue = np.moveaxis(frame.astype(np.float32) / 255, -1, 0)
            luma = 0.2126 * red + 0.7152 * green + 0.0722 * blue
            planes = [16 + 219 * luma]
            for difference in ((blue - luma) / 1.8556, (red - luma) / 1.5748):  # Cb, Cr: -0.5 to 0.5
                planes.append(128 + 224 * difference.reshape(height // 2, 2, width // 2, 2).mean((1, 3)))
            file.write(b"FRAME\n" + b"".join(plane.round().astype(np.uint8).tobytes() for plane in planes))
