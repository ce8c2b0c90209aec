"""The command of the first DAX, its flags and its manners, on this engine.

    torchrun --nproc_per_node=8 examples/wan_t2v_example.py --model_id Wan-AI/Wan2.1-T2V-14B-Diffusers \
        --height 720 --width 1280 --output_file dax.mp4 --sequence_parallel --int8_linear --overlap_comm \
        --enable_teacache --compile

ATTENTION_BACKEND is SAGE_ATTN, FLASH_ATTN (3 if installed, else 2) or TORCH_SDPA, which is also what unset means. As
there: guidance and flow shift of five, 16 frames per second, a warm-up of three steps, the output file replaced and its
folder made. `--model_id tiny` is the model that comes with DAX, at its own size unless one is given.
"""

import argparse
import os
import sys
import time
from pathlib import Path

ATTENTION = {"SAGE_ATTN": "sage", "FLASH_ATTN": "flash", "TORCH_SDPA": "sdpa"}
FPS, GUIDANCE, FLOW_SHIFT, WARM_UP_STEPS = 16, 5.0, 5.0, 3
SIZES = {"tiny": (128, 128, 17)}  # height, width, frames; every other model: 720, 1280, 81
PROMPTS = {"tiny": "a large yellow star moves up over a dark blue background"}
PROMPT = "A red fox trots through fresh snow at dawn, its breath visible, the camera following at its side."
NEGATIVE = "overexposed, static, blurred, subtitles, low quality, JPEG artifacts, deformed, extra fingers"


def parse(arguments=None):
    parser = argparse.ArgumentParser(description="Generate a video from a text prompt with Wan2.1")
    parser.add_argument("--model_id", default="Wan-AI/Wan2.1-T2V-14B-Diffusers", help="hub id, folder or tiny")
    parser.add_argument("--prompt", help="what the video shows")
    parser.add_argument("--negative_prompt", help="what it should not show")
    parser.add_argument("--height", type=int, help="pixels (720)")
    parser.add_argument("--width", type=int, help="pixels (1280)")
    parser.add_argument("--num_frames", type=int, help="frames (81)")
    parser.add_argument("--num_inference_steps", type=int, default=50, help="denoising steps")
    parser.add_argument("--output_file", default="output.mp4")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sequence_parallel", action="store_true", help="share the work among the ranks of torchrun")
    parser.add_argument("--int8_linear", action="store_true", help="linears in 8 bits")
    parser.add_argument("--overlap_comm", action="store_true", help="hide the exchange between ranks")
    parser.add_argument("--enable_teacache", action="store_true", help="predict steps by TeaCache, threshold 0.1")
    parser.add_argument("--compile", action="store_true", help="torch.compile")
    return parser.parse_args(arguments)


def plan_of(args, environment=os.environ):
    """The flags as a dax.Plan. DaxError("bad_request") for a backend nobody knows, or overlap without ranks."""
    from dax import DaxError, Plan
    from dax.errors import nearest

    backend = environment.get("ATTENTION_BACKEND", "TORCH_SDPA")
    if backend not in ATTENTION:
        raise DaxError("bad_request", f"ATTENTION_BACKEND={backend}: unknown{nearest(backend, ATTENTION)}")
    if args.overlap_comm and not args.sequence_parallel:
        raise DaxError("bad_request", "--overlap_comm needs --sequence_parallel: one rank exchanges nothing")
    wanted = {"attention.kernel": ATTENTION[backend], "blocks.fused": False}  # it ran the vendor's own blocks
    if args.sequence_parallel:
        wanted["parallel.overlap"] = "auto" if args.overlap_comm else 0
    if args.int8_linear:
        wanted["linear.scheme"] = "int8"
    if args.enable_teacache:
        wanted |= {"cache.policy": "teacache", "cache.threshold": 0.1, "cache.reuse": "residual"}
    if args.compile:
        wanted["compile"] = "blocks"
    return Plan.from_layers([("the flags", wanted)])[0]


def load(model_id: str, device: str):
    """The pipeline with the scheduler's flow shift at 5, in bf16 on a GPU; the VAE stays in fp32."""
    import torch

    from dax.generate import settle, stages

    checked = settle.check_model(model_id)
    pipe = stages.load(checked, device, torch.bfloat16 if device == "cuda" else torch.float32)
    stages.set_flow_shift(pipe, FLOW_SHIFT)
    return pipe


def main() -> None:
    args = parse()
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    log = print if rank == 0 else lambda *_, **__: None
    plan = plan_of(args)
    if rank > 0 and not args.sequence_parallel:
        return  # without --sequence_parallel every rank would make the same video

    import torch

    import dax
    from dax.generate.video import write

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if ranks > 1 and args.sequence_parallel:
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group("nccl" if device == "cuda" else "gloo")
    pipe = load(args.model_id, device)
    pipe.set_progress_bar_config(disable=rank > 0)
    engine = dax.optimize(pipe, plan, strict=True)
    log(engine.summary())
    if args.prompt is None:
        args.prompt = PROMPTS.get(args.model_id, PROMPT)
        log(f"Using default prompt: {args.prompt}")
    height, width, num_frames = SIZES.get(args.model_id, (720, 1280, 81))

    def video(steps: int):
        frames = pipe(
            prompt=args.prompt,
            negative_prompt=NEGATIVE if args.negative_prompt is None else args.negative_prompt,
            height=args.height or height,
            width=args.width or width,
            num_frames=args.num_frames or num_frames,
            guidance_scale=GUIDANCE,
            num_inference_steps=steps,
            generator=torch.Generator("cpu").manual_seed(args.seed),
        ).frames[0]
        if device == "cuda":
            torch.cuda.synchronize()
        return frames

    video(min(WARM_UP_STEPS, args.num_inference_steps))
    start = time.perf_counter()
    frames = video(args.num_inference_steps)
    log(f"Inference finished. Per prompt time:{time.perf_counter() - start:.2f}s")
    if rank == 0:
        path = Path(args.output_file)
        path.parent.mkdir(parents=True, exist_ok=True)
        record = {"prompt": args.prompt, "seed": args.seed, "plan": engine.plan.model_dump()}
        write(path, (frames * 255).round().astype("uint8"), FPS, record, overwrite=True)
        log(path)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    from dax import DaxError

    try:
        main()
    except DaxError as error:
        print(f"dax: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
