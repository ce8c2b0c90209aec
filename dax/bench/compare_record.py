"""What a comparison hands back, as types: `docs/schema/compare.json` is made from them, and no report is written that
does not fit them. Decibels are capped at quality.CAP_DB. Times are seconds, memory GiB, errors relative L2.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

SCHEMA = "dax.compare/1"


class Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Cell(Entry):
    """One clip under one arrangement, measured against the reference's clip of the same prompt, seed and noise.

    latent_error   relative L2 of the latents after every step;  cosine  of the last ones
    seconds, peak_gib   by stage: text, denoise, decode
    vmaf   mean over the frames, None unless every clip of the comparison has one (dax/bench/vmaf.py)
    """

    prompt: int
    psnr_db: float
    frame_psnr_db: list[float]
    ssim: float
    frame_ssim: list[float]
    latent_error: list[float]
    cosine: float
    computed: dict[str, int]
    seconds: dict[str, float]
    peak_gib: dict[str, float | None]
    vmaf: float | None = None


class Worst(Entry):
    """The frame that lies farthest from the reference's, over all prompts."""

    prompt: int
    frame: int
    psnr_db: float


class Fidelity(Entry):
    """Over all prompts. `psnr_p10_db` and `vmaf_p10` are what nine clips of ten do better than; `worst_prompt` has the
    lowest PSNR.
    """

    psnr_db: float
    psnr_p10_db: float
    psnr_worst_db: float
    ssim: float
    latent_error: float
    latent_snr_db: float
    cosine: float
    worst_prompt: int
    worst_frame: Worst
    vmaf: float | None = None
    vmaf_p10: float | None = None


class Variant(Entry):
    """One arrangement of the engine. `differs` holds the plan keys whose values are not the reference's.

    role       reference, floor (a harmless change), plan (asked for), knob (one part of an asked plan, alone)
    computed   forwards of a clip;  seconds  median over prompts;  peak_gib  largest over prompts
    speedup    of denoising over the reference's; None on a CPU for plans of GPU kernels, whose references run there
    work       share of the reference's work: forwards weighted with measured kernels, see dax/bench/costs.py
    judge      per cent of clips in which the tiny model's judge reads each part of the caption, None if not judged
    """

    name: str
    role: Literal["reference", "floor", "plan", "knob"]
    description: str
    plan: dict[str, Any]
    plan_hash: str
    differs: dict[str, Any]
    fallbacks: list[str]
    computed: dict[str, float]
    seconds: dict[str, float]
    peak_gib: dict[str, float | None]
    speedup: float | None
    work: float
    fidelity: Fidelity
    judge: dict[str, float] | None
    cells: list[Cell]


class Knob(Entry):
    """One part of a plan alone: the name of its variant, or why it cannot stand alone."""

    part: str
    variant: str | None
    refused: str | None
    latent_error: float | None
    psnr_db: float | None


class Attribution(Entry):
    """What each knob of a plan costs alone, and all together.

    if_independent   root of the sum of the knobs' squared errors: what all together would cost without interaction
    """

    plan: str
    prompts: list[int]
    knobs: list[Knob]
    together: float
    together_psnr_db: float
    if_independent: float | None


class Comparison(Entry):
    """All of it. `not_measured` says what is missing here, and why."""

    schema_version: Literal["dax.compare/1"]
    command: str
    date: str
    model: str
    model_digest: str
    device: str
    dtype: str
    versions: dict[str, str]
    request: dict[str, Any]
    prompts: list[str]
    seeds: list[int]
    floor: str
    variants: list[Variant]
    attribution: list[Attribution]
    not_measured: list[str]

    def variant(self, name: str) -> Variant:
        return next(variant for variant in self.variants if variant.name == name)

    @property
    def reference(self) -> Variant:
        return self.variants[0]

    @property
    def noise(self) -> Variant:
        return next(variant for variant in self.variants if variant.role == "floor")

    @property
    def scored(self) -> bool:
        """Whether there is a VMAF: of all clips or of none."""
        return self.reference.fidelity.vmaf is not None

    def shown(self) -> list[Variant]:
        """The reference and the plans asked for, in order."""
        return [variant for variant in self.variants if variant.role in ("reference", "plan")]
