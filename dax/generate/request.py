"""What clip is wanted: one frozen Request, checked in full before anything heavy is imported.

`make_request` fills in what a model is meant for and refuses every value that would fail later, or, worse, succeed with
something else. Rows 1 to 15 of docs/faults.md.
"""

import math
from dataclasses import dataclass, fields

from dax.bench.roofline import device_weight_bytes, weight_bytes
from dax.errors import DaxError
from dax.facts import Facts
from dax.plan import Plan

MAX_PROMPT = 10_000  # characters
MAX_SIDE = 8192  # pixels
MAX_FRAMES = 100_001
MAX_STEPS = 1000
MAX_SEED = 2**63 - 1
MAX_FPS = 240
DECODER_ALIVE = 13  # activations of a decoder's full size at once: 20.2 GiB with the clip, 720p x 81 frames, an H200


@dataclass(frozen=True)
class Request:
    """One clip. Sizes in pixels and frames, fps in frames per second; the field names are those of the command line.

    guidance_scale_2   of the second expert, where the model has two; else None
    """

    prompt: str
    height: int
    width: int
    num_frames: int
    steps: int
    guidance_scale: float
    flow_shift: float
    fps: int
    negative_prompt: str = ""
    seed: int = 0
    guidance_scale_2: float | None = None


def request_fields(record: dict) -> dict:
    """The fields of a Request that a clip's record holds, or the flags of a command."""
    return {field.name: record[field.name] for field in fields(Request) if field.name in record}


def make_request(
    facts: Facts, given: dict, round: bool = False, allow_empty_prompt: bool = False
) -> tuple[Request, list[str]]:
    """(Request, warnings) of the given fields, the others as the model is meant to be used.

    A value of None counts as not given; a stated guidance_scale is both experts', unless the second's is stated too.
    `round` moves a size to the nearest one the model can make, and a warning says so. DaxError("bad_request") names
    the field, its value and the way out.
    """
    unknown = set(given) - {field.name for field in fields(Request)}
    if unknown:
        raise DaxError("bad_request", f"unknown request field {sorted(unknown)[0]!r}")
    stated = {name: value for name, value in given.items() if value is not None}
    values = {**vars(facts.defaults), **stated}
    if "prompt" not in values:
        raise DaxError("bad_request", "no prompt: say what the clip shows, or take that of an earlier clip with --from")
    check_text("prompt", values["prompt"])
    check_text("negative_prompt", values.get("negative_prompt", ""))
    if not values["prompt"].strip() and not allow_empty_prompt:
        raise DaxError("bad_request", "the prompt is empty: describe the clip, or pass --allow-empty-prompt")
    check_whole("seed", values.get("seed", 0), 0, MAX_SEED)
    check_whole("steps", values["steps"], 1, MAX_STEPS)
    check_whole("fps", values["fps"], 1, MAX_FPS)
    check_real("guidance_scale", values["guidance_scale"], 0, 100)
    if facts.num_experts == 2:
        if "guidance_scale" in stated or values["guidance_scale_2"] is None:
            values["guidance_scale_2"] = stated.get("guidance_scale_2", values["guidance_scale"])
        check_second_scale(values["guidance_scale"], values["guidance_scale_2"])
    elif "guidance_scale_2" in stated:
        raise DaxError("bad_request", f"guidance_scale_2: {facts.name} has one transformer; leave it out")
    check_real("flow_shift", values["flow_shift"], 0.01, 100)
    warnings = []
    for name, least, most, step, offset in (
        ("height", facts.size_multiple, MAX_SIDE, facts.size_multiple, 0),
        ("width", facts.size_multiple, MAX_SIDE, facts.size_multiple, 0),
        ("num_frames", 1, MAX_FRAMES, facts.vae_temporal, 1),
    ):
        value = values[name]
        check_whole(name, value, 1, most)
        below = (value - offset) // step * step + offset
        choices = [size for size in (below, below + step) if least <= size <= most]
        if value in choices:
            continue
        nearest = min(choices, key=lambda size: abs(size - value))
        if not round:
            rule = f"a multiple of {step}" + (f" plus {offset}" if offset else "")
            or_else = " or ".join(map(str, choices))
            raise DaxError("bad_request", f"{name} {value} must be {rule} (nearest {or_else}; --round picks one)")
        warnings.append(f"{name} {value} rounded to {nearest}")
        values[name] = nearest
    for name in ("guidance_scale", "guidance_scale_2", "flow_shift"):
        values[name] = None if values[name] is None else float(values[name])
    return Request(**values), warnings


def check_second_scale(first, second) -> None:
    """DaxError for a number that is none, or guidance that only the second expert is to have."""
    check_real("guidance_scale_2", second, 0, 100)
    if first <= 1 < second:
        raise DaxError(
            "bad_request",
            f"guidance_scale {first:g} means no guidance, of either expert: guidance_scale_2 {second:g} has no effect",
        )


def check_text(name: str, value) -> None:
    """DaxError for what is no text, holds characters no text has, or is too long to be a prompt."""
    if not isinstance(value, str):
        raise DaxError("bad_request", f"{name} must be text, not {type(value).__name__}")
    if len(value) > MAX_PROMPT:
        raise DaxError("bad_request", f"{name} has {len(value)} characters: at most {MAX_PROMPT}")
    if "\0" in value:
        raise DaxError("bad_request", f"{name} holds a NUL character: remove it")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise DaxError("bad_request", f"{name} is not valid Unicode: it holds a lone surrogate")


def check_whole(name: str, value, least: int, most: int) -> None:
    if type(value) is not int:
        raise DaxError("bad_request", f"{name} {value!r} must be a whole number")
    if not least <= value <= most:
        raise DaxError("bad_request", f"{name} {value} must lie from {least} to {most}")


def check_real(name: str, value, least: float, most: float) -> None:
    if type(value) not in (int, float) or not math.isfinite(value) or not least <= value <= most:
        raise DaxError("bad_request", f"{name} {value!r} must be a number from {least} to {most}")


def experts_bytes(facts: Facts, plan: Plan, itemsize: int, stored: bool = False) -> int:
    """The most bytes of transformers' weights on the device: of two experts, the first as loaded, or both as they run.

    itemsize   bytes per parameter as loaded
    stored     whether they are loaded in the plan's 8 bits
    """
    codes = weight_bytes(facts) - weight_bytes(facts, eight_bits=stored and plan.linear.scheme != "none")
    alone = facts.num_parameters * itemsize - codes * (itemsize - 1)
    if facts.num_experts == 1:
        return alone
    eight_bits, idle_on_host = plan.linear.scheme != "none", plan.offload == "experts"
    return max(alone, device_weight_bytes(facts, eight_bits, idle_on_host) * itemsize // 2)


@dataclass(frozen=True)
class Released:
    """Bytes of weights that a job gives back: the text encoder's once the text is read, the experts' after the loop.

    strips   ranks that decode together; they keep their experts meanwhile
    """

    text: int = 0
    experts: int = 0
    strips: int = 1


def memory_bytes(facts: Facts, request: Request, weights: int, itemsize: int, released: Released = Released()) -> int:
    """Estimate of the most memory the job needs at once: weights, with a block's or the decoder's peak.

    weights   bytes as loaded;  itemsize  bytes per activation
    """
    tokens = facts.tokens(request.height, request.width, request.num_frames)
    block = itemsize * tokens * (8 * facts.width + 2 * facts.ffn_dim)
    pixels = request.height * request.width
    decoder = 4 * pixels * 4 * 96 * DECODER_ALIVE
    clip = 3 * pixels * request.num_frames * (4 + 4 + 4 + 1)  # decoded, joined, scaled; then bytes
    looping = weights - released.text
    decoding = looping - released.experts + (decoder + clip) // released.strips
    return max(weights, looping + block, decoding)


def check_memory(
    facts: Facts,
    request: Request,
    weights: int,
    itemsize: int,
    memory_gib: float | None,
    released: Released = Released(),
) -> None:
    """DaxError("unsupported") if the estimate exceeds the memory there is. None: unknown, nothing to say."""
    need = memory_bytes(facts, request, weights, itemsize, released) / 2**30
    if memory_gib is not None and need > memory_gib:
        raise DaxError(
            "unsupported",
            f"{request.height}x{request.width}x{request.num_frames} needs about {need:.1f} GiB and there are "
            f"{memory_gib:.1f}: fewer frames, a smaller size, or a larger machine",
        )
