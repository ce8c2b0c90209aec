"""Every registered operation and case: on a GPU against exact numbers; without one, interpreted, compiled, traced."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch
from torch.overrides import TorchFunctionMode

from dax.errors import DaxError
from dax.kernels import attention_bf16, k_quantize, q_quantize, v_quantize
from dax.kernels import attention_int8 as attention
from dax.kernels.attention_bf16_hopper import readable
from dax.kernels.hopper import compute_capability, hopper
from tests.kernels.offline import arguments, errors, listed, load_ops, poisoned

OPS = load_ops()
CASES = [pytest.param(name, case, id=f"{name}: {case}") for name, op in OPS.items() for case in op.cases]
NEEDS_TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
SPILLS = {  # bytes that ptxas is known to spill, by the Triton that wrote the code
    "scaled_linear": 32, "attention_int8": {"3.6": 20, "3.7": 20, "3.8": 64, "3.9": 1420},
    "attention_bf16": {"3.8": 444, "3.9": 368},
}  # fmt: skip
INTO = {"attention_int8": attention.attention_int8_into, "attention_bf16": attention_bf16.attention_bf16_into}


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    """rows(what): the objects that `tests.kernels.offline what` prints, run once."""
    done = {}

    def rows(what):
        if what not in done:
            cache = os.environ.get("TRITON_CACHE_DIR") or str(tmp_path_factory.mktemp("triton"))
            run = subprocess.run(
                [sys.executable, "-m", "tests.kernels.offline", what],
                capture_output=True,
                text=True,
                env={**os.environ, "TRITON_CACHE_DIR": cache},
            )
            assert run.returncode == 0, run.stderr[-3000:]
            done[what] = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
        return done[what]

    return rows


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "case"), CASES)
def test_on_a_gpu(name, case):
    op = OPS[name]
    major, minor = torch.cuda.get_device_capability()
    if 10 * major + minor < op.min_sm or (name == "attention_bf16" and major != 9):
        pytest.skip(f"needs compute capability {op.min_sm / 10}")
    given = arguments(op, case, "cuda")
    with poisoned():
        got = op(*given)
    found = errors(op, given, got, op.reference(*given))
    assert found["alike"] and found["kernel"] <= 2 * found["reference"] + 1e-6, found


@pytest.mark.gpu
@pytest.mark.parametrize("name", INTO)
def test_attention_into_rooms_gives_the_same_bits(name):
    """Tokens go to one room after the other, each of other strides; nothing beside them is touched."""
    if not hopper(compute_capability(None)):
        pytest.skip("needs compute capability 9.0")
    given = arguments(OPS[name], "63 in two batches", "cuda")[:-1]  # without portable, or the scale
    given = (*given, 0.3) if name == "attention_bf16" else given
    wanted = OPS[name](*given)
    whole = torch.full((3, 2, 50, 5, 64), 7.0, device="cuda", dtype=torch.bfloat16)
    rooms = [whole[0, :, :40, 2:4], whole[1, :, 3:3, :2], whole[2, :, 5:28, 3:]]
    INTO[name](*given, rooms)
    assert torch.equal(torch.cat(rooms, 1), wanted)
    for room in rooms:
        room.fill_(7.0)
    assert (whole == 7).all()


@NEEDS_TRITON
@pytest.mark.parametrize("name", INTO)
@pytest.mark.parametrize("short", [(1, 69), (2, 70)])
def test_rooms_for_other_tokens_are_refused(name, short, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    given = operands().values() if name == "attention_int8" else (*sixteen_bits(), None)
    with pytest.raises(DaxError, match=r"rooms for \[\d, \d+\] tokens; the attention has \[1, 70\]") as caught:
        INTO[name](*given, [torch.empty(*short, 2, 64, dtype=torch.bfloat16)])
    assert caught.value.exit_code == 2


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["q_quantize", "k_quantize", "v_quantize"])
def test_codes_into_rooms_are_the_same(name):
    """Heads go to one room after the other, each of other strides."""
    into = {"q": q_quantize.q_quantize_into, "k": k_quantize.k_quantize_into, "v": v_quantize.v_quantize_into}[name[0]]
    case = next(case for case in OPS[name].cases if case.startswith("63"))
    given = arguments(OPS[name], case, "cuda")
    codes, scales = OPS[name](*given)
    whole = torch.zeros(2, 3, *codes.shape[:1], 6, *codes.shape[2:], device="cuda", dtype=torch.uint8).view(codes.dtype)
    rooms = [whole[0, 1, :, 2:5], whole[1, 2, :, 1:2]]
    given = given[:2] if name[0] == "v" else (*given, 1e-6)
    assert torch.equal(into(*given, rooms), scales)
    assert torch.equal(torch.cat([room.view(torch.uint8) for room in rooms], 1), codes.view(torch.uint8))
    for room in rooms:
        room.view(torch.uint8).zero_()
    assert not whole.view(torch.uint8).any()


@NEEDS_TRITON
def test_interpreted(offline):
    """The interpreter cuts bf16 off instead of rounding, which costs up to 2^-8 of the result."""
    rows = offline("interpret")
    assert {row["op"] for row in rows} >= {"qk_norm_rope", "q_quantize", "k_quantize", "v_quantize", "attention_int8"}
    for row in rows:
        assert row["alike"] and row["kernel"] <= 2 * row["reference"] + 2**-9, row


@NEEDS_TRITON
def test_compiled_for_hopper(offline):
    """No spilled registers and no serialized tensor cores, as ptxas tells them."""
    import triton

    rows = offline("compile")
    assert {row["op"] for row in rows} >= set(OPS) - {"scaled_linear", "scaled_linear_quantize"}
    for row in rows:
        allowed = SPILLS.get(row["op"], 0)
        if isinstance(allowed, dict):
            allowed = allowed.get(triton.__version__[:3], 0)
        assert "failed" not in row and row["assembled"] and row["spilled"] <= allowed and not row["serialized"], row


@NEEDS_TRITON
def test_a_kernel_serves_any_number_of_tokens(offline):
    """Else a first call would compile again what `compiled_ahead` had compiled for a few tokens."""
    needed = {}
    for row in offline("tokens"):
        needed.setdefault(row["op"], []).append(row["kernels"])
    assert len(needed) == 12
    for op, kernels in needed.items():
        assert kernels[0] and kernels[0] == kernels[1] == kernels[2], op


@pytest.mark.parametrize(("name", "case"), CASES)
def test_traced(name, case):
    """The shapes and dtypes that torch.compile is told are those of the reference."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    op = OPS[name]
    given = arguments(op, case)
    with FakeTensorMode() as mode:
        fake = op(*(mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in given))
    for told, real in zip(listed(fake), listed(op(*given)), strict=True):
        assert told.shape == real.shape and told.dtype == real.dtype


@pytest.mark.parametrize(("name", "case"), CASES)
def test_a_case_is_made_on_the_device_it_is_for(name, case):
    """Every tensor on the way: what a GPU's generator draws can be nowhere else."""
    made = []

    class Made(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            made.extend(listed(found := function(*args, **(kwargs or {}))))
            return found

    with Made():
        given = OPS[name].cases[case](torch.Generator(), "meta")
    tensors = [x for x in (*made, *given) if isinstance(x, torch.Tensor)]
    assert tensors and all(x.is_meta for x in tensors)


def operands(B=1, S=70, N=130, H=2, D=64, **changes):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, n, H, D, generator=generator) for n in (S, N, N))
    names = ("q", "q_scale", "k", "k_scale", "v", "v_scale", "num_keys")
    given = dict(zip(names, attention.arguments_of(q, k, v, torch.float8_e4m3fn)))
    return {**given, **{name: change(given[name]) for name, change in changes.items()}}


@pytest.mark.parametrize(
    "changes",
    [
        {"q": lambda q: q[0]},
        {"q": lambda q: q[..., :32]},
        {"q_scale": lambda x: x[..., :-1]},
        {"k": lambda k: k[:, :, :1]},
        {"k": lambda k: k.float()},
        {"v": lambda v: v.transpose(-1, -2)},
        {"v_scale": lambda x: x.bfloat16()},
        {"v": lambda v: v.to("meta")},
        {"num_keys": lambda n: n + 200},
        {"num_keys": lambda n: 0},
    ],
)
def test_operands_that_do_not_fit_are_refused(changes):
    with pytest.raises(DaxError, match="attention_int8 of") as caught:
        attention.ATTENTION_INT8(**operands(**changes))
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)


def sixteen_bits(B=1, S=70, N=130, H=2, D=64, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(B, n, H, D, generator=generator).to(dtype) for n in (S, N, N)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_the_reference_of_16_bits_is_attention(dtype, scale):
    q, k, v = sixteen_bits(2, dtype=dtype)
    turned = [x.double().transpose(1, 2) for x in (q, k, v)]
    exact = torch.nn.functional.scaled_dot_product_attention(*turned, scale=scale).transpose(1, 2)
    out = attention_bf16.ATTENTION_BF16(q, k, v, scale)
    assert out.dtype == dtype and out.is_contiguous()
    assert ((out - exact).norm() / exact.norm()).item() < (0.004 if dtype == torch.bfloat16 else 0.0005)


@pytest.mark.parametrize(
    "change",
    [
        lambda q, k, v: (q[0], k, v),
        lambda q, k, v: (q, k[:, 1:], v),
        lambda q, k, v: (q, k[:, :0], v[:, :0]),
        lambda q, k, v: (q[..., :32], k[..., :32], v[..., :32]),
        lambda q, k, v: (q, k.half(), v),
        lambda q, k, v: (q, k, v.to("meta")),
        lambda q, k, v: (q, k, v, 0.0),
        lambda q, k, v: (q, k, v, float("nan")),
    ],
)
def test_operands_of_16_bits_that_do_not_fit_are_refused(change):
    with pytest.raises(DaxError, match="attention_bf16 of") as caught:
        attention_bf16.ATTENTION_BF16(*change(*sixteen_bits()))
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)


@pytest.mark.parametrize(("sm", "dtype", "code"), [((8, 0), torch.bfloat16, 4), ((9, 0), torch.float32, 2)])
def test_attention_of_16_bits_is_launched_where_it_runs_alone(sm, dtype, code, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: sm)
    with pytest.raises(DaxError, match="attention_bf16: ") as caught:
        OPS["attention_bf16"].launch(*sixteen_bits(dtype=dtype))
    assert caught.value.exit_code == code


def test_what_the_copy_engine_cannot_read_is_copied_and_nothing_else():
    whole = torch.randn(2, 33, 6, 64).bfloat16()
    for x in (whole, whole[:, :, 2:4], whole[:, 1::2], whole[1:], whole[:1, :1, :1]):
        assert readable(x) is x
    flat = torch.randn(2 * 33 * 2 * 65 + 1).bfloat16()
    for x in (whole.transpose(1, 3)[..., :2], whole[:1].expand(2, -1, -1, -1), whole[..., ::2],
              flat[:-1].view(2, 33, 2, 65)[..., :64], flat[1:8449].view(2, 33, 2, 64)):  # fmt: skip
        assert readable(x).is_contiguous() and readable(x) is not x and torch.equal(readable(x), x)
