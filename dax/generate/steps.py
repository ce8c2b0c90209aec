"""What the step cache will do, told before a weight is read: by generate, to refuse early, and by explain, to show."""

from pathlib import Path

from dax.cache.artifact import Artifact
from dax.cache.checkpoint import TENSOR, folder_digest, joint_digest
from dax.cache.policy import Maker
from dax.cache.step_plan import Setting, flow_sigmas
from dax.facts import Facts
from dax.generate.checkpoint import check_dtypes, read_weights
from dax.plan import Cache


def checkpoint_of(folder: Path, facts: Facts) -> str:
    """The digest that a calibration of this checkpoint carries; DaxError("bad_model") if its weights cannot be read."""
    digests = []
    for part in ("transformer", "transformer_2")[: facts.num_experts]:
        tensors = read_weights(folder / part, "diffusion_pytorch_model")[0]
        check_dtypes({TENSOR: tensors[TENSOR]})
        digests.append(folder_digest(tensors[TENSOR].file, facts.num_layers))
    return joint_digest(digests)


def schedule(cache: Cache, calibration: Artifact | None, facts: Facts, request, checkpoint: str | None):
    """The StepPlan a resolved plan's cache gives for a request; None without a cache, or if it takes weights to know.

    request   a Request, or a model's Defaults: steps, flow_shift and guidance_scale count
    DaxError("bad_request") if it cannot serve the request.
    """
    if cache.policy == "none":
        return None
    setting = Setting(request.steps, None, request.flow_shift, request.guidance_scale, checkpoint)
    return Maker(cache, calibration, facts)(setting, flow_sigmas(request.steps, request.flow_shift))
