"""Tensors of a mapped file to a GPU: one thread reads in the file's order, others copy what is there to the device.

Copied one by one, as diffusers does it, the disk rests while a tensor crosses to the device and the other way round; a
mapped page, moreover, is first copied by the driver to memory it can read from.
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue

import numpy as np
import torch

THREADS = 8
PIECE = 8 * 2**20  # bytes a thread copies at once, through one of its two pinned buffers
PAGE = 4096


def upload(tensors: Mapping[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """The same tensors, bit for bit, on a GPU; those that are no contiguous host memory come by `.to`.

    Takes 128 MiB of pinned host memory, which stays torch's. All is there when it returns.
    """
    device = torch.empty(0, device=device).device  # with its number: a new thread would begin at 0
    found, pieces = dict.fromkeys(tensors), []
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].data_ptr()):
        if tensor.device.type != "cpu" or not tensor.is_contiguous() or not tensor.numel():
            found[name] = tensor.to(device)
            continue
        found[name] = torch.empty_like(tensor, device=device)
        here, there = (x.detach().flatten().view(torch.uint8) for x in (tensor, found[name]))
        pieces += zip(here.split(PIECE), there.split(PIECE), strict=True)
    torch.cuda.current_stream(device).synchronize()  # what used the memory before is done with it
    ready = SimpleQueue()
    with ThreadPoolExecutor(THREADS) as pool:
        movers = [pool.submit(move, ready, device) for _ in range(THREADS)]
        try:
            for piece in pieces:
                piece[0].numpy()[::PAGE].max()  # has the page read, and those after it
                ready.put(piece)
        finally:
            for _ in movers:
                ready.put(None)
        for mover in movers:
            mover.result()
    return found


def move(ready: SimpleQueue, device: torch.device) -> None:
    """Copy pieces (host bytes, device bytes) as they come, until None does."""
    with torch.cuda.device(device), torch.cuda.stream(stream := torch.cuda.Stream(device)):
        buffers = [torch.empty(PIECE, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        emptied = [torch.cuda.Event() for _ in buffers]
        for turn, (here, there) in enumerate(iter(ready.get, None)):
            buffer, event = buffers[turn % 2][: len(here)], emptied[turn % 2]
            event.synchronize()
            np.copyto(buffer.numpy(), here.numpy())  # leaves Python to the other threads
            there.copy_(buffer, non_blocking=True)
            event.record()
        stream.synchronize()
