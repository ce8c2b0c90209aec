"""What the attention kernels for Hopper share: whether they run, and their barriers."""

import torch

from dax.kernels.language import Absent, gl, gluon, mbarrier


def compute_capability(device) -> int:
    """90 for Hopper."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def hopper(sm: int) -> bool:
    """Whether kernels for Hopper run: their instructions exist on compute capability 9.0 alone."""
    return sm == 90 and gl is not Absent


def on_hopper() -> bool:
    """Whether they run on the current GPU, if there is one."""
    return torch.cuda.is_available() and hopper(compute_capability(None))


@gluon.jit
def barriers(NUM: gl.constexpr, COUNT: gl.constexpr):
    """NUM barriers in shared memory, [NUM, 1], each of which waits for COUNT arrivals."""
    layout: gl.constexpr = mbarrier.MBarrierLayout()
    made = gl.allocate_shared_memory(gl.int64, [NUM, 1], layout)
    for i in gl.static_range(NUM):
        mbarrier.init(made.index(i), count=COUNT)
    return made
