"""`dax generate`: a prompt, and a picture where the model takes one, to a clip. The work is in `dax.generate.run`."""

import json
from typing import Annotated

import typer

from dax.cli import options
from dax.cli.options import log


def command(
    prompt: Annotated[str | None, typer.Argument(help="what the clip shows")] = None,
    output: Annotated[str | None, typer.Option("-o", "--output", help=".mp4, .npz (frames) or .png (sheet)")] = None,
    model: options.Model = None,
    plan: options.Plan = None,
    sets: options.Sets = None,
    height: options.Height = None,
    width: options.Width = None,
    num_frames: options.NumFrames = None,
    steps: options.Steps = None,
    guidance_scale: options.GuidanceScale = None,
    flow_shift: options.FlowShift = None,
    negative_prompt: options.NegativePrompt = None,
    seed: options.Seed = None,
    fps: Annotated[int | None, typer.Option(help="frames per second of the file")] = None,
    from_clip: Annotated[
        str | None, typer.Option("--from", help="an earlier clip: its settings where nothing else is stated")
    ] = None,
    loras: Annotated[
        list[str] | None, typer.Option("--lora", metavar="FILE[:SCALE]", help="added to the weights, repeated")
    ] = None,
    image: Annotated[str | None, typer.Option(help="image-to-video: the first frame, a PNG, JPEG or WebP")] = None,
    last_image: Annotated[str | None, typer.Option(help="first-last-frame: the last frame")] = None,
    device: options.Device = None,
    gpus: Annotated[int, typer.Option(help="ranks on this machine, one GPU each")] = 1,
    overwrite: options.Overwrite = False,
    round: Annotated[bool, typer.Option("--round", help="move a size to the nearest the model can make")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="read all weights: finite, and as their digests say")
    ] = False,
    strict: options.Strict = False,
    min_psnr: Annotated[
        float | None,
        typer.Option(help="dB: refuse unless the plan is exact, or was measured to hold it: mean, and p10 3 dB under"),
    ] = None,
    allow_empty_prompt: Annotated[
        bool, typer.Option("--allow-empty-prompt", help="without a word, on purpose")
    ] = False,
    keep_frames_on_error: Annotated[
        str | None, typer.Option(help="where to save the frames (.npz) if the output cannot be written")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Generate a clip. Its path (or a JSON record) goes to stdout, progress to stderr."""
    from dax.generate.request import request_fields
    from dax.generate.run import Job, generate, last_line

    if model is None and from_clip is None:
        options.say_if_tiny(model)
    given = request_fields(locals())
    job = Job(
        given,
        output,
        model,
        plan,
        tuple(sets or ()),
        device,
        overwrite,
        round,
        verify,
        strict,
        allow_empty_prompt,
        keep_frames_on_error,
        from_clip,
        gpus,
        min_psnr,
        tuple(loras or ()),
        image,
        last_image,
    )
    record = generate(job, log)
    if record is None:  # a rank of torchrun's that is not the first
        return
    for warning in record["warnings"]:
        log(f"warning: {warning}")
    log(last_line(record))
    print(json.dumps(record) if as_json else record["path"])
