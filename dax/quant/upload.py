"""Tensors of a mapped file to a GPU, read by several threads while the copy engine takes what they have read.

Copied one by one, as diffusers does it, the disk rests while a tensor crosses to the device and the other way round; a
mapped page, moreover, is first copied by the driver to memory it can read from.
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

THREADS = 8
PIECE = 8 * 2**20  # bytes a thread reads at once, into one of its two pinned buffers


def upload(tensors: Mapping[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """The same tensors, bit for bit, on a GPU; those that are no contiguous host memory come by `.to`.

    Takes 128 MiB of pinned host memory, which stays torch's. All is there when it returns.
    """
    device = torch.empty(0, device=device).device  # with its number: a new thread would begin at 0
    found, pieces = {}, []
    for name, tensor in tensors.items():
        if tensor.device.type != "cpu" or not tensor.is_contiguous() or not tensor.numel():
            found[name] = tensor.to(device)
            continue
        found[name] = torch.empty_like(tensor, device=device)
        here, there = (x.detach().flatten().view(torch.uint8) for x in (tensor, found[name]))
        pieces += zip(here.split(PIECE), there.split(PIECE), strict=True)
    torch.cuda.current_stream(device).synchronize()  # what used the memory before is done with it
    waiting = iter(pieces)  # shared: each next() is one thread's
    with ThreadPoolExecutor(THREADS) as pool:
        for done in [pool.submit(move, waiting, device) for _ in range(THREADS)]:
            done.result()
    return found


def move(pieces, device: torch.device) -> None:
    """Take pieces (host bytes, device bytes) until there are none."""
    with torch.cuda.device(device), torch.cuda.stream(stream := torch.cuda.Stream(device)):
        buffers = [torch.empty(PIECE, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        emptied = [torch.cuda.Event() for _ in buffers]
        for turn, (here, there) in enumerate(pieces):
            buffer, event = buffers[turn % 2][: len(here)], emptied[turn % 2]
            event.synchronize()
            np.copyto(buffer.numpy(), here.numpy())  # leaves Python to the other threads
            there.copy_(buffer, non_blocking=True)
            event.record()
        stream.synchronize()
