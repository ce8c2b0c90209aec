"""The figures of fidelity equal scikit-image's, and a different clip never looks like the same one."""

import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from dax.bench import quality


def pictures(noise: float, shape=(41, 57, 3), seed=0):
    rng = np.random.default_rng(seed)
    rows = np.linspace(0, 6, shape[0])[:, None, None]
    columns = np.linspace(0, 9, shape[1])[None, :, None]
    picture = 127 + 100 * np.sin(rows + columns) * np.linspace(0.3, 1, shape[2])
    other = picture + noise * rng.standard_normal(shape)
    return picture.round().astype(np.uint8), np.clip(other, 0, 255).round().astype(np.uint8)


@pytest.mark.parametrize("noise", [0.3, 5.0, 80.0])
@pytest.mark.parametrize("shape", [(41, 57, 3), (7, 64, 3), (128, 128, 1)])
def test_psnr_and_ssim_equal_those_of_scikit_image(noise, shape):
    a, b = pictures(noise, shape)
    assert quality.psnr(a, b) == pytest.approx(peak_signal_noise_ratio(a, b, data_range=255), abs=1e-6)
    theirs = structural_similarity(a, b, channel_axis=-1, data_range=255)
    assert quality.ssim(a, b) == pytest.approx(theirs, abs=1e-6)


def test_flat_and_opposite_pictures():
    black, white = np.zeros((16, 16, 3), np.uint8), np.full((16, 16, 3), 255, np.uint8)
    assert quality.psnr(black, white) == 0  # and not the wrap-around of unsigned bytes
    assert quality.ssim(black, white) == pytest.approx(
        structural_similarity(black, white, channel_axis=-1, data_range=255), abs=1e-6
    )


def test_identical_is_capped_only_where_means_are_taken():
    a, _ = pictures(1.0)
    assert quality.psnr(a, a) == float("inf")
    assert quality.frame_psnr(a[None], a[None]) == [quality.CAP_DB]
    assert quality.ssim(a, a) == pytest.approx(1)
    assert quality.snr_db(0.0) == quality.CAP_DB


def test_errors_of_latents():
    rng = np.random.default_rng(0)
    a = rng.standard_normal((1, 16, 5, 8, 8)).astype(np.float32)
    noise = rng.standard_normal(a.shape)
    b = a + 0.1 * noise * np.linalg.norm(a) / np.linalg.norm(noise)
    assert quality.relative_l2(a, b) == pytest.approx(0.1, rel=1e-6)
    assert quality.snr_db(0.1) == pytest.approx(20)
    assert quality.cosine(a, b) == pytest.approx(1 / (1 + 0.1**2) ** 0.5, abs=2e-3)
    assert quality.cosine(a, -a) == pytest.approx(-1)


def test_clips_of_other_sizes_cannot_be_compared():
    clip = np.zeros((3, 16, 16, 3), np.uint8)
    for figure in (quality.psnr, quality.frame_psnr, quality.frame_ssim, quality.relative_l2, quality.cosine):
        with pytest.raises(ValueError, match=r"cannot compare \[3, 16, 16, 3\] with \[2, 16, 16, 3\]"):
            figure(clip, clip[:2])
    with pytest.raises(ValueError, match="smaller than its window"):
        quality.ssim(clip[0, :6], clip[0, :6])


def test_p10():
    assert quality.p10(range(11)) == 1
