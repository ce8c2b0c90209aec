"""Static scales: the largest input each linear layer sees while a model runs, kept in one small versioned file.

The file names the model it was measured on by a digest, and is refused for another.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from dax.errors import DaxError
from dax.quant.apply import linears
from dax.quant.scheme import match

VERSION = 1
SAMPLES = 64  # values of each weight that enter the digest


@dataclass(frozen=True)
class Scales:
    """What calibration found: `amax` {layer: largest magnitude of its input}, and the digest of the model."""

    model: str
    amax: dict[str, float]
    version: int = VERSION

    def save(self, path: "str | Path") -> None:
        """Write it as JSON; fp32 values come back bit for bit. DaxError("cannot_write") if the path refuses."""
        try:
            Path(path).write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")
        except OSError as error:
            raise DaxError("cannot_write", f"scales {path}: {error.strerror}") from None

    @classmethod
    def load(cls, path: "str | Path") -> "Scales":
        """DaxError("bad_request") for a file that is not one of this version."""
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DaxError("bad_request", f"scales {path}: {error}") from None
        if not isinstance(found, dict) or found.get("version") != VERSION or set(found) != {"model", "amax", "version"}:
            raise DaxError("bad_request", f"scales {path}: not a file of static scales, version {VERSION}")
        wrong = [k for k, v in found["amax"].items() if type(v) not in (int, float) or not 0 < v < float("inf")]
        if wrong:
            raise DaxError("bad_request", f"scales {path}: {wrong[0]} = {found['amax'][wrong[0]]!r} is no magnitude")
        return cls(**found)

    @property
    def digest(self) -> str:
        """sha256 (hex) of the content: what a plan's hash uses instead of the path."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def check(self, module: nn.Module) -> None:
        """DaxError("bad_model") unless they were measured on this model, before it was quantised."""
        if (found := digest(module)) != self.model:
            raise DaxError(
                "bad_model", f"static scales are of model {self.model[:12]}, this is {found[:12]}: calibrate again"
            )


def calibrate(module: nn.Module, rules: "Mapping[str, str] | str", forward: Callable[[], object]) -> Scales:
    """Run `forward()` once with observers on the layers that the rules quantise; returns their static scales.

    forward   runs the module on what it will see in use: a few real steps of several prompts
    Every rank of an initialised torch.distributed gets the same scales. The module is left as it was.
    DaxError("bad_request") if a layer was never reached, ("check_failed") if an input was not finite.
    """
    layers = linears(module)
    names = sorted(match(layers, {"*": rules} if isinstance(rules, str) else rules))
    seen: dict[str, torch.Tensor] = {}

    def observe(name):
        def hook(_, args):
            amax = torch.linalg.vector_norm(args[0].detach(), torch.inf).float()
            seen[name] = torch.maximum(seen[name], amax) if name in seen else amax

        return hook

    hooks = [layers[name].register_forward_pre_hook(observe(name)) for name in names]
    try:
        with torch.no_grad():
            forward()
    finally:
        for hook in hooks:
            hook.remove()
    unseen = [name for name in names if name not in seen]
    if unseen:
        raise DaxError("bad_request", f"calibrate: {len(unseen)} layers were never run, the first is {unseen[0]}")
    amax = torch.stack([seen[name] for name in names])
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(amax, torch.distributed.ReduceOp.MAX)
    for name, value in zip(names, amax.tolist()):
        if not 0 < value < float("inf"):
            raise DaxError("check_failed", f"calibrate: the largest input of {name} is {value}")
    return Scales(digest(module), dict(zip(names, amax.tolist())))


def digest(module: nn.Module) -> str:
    """sha256 (hex) of a model: its linear layers' names and shapes and 64 evenly spaced values of each weight.

    The values are taken in bf16, so that loading the same checkpoint in another dtype gives the same digest.
    """
    parts = hashlib.sha256()
    for name, layer in sorted(linears(module).items()):
        weight = layer.weight.detach().flatten()
        step = max(1, len(weight) // SAMPLES)
        sample = weight[::step][:SAMPLES]
        sample = sample.to(torch.bfloat16).view(torch.int16) if sample.is_floating_point() else sample
        parts.update(f"{name} {list(layer.weight.shape)} {sample.tolist()}\n".encode())
    return parts.hexdigest()
