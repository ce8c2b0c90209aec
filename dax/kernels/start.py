"""How a kernel starts, and how kernels are compiled side by side before their first start.

Triton compiles a kernel when it is first launched, so those of a block would compile one after the other. Its passes
and the compilers it calls leave Python free, so threads do them all in about the time of the slowest.
"""

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from dax.kernels.language import triton

AHEAD: ContextVar[list | None] = ContextVar("kernels compiled ahead", default=None)  # None: kernels run
MOST_THREADS = 16


def start(kernel, grid: tuple, *args, **constants) -> None:
    """Launch a kernel on the current stream; inside `compiled_ahead` only have it compiled."""
    ahead = AHEAD.get()
    if ahead is None:
        kernel[grid](*args, **constants)
    else:
        ahead.append(kernel.warmup(*args, grid=grid, **constants))


@contextmanager
def compiled_ahead():
    """Inside, operations compile their kernels for the current GPU, all at once, and run none: outputs stay unwritten.

    Yields the list that the kernels are added to; afterwards they are loaded. No kernel is compiled for a number of
    tokens, so a few stand for any number. What Triton's cache on disk has is only loaded. Raises what the compiler
    raised.
    """
    kernels = []
    token = AHEAD.set(kernels)
    device = torch.cuda.current_device()  # of this thread: a new one would begin at 0
    try:
        with ThreadPoolExecutor(MOST_THREADS, initializer=torch.cuda.set_device, initargs=(device,)) as pool:
            with triton.AsyncCompileMode(pool):
                yield kernels
            list(pool.map(load, {id(kernel): kernel for kernel in kernels}.values()))
    finally:
        AHEAD.reset(token)


def load(kernel) -> None:
    """Put a compiled kernel on the GPU and build what launches it, which takes a C compiler in some Tritons."""
    kernel = kernel.result() if hasattr(kernel, "result") else kernel
    _ = kernel.run  # a property that does it when first asked
