"""`dax bench linear`: a block's linear layers in 8 bits beside bf16 and torch's own, and its whole feed-forward.

Gaussian activations and weights, quantised as they would be; every result is compared with fp64 on some rows first.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass

from dax.bench import report
from dax.bench.model import facts_of
from dax.bench.size import checked_size
from dax.bench.timing import measure
from dax.errors import DaxError
from dax.facts import Facts

COLUMNS = {
    "shape": "K x N",
    "label": "product",
    "ms": "ms",
    "tops": "TOP/s",
    "ceiling_ms": "ceiling ms",
    "of_ceiling_pct": "% of ceiling",
    "error": "error",
    "sm_mhz": "SM MHz",
    "watts": "W",
}
SCHEMES = ("int8", "fp8")
CHECKED_ROWS = 64
LIMITS = {"int8": 0.004, "fp8": 0.006, "bf16": 0.006}  # rounding of the bf16 result, and fp8's short accumulator
FFN_LIMIT = 0.08  # of 8-bit operands, against bf16


@dataclass(frozen=True)
class Product:
    """One way to multiply: what the table calls it, its arithmetic, the call, what rows of it should be, a limit."""

    label: str
    dtype: str
    call: Callable
    expected: Callable
    limit: float


def bench(model: str | None, size, warm_up_s: float, timed_s: float, device: str | None, log=print) -> dict:
    """Time the products of one block's linear layers over all tokens of a video, and its feed-forward; the record."""
    import torch

    from dax.hardware import machine

    facts = facts_of(model or "tiny")
    pixels = checked_size(facts, size)
    tokens, here = facts.tokens(**asdict(pixels)), machine(device)
    device, lines = here.device, []
    with torch.no_grad():
        for name, shape, flops, products in subjects(facts, tokens, device):
            errors = {}
            for product in products():
                errors[product.label] = checked(product, tokens, device)
            calls = {product.label: product.call for product in products()}
            log(f"{name}: " + ", ".join(f"{label} {error:.4f}" for label, error in errors.items()))
            for label, timing in measure(calls, device, warm_up_s, timed_s).items():
                dtype = next(product.dtype for product in products() if product.label == label)
                peak = here.peak_tflops.get(dtype)
                ceiling = flops / peak / 1e9 if peak else None
                lines.append(
                    {
                        "subject": name,
                        "shape": shape,
                        "label": label,
                        "ms": timing.ms,
                        "tops": flops / timing.ms / 1e9,
                        "ceiling_ms": ceiling,
                        "of_ceiling_pct": ceiling and 100 * ceiling / timing.ms,
                        "error": errors[label],
                        "visits_ms": timing.visits,
                        **asdict(timing.reading),
                    }
                )
            del calls
    method = {"warm_up_s": warm_up_s, "timed_s": timed_s, "interleaved": True}
    return report.record("linear", device, model=facts.name, **asdict(pixels), tokens=tokens, method=method, rows=lines)


def subjects(facts: Facts, tokens: int, device: str):
    """(name, K x N, operations, products) of each distinct shape, then of the feed-forward."""
    from functools import cache

    C, F = facts.width, facts.ffn_dim
    for K, N in ((C, C), (C, F), (F, C)):
        yield f"{K}x{N}", f"{K} x {N}", 2 * tokens * K * N, cache(lambda K=K, N=N: linears(tokens, K, N, device))
    yield "ffn", f"{C} x {F} x {C}", 4 * tokens * C * F, cache(lambda: feed_forwards(tokens, C, F, device))


def gaussian(*shape, device: str, seed: int, std: float = 1.0):
    import torch

    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(*shape, generator=generator, device=device, dtype=torch.bfloat16) * std


def linears(tokens: int, K: int, N: int, device: str) -> list[Product]:
    """x w^T + b of one shape: ours in 8 bits, torch's, and bf16."""
    import torch
    import torch.nn.functional as F

    from dax.kernels.quantize import quantize_rows
    from dax.kernels.scaled_linear import scaled_linear

    x, w = gaussian(tokens, K, device=device, seed=0), gaussian(N, K, device=device, seed=1, std=K**-0.5)
    bias = gaussian(N, device=device, seed=2)
    found = []
    for scheme, dtype in zip(SCHEMES, (torch.int8, torch.float8_e4m3fn)):
        a, row, b, column = *quantize_rows(x, dtype), *quantize_rows(w, dtype)

        def expected(rows, a=a, row=row, b=b, column=column):
            return (a[rows].float().double() @ b.float().double().T) * row[rows, None] * column + bias.double()

        def ours(a=a, row=row, b=b, column=column):
            return scaled_linear(a, row, b, column, bias, torch.bfloat16)

        found.append(Product(f"DAX {scheme}", scheme, ours, expected, LIMITS[scheme]))
        if scheme == "fp8" and device == "cuda":

            def theirs(a=a, row=row[:, None], b=b.T, column=column[None]):
                return torch._scaled_mm(a, b, row, column, bias, out_dtype=torch.bfloat16, use_fast_accum=True)

            found.append(Product("torch._scaled_mm fp8", "fp8", theirs, expected, LIMITS["fp8"]))
        if scheme == "int8":
            found.append(
                Product(
                    "torch._int_mm, no scales",
                    "int8",
                    lambda a=a, b=b.T: torch._int_mm(a, b),
                    lambda rows, a=a, b=b: a[rows].double() @ b.double().T,
                    0,
                )
            )
    found.append(
        Product(
            "bf16",
            "bf16",
            lambda: F.linear(x, w, bias),
            lambda rows: x[rows].double() @ w.double().T + bias.double(),
            LIMITS["bf16"],
        )
    )
    return found


def feed_forwards(tokens: int, C: int, F: int, device: str) -> list[Product]:
    """residual + gate * (GELU(x w1^T + b1) w2^T + b2) from 8-bit x: everything of the feed-forward but its norm."""
    import torch
    from torch import nn

    from dax.kernels.gated_residual import gated_residual
    from dax.quant.linear import QuantLinear

    first, second = nn.Linear(C, F, device="meta"), nn.Linear(F, C, device="meta")
    for seed, layer in enumerate((first, second)):
        N, K = layer.out_features, layer.in_features
        layer.weight = nn.Parameter(gaussian(N, K, device=device, seed=seed, std=K**-0.5), requires_grad=False)
        layer.bias = nn.Parameter(gaussian(N, device=device, seed=seed + 2), requires_grad=False)
    x, residual = (gaussian(1, tokens, C, device=device, seed=seed) for seed in (4, 5))
    gate = gaussian(1, 1, C, device=device, seed=6).float()

    def plain(x=x, residual=residual):
        return gated_residual(second(torch.nn.functional.gelu(first(x), approximate="tanh")), gate, residual)

    def expected(rows):
        return (plain(x[:, rows], residual[:, rows])).double()[0]

    found = []
    for scheme in SCHEMES:
        one, two = QuantLinear.from_float(first, scheme), QuantLinear.from_float(second, scheme)

        codes = one.quantize(x)

        def ours(one=one, two=two, codes=codes):
            h, scale = one.forward_gelu_quantized(*codes, two)
            return two.forward_quantized(h, scale, gate=gate, residual=residual)

        found.append(Product(f"DAX {scheme}", scheme, ours, expected, FFN_LIMIT))
    found.append(Product("bf16, gate in one pass", "bf16", plain, expected, LIMITS["bf16"]))
    return found


def checked(product: Product, tokens: int, device: str) -> float:
    """Relative error of a product on some rows, the last ones among them. DaxError("check_failed") if it is off."""
    import torch

    output = product.call()
    output = output[0] if output.ndim == 3 else output
    rows = torch.randint(0, tokens, (min(CHECKED_ROWS, tokens),), generator=torch.Generator().manual_seed(0))
    rows = torch.cat([rows, torch.tensor([0, tokens - 1])]).to(device)
    expected = product.expected(rows)
    error = ((output[rows].double() - expected).norm() / expected.norm()).item()
    if not error <= product.limit or not output.isfinite().all():
        raise DaxError("check_failed", f"{product.label}: {error:.4f} from the reference, limit {product.limit}")
    return error
