"""`dax.attention.attend`: any kernel on tensors of one's own, after checking that they fit and that it runs here."""

from dax.attention.backend import KERNELS, Turn, backend_of, choose, reason
from dax.errors import DaxError
from dax.hardware import machine


def attend(q, k, v, *, kernel: str = "auto", scale: float | None = None):
    """`dax.attention.attend`, see there."""
    check_operands(q, k, v)
    here, head_dim = machine(q.device.type), q.shape[-1]
    name = str(q.dtype).removeprefix("torch.")
    if kernel == "auto":
        kernel = choose(here, name, head_dim)
    problem = reason(kernel, here, name, head_dim)
    if problem:
        runs = [other for other in KERNELS if reason(other, here, name, head_dim) is None]
        raise DaxError("unsupported", f"attention kernel {kernel!r} {problem}; these run here: {', '.join(runs)}")
    backend, heads, turn = backend_of(kernel), q.shape[2], Turn()
    num_keys, dtype = k.shape[1], q.dtype
    q, k, v = (x.flatten(2) for x in (q, k, v))
    operands = backend.prepare(q, k, v, heads, turn, backend.stats(k, v, heads, turn), scale)
    return backend.attend(operands, num_keys, scale).to(dtype)


def check_operands(q, k, v) -> None:
    """DaxError("bad_request") unless the three are [B, S, H, D], [B, T, H, D] twice, of one dtype on one device."""
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]):
        raise DaxError("bad_request", f"attend: {shapes}: expected [B, S, H, D] and twice [B, T, H, D]")
    if 0 in (*q.shape, *k.shape):
        raise DaxError("bad_request", f"attend: {shapes}: nothing to attend to; every size must be at least 1")
    if not q.is_floating_point() or len({(x.dtype, x.device) for x in (q, k, v)}) > 1:
        kinds = ", ".join(f"{x.dtype} on {x.device}" for x in (q, k, v))
        raise DaxError("bad_request", f"attend: q, k, v are {kinds}: give one floating dtype on one device")
