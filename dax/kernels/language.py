"""Triton and Gluon under the names the kernel files use, or stand-ins where they are not installed.

A stand-in lets a kernel file be imported on a machine without a GPU, where only its reference runs.
"""


class Absent:
    jit = staticmethod(lambda function=None, **options: function or (lambda function: function))
    constexpr = staticmethod(lambda value: value)


try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = Absent

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_init,
        warpgroup_mma_wait,
    )

    shared = gl.shared_memory_descriptor
    reinterpret = getattr(shared, "reinterpret", None) or shared._reinterpret  # the latter in Triton 3.6, as below
    load_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
    store_tile = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
except (ImportError, AttributeError):  # Gluon is experimental: a Triton may lack it, or some of it
    gluon = gl = Absent
    fence_async_shared = load_tile = reinterpret = store_tile = mbarrier = tma = None
    warpgroup_mma = warpgroup_mma_init = warpgroup_mma_wait = None

__all__ = [
    "Absent",
    "fence_async_shared",
    "gl",
    "gluon",
    "load_tile",
    "mbarrier",
    "reinterpret",
    "store_tile",
    "tl",
    "tma",
    "triton",
    "warpgroup_mma",
    "warpgroup_mma_init",
    "warpgroup_mma_wait",
]
