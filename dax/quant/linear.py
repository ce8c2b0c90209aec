"""QuantLinear: a linear layer whose weight, and usually whose input, has 8 bits.

It stays an `nn.Linear`, so that whatever looks for linear layers (adapters, offloading) finds it. Its weight and its
scales never change dtype: `.to(bfloat16)` moves them and leaves them as they are.
"""

import torch
import torch.nn.functional as F
from torch import nn

from dax.errors import DaxError
from dax.kernels.quantize import LARGEST, SMALLEST_AMAX, quantize_rows, rotated, to_codes
from dax.kernels.scaled_linear import scaled_linear, scaled_linear_quantize
from dax.quant.scheme import SCHEMES, Rule

MULTIPLE = 16  # of K and N: what 8-bit matrix units and the copy engine take


class QuantLinear(nn.Linear):
    """y = x w^T + b with w in 8 bits, and x too unless the scheme is for the weight alone.

    weight        [N, K]  int8 or float8_e4m3fn      weight_scale  [N]  fp32 (equal entries for one per tensor)
                  its codes are of the rotated weight where rule.rotated
    input_scale   []      fp32, or None: dynamic     bias          [N]  or None
    rule          how it was quantised (scheme, granularity, static)
    float_dtype   what `.to(dtype)` would have made of the weight by now, had it stayed in floating point
    The result has x's dtype. 2 M N K operations at twice the rate of bf16, half the bytes of weights.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool, rule: Rule, device=None, dtype=None):
        nn.Module.__init__(self)
        self.float_dtype = dtype or torch.get_default_dtype()
        self.in_features, self.out_features, self.rule = in_features, out_features, rule
        codes = torch.empty(out_features, in_features, device=device, dtype=getattr(torch, SCHEMES[rule.scheme].weight))
        self.weight = nn.Parameter(codes, requires_grad=False)
        bias = torch.empty(out_features, device=device, dtype=dtype) if bias else None
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.register_buffer("weight_scale", torch.empty(out_features, device=device, dtype=torch.float32))
        scale = torch.empty((), device=device, dtype=torch.float32) if rule.static else None
        self.register_buffer("input_scale", scale)

    @classmethod
    def from_float(cls, linear: nn.Linear, rule: "Rule | str", input_scale: float | None = None) -> "QuantLinear":
        """The quantised twin of a linear layer, which stays as it is.

        rule          a Rule, or a scheme's name for the default granularity
        input_scale   largest input / largest code, for a static rule
        DaxError("bad_request") for K or N not a multiple of 16, a weight that is quantised already or not finite, or a
        static rule without its scale.
        """
        rule = Rule(rule) if isinstance(rule, str) else rule
        check(linear)
        if rule.static != (input_scale is not None):
            raise DaxError("bad_request", f"linear: static = {rule.static} and input_scale = {input_scale} disagree")
        weight = linear.weight.detach()
        new = cls(linear.in_features, linear.out_features, linear.bias is not None, rule, weight.device, weight.dtype)
        new.weight.data, new.weight_scale.data = quantized(weight, new.weight.dtype, rule)
        if linear.bias is not None:
            new.bias.data = linear.bias.detach().clone()
        if rule.static:
            new.input_scale.fill_(input_scale)
        return new.train(linear.training)

    @property
    def activation(self) -> torch.dtype | None:
        """The dtype of the quantised input, None where the input stays as it is."""
        name = SCHEMES[self.rule.scheme].activation
        return name and getattr(torch, name)

    def quantize(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(codes, one fp32 scale per token) of an input [..., K], as this layer wants it."""
        return quantize_rows(x, self.activation, self.scale_of(x), self.rule.rotated)

    def scale_of(self, x: torch.Tensor) -> torch.Tensor | None:
        """The scale to divide an input by: the static one, one for the whole tensor, or None for each token's own."""
        if self.rule.static:
            return self.input_scale
        return None if self.rule.per_token else tensor_scale(x, self.activation)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.activation is None:
            return F.linear(x, self.dequantized(x.dtype), None if self.bias is None else self.bias.to(x.dtype))
        return self.forward_quantized(*self.quantize(x), x.dtype)

    def forward_quantized(
        self, x, scale, dtype=torch.bfloat16, gelu=False, gate=None, residual=None, split=0
    ) -> torch.Tensor:
        """The layer on an input that comes quantised, with GELU, or gate and residual, in the same kernel.

        x, scale   [B, S, K] of `activation`, [B, S] fp32, as `quantize` gives them; the rest as in scaled_linear
        """
        weight, weight_scale, bias = self.weight, self.weight_scale, self.bias
        return scaled_linear(x, scale, weight, weight_scale, bias, dtype, gelu, gate, residual, split)

    def forward_gelu_quantized(self, x, scale, following: "QuantLinear", dtype=torch.bfloat16):
        """GELU of the layer, in the 8 bits that `following` takes: (codes, scales).

        With a static scale the same kernel writes 8 bits; else a second pass finds each token's own.
        """
        if following.rule.static and following.activation == self.activation:
            weight, weight_scale, out_scale = self.weight, self.weight_scale, following.input_scale
            return scaled_linear_quantize(x, scale, weight, weight_scale, self.bias, out_scale, True)
        return following.quantize(self.forward_quantized(x, scale, dtype, gelu=True))

    def dequantized(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """[N, K] in floating point."""
        weight = self.weight.float() * self.weight_scale[:, None]
        return (rotated(weight) if self.rule.rotated else weight).to(dtype)

    def _apply(self, fn, recurse=True):
        """Move weight and scales with the module, but never change what they are. Layerwise casting is refused."""
        float_dtype = fn(torch.zeros(1, dtype=self.float_dtype)).dtype
        if float_dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
            raise DaxError(
                "bad_request", "layerwise casting to 8 bits of a quantised linear layer: it has 8 bits already"
            )
        self.float_dtype = float_dtype
        kept = [tensor for tensor in (self.weight, self.weight_scale, self.input_scale) if tensor is not None]

        def moved(tensor):
            new = fn(tensor)
            if not any(tensor is one for one in kept) or new.dtype == tensor.dtype:
                return new
            return tensor.to(new.device)

        return super()._apply(moved, recurse)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        """As any module, but bf16 weights are not silently cut down to integers."""
        for name in ("weight", "weight_scale", "input_scale"):
            given, own = state_dict.get(prefix + name), getattr(self, name)
            if given is not None and own is not None and given.dtype != own.dtype:
                errors.append(f"{prefix}{name} is {given.dtype}, this quantised layer takes {own.dtype}")
                return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.rule.scheme}, {self.rule.granularity}" + ", static" * self.rule.static


def quantized(weight: torch.Tensor, dtype: torch.dtype, rule: Rule) -> tuple[torch.Tensor, torch.Tensor]:
    """[N, K] in 8 bits, rotated if the rule says so, and its [N] fp32 scales, all equal where the tensor has one."""
    if weight.dtype in LARGEST:
        raise DaxError("bad_request", f"the weight is {weight.dtype} already")
    if rule.per_channel:
        return quantize_rows(weight.contiguous(), dtype, rotate=rule.rotated)
    scale = tensor_scale(weight, dtype)
    return to_codes(weight.float() / scale, dtype), scale.repeat(len(weight))


def tensor_scale(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[] fp32: the one scale that lets the largest magnitude of x use the largest code. Reads x once."""
    return torch.linalg.vector_norm(x, torch.inf).float().clamp_min(SMALLEST_AMAX) / LARGEST[dtype]


def check(linear: nn.Linear, name: str = "this linear layer") -> None:
    """DaxError unless the layer can be quantised: plain, of a size the kernels take, finite."""
    N, K = linear.out_features, linear.in_features
    if type(linear) is not nn.Linear:
        raise DaxError(
            "bad_request", f"{name} is {type(linear).__name__}, not a plain linear layer: quantise once, after fusing"
        )
    if N % MULTIPLE or K % MULTIPLE:
        raise DaxError(
            "bad_request",
            f"{name}: {K} -> {N} features are not multiples of {MULTIPLE}: add the rule {name}: none",
        )
    if linear.weight.is_meta:
        return
    amax = linear.weight.detach().abs().amax()
    if not amax.isfinite():
        raise DaxError("bad_model", f"{name}: the weight has NaN or infinity in it: the checkpoint is damaged")
    if linear.bias is not None and not linear.bias.detach().isfinite().all():
        raise DaxError("bad_model", f"{name}: the bias has NaN or infinity in it: the checkpoint is damaged")
    if amax < SMALLEST_AMAX and amax > 0:
        raise DaxError("bad_model", f"{name}: every weight is below {SMALLEST_AMAX}: the checkpoint is damaged")
