"""How far one clip lies from another made with the same seed: the figures of dax compare, on two runs of your own."""

import dax
from dax.bench import quality
from dax.generate.run import Job, generate

REQUEST = {"prompt": "a large red circle moves right over a black background", "steps": 8, "seed": 1}
SIZE = {"height": 64, "width": 64, "num_frames": 9}


def frames(folder: str, name: str, *sets: str):
    import numpy as np

    record = generate(Job(REQUEST | SIZE, f"{folder}/{name}.npz", sets=sets))
    print(name, record["computed"], f"{record['seconds']['denoise']} s")
    return np.load(record["path"])["frames"]


if __name__ == "__main__":
    import tempfile

    print("DAX", dax.__version__)
    with tempfile.TemporaryDirectory() as folder:
        exact = frames(folder, "exact")
        skips = frames(folder, "skips", "cache.policy=mask", "cache.mask=11011011")
    print(f"PSNR {quality.psnr(exact, skips):.1f} dB, worst frame {min(quality.frame_psnr(exact, skips)):.1f} dB")
    similar = quality.frame_ssim(exact, skips)
    print(f"SSIM {sum(similar) / len(similar):.4f}")
