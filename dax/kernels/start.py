"""How a kernel starts, how kernels are compiled side by side before their first start, and how a GPU begins.

Triton compiles a kernel when it is first launched, so those of a block would compile one after the other. Its passes
and the compilers it calls leave Python free, so threads do them all in about the time of the slowest.
"""

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from threading import Thread

import torch

from dax.kernels.language import triton

AHEAD: ContextVar[list | None] = ContextVar("kernels compiled ahead", default=None)  # None: kernels run
MOST_THREADS = 16


def begin() -> Thread:
    """Start the current GPU, and let Triton read itself, in a thread, while Python imports what else it needs.

    Both are done once in a process and would wait for the first tensor and the first kernel: the GPU's context, and the
    sha256 of Triton's compiler, hundreds of MB, which is part of every key of its cache. Neither needs Python.
    What fails here fails again where it is needed, and is told there.
    """
    device = torch.cuda.current_device()  # of this thread: a new one would begin at 0
    triton_key = None
    with suppress(ImportError):
        from triton.runtime.cache import triton_key  # remembers what it returns; in Triton 3.5 and newer

    def work():
        for step in (lambda: torch.zeros(1, device=torch.device("cuda", device)), triton_key):
            with suppress(Exception):
                step()

    thread = Thread(target=work, name="dax begin")
    thread.start()
    return thread


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
