"""`dax bench video`: the whole denoising loop, the pipeline's own with its solver, on random weights at real sizes.

No text encoder and no decoder: embeddings are random, the result stays a latent. Every step is timed, so that a step
cache shows: what a computed and a predicted step take, and the loop against its share of an uncached one.
"""

import time
from dataclasses import asdict, dataclass
from statistics import median

from dax.bench import report
from dax.bench.model import blocks_of, build, facts_of, pipeline
from dax.bench.size import checked_size, named
from dax.bench.timing import Reading, Sensors, sensor, summarise
from dax.errors import DaxError
from dax.facts import Facts

UNCACHED_STEPS = 3  # of the loop without a cache, after one that warms up
COLUMNS = {
    "what": "what",
    "steps": "steps",
    "forwards": "forwards",
    "seconds": "s",
    "ms_per_step": "ms/step",
    "sm_mhz": "SM MHz",
    "watts": "W",
}


def bench(
    model: str | None,
    size,
    plan: str,
    steps: int | None = None,
    num_layers: int | None = None,
    device: str | None = None,
    log=print,
) -> dict:
    """The record of one loop under a plan and of some steps of it without the step cache.

    DaxError("bad_request") for a plan without a step cache, or too few steps to tell.
    """
    import torch

    from dax.hardware import machine
    from dax.optimize import optimize
    from dax.plan import Plan

    facts, device = facts_of(model or "tiny"), machine(device).device
    if facts.num_images:
        raise DaxError("bad_request", f"bench video: {facts.name} starts from an image: dax bench forward knows it")
    if facts.control_layers:
        raise DaxError("bad_request", f"bench video: {facts.name} takes a control video: dax bench forward knows it")
    pixels = checked_size(facts, size)
    steps = facts.defaults.steps if steps is None else steps
    if Plan.load(plan).cache.policy == "none":
        raise DaxError("bad_request", f"bench video: plan {plan} has no step cache; dax bench forward times a forward")
    if steps <= UNCACHED_STEPS:
        raise DaxError("bad_request", f"--steps {steps}: at least {UNCACHED_STEPS + 1}")
    layers = blocks_of(facts, num_layers)
    second = [build(facts, None, device, layers).cpu() for _ in range(facts.num_experts - 1)]  # optimize() fetches it
    pipe = pipeline([build(facts, None, device, layers), *second], facts)
    loop = Loop(pipe, facts, asdict(pixels), steps, device)
    log(f"{facts.name}: {layers} blocks, {steps} steps, on {device}")
    with torch.no_grad():
        engine = optimize(pipe, plan, linear={"keep_original": "none"})  # nothing is undone
        log(engine.summary())
        if device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats()  # of the loop, not of building random weights
        gated = [(x, x.forward) for x in (pipe.transformer, pipe.transformer_2) if x is not None]
        for (transformer, _), expert in zip(gated, engine.gate.experts):  # the same kernels, ungated
            transformer.forward = expert.forward
        uncached = loop.run(UNCACHED_STEPS + 1)
        for transformer, forward in gated:
            transformer.forward = forward
        cached = loop.run(steps)
    ran = engine.gate.last
    if ran is None:
        raise DaxError("check_failed", "bench video: the loop did not reach its end")
    return report.record(
        "video",
        device,
        **named(facts, pixels),
        num_blocks=layers,
        weights="random",
        plan=engine.plan.model_dump(),
        plan_hash=engine.plan.hash(),
        fallbacks=list(engine.fallbacks),
        made_by=ran.plan.made_by,
        mask=ran.plan.mask(),
        computed=ran.computed,
        peak_gib=torch.cuda.max_memory_allocated() / 2**30 if device.startswith("cuda") else None,
        **figures(ran, uncached, cached),
    )


def figures(ran, uncached: "Times", cached: "Times") -> dict:
    """Rows for people, and how far the loop's time is from its computed share of an uncached one."""
    each = median(uncached.seconds[1:])  # the first warms up
    steps, mask = len(cached.seconds), ran.plan.mask()
    by = {letter: [s for s, m in zip(cached.seconds, mask) if m == letter] for letter in "10"}
    share = sum(ran.computed.values()) / (2 * steps)
    total = sum(cached.seconds)

    def row(what: str, seconds: list[float], forwards: int, reading) -> dict:
        each_ms = 1e3 * sum(seconds) / len(seconds) if seconds else None
        return {
            "what": what,
            "steps": len(seconds),
            "forwards": forwards,
            "seconds": sum(seconds),
            "ms_per_step": each_ms,
            **asdict(reading),
        }

    return {
        "rows": [
            row("uncached steps", uncached.seconds[1:], 2 * len(uncached.seconds[1:]), uncached.reading),
            row("computed steps", by["1"], sum(ran.computed.values()), cached.reading),
            row("predicted steps", by["0"], 0, cached.reading),
            row("the loop", cached.seconds, sum(ran.computed.values()), cached.reading),
        ],
        "uncached_step_s": each,
        "computed_share": share,
        "expected_s": share * steps * each,
        "loop_s": total,
        "off_pct": 100 * (total / (share * steps * each) - 1),
        "steps_s": cached.seconds,
    }


@dataclass
class Times:
    """Seconds of each step, the device waited for, and the card's sensors meanwhile."""

    seconds: list[float]
    reading: Reading


class Loop:
    """The pipeline's loop on fixed random inputs."""

    def __init__(self, pipe, facts: Facts, size: dict, steps: int, device: str):
        import torch

        generator = torch.Generator(device).manual_seed(0)
        gaussian = lambda *shape: torch.randn(*shape, generator=generator, device=device)
        text = gaussian(2, facts.text_tokens, facts.text_dim).bfloat16()
        self.pipe, self.device = pipe, device
        self.arguments = {
            "prompt_embeds": text[:1],
            "negative_prompt_embeds": text[1:],
            "latents": gaussian(1, *facts.latent_shape(**size)),
            "num_inference_steps": steps,
            "guidance_scale": facts.defaults.guidance_scale,
            "guidance_scale_2": facts.defaults.guidance_scale_2,
            "output_type": "latent",
            **size,
        }

    def run(self, most: int) -> Times:
        """The first `most` steps of the loop. DaxError("check_failed") if the latents end up not finite."""
        seconds, start = [], 0.0

        def step_done(pipe, step, timestep, tensors):
            nonlocal start
            self.wait()
            now = time.perf_counter()
            seconds.append(now - start)
            start = now
            pipe._interrupt = len(seconds) == most
            return tensors

        self.wait()
        with Sensors(sensor(self.device) if self.device.startswith("cuda") else None) as sensors:
            start = time.perf_counter()
            latents = self.pipe(callback_on_step_end=step_done, **self.arguments).frames
        if not latents.isfinite().all():
            raise DaxError("check_failed", "bench video: the latents are not finite")
        return Times(seconds, summarise(sensors.rows))

    def wait(self) -> None:
        import torch

        if self.device.startswith("cuda"):
            torch.cuda.synchronize()
