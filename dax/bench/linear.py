"""`dax bench linear`: a block's linear layers in 8 bits beside bf16 and torch's own, and its whole feed-forward.

Gaussian activations and weights, quantised as they would be; every result is compared with fp64 on some rows first.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

from dax.bench import report
from dax.bench.model import facts_of
from dax.bench.rivals import chosen
from dax.bench.size import checked_size, named
from dax.bench.timing import measure
from dax.errors import DaxError
from dax.facts import Facts
from dax.quant.scheme import SCHEMES

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


@dataclass(frozen=True)
class Subject:
    """What is multiplied in several ways, in `operations`; `products()` makes them, operands and all."""

    name: str
    shape: str
    operations: int
    products: Callable[[], list[Product]]


def bench(
    model: str | None, size, warm_up_s: float, timed_s: float, device: str | None, log=print, only: str | None = None
) -> dict:
    """Time the products of one block's linear layers over all tokens of a video, and its feed-forward; the record.

    only   some of int8, fp8 and bf16, with commas between; all by default
    """
    import torch

    from dax.hardware import machine

    dtypes = chosen(only, LIMITS)
    facts, here = facts_of(model or "tiny"), machine(device)
    about = named(facts, checked_size(facts, size))
    with torch.no_grad():
        found = [
            rows(subject, dtypes, about["tokens"], here, warm_up_s, timed_s, log)
            for subject in subjects(facts, about["tokens"], here.device)
        ]
    method = {"warm_up_s": warm_up_s, "timed_s": timed_s, "interleaved": True}
    return report.record("linear", here.device, **about, method=method, rows=[row for each in found for row in each])


def subjects(facts: Facts, tokens: int, device: str) -> list[Subject]:
    """Each distinct shape of a block's layers, then its feed-forward."""
    C, F = facts.width, facts.ffn_dim
    found = [
        Subject(f"{K}x{N}", f"{K} x {N}", 2 * tokens * K * N, partial(linears, tokens, K, N, device))
        for K, N in ((C, C), (C, F), (F, C))
    ]
    make = partial(feed_forwards, tokens, C, F, device)
    return [*found, Subject("ffn", f"{C} x {F} x {C}", 4 * tokens * C * F, make)]


def rows(
    subject: Subject, dtypes: list[str], tokens: int, machine, warm_up_s: float, timed_s: float, log
) -> list[dict]:
    """Products of a subject, checked, then timed in turns. DaxError("check_failed") if one is off."""
    products = [product for product in subject.products() if product.dtype in dtypes]
    errors = [checked(product, tokens, machine.device) for product in products]
    log(f"{subject.name}: " + ", ".join(f"{each.label} {error:.4f}" for each, error in zip(products, errors)))
    calls = {product.label: product.call for product in products}
    timings = measure(calls, machine.device, warm_up_s, timed_s, log)
    found = []
    for product, error in zip(products, errors):
        timing, peak = timings[product.label], machine.peak_tflops.get(product.dtype)
        ceiling = subject.operations / peak / 1e9 if peak else None
        found.append(
            {
                "subject": subject.name,
                "shape": subject.shape,
                "label": product.label,
                "ms": timing.ms,
                "tops": subject.operations / timing.ms / 1e9,
                "ceiling_ms": ceiling,
                "of_ceiling_pct": ceiling and 100 * ceiling / timing.ms,
                "error": error,
                "visits_ms": timing.visits,
                **asdict(timing.reading),
            }
        )
    return found


def gaussian(*shape, device: str, seed: int, std: float = 1.0):
    import torch

    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(*shape, generator=generator, device=device, dtype=torch.bfloat16) * std


def linears(tokens: int, K: int, N: int, device: str) -> list[Product]:
    """x w^T + b of one shape: ours in 8 bits, torch's, and bf16."""
    import torch.nn.functional as F

    x, w = gaussian(tokens, K, device=device, seed=0), gaussian(N, K, device=device, seed=1, std=K**-0.5)
    bias = gaussian(N, device=device, seed=2)

    def expected(rows):
        return exact(x, w, rows) + bias.double()

    plain = Product("bf16", "bf16", lambda: F.linear(x, w, bias), expected, LIMITS["bf16"])
    return [*eight_bits("int8", x, w, bias), *eight_bits("fp8", x, w, bias), plain]


def eight_bits(scheme: str, x, w, bias) -> list[Product]:
    """x w^T + b of operands quantised before: ours, and the nearest that torch has."""
    import torch

    from dax.kernels.quantize import quantize_rows
    from dax.kernels.scaled_linear import scaled_linear

    dtype = getattr(torch, SCHEMES[scheme].weight)
    (a, row), (b, column) = quantize_rows(x, dtype), quantize_rows(w, dtype)

    def expected(rows):
        return exact(a, b, rows) * row[rows, None] * column + bias.double()

    def ours():
        return scaled_linear(a, row, b, column, bias, torch.bfloat16)

    def scaled_mm():
        return torch._scaled_mm(a, b.T, row[:, None], column[None], bias, out_dtype=torch.bfloat16, use_fast_accum=True)

    found = [Product(f"DAX {scheme}", scheme, ours, expected, LIMITS[scheme])]
    if scheme == "int8":
        call, without_scales = lambda: torch._int_mm(a, b.T), lambda rows: exact(a, b, rows)
        found.append(Product("torch._int_mm, no scales", scheme, call, without_scales, 0))
    elif x.is_cuda:
        found.append(Product("torch._scaled_mm fp8", scheme, scaled_mm, expected, LIMITS[scheme]))
    return found


def exact(a, b, rows):
    """Rows of a b^T in fp64."""
    return a[rows].float().double() @ b.float().double().T


def feed_forwards(tokens: int, C: int, F: int, device: str) -> list[Product]:
    """residual + gate * (GELU(x w1^T + b1) w2^T + b2) from 8-bit x: everything of the feed-forward but its norm."""
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

    def plain(rows=slice(None)):
        h = nn.functional.gelu(first(x[:, rows]), approximate="tanh")
        return gated_residual(second(h), gate, residual[:, rows])

    def expected(rows):
        return plain(rows).double()[0]

    def ours(one, two, codes):
        h, scale = one.forward_gelu_quantized(*codes, two)
        return two.forward_quantized(h, scale, gate=gate, residual=residual)

    found = []
    for scheme in ("int8", "fp8"):
        one, two = QuantLinear.from_float(first, scheme), QuantLinear.from_float(second, scheme)
        found.append(Product(f"DAX {scheme}", scheme, partial(ours, one, two, one.quantize(x)), expected, FFN_LIMIT))
    return [*found, Product("bf16, gate in one pass", "bf16", plain, expected, LIMITS["bf16"])]


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
