"""Imports of torch and diffusers in less time, in a process that is DAX's own: a command, a rank."""

import atexit
import gc
import sys
from contextlib import contextmanager


@contextmanager
def importing():
    """Python looks for no garbage inside, and afterwards never again among what is there then.

    Modules are no garbage, and torch and diffusers make half a million objects: looking through them over and over is a
    quarter of their import, and a look at all of them would be due again whenever a model is built.
    Nothing happens where diffusers is there already (a process with models may have garbage worth finding) or where
    the collector is off. Never around a model; and a user's process is left alone, whose garbage is not ours to keep.
    """
    if "diffusers" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
        atexit.register(gc.unfreeze)  # at its end Python takes modules down in order only if the collector sees them
