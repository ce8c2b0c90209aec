"""`dax compare`: what plans cost and what they save, clip by clip, against the unoptimised run and its noise floor.

The story of a comparison: settle prompts and plans, look up which cells are finished, run the others with one model,
then add up. Every plan gets the same prompts, seeds and noise. What each arrangement is: compare_variants.py; how a
clip is run: compare_run.py; what comes out: compare_record.py.
"""

from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

from dax.bench import costs, quality
from dax.bench.compare_cells import Cells
from dax.bench.compare_record import SCHEMA, Attribution, Cell, Comparison, Fidelity, Knob, Variant, Worst
from dax.bench.compare_run import Runner, keys_of, versions
from dax.bench.compare_variants import Arrangement, Split, arrangements, differences
from dax.bench.judge import judge_clips
from dax.bench.prompts import default_prompts, read_prompts
from dax.bench.vmaf import vmaf_clips
from dax.generate import settle
from dax.generate.request import check_memory, check_whole, make_request
from dax.generate.steps import checkpoint_of, schedule


@dataclass(frozen=True)
class Job:
    """What `dax compare` was asked for. `given` holds the request's fields that were stated, but for the prompt.

    attribute   how many of the prompts each knob is run on alone; 0 leaves attribution out
    """

    plans: tuple[str, ...]
    output: Path
    given: dict
    prompts: str | None = None
    model: str | None = None
    attribute: int = 4
    device: str | None = None
    strict: bool = False
    command: str = "dax compare"


def compare(job: Job, log=lambda text: None, ready=lambda: None) -> tuple[Comparison, dict[str, list]]:
    """(the Comparison, {name: its clips [T, H, W, 3] uint8, one per prompt that it ran}).

    ready   called once everything asked is known to be possible, before the model is loaded

    DaxError before anything is loaded for bad plans, prompts, sizes or models. A cell that is finished in the output
    folder is not run again, so a comparison that was cut off goes on where it stopped. Costs plans x prompts clips.
    """
    checked = settle.check_model(job.model)
    name = job.model or "tiny"
    prompts = read_prompts(job.prompts or default_prompts(name))
    check_whole("attribute", job.attribute, 0, 10_000)
    seed = job.given.get("seed") or 0
    requests = [
        make_request(checked.facts, {**job.given, "prompt": prompt, "seed": seed + index})[0]
        for index, prompt in enumerate(prompts)
    ]

    import torch

    from dax.hardware import machine
    from dax.resolve import resolve

    here = machine(job.device)
    dtype = torch.bfloat16 if here.device == "cuda" else torch.float32
    dtype_name = str(dtype).removeprefix("torch.")
    weights = checked.parameters * dtype.itemsize
    check_memory(checked.facts, requests[0], weights, dtype.itemsize, here.memory_gib)
    checkpoint = checkpoint_of(checked.folder, checked.facts)

    def resolved(plan):
        found = resolve(plan, checked.facts, here, job.strict, dtype_name, checkpoint)
        schedule(found.plan.cache, found.calibration, checked.facts, requests[0], checkpoint)
        return found

    knobs, head_dim = job.attribute > 0, checked.facts.head_dim
    found, splits = arrangements(list(job.plans), resolved, here, dtype_name, head_dim, knobs)
    common = {"model": checked.digest, "device": here.name, "dtype": dtype_name, "versions": versions(here)}
    ready()
    runner = Runner(checked, here.device, dtype, job.strict, log)
    cells, clips, scored_by, not_scored = run_all(runner, found, requests, job, common, log)
    judged, not_judged = judge_clips(prompts, {each.name: clips[each.name] for each in found if each.role != "knob"})
    variants = [variant(each, found[0], cells, judged.get(each.name), checked.facts, here.device) for each in found]
    not_measured = [why for why in (not_scored, not_judged) if why]
    shared = {key: value for key, value in asdict(requests[0]).items() if key not in ("prompt", "seed")}
    comparison = Comparison(
        schema_version=SCHEMA,
        command=job.command,
        date=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        model=name,
        model_digest=checked.digest,
        device=here.name,
        dtype=dtype_name,
        versions=versions(here) | ({"VMAF": scored_by} if scored_by else {}),
        request=shared,
        prompts=prompts,
        seeds=[request.seed for request in requests],
        floor=found[1].description,
        variants=variants,
        attribution=[attribution(split, {each.name: each for each in variants}) for split in splits],
        not_measured=not_measured,
    )
    return comparison, clips


def run_all(runner: Runner, found: list[Arrangement], requests: list, job: Job, common: dict, log):
    """({name: its Cells}, {name: its clips}, what scored their VMAF, or why nothing did) of every arrangement.

    Finished cells come from the folder, the others are run.
    """
    store, exact = Cells(job.output / "cells"), found[0]
    chosen = {each.name: requests[: job.attribute] if each.role == "knob" else requests for each in found}
    keys = {each.name: keys_of(each, exact, chosen[each.name], common) for each in found}
    pairs = {key: reference for some in keys.values() for key, reference in zip(some, keys[exact.name])}
    waiting = [key for key, reference in pairs.items() if store.read(key, key == reference) is None]
    log(f"{len(found)} arrangements, {len(requests)} prompts: {len(waiting)} clips to run")
    if waiting:
        runner.warm_up(requests[0])
    for each in found:
        runner.run_missing(store, each, chosen[each.name], keys[each.name], keys[exact.name])
    scores, scored_by, not_scored = vmaf_clips(store, pairs, log)
    cells = {
        name: [
            store.read(key).model_copy(update={"prompt": index, "vmaf": scores.get(key)})
            for index, key in enumerate(some)  # a kept cell may be of a list of prompts where its own stood elsewhere
        ]
        for name, some in keys.items()
    }
    clips = {name: [store.frames(key) for key in some] for name, some in keys.items()}
    return cells, clips, scored_by, not_scored


def variant(each: Arrangement, reference: Arrangement, cells: dict[str, list[Cell]], judge, facts, device) -> Variant:
    """One arrangement, added up over its prompts."""
    own, exact = cells[each.name], cells[reference.name]
    forwards, all_forwards = (sum(sum(cell.computed.values()) for cell in some[: len(own)]) for some in (own, exact))
    middle = {stage: median(cell.seconds[stage] for cell in own) for stage in own[0].seconds}
    theirs = median(cell.seconds["denoise"] for cell in exact[: len(own)])
    return Variant(
        name=each.name,
        role=each.role,
        description=each.description,
        plan=each.plan.model_dump(mode="json"),
        plan_hash=each.plan.hash(),
        differs=differences(each.plan, reference.plan),
        fallbacks=list(each.resolved.fallbacks),
        computed={branch: sum(cell.computed[branch] for cell in own) / len(own) for branch in own[0].computed},
        seconds=middle,
        peak_gib={stage: largest(cell.peak_gib[stage] for cell in own) for stage in own[0].peak_gib},
        speedup=None if costs.runs_references(each.plan, device) else theirs / middle["denoise"],
        work=costs.cost(each.plan, forwards, reference.plan, all_forwards, facts.num_layers),
        fidelity=fidelity(own),
        judge=judge,
        cells=own,
    )


def fidelity(cells: list[Cell]) -> Fidelity:
    """The figures of all prompts together."""
    clips, scores = ([getattr(cell, figure) for cell in cells] for figure in ("psnr_db", "vmaf"))
    error = sum(cell.latent_error[-1] for cell in cells) / len(cells)
    frames = [
        Worst(prompt=cell.prompt, frame=frame, psnr_db=value)
        for cell in cells
        for frame, value in enumerate(cell.frame_psnr_db)
    ]
    return Fidelity(
        psnr_db=sum(clips) / len(clips),
        psnr_p10_db=quality.p10(clips),
        psnr_worst_db=min(clips),
        ssim=sum(cell.ssim for cell in cells) / len(cells),
        latent_error=error,
        latent_snr_db=quality.snr_db(error),
        cosine=sum(cell.cosine for cell in cells) / len(cells),
        worst_prompt=min(cells, key=lambda cell: cell.psnr_db).prompt,
        worst_frame=min(frames, key=lambda worst: worst.psnr_db),
        vmaf=None if None in scores else sum(scores) / len(scores),
        vmaf_p10=None if None in scores else quality.p10(scores),
    )


def attribution(split: Split, variants: dict[str, Variant]) -> Attribution:
    """What each knob cost alone beside all together, on the same prompts."""
    count = min(len(variants[name].cells) for name in [split.plan, *split.knobs.values()])
    costs = {part: fidelity(variants[name].cells[:count]) for part, name in split.knobs.items()}
    together = fidelity(variants[split.plan].cells[:count])
    knobs = [
        Knob(part=part, variant=name, refused=None, latent_error=costs[part].latent_error, psnr_db=costs[part].psnr_db)
        for part, name in split.knobs.items()
    ]
    knobs += [
        Knob(part=part, variant=None, refused=why, latent_error=None, psnr_db=None)
        for part, why in split.refused.items()
    ]
    return Attribution(
        plan=split.plan,
        prompts=list(range(count)),
        knobs=knobs,
        together=together.latent_error,
        together_psnr_db=together.psnr_db,
        if_independent=sum(cost.latent_error**2 for cost in costs.values()) ** 0.5 if costs else None,
    )


def largest(values) -> float | None:
    known = [value for value in values if value is not None]
    return max(known) if known else None
