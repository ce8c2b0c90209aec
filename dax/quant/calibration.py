"""Static scales: the largest input each linear layer sees while a model runs."""

from collections.abc import Callable, Mapping

import torch
from torch import nn

from dax.errors import DaxError
from dax.quant.layers import digest, linears
from dax.quant.scales import Scales
from dax.quant.scheme import match


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
