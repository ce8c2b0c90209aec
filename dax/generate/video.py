"""The output file: complete and decodable, or not there.

Frames are written beside the target under a name of this process, read back, then linked into place, which fails if
someone else was first. `.mp4` through PyAV, `.npz` raw frames, `.png` one frame or a contact sheet. The job's record
travels in the file under the key `dax`. Rows 38 to 43 of docs/faults.md.
"""

import json
import os
import re
import stat
from contextlib import contextmanager
from pathlib import Path

from dax.errors import DaxError
from dax.parallel.launch import process_exists

SUFFIXES = (".mp4", ".npz", ".png")
KEY = "dax"
MAX_NAME = 255 - len(".dax-4194304.part.mp4")  # bytes
SHEET_FRAMES = 16


def default_name(prompt: str, seed: int, plan_hash: str) -> str:
    """outputs/<up to 40 letters and digits of the prompt>-s<seed>-<8 digits of the plan's hash>.mp4, always ASCII."""
    slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40].strip("-") or "clip"
    return f"outputs/{slug}-s{seed}-{plan_hash[:8]}.mp4"


def check_target(path: Path, overwrite: bool, suffixes: tuple[str, ...] = SUFFIXES) -> None:
    """Refuse, before a model is loaded, what could not be written at the end; make the folder if its parent exists.

    DaxError("cannot_write") names the path. Temporary files that dead runs left for this very name are removed.
    """
    if path.suffix not in suffixes:
        raise DaxError("cannot_write", f"{path}: unknown suffix {path.suffix!r}; known: {', '.join(suffixes)}")
    if len(os.fsencode(path.name)) > MAX_NAME:
        raise DaxError("cannot_write", f"{path}: the name has more than {MAX_NAME} bytes")
    try:
        folder = path.parent
        if not folder.exists():
            if not folder.parent.is_dir():
                raise DaxError("cannot_write", f"{path}: there is no folder {folder.parent}")
            folder.mkdir(exist_ok=True)
        if not folder.is_dir():
            raise DaxError("cannot_write", f"{path}: {folder} is not a folder")
        check_free(path, overwrite)
        remove_stale(path)
        with part_file(path) as part:
            part.touch()
    except OSError as error:
        raise DaxError("cannot_write", f"{path}: {error.strerror or error}") from None


def check_free(path: Path, overwrite: bool) -> None:
    """DaxError if something stands at the path that may not be replaced. A symbolic link counts as itself."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(mode) and not stat.S_ISLNK(mode):
        raise DaxError("cannot_write", f"{path}: is a {kind_of(mode)}, never replaced")
    if stat.S_ISLNK(mode) and path.exists() and not path.is_file():
        raise DaxError("cannot_write", f"{path}: links to a {kind_of(path.stat().st_mode)}, never replaced")
    if not overwrite:
        raise DaxError("cannot_write", f"{path}: exists; pass --overwrite or another name")


def kind_of(mode: int) -> str:
    return "folder" if stat.S_ISDIR(mode) else "device" if stat.S_ISCHR(mode) or stat.S_ISBLK(mode) else "special file"


def part_of(path: Path, pid: int) -> Path:
    return path.with_name(f".{path.stem}.dax-{pid}.part{path.suffix}")


def remove_stale(path: Path) -> None:
    """Remove temporary files of this target whose process is gone."""
    pattern = re.compile(re.escape(f".{path.stem}.dax-") + r"(\d+)" + re.escape(f".part{path.suffix}") + "$")
    for other in path.parent.iterdir():
        match = pattern.match(other.name)
        if match and not process_exists(int(match[1])):
            other.unlink(missing_ok=True)


@contextmanager
def part_file(path: Path):
    """The temporary path beside `path`; whatever ends the block, nothing is left there."""
    part = part_of(path, os.getpid())
    try:
        yield part
    finally:
        part.unlink(missing_ok=True)


def write(path: Path, frames, fps: int, record: dict, overwrite: bool = False) -> None:
    """Write a clip so that `path` is complete or untouched.

    frames  [T, H, W, 3] uint8
    record  JSON-ready, stored under the key `dax`
    DaxError("cannot_write") when it cannot be written or does not read back.
    """
    text = json.dumps(record)
    writer = {".mp4": write_mp4, ".npz": write_npz, ".png": write_png}[path.suffix]
    try:
        with part_file(path) as part:
            writer(part, frames, fps, text)
            check_readable(part, frames, text)
            flush(part)
            place(part, path, overwrite)
    except OSError as error:  # PyAV's errors are OSErrors too
        raise DaxError("cannot_write", f"{path}: {error.strerror or error}") from None


def place(part: Path, path: Path, overwrite: bool) -> None:
    """Give the finished file its name at once. Without `overwrite` the loser of a race is refused."""
    if overwrite:
        check_free(path, overwrite)
        os.replace(part, path)
        return
    try:
        os.link(part, path)
    except FileExistsError:
        raise DaxError("cannot_write", f"{path}: appeared meanwhile; pass --overwrite or another name") from None
    except OSError:  # a file system without hard links
        check_free(path, overwrite)
        os.rename(part, path)


def flush(part: Path) -> None:
    descriptor = os.open(part, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_mp4(part: Path, frames, fps: int, text: str) -> None:
    """H.264, 4:2:0, constant quality 16."""
    import av

    options = {"movflags": "use_metadata_tags+faststart"}
    with av.open(str(part), "w", format="mp4", options=options) as container:
        container.metadata[KEY] = text
        stream = container.add_stream("libx264", rate=fps, options={"crf": "16", "preset": "medium"})
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def write_npz(part: Path, frames, fps: int, text: str) -> None:
    import numpy as np

    with part.open("wb") as file:
        np.savez_compressed(file, frames=frames, fps=np.int64(fps), **{KEY: np.array(text)})


def write_png(part: Path, frames, fps: int, text: str) -> None:
    """One frame as it is; more as a sheet of up to 16 of them, evenly spaced, rows of four."""
    from PIL import Image, PngImagePlugin

    info = PngImagePlugin.PngInfo()
    info.add_itxt(KEY, text)
    Image.fromarray(contact_sheet(frames)).save(part, format="PNG", pnginfo=info)


def contact_sheet(frames):
    """[T, H, W, 3] -> [rows * H, columns * W, 3] uint8; cells without a frame are black."""
    import numpy as np

    shown = frames[np.linspace(0, len(frames) - 1, min(len(frames), SHEET_FRAMES)).round().astype(int)]
    columns = min(len(shown), 4)
    rows = -(-len(shown) // columns)
    count, height, width, channels = shown.shape
    sheet = np.zeros((rows * columns, height, width, channels), np.uint8)
    sheet[:count] = shown
    return sheet.reshape(rows, columns, height, width, channels).swapaxes(1, 2).reshape(rows * height, -1, channels)


def check_readable(part: Path, frames, text: str) -> None:
    """DaxError unless the finished file gives back every frame and the record."""
    shape = decoded_shape(part)
    expected = frames.shape if part.suffix != ".png" else contact_sheet(frames).shape
    if tuple(shape) != tuple(expected) or json.dumps(read_record(part)) != text:
        raise DaxError("cannot_write", f"{part}: reads back as {list(shape)} instead of {list(expected)}")


def decoded_shape(path: Path) -> tuple[int, ...]:
    """[T, H, W, 3] of a clip, [H, W, 3] of an image, by decoding all of it."""
    if path.suffix == ".mp4":
        import av

        with av.open(str(path)) as container:
            sizes = [(frame.height, frame.width) for frame in container.decode(video=0)]
        return (len(sizes), *sizes[0], 3) if sizes else (0,)
    if path.suffix == ".npz":
        import numpy as np

        with np.load(path, allow_pickle=False) as saved:
            return saved["frames"].shape
    from PIL import Image

    with Image.open(path) as image:
        image.load()
        return (image.height, image.width, len(image.getbands()))


def read_record(path: Path) -> dict:
    """The record a clip was written with. DaxError("bad_request") when the file is none of DAX's."""
    if path.suffix not in SUFFIXES:
        raise DaxError("bad_request", f"{path}: unknown suffix {path.suffix!r}; known: {', '.join(SUFFIXES)}")
    try:
        text = read_text(path)
    except FileNotFoundError:
        raise DaxError("bad_request", f"{path}: no such file") from None
    except Exception as error:  # whatever a decoder says of a file that is none
        raise DaxError("bad_request", f"{path}: cannot be read: {str(error).splitlines()[0]}") from None
    try:
        record = json.loads(text) if text else None
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise DaxError("bad_request", f"{path}: holds no record of DAX")
    return record


def read_text(path: Path) -> str | None:
    if not path.is_file():
        raise FileNotFoundError(path)
    if path.suffix == ".mp4":
        import av

        with av.open(str(path)) as container:
            return container.metadata.get(KEY)
    if path.suffix == ".npz":
        import numpy as np

        with np.load(path, allow_pickle=False) as saved:
            return str(saved[KEY]) if KEY in saved else None
    from PIL import Image

    with Image.open(path) as image:
        image.load()
        return image.text.get(KEY)
