"""Every kernel against one float64 reference; the table of what runs where; the Wan processor against the vendor's."""

import sys
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import dax
from dax.attention import attend, available, backend, choose, dense, kernel_for_cross, reason, self_check
from dax.attention.self_check import Verdict
from dax.errors import DaxError
from dax.facts import FACTS
from dax.hardware import MACHINES, Machine, machine
from dax.kernels.rooms import fill
from dax.models import wan, wan_guard
from dax.optimize import resolve
from dax.plan import Plan

H200 = replace(MACHINES["h200"], packages={})
WITH_TRITON = replace(H200, packages={"triton": "3.6.0"})
CPU = Machine("cpu", "some CPU", packages={})


@pytest.fixture
def sound(monkeypatch):
    """DAX's own kernels pass their self-check on machines that are not there."""
    monkeypatch.setattr(backend, "self_check", lambda kernel: Verdict())


def attention_reference(q, k, v, scale=None):
    """softmax(q k^T scale) v in float64; [B, S, H, D] in and out."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def operands(B=1, S=63, T=63, H=3, D=64, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(S + T)
    shapes = ((B, S, H, D), (B, T, H, D), (B, T, H, D))
    return [(1.5 * torch.randn(shape, generator=generator)).to(device, dtype) for shape in shapes]


def relative(a, b) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.mark.parametrize("kernel", ["auto", "sdpa"])
@pytest.mark.parametrize(("S", "T"), [(1, 1), (63, 63), (257, 5), (5, 257)])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_attend_on_the_cpu(kernel, S, T, scale):
    q, k, v = operands(2, S, T)
    out = attend(q, k, v, kernel=kernel, scale=scale)
    assert out.shape == q.shape and out.dtype == q.dtype
    assert relative(out, attention_reference(q, k, v, scale)) < 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kernel", backend.KERNELS)
@pytest.mark.parametrize(("S", "T"), [(63, 63), (257, 512), (4097, 4097)])
def test_attend_on_a_gpu(kernel, S, T):
    if available()[kernel]:
        pytest.skip(available()[kernel])
    q, k, v = operands(1, S, T, 4, 128, torch.bfloat16, "cuda")
    wanted = attention_reference(q, k, v)
    limit = 2 * relative(dense.sdpa(q, k, v), wanted) if backend.KERNELS[kernel].exact else 0.06
    assert relative(attend(q, k, v, kernel=kernel), wanted) < limit


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("B", "S", "T", "D", "size"),
    [
        (1, 1, 1, 128, 1.5),
        (2, 63, 257, 64, 1.5),
        (1, 4097, 129, 128, 1.5),
        (2, 1000, 1361, 128, 1.5),
        (1, 300, 300, 128, 0.0),
        (1, 300, 1000, 64, 100.0),
    ],
)
def test_16_bit_attention_of_our_own_is_as_good_as_sdpa(B, S, T, D, size):
    """Constant tensors and large ones too; no number of another batch or head is read."""
    if reason("bf16", machine()):
        pytest.skip(reason("bf16", machine()))
    q, k, v = (x * size / 1.5 for x in operands(B, S, T, 3, D, torch.bfloat16, "cuda"))
    v = v if size else v + 1
    wanted = attention_reference(q, k, v)
    limit = 1.1 * relative(dense.sdpa(q, k, v), wanted) + 1e-4
    assert relative(attend(q, k, v, kernel="bf16"), wanted) <= limit
    if B > 1:
        k[1, 0], v[1, 0] = float("nan"), float("nan")
        out = attend(q, k, v, kernel="bf16")
        assert relative(out[:1], wanted[:1]) <= limit and out[1].isnan().all()


def test_what_runs_here_is_told():
    told = dax.attention.available()
    here = [*backend.KERNELS] if machine().device == "cuda" else [*backend.KERNELS][:-1] + ["int8 (reference)"]
    assert list(told) == here and told["sdpa"] is None
    if machine().device == "cpu":
        assert told["int8 (reference)"] is None
        assert told["cudnn"] == told["flash"] == told["bf16"] == told["sage"] == "needs an NVIDIA GPU"


@pytest.mark.parametrize("kernel", ["cudnn", "flash", "bf16", "sage"])
def test_a_kernel_that_does_not_run_here_is_refused(kernel):
    with pytest.raises(DaxError, match=f"'{kernel}' needs an NVIDIA GPU; these run here: sdpa") as caught:
        attend(*operands(), kernel=kernel)
    assert caught.value.exit_code == 4


def test_an_unknown_kernel_offers_the_nearest():
    with pytest.raises(DaxError, match="did you mean 'sage'"):
        attend(*operands(), kernel="saeg")


@pytest.mark.parametrize(
    "break_it",
    [
        lambda q, k, v: (q[0], k, v),
        lambda q, k, v: (q, k[:, :-1], v),
        lambda q, k, v: (q, k[:, :, :1], v[:, :, :1]),
        lambda q, k, v: (q, k[..., :32], v[..., :32]),
        lambda q, k, v: (q.half(), k, v),
        lambda q, k, v: (q.long(), k.long(), v.long()),
        lambda q, k, v: (q.to("meta"), k, v),
    ],
)
def test_operands_that_do_not_fit_are_refused(break_it):
    with pytest.raises(DaxError, match="attend: ") as caught:
        attend(*break_it(*operands()))
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("here", "kernel", "dtype", "head_dim", "expected"),
    [
        (CPU, "sdpa", "float32", 40, None),
        (CPU, "cudnn", "bfloat16", 128, "needs an NVIDIA GPU"),
        (H200, "cudnn", "bfloat16", 128, None),
        (H200, "cudnn", "float32", 128, "the model is float32"),
        (H200, "cudnn", "bfloat16", 192, "does not take heads of 192"),
        (H200, "flash", "bfloat16", 128, "is not installed"),
        (H200, "sage", "bfloat16", 128, "package sageattention is not installed: pip install sageattention"),
        (MACHINES["h200"], "sage", "bfloat16", 128, None),
        (replace(H200, packages={"sageattention": "2.2"}), "sage", "bfloat16", 128, None),
        (replace(H200, packages={"sageattention": "2.2"}), "sage", "bfloat16", 80, "heads of 80"),
        (
            replace(H200, packages={"sageattention": "2.2"}, broken={"sageattention": "ImportError: undefined symbol"}),
            "sage",
            "bfloat16",
            128,
            "does not import (ImportError: undefined symbol)",
        ),
        (replace(H200, sm=75, name="T4"), "cudnn", "float16", 128, "needs compute capability 8.0 or newer, T4 has 7.5"),
        (CPU, "bf16", "bfloat16", 128, "needs an NVIDIA GPU"),
        (H200, "bf16", "bfloat16", 128, "package triton is not installed"),
        (WITH_TRITON, "bf16", "float16", 64, None),
        (WITH_TRITON, "bf16", "float32", 128, "the model is float32"),
        (WITH_TRITON, "bf16", "bfloat16", 96, "does not take heads of 96"),
        (MACHINES["h100"], "bf16", "bfloat16", 128, None),
        (MACHINES["a100"], "bf16", "bfloat16", 128, "needs compute capability 9.0, NVIDIA A100 80GB has 8.0"),
        (MACHINES["b200"], "bf16", "bfloat16", 128, "needs compute capability 9.0, NVIDIA B200 has 10.0"),
    ],
)
def test_the_table_of_what_runs_where(here, kernel, dtype, head_dim, expected, sound):
    told = reason(kernel, here, dtype, head_dim)
    assert told is None if expected is None else expected in told


@pytest.mark.parametrize(
    ("here", "dtype", "kernel"),
    [
        (CPU, "bfloat16", "sdpa"),
        (H200, "bfloat16", "cudnn"),
        (H200, "float32", "sdpa"),
        (MACHINES["h200"], "bfloat16", "bf16"),
        (WITH_TRITON, "bfloat16", "bf16"),
        (replace(WITH_TRITON, packages={"triton": "3.6.0", "flash_attn_interface": "3"}), "bfloat16", "flash"),
        (MACHINES["a100"], "bfloat16", "sdpa"),
        (replace(H200, packages={"flash_attn_interface": "3"}), "bfloat16", "flash"),
        (
            replace(H200, packages={"flash_attn_interface": "3"}, broken={"flash_attn_interface": "x"}),
            "bfloat16",
            "cudnn",
        ),
        (replace(H200, packages={"flash_attn": "2.8"}), "bfloat16", "cudnn"),
        (replace(H200, packages={"sageattention": "2.2"}), "bfloat16", "cudnn"),
        (replace(MACHINES["b200"], packages={"flash_attn_interface": "3"}), "bfloat16", "cudnn"),
    ],
)
def test_auto_is_the_fastest_exact_kernel(here, dtype, kernel, sound):
    assert choose(here, dtype) == kernel and backend.KERNELS[kernel].exact


def test_a_kernel_that_fails_its_self_check_is_passed_over_by_name(monkeypatch):
    monkeypatch.setattr(backend, "self_check", lambda kernel: Verdict(problem="failed its self-check (error 0.5)"))
    plan = lambda kernel: Plan(attention={"kernel": kernel})
    auto, asked = (resolve(plan(kernel), FACTS["wan2.1-t2v-14b"], WITH_TRITON) for kernel in ("auto", "bf16"))
    assert auto.plan.attention.kernel == asked.plan.attention.kernel == "cudnn" and auto.fallbacks == ()
    assert auto.notes[0].endswith("auto is cudnn on NVIDIA H200 in bfloat16; bf16 failed its self-check (error 0.5)")
    assert asked.fallbacks[0] == "attention.kernel = bf16: failed its self-check (error 0.5); cudnn instead"
    assert kernel_for_cross("int8", WITH_TRITON) == "cudnn"


@pytest.mark.parametrize(
    ("wrong", "found"),
    [
        (lambda q, k, v, scale: dense.sdpa(q, k, v, scale), None),
        (lambda q, k, v, scale: dense.sdpa(q, k[:, :-1], v[:, :-1], scale), "error"),
        (lambda q, k, v, scale: 1.02 * dense.sdpa(q, k, v, scale), "V = 1 gives O = 1 within 0.0"),
        (lambda q, k, v, scale: dense.sdpa(q, k, v, scale) * float("nan"), "error nan"),
        (lambda q, k, v, scale: 1 / 0, "ZeroDivisionError: division by zero"),
    ],
    ids=["right", "a key is missing", "a wrong sum", "NaN", "raises"],
)
def test_the_self_check_notices(wrong, found, monkeypatch):
    monkeypatch.setitem(dense.RUN, "bf16", wrong)
    monkeypatch.setattr(self_check, "compiled_ahead", nullcontext)
    told = self_check.difference("bf16", dense.backend("bf16"), "cpu")
    assert told is None if found is None else found in told


def test_16_bits_go_to_several_places_on_hopper_alone(monkeypatch):
    """The scale and rooms of the operands' size and dtype arrive as they must; other kernels never write there."""
    assert dense.backend("bf16").attend_into is None
    monkeypatch.setattr(dense, "on_hopper", lambda: True)
    assert dense.backend("cudnn").attend_into is dense.backend("flash").attend_into is None

    def into(q, k, v, scale, rooms):
        fill(rooms, dense.RUN["bf16"](q, k, v, scale), 1)
        return rooms[0]

    def rooms(B, D, dtype):
        found.extend(torch.empty(B, size, 3, D, dtype=dtype) for size in (40, 23))
        return found

    monkeypatch.setattr(dense, "attention_bf16_into", into)
    kernel, found, given = dense.backend("bf16"), [], operands(2, dtype=torch.float16)
    kernel.attend_into(given, 63, rooms, 0.3)
    assert torch.equal(torch.cat(found, 1), kernel.attend(given, 63, 0.3))


def test_flash_is_3_on_hopper_and_2_elsewhere():
    both = {"flash_attn_interface": "3", "flash_attn": "2.8"}
    assert backend.package("flash", replace(H200, packages=both)) == "flash_attn_interface"
    assert backend.package("flash", replace(MACHINES["a100"], packages=both)) == "flash_attn"


def test_cross_attention_stays_exact():
    assert kernel_for_cross("sage", H200) == "cudnn" and kernel_for_cross("sdpa", H200) == "sdpa"


def test_packages_are_called_with_our_layout(monkeypatch):
    """Stand-ins with the packages' signatures: layout, scale and no mask arrive as they must."""

    def sageattn(q, k, v, tensor_layout="HND", is_causal=True, sm_scale=None):
        assert tensor_layout == "NHD" and not is_causal
        return attention_reference(q, k, v, sm_scale).to(q.dtype)

    def flash_attn_func(q, k, v, softmax_scale=None, causal=True):
        assert not causal
        return attention_reference(q, k, v, softmax_scale).to(q.dtype), None

    monkeypatch.setitem(sys.modules, "sageattention", SimpleNamespace(sageattn=sageattn))
    monkeypatch.setattr(dense, "flash_function", lambda: flash_attn_func)
    q, k, v = operands(1, 9, 5)
    for kernel in ("sage", "flash"):
        for scale in (None, 0.3):
            assert relative(dense.RUN[kernel](q, k, v, scale), attention_reference(q, k, v, scale)) < 1e-6


def test_package_kernels_trace_as_one_graph(monkeypatch):
    monkeypatch.setattr(
        dense, "flash_function", lambda: lambda q, k, v, softmax_scale, causal: dense.sdpa(q, k, v).clone()
    )
    q, k, v = operands(1, 9, 5)
    traced = torch.compile(lambda *x: 2 * dense.flash(*x), backend="eager", fullgraph=True)
    assert relative(traced(q, k, v), 2 * attention_reference(q, k, v)) < 1e-5


def test_processor_equals_the_vendors():
    wan_guard.check_processor.__wrapped__()


def turn_otherwise(monkeypatch, change):
    def turn_of(attn, rotary_emb, right=wan.turn_of):
        turn = right(attn, rotary_emb)
        if rotary_emb is None:
            return turn
        cos, sin = change(turn.cos, turn.sin)
        return turn._replace(cos=cos, sin=sin)

    monkeypatch.setattr(wan, "turn_of", turn_of)


@pytest.mark.parametrize(
    "fault",
    [
        lambda m: turn_otherwise(m, lambda cos, sin: (None, None)),
        lambda m: turn_otherwise(m, lambda cos, sin: (cos, -sin)),
        lambda m: turn_otherwise(m, lambda cos, sin: (cos.roll(1, 0), sin.roll(1, 0))),
        lambda m: m.setattr(wan, "project", lambda attn, x: (attn.to_q(x), *2 * [attn.to_k(x)])),
        lambda m: m.setattr(
            wan, "text_operands", lambda *x, right=wan.text_operands: tuple(pair[::-1] for pair in right(*x))
        ),
        lambda m: m.setitem(dense.RUN, "sdpa", lambda q, k, v, scale: dense.sdpa(q, k, v, 1.0)),
        lambda m: m.setitem(dense.RUN, "sdpa", lambda q, k, v, scale: dense.sdpa(q, k, v).flip(2)),
    ],
    ids=["no rotation", "wrong way", "off by one", "v is k", "text swapped", "scale", "heads swapped"],
)
def test_a_processor_that_differs_is_noticed(fault, monkeypatch):
    fault(monkeypatch)
    with pytest.raises(DaxError, match="otherwise than DAX") as caught:
        wan_guard.check_processor.__wrapped__()
    assert caught.value.exit_code == 8


def test_fused_projections_are_used(random_pipe):
    transformer = random_pipe.transformer
    q = torch.randn(1, 16, 3, 8, 8), torch.tensor([500.0]), torch.randn(1, 7, 32)
    wanted = transformer(*q).sample
    transformer.fuse_qkv_projections()
    for block in transformer.blocks:  # only the fused weights may be read
        for linear in (block.attn1.to_q, block.attn1.to_k, block.attn1.to_v, block.attn2.to_k, block.attn2.to_v):
            linear.weight.fill_(float("nan"))
    with dax.optimize(transformer):
        assert relative(transformer(*q).sample, wanted) < 1e-5


def test_a_mask_is_refused(random_pipe):
    block = random_pipe.transformer.blocks[0]
    with dax.optimize(random_pipe), pytest.raises(DaxError, match="attention_mask"):
        block.attn1(torch.randn(1, 4, 64), None, torch.ones(1, 4))


def test_diffusers_own_switches_are_refused(random_pipe):
    with dax.optimize(random_pipe):
        with pytest.raises(DaxError, match="set attention.kernel in the plan"):
            random_pipe.transformer.set_attention_backend("native")
        random_pipe.transformer.reset_attention_backend()
    random_pipe.transformer.set_attention_backend("native")
