"""The embedded model: a small Wan that was really trained, in diffusers' folder layout, so that DAX runs anywhere."""

from pathlib import Path

from dax.errors import DaxError

FOLDER = Path(__file__).parent / "tiny_wan"


def load_tiny(device: str = "cpu", dtype=None):
    """The embedded tiny Wan as a diffusers WanPipeline.

    dtype     torch.float32 when None; the vendor's fp32 parts stay fp32 in any case
    DaxError("bad_model") if this installation lacks the weights.
    """
    if not (FOLDER / "model_index.json").is_file():
        raise DaxError("bad_model", f"the embedded model is missing ({FOLDER}): reinstall dax-engine")
    import torch
    from diffusers import WanPipeline

    pipe = WanPipeline.from_pretrained(FOLDER, dtype=dtype or torch.float32, local_files_only=True)
    return pipe.to(device)
