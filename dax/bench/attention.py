"""`dax bench attention`: self-attention of one layer with every kernel that runs here, and the passes around it.

Queries 1.5 x Gaussian, keys Gaussian plus a bias of each channel twice as large (as real keys have), values Gaussian.
Every result is compared with fp64 on some rows of some heads before it is timed. An 8-bit time includes quantizing q, k
and v with every statistic; "kernel alone" is without. What SageAttention2's arithmetic would give is emulated in fp32.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass

from dax.bench import report
from dax.bench.model import facts_of
from dax.bench.rivals import chosen
from dax.bench.size import checked_size, named
from dax.bench.timing import measure
from dax.errors import DaxError

COLUMNS = {
    "label": "kernel",
    "ms": "ms",
    "tflops": "TFLOP/s",
    "tbs": "TB/s",
    "of_ceiling_pct": "% of ceiling",
    "error": "error",
    "v1_error_pct": "V = 1 off by %",
    "sm_mhz": "SM MHz",
    "watts": "W",
}
CHECKED_ROWS, CHECKED_HEADS = 64, 4
EXACT_LIMIT, LOSSY_LIMIT = 0.006, 0.06
PASSES = ("copy", "qk_norm_rope", "q_quantize", "key_means", "k_quantize")


@dataclass
class Row:
    """One line: a call, what it computes as [B, S, H, D] (None: nothing to check), its limit, work and arithmetic."""

    label: str
    call: Callable
    limit: float | None = None
    dtype: str = "bf16"
    moved: float | None = None  # bytes, of a pass that is bound by memory


def bench(
    model: str | None,
    size,
    rows: str | None,
    warm_up_s: float,
    timed_s: float,
    device: str | None,
    log=print,
    tokens: int | None = None,
) -> dict:
    """The record of one layer's self-attention at a video's size, or at `tokens`. Rows: kernels and passes by name."""
    import torch

    from dax.hardware import machine

    facts = facts_of(model or "tiny")
    about = named(facts, checked_size(facts, size))
    if tokens is not None and tokens < 1:
        raise DaxError("bad_request", f"--tokens {tokens}: must be at least 1")
    here, S = machine(device), tokens or about["tokens"]
    H, D, device = facts.num_heads, facts.head_dim, here.device
    q, k, v = inputs(S, H, D, device)
    arranged, left_out = arrange(q, k, v, here, rows)
    flops, lines, calls = 4 * H * S * S * D, {}, {}
    with torch.no_grad():
        sampled = reference(q, k, v)
        for row in arranged:
            line = {"label": row.label, "error": None, "v1_error_pct": None}
            if row.limit is not None:
                line["error"] = error = distance(row.call(q, k, v), sampled)
                log(f"{row.label}: error {error:.4f} (limit {row.limit})")
                if not error <= row.limit:
                    raise DaxError("check_failed", f"{row.label}: {error:.4f} from fp64, limit {row.limit}; not timed")
                if row.dtype == "int8" and "alone" not in row.label:
                    line["v1_error_pct"] = 100 * (row.call(q, k, torch.ones_like(v)).float() - 1).abs().max().item()
            lines[row.label], calls[row.label] = line, lambda call=row.call: call(q, k, v)
        emulated = sage_emulated(q, k, v, sampled)
        for label, timing in measure(calls, device, warm_up_s, timed_s, log).items():
            row = next(row for row in arranged if row.label == label)
            peak = here.peak_tflops.get(row.dtype)
            bound = row.moved / here.bandwidth_tbs / 1e9 if row.moved and here.bandwidth_tbs else None
            bound = bound if row.moved else peak and flops / peak / 1e9
            lines[label] |= {
                "ms": timing.ms,
                "tflops": None if row.moved else flops / timing.ms / 1e9,
                "tbs": row.moved / timing.ms / 1e9 if row.moved else None,
                "ceiling_ms": bound,
                "of_ceiling_pct": bound and 100 * bound / timing.ms,
                "visits_ms": timing.visits,
                **asdict(timing.reading),
            }
    lines["sage"] = {"label": "SageAttention2's arithmetic, emulated", "error": emulated}
    return report.record(
        "attention",
        device,
        **about | {"tokens": S},
        num_heads=H,
        head_dim=D,
        method={"warm_up_s": warm_up_s, "timed_s": timed_s, "interleaved": True},
        rows=list(lines.values()),
        left_out=left_out,
    )


def inputs(S: int, H: int, D: int, device: str):
    import torch

    generator = torch.Generator(device).manual_seed(0)

    def gaussian(*shape):
        return torch.randn(*shape, generator=generator, device=device, dtype=torch.bfloat16)

    q, k, v = (gaussian(1, S, H, D) for _ in range(3))
    return q.mul_(1.5), k.add_(2 * gaussian(1, 1, H, D)), v


def arrange(q, k, v, machine, names: str | None) -> tuple[list[Row], dict[str, str]]:
    """The rows to time, and {kernel left out: why}. DaxError("bad_request") for a name that is none."""
    from dax.attention import KERNELS, attend, reason

    known = [*KERNELS, "triton", *PASSES]
    rows, left_out = [], {}
    for name in chosen(names, known):
        problem = reason("int8" if name == "triton" else name, machine) if name not in PASSES else None
        if problem or (name in (*PASSES, "triton") and machine.device != "cuda"):
            left_out[name] = problem or "needs an NVIDIA GPU"
        elif name in PASSES:
            rows.append(memory_pass(name, q))
        elif name in ("int8", "triton"):
            rows += eight_bits(q, k, v, portable=name == "triton")
        else:
            limit, dtype = (EXACT_LIMIT, "bf16") if KERNELS[name].exact else (LOSSY_LIMIT, "int8")
            rows.append(Row(name, lambda q, k, v, name=name: attend(q, k, v, kernel=name), limit, dtype))
    if not rows:
        raise DaxError("unsupported", "no row runs here: " + "; ".join(f"{n}: {why}" for n, why in left_out.items()))
    return rows, left_out


def eight_bits(q, k, v, portable: bool) -> list[Row]:
    """DAX's own: everything from bf16 to bf16, and the kernel alone."""
    import torch

    from dax.attention import Turn
    from dax.attention.int8 import backend

    kernel, H = backend(portable or None), q.shape[2]

    def prepared(q, k, v):
        q, k, v = (x.flatten(2) for x in (q, k, v))
        return kernel.prepare(q, k, v, H, Turn(), kernel.stats(k, v, H, Turn()))

    def whole(q, k, v):
        return kernel.attend(prepared(q, k, v), k.shape[1])

    with torch.no_grad():
        operands = prepared(q, k, v)
    name = "int8 (Triton)" if portable else kernel.name
    return [
        Row(name, whole, LOSSY_LIMIT, "int8"),
        Row(f"{name}, kernel alone", lambda q, k, v: kernel.attend(operands, k.shape[1]), LOSSY_LIMIT, "int8"),
    ]


def memory_pass(name: str, q) -> Row:
    """What memory bounds, over queries or keys: a copy, norm and rotation, the same to 8 bits, the mean of keys."""
    import torch

    from dax.kernels.k_quantize import K_QUANTIZE
    from dax.kernels.q_quantize import Q_QUANTIZE
    from dax.kernels.qk_norm_rope import QK_NORM_ROPE, rotary_table
    from dax.kernels.token_stats import EVERY, KEY_MEANS

    _, S, H, D = q.shape
    flat, weight, (cos, sin) = q.flatten(2), q.new_ones(H * D), rotary_table(S, D, q.device)
    copied, tables, mean = torch.empty_like(flat), 2 * cos.nbytes, q.new_zeros(1, H, D, dtype=torch.float32)
    calls = {
        "copy": (lambda *_: copied.copy_(flat), 2 * flat.nbytes),
        "qk_norm_rope": (lambda *_: QK_NORM_ROPE(flat, H, weight, cos, sin), 2 * flat.nbytes + tables),
        "q_quantize": (lambda *_: Q_QUANTIZE(flat, H, D**-0.5, weight, cos, sin), 1.5 * flat.nbytes + tables),
        "key_means": (lambda *_: KEY_MEANS(flat, H, weight, cos, sin), (flat.nbytes + tables) / EVERY),
        "k_quantize": (lambda *_: K_QUANTIZE(flat, H, mean, weight, cos, sin), 2.5 * flat.nbytes + tables),
    }
    call, moved = calls[name]
    return Row(name, call, moved=moved)


def reference(q, k, v):
    """(rows, heads, attention of those in fp64)."""
    import torch

    _, S, H, D = q.shape
    generator = torch.Generator().manual_seed(0)
    rows = torch.cat((torch.randint(0, S, (CHECKED_ROWS - 2,), generator=generator), torch.tensor([0, S - 1])))
    heads = sorted({0, H // 3, H // 2, H - 1})[:CHECKED_HEADS]
    rows = rows.to(q.device)
    found = []
    for head in heads:
        s = q[0, rows, head].double() @ k[0, :, head].double().T * D**-0.5
        found.append(torch.softmax(s, -1) @ v[0, :, head].double())
    return rows, heads, torch.stack(found, 1)


def distance(o, sampled) -> float:
    """Relative L2 over the sampled rows; infinite if any number of the whole output is not finite."""
    rows, heads, exact = sampled
    if not o.isfinite().all():
        return float("inf")
    return ((o[0, rows][:, heads].double() - exact).norm() / exact.norm()).item()


def sage_emulated(q, k, v, sampled) -> float:
    """The error of SageAttention2's scheme with scales per thread, in fp32 (arXiv:2411.10958; sm90 kernel).

    int8 q: a scale for the rows r, r + 8 of each 16; int8 k minus its mean: a scale for each 32 of 128 keys, those that
    one thread holds; fp8 v per channel; p in fp8; the row sum of unrounded p. Rows are sampled before, so a query's
    scale is taken with the row 8 further on, as in place.
    """
    import torch
    import torch.nn.functional as F

    rows, heads, exact = sampled
    S, D = q.shape[1], q.shape[3]
    partner = torch.where(rows % 16 < 8, rows + 8, rows - 8).clamp_max(S - 1)
    found = []
    for head in heads:
        pair = torch.stack((q[0, rows, head], q[0, partner, head])).float()
        step = pair.abs().amax((0, 2)).clamp_min(1e-20)[:, None] / 127
        x = (pair[0] / step).round() * step
        y = k[0, :, head].float()
        y = F.pad(y - y.mean(0), (0, 0, 0, -S % 128)).view(-1, 16, 4, 2, D)
        y_step = y.abs().amax((1, 3, 4), keepdim=True).clamp_min(1e-20) / 127
        y = ((y / y_step).round() * y_step).view(-1, D)[:S]
        z = v[0, :, head].float()
        z_step = z.abs().amax(0).clamp_min(1e-20) / 448
        z = (z / z_step).to(torch.float8_e4m3fn).float()
        s = x @ y.T * D**-0.5
        p = torch.exp(s - s.amax(-1, keepdim=True)) * 448
        found.append(p.to(torch.float8_e4m3fn).float() @ z * z_step / p.sum(-1, keepdim=True))
    o = torch.stack(found, 1).double()
    return ((o - exact).norm() / exact.norm()).item()
