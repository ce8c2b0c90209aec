"""The output file: whole or absent, never someone else's, and it tells how it was made. Rows 38 to 43, 11, 14."""

import json
import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dax.errors import DaxError
from dax.generate import video

RECORD = {"prompt": "ein Stern \u2605 \U0001f600 \u05d0 ../../etc", "seed": 3}


def frames(count=5, height=32, width=48):
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


@pytest.mark.fault(11)
@pytest.mark.parametrize("suffix", video.SUFFIXES)
def test_a_clip_reads_back_with_its_record(tmp_path, suffix):
    path = tmp_path / f"clip{suffix}"
    video.write(path, frames(), 8, RECORD)
    assert video.read_record(path) == RECORD
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.fault(14)
@pytest.mark.parametrize("suffix", video.SUFFIXES)
def test_row_14_one_frame(tmp_path, suffix):
    path = tmp_path / f"clip{suffix}"
    video.write(path, frames(1), 8, RECORD)
    assert video.decoded_shape(path)[-3:] == (32, 48, 3)


def test_frames_in_npz_are_exact_and_a_smooth_mp4_is_close(tmp_path):
    smooth = np.broadcast_to(np.linspace(0, 255, 64, dtype=np.uint8)[None, None, :, None], (5, 64, 64, 3)).copy()
    video.write(tmp_path / "a.npz", smooth, 8, {})
    assert np.array_equal(np.load(tmp_path / "a.npz")["frames"], smooth)
    video.write(tmp_path / "a.mp4", smooth, 8, {})
    import av

    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.streams.video[0].average_rate == 8
        decoded = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert np.abs(decoded.astype(int) - smooth).mean() < 3


def test_the_sheet_shows_first_and_last_frame():
    clip = np.stack([np.full((8, 8, 3), value, np.uint8) for value in range(33)])
    sheet = video.contact_sheet(clip)
    assert sheet.shape == (32, 32, 3) and sheet[0, 0, 0] == 0 and sheet[-1, -1, 0] == 32


@pytest.mark.fault(38)
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("no/such/clip.mp4", "there is no folder"),
        ("file/clip.mp4", "is not a folder"),
        ("clip.avi", "unknown suffix '.avi'; known: .mp4, .npz, .png"),
        ("clip", "unknown suffix ''"),
        ("x" * 260 + ".mp4", "bytes"),
        ("/proc/clip.mp4", "/proc/clip.mp4"),
    ],
)
def test_row_38_an_impossible_output_is_refused_first(tmp_path, name, says):
    (tmp_path / "file").write_text("")
    with pytest.raises(DaxError) as caught:
        video.check_target(tmp_path / name, overwrite=True)
    assert caught.value.exit_code == 6 and says in str(caught.value)


@pytest.mark.fault(38)
def test_row_38_the_last_folder_is_made(tmp_path):
    video.check_target(tmp_path / "new" / "clip.mp4", overwrite=False)
    assert (tmp_path / "new").is_dir() and not os.listdir(tmp_path / "new")


@pytest.mark.fault(39)
@pytest.mark.parametrize("suffix", video.SUFFIXES)
@pytest.mark.parametrize("limit", [0, 4096])
def test_row_39_a_full_disk_leaves_nothing(tmp_path, suffix, limit):
    script = f"""
        import resource
        from pathlib import Path
        import numpy as np
        from dax.errors import DaxError
        from dax.generate import video
        clip = np.random.default_rng(0).integers(0, 256, (9, 64, 64, 3), dtype=np.uint8)
        resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
        try:
            video.write(Path("clip{suffix}"), clip, 8, {{}})
        except DaxError as error:
            raise SystemExit(error.exit_code)
    """
    environment = {**os.environ, "PYTHONPATH": str(Path(video.__file__).parents[2])}
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=tmp_path, env=environment, timeout=60)
    assert ended.returncode == 6
    assert os.listdir(tmp_path) == []


@pytest.mark.fault(40)
@pytest.mark.parametrize("suffix", [".npz", ".png"])
def test_row_40_of_two_writers_one_wins(tmp_path, suffix, monkeypatch):
    path = tmp_path / f"clip{suffix}"
    pids = iter(range(10**9, 10**9 + 8))
    monkeypatch.setattr(video.os, "getpid", lambda: next(pids))

    def attempt(seed):
        try:
            video.write(path, frames(), 8, {"seed": seed})
            return seed
        except DaxError as error:
            assert error.exit_code == 6
            return None

    with ThreadPoolExecutor(8) as pool:
        winners = [seed for seed in pool.map(attempt, range(8)) if seed is not None]
    assert len(winners) == 1 and video.read_record(path) == {"seed": winners[0]}
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.fault(41)
def test_row_41_what_exists_is_replaced_only_when_asked(tmp_path):
    path, other = tmp_path / "clip.npz", tmp_path / "other.npz"
    other.write_text("precious")
    path.symlink_to(other)
    with pytest.raises(DaxError, match="exists; pass --overwrite"):
        video.check_target(path, overwrite=False)
    video.check_target(path, overwrite=True)
    video.write(path, frames(), 8, RECORD, overwrite=True)
    assert not path.is_symlink() and video.read_record(path) == RECORD
    assert other.read_text() == "precious"


@pytest.mark.fault(41)
def test_row_41_a_device_or_a_folder_is_never_replaced(tmp_path):
    (tmp_path / "null.mp4").symlink_to("/dev/null")
    (tmp_path / "folder.mp4").mkdir()
    os.mkfifo(tmp_path / "pipe.mp4")
    for name in ("null.mp4", "folder.mp4", "pipe.mp4"):
        with pytest.raises(DaxError, match="never replaced") as caught:
            video.check_target(tmp_path / name, overwrite=True)
        assert caught.value.exit_code == 6
    assert Path("/dev/null").is_char_device()


@pytest.mark.fault(43)
def test_row_43_only_dead_runs_of_this_name_are_cleaned(tmp_path):
    path = tmp_path / "clip.mp4"
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    gone = video.part_of(path, dead.pid)
    kept = [
        video.part_of(path, os.getppid()),
        video.part_of(tmp_path / "other.mp4", dead.pid),
        tmp_path / ".x.part.mp4",
    ]
    for file in (gone, video.part_of(path, 10**20), *kept):  # no process has such a number
        file.write_text("")
    video.check_target(path, overwrite=False)
    assert sorted(tmp_path.iterdir()) == sorted(kept)


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x00\x00\x00\x18ftypmp42"])
@pytest.mark.parametrize("suffix", video.SUFFIXES)
def test_what_is_no_clip_is_refused_in_one_line(tmp_path, content, suffix):
    path = tmp_path / f"clip{suffix}"
    path.write_bytes(content)
    with pytest.raises(DaxError) as caught:
        video.read_record(path)
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)


def test_a_foreign_image_has_no_record(tmp_path):
    from PIL import Image

    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(DaxError, match="holds no record"):
        video.read_record(tmp_path / "a.png")


@pytest.mark.fault(11)
@settings(max_examples=300, deadline=None)
@given(prompt=st.text(max_size=400), seed=st.integers(0, 2**63 - 1))
def test_row_11_the_default_name_stays_in_its_folder(prompt, seed):
    name = video.default_name(prompt, seed, "0123456789abcdef")
    folder, _, file = name.partition("/")
    assert folder == "outputs" and "/" not in file and ".." not in file
    assert name.isascii() and len(file) < 100
    assert json.loads(json.dumps({"prompt": prompt})) == {"prompt": prompt}
