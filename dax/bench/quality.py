"""How far one clip, or one latent, lies from another: PSNR, SSIM, relative L2, SNR, cosine. numpy alone.

Every figure compares with a reference run of the same prompt, seed and noise, so it says how faithful a plan is to the
unoptimised model, not how beautiful the clip is. A figure means little without the noise floor beside it: what a
harmless change, another exact kernel, does to the same clip (dax/bench/compare.py measures it).
"""

import numpy as np

CAP_DB = 100.0  # of PSNR and SNR: at and above, two things are as good as identical, and means stay finite
WINDOW = 7  # pixels, of SSIM
WORST_SHARE = 10  # per cent: p10 is what nine clips of ten do better than


def psnr(reference, other) -> float:
    """Peak signal-to-noise ratio in dB of 8-bit pictures or clips, 255 being the peak; inf for identical ones.

    reference, other   uint8, of one shape
    Source: 10 log10(255^2 / MSE), as scikit-image's peak_signal_noise_ratio.
    """
    check_same_shape(reference, other)
    error = np.mean(np.square(np.subtract(reference, other, dtype=np.float64)))
    return float("inf") if error == 0 else float(10 * np.log10(255.0**2 / error))


def frame_psnr(reference, other) -> list[float]:
    """PSNR of every frame of two clips [T, H, W, 3] uint8, in dB, at most CAP_DB."""
    check_same_shape(reference, other)
    return [capped(psnr(a, b)) for a, b in zip(reference, other)]


def ssim(reference, other) -> float:
    """Mean structural similarity of two pictures [H, W, C] uint8, from -1 to 1.

    Every window of 7 x 7 pixels that lies inside, each channel alone, the sample covariance, K1 .01 and K2 .03: the
    defaults of scikit-image's structural_similarity, which it equals. Costs five box filters of the picture.
    Source: Wang, Bovik, Sheikh, Simoncelli, IEEE Transactions on Image Processing 13(4), 2004.
    """
    check_same_shape(reference, other)
    if min(reference.shape[:2]) < WINDOW:
        raise ValueError(f"ssim: pictures of {list(reference.shape)} are smaller than its window of {WINDOW}")
    x, y = np.asarray(reference, np.float64), np.asarray(other, np.float64)
    mean_x, mean_y = box(x), box(y)
    sample = WINDOW**2 / (WINDOW**2 - 1)
    var_x, var_y = sample * (box(x * x) - mean_x**2), sample * (box(y * y) - mean_y**2)
    covariance = sample * (box(x * y) - mean_x * mean_y)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    top = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return float((top / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).mean())


def frame_ssim(reference, other) -> list[float]:
    """SSIM of every frame of two clips [T, H, W, 3] uint8."""
    check_same_shape(reference, other)
    return [ssim(a, b) for a, b in zip(reference, other)]


def box(x):
    """Mean over every window of WINDOW x WINDOW pixels that lies inside: [H, W, C] -> [H - 6, W - 6, C]."""
    for axis in (0, 1):
        total = np.cumsum(x, axis=axis)
        total = np.concatenate([np.zeros_like(total.take([0], axis)), total], axis)
        size = total.shape[axis]
        high, low = (total.take(range(a, b), axis) for a, b in ((WINDOW, size), (0, size - WINDOW)))
        x = (high - low) / WINDOW
    return x


def relative_l2(reference, other) -> float:
    """|other - reference| / |reference| over all elements."""
    check_same_shape(reference, other)
    a, b = np.asarray(reference, np.float64), np.asarray(other, np.float64)
    return float(np.linalg.norm(b - a) / max(np.linalg.norm(a), 1e-300))


def snr_db(error: float) -> float:
    """Signal-to-noise ratio in dB of a relative L2 error, at most CAP_DB. Higher is closer."""
    return CAP_DB if error <= 0 else capped(-20 * float(np.log10(error)))


def cosine(reference, other) -> float:
    """Cosine of the angle between two tensors taken as vectors."""
    check_same_shape(reference, other)
    a, b = (np.asarray(x, np.float64).ravel() for x in (reference, other))
    return float(a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-300))


def capped(decibels: float) -> float:
    """dB, at most CAP_DB."""
    return min(decibels, CAP_DB)


def p10(values) -> float:
    """The value that one in ten falls below, between neighbours."""
    return float(np.percentile(np.asarray(values, np.float64), WORST_SHARE))


def check_same_shape(reference, other) -> None:
    if np.shape(reference) != np.shape(other):
        raise ValueError(f"cannot compare {list(np.shape(reference))} with {list(np.shape(other))}")
