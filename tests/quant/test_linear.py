"""QuantLinear: what it computes, what it keeps through moves and casts, what it refuses."""

import copy

import pytest
import torch
from torch import nn

from dax.errors import DaxError
from dax.kernels.quantize import quantize_rows
from dax.kernels.scaled_linear import scaled_linear
from dax.quant import QuantLinear, Rule
from dax.quant.scheme import SCHEMES

ERROR = {"int8": 0.012, "fp8": 0.04, "fp8_e5m2": 0.07, "int8_weight_only": 0.009}  # on Gaussian numbers, a half above


def layer(K=64, N=48, bias=True, seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    made = nn.Linear(K, N, bias=bias, dtype=dtype)
    return made.requires_grad_(False)


def relative(a, b):
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("granularity", ["token-channel", "tensor-channel", "tensor"])
def test_every_scheme_is_as_near_as_its_bits_allow(scheme, granularity):
    plain, x = layer(256, 96), torch.randn(3, 65, 256)
    quantised = QuantLinear.from_float(plain, Rule(scheme, granularity))
    assert isinstance(quantised, nn.Linear) and quantised.weight.element_size() == 1
    assert quantised.weight_scale.dtype == torch.float32
    error = relative(quantised(x), plain(x))
    assert 1e-4 < error < (1 if granularity == "token-channel" else 2) * ERROR[scheme]


def test_a_scale_per_token_spares_the_others_from_an_outlier():
    plain, x = layer(), torch.randn(1, 32, 64)
    x[0, 5] *= 1000
    others = torch.arange(32) != 5
    per_token, per_tensor = (
        QuantLinear.from_float(plain, Rule("int8", granularity))(x)[0, others]
        for granularity in ("token-channel", "tensor-channel")
    )
    assert relative(per_token, plain(x)[0, others]) < 0.02 < 0.3 < relative(per_tensor, plain(x)[0, others])


def test_a_loud_channel_costs_the_others_less_where_weight_and_input_are_rotated():
    plain, x = layer(256, 96), torch.randn(3, 65, 256)
    x[..., 7] *= 30
    quantised = QuantLinear.from_float(plain, "int8")
    weight, weight_scale = quantize_rows(plain.weight, torch.int8)
    unrotated = scaled_linear(*quantize_rows(x, torch.int8), weight, weight_scale, plain.bias, torch.float32)
    assert relative(quantised(x), plain(x)) < 0.6 * relative(unrotated, plain(x))
    assert relative(quantised.dequantized(), plain.weight) < 0.01
    assert not torch.equal(quantised.weight, weight)


def test_static_scales_saturate_and_need_their_scale():
    plain, x = layer(), torch.randn(1, 32, 64).clamp(-3, 3)
    rule = Rule("int8", "tensor-channel", static=True)
    quantised = QuantLinear.from_float(plain, rule, input_scale=3.0 / 127)
    assert relative(quantised(x), plain(x)) < 0.02
    assert torch.equal(quantised(100 * torch.ones(1, 1, 64)), quantised(3 * torch.ones(1, 1, 64)))
    with pytest.raises(DaxError, match="disagree"):
        QuantLinear.from_float(plain, rule)
    with pytest.raises(DaxError, match="cannot be per token"):
        Rule("int8", "token-channel", static=True)


def test_codes_handed_over_give_the_same_result():
    quantised, x = QuantLinear.from_float(layer(), "int8"), torch.randn(2, 7, 64)
    assert torch.equal(quantised.forward_quantized(*quantised.quantize(x), torch.float32), quantised(x))


@pytest.mark.parametrize("scheme", ["int8", "fp8", "int8_weight_only"])
@pytest.mark.parametrize("shape", [(), (1,), (2, 1, 3), (0,), (2, 0)])
def test_any_leading_shape(scheme, shape):
    quantised, x = QuantLinear.from_float(layer(), scheme), torch.randn(*shape, 64)
    assert torch.equal(quantised(x), quantised(x.reshape(-1, 64)).reshape(*shape, 48))


def test_gelu_gate_and_residual_are_part_of_it():
    first, second = (
        QuantLinear.from_float(layer(64, 128), "int8"),
        QuantLinear.from_float(layer(128, 64, seed=1), "int8"),
    )
    x, residual, gate = torch.randn(2, 9, 64), torch.randn(2, 9, 64), torch.randn(2, 1, 64)
    h, scale = first.forward_gelu_quantized(*first.quantize(x), second, torch.float32)
    got = second.forward_quantized(h, scale, torch.float32, gate=gate, residual=residual)
    wanted = residual + gate * second(nn.functional.gelu(first(x), approximate="tanh"))
    assert relative(got, wanted) < 1e-5


@pytest.mark.parametrize(
    "cast", [lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.double(), nn.Module.float]
)
@pytest.mark.parametrize("scheme", ["int8", "fp8"])
def test_casts_leave_codes_and_scales_alone(scheme, cast):
    rule = Rule(scheme, "tensor-channel", static=True)
    quantised = QuantLinear.from_float(layer(), rule, input_scale=0.0123456789)
    before = {name: tensor.clone() for name, tensor in quantised.state_dict().items() if name != "bias"}
    cast(nn.Sequential(quantised))
    for name, tensor in before.items():
        now = quantised.state_dict()[name]
        assert now.dtype == tensor.dtype and torch.equal(now.double(), tensor.double()), name


def test_layerwise_casting_is_refused():
    from diffusers.hooks import apply_layerwise_casting

    model = nn.Sequential(QuantLinear.from_float(layer(), "int8"))
    with pytest.raises(DaxError, match="layerwise casting"):
        apply_layerwise_casting(model, torch.float8_e4m3fn, torch.float32)


def test_bf16_weights_do_not_load_into_integers():
    quantised = QuantLinear.from_float(layer(), "int8")
    with pytest.raises(RuntimeError, match="this quantised layer takes torch.int8"):
        quantised.load_state_dict(layer().state_dict(), strict=False)


def test_it_copies_and_moves_like_any_module():
    quantised, x = QuantLinear.from_float(layer(), "int8"), torch.randn(2, 64)
    assert torch.equal(copy.deepcopy(quantised)(x), quantised(x))
    assert quantised.to("meta").weight.dtype == torch.int8


@pytest.mark.parametrize(("K", "N"), [(40, 64), (64, 40), (17, 32)])
def test_odd_sizes_are_named(K, N):
    with pytest.raises(DaxError, match=f"{K} -> {N} features are not multiples of 16"):
        QuantLinear.from_float(layer(K, N), "int8")


def test_quantising_twice_is_refused():
    with pytest.raises(DaxError, match="QuantLinear, not a plain linear layer"):
        QuantLinear.from_float(QuantLinear.from_float(layer(), "int8"), "int8")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_fault_in_one_token_reaches_its_result_and_no_other(value):
    quantised, x = QuantLinear.from_float(layer(), "int8"), torch.randn(1, 4, 64)
    x[0, 2, 7] = value
    assert quantised(x).isfinite().all(-1).tolist() == [[True, True, False, True]]


def test_forgetting_a_scale_is_seen():
    plain, x = layer(256, 96), torch.randn(3, 65, 256)
    plain.weight.mul_(torch.linspace(0.5, 1.5, 96)[:, None])
    quantised = QuantLinear.from_float(plain, "int8")
    assert relative(quantised(x), plain(x)) < ERROR["int8"]
    quantised.weight_scale.fill_(quantised.weight_scale.mean())
    assert relative(quantised(x), plain(x)) > 10 * ERROR["int8"]


def test_zeros_stay_zeros():
    plain = layer(bias=False)
    plain.weight[3] = 0
    out = QuantLinear.from_float(plain, "int8")(torch.zeros(1, 2, 64))
    assert torch.equal(out, torch.zeros_like(out))
