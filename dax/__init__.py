"""DAX: Diffusion Accelerated eXecution. An inference acceleration engine for diffusion transformers.

    engine = dax.optimize(pipe, plan="exact")      # engine.summary(), engine.undo()

Names are imported when they are first used: `import dax` prints nothing, changes nothing and needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dax import attention, quant
    from dax.errors import DaxError
    from dax.models.tiny import load_tiny
    from dax.optimize import optimize
    from dax.plan import Plan

__version__ = "0.1.0"
__all__ = ["DaxError", "Plan", "attention", "load_tiny", "optimize", "quant"]

HOMES = {"DaxError": "dax.errors", "Plan": "dax.plan", "load_tiny": "dax.models.tiny"}
MODULES = ("attention", "optimize", "quant")  # `dax.optimize` is a module that can be called, see there


def __getattr__(name: str):
    if name in HOMES:
        return getattr(import_module(HOMES[name]), name)
    if name in MODULES:
        return import_module(f"dax.{name}")
    raise AttributeError(f"module 'dax' has no attribute {name!r}")


def __dir__():
    return sorted([*__all__, "__version__"])
