"""Stage 3: the trained parts as one diffusers folder, the embedded model of DAX.

python -m training.tiny_wan.assemble --build build --out dax/models/tiny_wan
"""

import argparse
import shutil
from pathlib import Path

from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from transformers import T5Tokenizer, UMT5EncoderModel

from .transformer import FLOW_SHIFT

LIMIT_BYTES = 32_000_000


def assemble(build: Path, out: Path) -> WanPipeline:
    """Save the pipeline of the parts in `build` to `out` and return it; weights over 32 MB are refused."""
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=FLOW_SHIFT
    )
    pipe = WanPipeline(
        tokenizer=T5Tokenizer.from_pretrained(build / "tokenizer"),
        text_encoder=UMT5EncoderModel.from_pretrained(build / "text_encoder", dtype="auto"),
        transformer=WanTransformer3DModel.from_pretrained(build / "transformer", torch_dtype="auto"),
        vae=AutoencoderKLWan.from_pretrained(build / "vae", torch_dtype="auto"),
        scheduler=scheduler,
    )
    for part in ("scheduler", "tokenizer"):
        getattr(pipe, part).save_pretrained(out / part)
    for part in ("text_encoder", "transformer", "vae"):  # byte for byte, with the dtypes of training
        shutil.copytree(build / part, out / part, ignore=shutil.ignore_patterns("training.json"), dirs_exist_ok=True)
    pipe.save_config(out)
    size = sum(f.stat().st_size for f in out.rglob("*.safetensors"))
    if size > LIMIT_BYTES:
        raise SystemExit(f"{out}: {size} bytes of weights, {LIMIT_BYTES} is the limit")
    return pipe


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--build", type=Path, default=Path("build"))
    parser.add_argument("--out", type=Path, default=Path("dax/models/tiny_wan"))
    a = parser.parse_args()
    assemble(a.build, a.out)
