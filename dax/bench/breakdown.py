"""Where a call's GPU time goes: attention kernels, matrix products, and all the rest, which is elementwise work."""

import re
from collections import defaultdict
from collections.abc import Callable

ATTENTION = re.compile(r"sdpa|fmha|flash|attention_kernel|attn|sage", re.IGNORECASE)
GEMM = re.compile(r"gemm|nvjet|cutlass|xmma|linear_kernel|cublas|_mm_", re.IGNORECASE)
CALLS = 2


def kind_of(kernel: str) -> str:
    """attention, gemm or elementwise, by a GPU kernel's name."""
    if ATTENTION.search(kernel):
        return "attention"
    return "gemm" if GEMM.search(kernel) else "elementwise"


def breakdown(call: Callable[[], object]) -> dict:
    """{"attention": ms, "gemm": ms, "elementwise": ms, "kernels": the ten that take longest} of one call on the GPU.

    From torch's profiler over two calls; the sum is less than the call's time where the card waits for the host.
    """
    import torch
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(CALLS):
            call()
        torch.cuda.synchronize()
    kinds: dict[str, float] = dict.fromkeys(("attention", "gemm", "elementwise"), 0.0)
    kernels: dict[str, list] = defaultdict(lambda: [0.0, 0])
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            ms = event.device_time / 1e3 / CALLS
            kinds[kind_of(event.name)] += ms
            kernels[event.name][0] += ms
            kernels[event.name][1] += 1
    longest = sorted(kernels.items(), key=lambda item: -item[1][0])[:10]
    rows = [{"name": name[:80], "kind": kind_of(name), "ms": ms, "count": n / CALLS} for name, (ms, n) in longest]
    return kinds | {"kernels": rows}
