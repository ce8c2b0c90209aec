"""Stands in for libvmaf's programs: reads what they read and scores with a formula of its own.

Named `vmaf` or `ffmpeg` by whoever installs it. A frame's score is 100 less how far its luma is above the
reference's, on average.
`behave` in its folder makes it fail; every run that scored leaves a line in `runs`.
"""

import json
import re
import sys
import time
from pathlib import Path

HEADER = re.compile(rb"YUV4MPEG2 W(\d+) H(\d+) F25:1 Ip A1:1 C420jpeg XCOLORRANGE=LIMITED\n")


def install(folder: Path, name: str, behave: str = "") -> Path:
    """Put the stub into a folder that is to become PATH."""
    folder.mkdir(exist_ok=True)
    (folder / "behave").write_text(behave)
    program = folder / name
    program.write_text(f"#!{sys.executable}\n" + Path(__file__).read_text())
    program.chmod(0o755)
    return program


def runs(folder: Path) -> int:
    """How many clips were scored."""
    return len((folder / "runs").read_text().splitlines()) if (folder / "runs").exists() else 0


def lumas(path: str) -> list[bytes]:
    content = Path(path).read_bytes()
    header = HEADER.match(content)
    width, height = int(header[1]), int(header[2])
    size, start = len(b"FRAME\n") + width * height * 3 // 2, header.end()
    assert (len(content) - start) % size == 0, "half a frame"
    places = range(start, len(content), size)
    assert all(content[at : at + 6] == b"FRAME\n" for at in places)
    return [content[at + 6 : at + 6 + width * height] for at in places]


def files(name: str, given: list[str]) -> tuple[str, str, str]:
    """Reference, clip, scores, from a command line that the real program would take."""
    if name == "vmaf":
        assert "--json" in given and "version=vmaf_v0.6.1" in given[given.index("-m") + 1]
        assert int(given[given.index("--threads") + 1]) > 0
        return tuple(given[given.index(flag) + 1] for flag in ("-r", "-d", "-o"))
    options = given[given.index("-lavfi") + 1]
    assert options.startswith("libvmaf=model='version=vmaf_v0.6.1':log_fmt=json:") and given.count("-i") == 2
    first = given.index("-i")
    return given[given.index("-i", first + 1) + 1], given[first + 1], re.search("log_path=([^:]+)", options)[1]


def main() -> int:
    program, given = Path(sys.argv[0]), sys.argv[1:]
    behave = (program.parent / "behave").read_text()
    if given == ["--version"]:
        print("3.0.0", file=sys.stderr, end="")
    elif given == ["-version"]:
        print("ffmpeg version 7.1 Copyright (c) the developers\nbuilt with gcc")
    elif "-filters" in given:
        print(" ... vmafmotion V->V" if behave == "without" else " ... libvmaf VV->V")
    elif behave == "refuse":
        print("\nproblem loading model: it is not here\nand more", file=sys.stderr)
        return 1
    elif behave == "abort":
        import os

        os.abort()
    elif behave == "hang":
        time.sleep(60)
    else:
        reference, clip, scores = files(program.name, given)
        pairs = list(zip(lumas(reference), lumas(clip), strict=True))
        found = [100 - sum(max(b - a, 0) for a, b in zip(*pair)) / len(pair[0]) for pair in pairs]
        found = {"short": found[1:], "nan": [float("nan"), *found[1:]]}.get(behave, found)
        frames = [{"frameNum": i, "metrics": {"vmaf": score}} for i, score in enumerate(found)]
        Path(scores).write_text("half a f" if behave == "torn" else json.dumps({"version": "3", "frames": frames}))
        with (program.parent / "runs").open("a") as file:
            file.write("scored\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
