"""What `dax tune` is asked for, checked before anything runs."""

from dataclasses import dataclass
from pathlib import Path

from dax.bench import quality
from dax.errors import DaxError
from dax.generate.request import check_real, check_whole
from dax.generate.video import check_target

MOST_SECONDS = 1e7
MOST_RUNS = 10_000


@dataclass(frozen=True)
class Job:
    """What `dax tune` was asked for: a fidelity, a time, or both.

    min_psnr      dB that the mean over prompts must hold against exact, p10 no more than 3 under; None: any
    max_seconds   of the denoising loop: share of exact's work x the seconds that exact's loop takes here; None: any
    few           prompts on which knobs are measured alone; `max_runs`: whole runs
    presets       the presets are measured on the held-out prompts too
    """

    min_psnr: float | None
    output: Path
    given: dict
    model: str | None = None
    prompts: str | None = None
    held_out: str | None = None
    calibration: str = "auto"
    few: int = 3
    max_runs: int = 10
    device: str | None = None
    overwrite: bool = False
    command: str = "dax tune"
    max_seconds: float | None = None
    presets: bool = False

    @property
    def wanted(self) -> str:
        """As it would be typed."""
        flags = (("--min-psnr", self.min_psnr), ("--max-seconds", self.max_seconds))
        return " ".join(f"{name} {value:g}" for name, value in flags if value is not None)


def check(job: Job) -> None:
    """DaxError("bad_request") for what cannot be asked, ("cannot_write") where no plan could be written at the end."""
    if job.min_psnr is None and job.max_seconds is None:
        raise DaxError("bad_request", "say what must hold: --min-psnr DB, --max-seconds S or both")
    if job.min_psnr is not None:
        check_real("min_psnr", job.min_psnr, 0, quality.CAP_DB)
    if job.max_seconds is not None:
        check_real("max_seconds", job.max_seconds, 0, MOST_SECONDS)
    check_whole("few", job.few, 1, MOST_RUNS)
    check_whole("max_runs", job.max_runs, 1, MOST_RUNS)
    check_target(job.output, job.overwrite, (".yaml", ".yml"))
