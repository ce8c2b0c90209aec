"""VMAF: what libvmaf's programs are given and say, and that a comparison without them differs in nothing else."""

import numpy as np
import pytest

from dax.bench import compare_run, vmaf
from dax.bench.compare import Job, compare
from dax.bench.compare_cells import Cells
from dax.bench.compare_files import text
from dax.bench.compare_page import page
from dax.errors import DaxError
from tests.vmaf_stub import install, runs

# Y, Cb, Cr of colour bars in BT.709, limited range, as broadcasting standards list them
BARS = {
    (255, 255, 255): (235, 128, 128),
    (255, 255, 0): (219, 16, 138),
    (0, 255, 255): (188, 154, 16),
    (0, 255, 0): (173, 42, 26),
    (255, 0, 255): (78, 214, 230),
    (255, 0, 0): (63, 102, 240),
    (0, 0, 255): (32, 240, 118),
    (0, 0, 0): (16, 128, 128),
}


def clips(noise: float, shape=(5, 64, 80, 3)):
    """Something that moves, and the same with noise."""
    frames, height, width, _ = shape
    t, y, x, c = np.ogrid[:frames, :height, :width, :3]
    clip = 127 + 80 * np.sin(x / 7 + t / 2 + c) + 30 * np.cos(y / 5 + c)
    other = clip + noise * np.random.default_rng(0).standard_normal(clip.shape)
    return clip.round().astype(np.uint8), np.clip(other, 0, 255).round().astype(np.uint8)


@pytest.fixture
def path(tmp_path, monkeypatch):
    """A PATH of one empty folder, and no package that brings a program."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(vmaf, "find_spec", lambda name: None)
    return tmp_path / "bin"


def test_colours_and_sizes_in_the_file_are_those_of_bt709(tmp_path):
    frames = np.zeros((len(BARS), 4, 6, 3), np.uint8)
    for frame, colour in zip(frames, BARS):
        frame[:] = colour
    vmaf.write_y4m(tmp_path / "bars.y4m", frames)
    header, *pictures = (tmp_path / "bars.y4m").read_bytes().split(b"FRAME\n")
    assert header == b"YUV4MPEG2 W6 H4 F25:1 Ip A1:1 C420jpeg XCOLORRANGE=LIMITED\n"
    for picture, (y, cb, cr) in zip(pictures, BARS.values(), strict=True):
        assert picture == bytes([y] * 24 + [cb] * 6 + [cr] * 6)


def test_ffmpeg_reads_the_file_as_the_same_pictures(tmp_path):
    import av

    clip, _ = clips(0)
    vmaf.write_y4m(tmp_path / "clip.y4m", clip)
    with av.open(str(tmp_path / "clip.y4m")) as container:
        frames = [frame.to_ndarray() for frame in container.decode(video=0)]
    assert len(frames) == 5 and frames[0].shape == (96, 80)
    luma = 16 + 219 / 255 * (clip @ np.array([0.2126, 0.7152, 0.0722]))
    assert np.abs(np.stack(frames)[:, :64] - luma).max() <= 0.51


@pytest.mark.parametrize("shape", [(2, 33, 32, 3), (2, 32, 33, 3), (2, 32, 32, 4), (32, 32, 3)])
def test_pictures_that_fit_no_such_file_are_refused(tmp_path, shape):
    with pytest.raises(ValueError, match="is not"):
        vmaf.write_y4m(tmp_path / "clip.y4m", np.zeros(shape, np.uint8))
    with pytest.raises(ValueError, match="float32"):
        vmaf.write_y4m(tmp_path / "clip.y4m", np.zeros((2, 32, 32, 3), np.float32))
    assert not (tmp_path / "clip.y4m").exists()


@pytest.mark.parametrize(
    ("kind", "name"), [("vmaf", "vmaf_v0.6.1 by vmaf 3.0.0"), ("ffmpeg", "vmaf_v0.6.1 by ffmpeg 7.1")]
)
def test_a_program_is_asked_for_the_clip_against_the_reference(path, kind, name):
    install(path, kind)
    tool = vmaf.find_tool()
    assert (tool.kind, tool.name) == (kind, name)
    reference, other = clips(12.0)
    weights = np.array([0.2126, 0.7152, 0.0722])
    lumas = [(16 + 219 / 255 * (each @ weights)).round() for each in (reference, other)]
    above = np.maximum(lumas[1] - lumas[0], 0).mean()
    assert above > 2 and vmaf.vmaf(tool, reference, other) == pytest.approx(100 - above, abs=0.01)
    dark, bright = (np.full((2, 32, 32, 3), value, np.uint8) for value in (130, 150))
    assert vmaf.vmaf(tool, bright, dark) == 100 and vmaf.vmaf(tool, dark, bright) == 100 - 17


def test_what_is_here_decides_and_what_is_not_is_said(path):
    with pytest.raises(DaxError, match="no `vmaf` and no `ffmpeg` with libvmaf is here; `pip install imageio-ffmpeg`"):
        vmaf.find_tool()
    install(path, "ffmpeg", "without")
    with pytest.raises(DaxError, match=r"bin/ffmpeg: built without it\); `pip install"):
        vmaf.find_tool()
    install(path, "vmaf", "without")
    assert vmaf.find_tool().kind == "vmaf"


@pytest.mark.parametrize(
    ("behave", "says"),
    [
        ("refuse", "problem loading model: it is not here$"),
        ("abort", "ended by SIGABRT$"),
        ("hang", "took more than 0.5 s$"),
        ("short", "4 scores for 5 frames$"),
        ("nan", "4 scores for 5 frames$"),
        ("torn", "wrote no scores that can be read$"),
    ],
)
def test_a_program_that_fails_is_one_line(path, monkeypatch, behave, says):
    monkeypatch.setattr(vmaf, "TIMEOUT_S", 0.5 if behave == "hang" else 30)
    install(path, "vmaf", behave)
    with pytest.raises(DaxError, match=f"{path}/vmaf on clips of 64 x 80 x 5: {says}"):
        vmaf.vmaf(vmaf.find_tool(), *clips(1.0))


def test_a_figure_is_measured_once_and_anew_by_another_name_or_from_a_damaged_file(tmp_path):
    store, answers = Cells(tmp_path), iter((1.0, 2.0, 3.0))
    store.path("key").mkdir()

    def ask(name):
        return store.figure("key", name, lambda: next(answers))

    assert [ask("a"), ask("a"), ask("b"), ask("a")] == [1, 1, 2, 1]
    (store.path("key") / "figures.json").write_text('{"a": nul')
    assert [ask("a"), ask("a")] == [3, 3]


@pytest.mark.fault(67)
def test_a_comparison_is_scored_from_its_stored_clips_or_not_at_all(path, tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("a red circle moves right over a black background\n")
    given = {"height": 32, "width": 48, "num_frames": 5, "steps": 2}
    job = Job(("exact",), tmp_path / "report", given, str(tmp_path / "prompts.txt"), attribute=0)
    without, shown = compare(job)
    assert without.not_measured[0].startswith("VMAF: no `vmaf`") and "VMAF" not in without.versions
    monkeypatch.setattr(compare_run.stages, "load", lambda *_: pytest.fail("a stored clip was run again"))

    install(path, "vmaf")
    scored, _ = compare(job)
    exact, floor = (each.fidelity for each in scored.variants)
    assert exact.vmaf == 100 > floor.vmaf > 90 and floor.vmaf == scored.noise.cells[0].vmaf == floor.vmaf_p10
    assert scored.versions["VMAF"] == "vmaf_v0.6.1 by vmaf 3.0.0" and "VMAF" not in str(scored.not_measured)
    assert "| VMAF " in text(scored) and "<th>VMAF</th>" in page(scored, shown)
    assert runs(path) == 2 and compare(job)[0].variants == scored.variants and runs(path) == 2
    (path / "vmaf").unlink()
    install(path, "ffmpeg")
    assert compare(job)[0].versions["VMAF"].endswith("ffmpeg 7.1") and runs(path) == 4, "never another's score"
    (path / "ffmpeg").unlink()

    next((job.output / "cells").glob("*/figures.json")).unlink()  # one score of two is lost, and the program fails
    install(path, "vmaf", "refuse")
    failed, _ = compare(job)
    assert "problem loading model" in failed.not_measured[0]
    (path / "vmaf").unlink()
    for other in (failed, compare(job)[0]):
        assert [each.fidelity.vmaf for each in other.variants] == [None, None]
        assert other.variants == without.variants
        assert "VMAF" not in text(other) and "<th>VMAF</th>" not in page(other, shown)


def real_tool():
    try:
        return vmaf.find_tool()
    except DaxError:
        return None


@pytest.mark.skipif(real_tool() is None, reason="no program of libvmaf here")
def test_the_real_program_agrees_that_more_noise_is_worse():
    tool, reference = real_tool(), clips(0)[0]
    itself, *noisy = (vmaf.vmaf(tool, reference, clips(noise)[1]) for noise in (0, 10, 40))
    assert 97 < itself < 100, "a first frame has no motion"
    assert itself > noisy[0] > noisy[1] > 20
    assert vmaf.vmaf(tool, clips(40)[1], reference) != pytest.approx(noisy[1], abs=1), "which is the reference matters"
    with pytest.raises(DaxError, match="on clips of 16 x 16 x 5: "):
        vmaf.vmaf(tool, *clips(1.0, (5, 16, 16, 3)))
