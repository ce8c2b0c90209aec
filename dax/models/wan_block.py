"""Wan's transformer block in a few fused passes, run eagerly: nothing to compile, nothing to warm up.

The vendor's block keeps its class, its names and its weights; only its `forward` is replaced, on the instance. Between
two matrix products an activation is read once and written once: norm, modulation and 8 bits in one pass, q, k and v in
one product, GELU inside the product before it, gate and residual inside the 8-bit product before them or, in bf16, in
one pass with the norm after them. Every layer is looked at when it runs: one that carries an adapter, or whose
neighbours are quantised otherwise, runs by itself, as the vendor has it.
"""

from collections import Counter
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from dax.edits import Edits
from dax.errors import DaxError
from dax.kernels.gated_residual import gated_residual
from dax.kernels.norm_modulate import norm_modulate, norm_modulate_quantize, residual_norm_modulate
from dax.kernels.scaled_linear import scaled_linear
from dax.kernels.start import compiled_ahead
from dax.models.token_time import modulation
from dax.models.wan import TEXT_TOKENS, attend_heads, attend_text
from dax.quant.linear import QuantLinear

FEW_TOKENS = 128
Activation = torch.Tensor | tuple[torch.Tensor, torch.Tensor]  # bf16, or 8 bits and a scale for each token


def block_forward(block, hidden_states, encoder_hidden_states, temb, rotary_emb):
    """What WanTransformerBlock.forward computes.

    hidden_states [B, S, C]   encoder_hidden_states [B, I + T, C]   rotary_emb as in WanProcessor
    temb          [B, 6, C]   or a Modulation of rows [B, R, 6, C]
    returns       [B, S, C]   in hidden_states' dtype; norms, gates and residuals in fp32 inside
    """
    x, text, times = hidden_states, encoder_hidden_states, modulation(temb)
    shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (block.scale_shift_table + times.rows.float()).unbind(2)
    attn1, attn2, (ffn_in, _, ffn_out) = block.attn1, block.attn2, block.ffn.net

    h = normed(x, 1 + scale, shift, block.norm1.eps, projections(attn1), times.split)
    o = attend_heads(attn1, *queries_keys_values(attn1, h, x.dtype), rotary_emb, attn1.processor.backend)
    norm = block.norm2
    if isinstance(norm, nn.Identity):
        h = x = added(attn1.to_out[0], o, gate, x, times.split)
    else:
        affine = norm.weight[None, None], norm.bias[None, None], norm.eps
        x, h = added_normed(attn1.to_out[0], o, gate, x, *affine, [attn2.to_q], times.split)
    o = attend_text(attn2, run(attn2.to_q, h, x.dtype), text, attn2.processor.backend, attn2.processor.text)

    modulated = 1 + ffn_scale, ffn_shift, block.norm3.eps
    x, h = added_normed(attn2.to_out[0], o, None, x, *modulated, [ffn_in.proj], times.split)
    return added(ffn_out, gelu(ffn_in, h, ffn_out, x.dtype), ffn_gate, x, times.split)


def control_forward(block, hidden_states, encoder_hidden_states, control_hidden_states, temb, rotary_emb):
    """What WanVACETransformerBlock.forward computes: (the hint or None, the control tokens), each [B, S, C]."""
    x = control_hidden_states
    if block.proj_in is not None:
        x = added(block.proj_in, x, None, hidden_states)
    x = block_forward(block, x, encoder_hidden_states, temb, rotary_emb)
    return None if block.proj_out is None else block.proj_out(x), x


def normed(x, weight, bias, eps: float, layers: list, split: int = 0) -> Activation:
    """LayerNorm(x) * weight + bias as `layers` take it: in their 8 bits where all take the same, else in x's dtype.

    weight, bias  [B or 1, R, C] fp32; `split` parts the tokens of two rows
    """
    first = layers[0]
    if not share_codes(layers):
        return norm_modulate(x, weight, bias, eps, split)
    if first.rule.static or first.rule.per_token:
        return norm_modulate_quantize(
            x, weight, bias, eps, first.activation, first.input_scale, split, first.rule.rotated
        )
    return first.quantize(norm_modulate(x, weight, bias, eps, split))


def share_codes(layers: list) -> bool:
    """Whether all are 8-bit layers, without an adapter, that take the very same codes."""
    first = layers[0]
    if not all(takes_codes(layer) and layer.rule == first.rule for layer in layers):
        return False
    return not first.rule.static or joined([layer.weight for layer in layers]) is not None  # `join` compared the scales


def takes_codes(layer) -> bool:
    """Whether a layer multiplies 8-bit activations, with no adapter around it."""
    return type(layer) is QuantLinear and layer.activation is not None


def projections(attn) -> list:
    """q, k and v of a self-attention layer, or the one that the vendor fused."""
    return [attn.to_qkv] if attn.fused_projections else [attn.to_q, attn.to_k, attn.to_v]


def queries_keys_values(attn, h: Activation, dtype: torch.dtype):
    """q, k, v, each [B, S, C], thirds of one product where their weights lie in one storage."""
    layers = projections(attn)
    if len(layers) == 1:
        return run(layers[0], h, dtype).chunk(3, dim=-1)
    weight, bias = joined([layer.weight for layer in layers]), joined([layer.bias for layer in layers])
    if weight is None or bias is None or len({type(layer) for layer in layers}) > 1:
        return tuple(run(layer, h, dtype) for layer in layers)
    if isinstance(h, tuple):
        scale = joined([layer.weight_scale for layer in layers])
        return scaled_linear(*h, weight, scale, bias, dtype).chunk(3, dim=-1)
    if type(layers[0]) is nn.Linear:
        return F.linear(h, weight, bias).chunk(3, dim=-1)
    return tuple(layer(h) for layer in layers)


def run(layer, h: Activation, dtype: torch.dtype) -> torch.Tensor:
    """A linear layer, whatever it is, on an activation made for it."""
    return layer.forward_quantized(*h, dtype) if isinstance(h, tuple) else layer(h)


def gelu(ffn_in, h: Activation, following, dtype: torch.dtype) -> Activation:
    """The first half of the feed-forward, as the second half takes it."""
    if not isinstance(h, tuple):
        return linear_gelu(ffn_in.proj, h) if gelu_in_product(ffn_in, h) else ffn_in(h)
    if takes_codes(following):
        return ffn_in.proj.forward_gelu_quantized(*h, following, dtype)
    return ffn_in.proj.forward_quantized(*h, dtype, gelu=True)


def gelu_in_product(ffn_in, h: torch.Tensor) -> bool:
    """Whether torch computes this GELU inside its product: the tanh form, on a GPU, of a linear layer without hooks.

    In 16 bits: in fp32 its tanh is an approximation, five times as far from the exact value as what torch does after.
    """
    proj = ffn_in.proj
    hooked = "forward" in vars(proj) or proj._forward_pre_hooks or proj._forward_hooks
    plain = type(proj) is nn.Linear and proj.bias is not None and not hooked
    half = h.dtype in (torch.bfloat16, torch.float16)
    return h.is_cuda and half and ffn_in.approximate == "tanh" and plain


def linear_gelu(linear: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """GELU(tanh) of a linear layer with a bias, [B, S, K] -> [B, S, N], on a GPU; what comes between stays in fp32.

    On a CPU the same call of torch means GELU(erf).
    """
    y = torch._addmm_activation(linear.bias, x.flatten(0, -2), linear.weight.t(), use_gelu=True)
    return y.unflatten(0, x.shape[:-1])


def added_normed(layer, h: Activation, gate, residual, weight, bias, eps: float, layers: list, split: int = 0):
    """(x, normed(x)) of x = added(...): in one pass where neither `layer` nor `layers` take 8 bits."""
    if takes_codes(layer) or share_codes(layers):
        x = added(layer, h, gate, residual, split)
        return x, normed(x, weight, bias, eps, layers, split)
    return residual_norm_modulate(layer(h), gate, residual, weight, bias, eps, split)


def added(layer, h: Activation, gate, residual, split: int = 0) -> torch.Tensor:
    """residual + gate * layer(h); gate [B, R, C] fp32, or None for 1; `split` parts the tokens of two rows."""
    if takes_codes(layer):
        codes, scale = h if isinstance(h, tuple) else layer.quantize(h)
        return layer.forward_quantized(codes, scale, residual.dtype, gate=gate, residual=residual, split=split)
    y = layer(h)
    return residual + y if gate is None else gated_residual(y, gate, residual, split)


def joined(tensors: list) -> torch.Tensor | None:
    """Tensors that lie one behind the other in one storage, as one along dim 0; None if they do not."""
    first, size = tensors[0], 0
    for tensor in tensors:
        if tensor is None or tensor.dtype != first.dtype or not tensor.is_contiguous():
            return None
        if tensor.data_ptr() != first.data_ptr() + size or tensor.device != first.device:
            return None
        size += tensor.nbytes
    if first.untyped_storage().nbytes() < first.storage_offset() * first.element_size() + size:
        return None  # neighbours by chance, each with a storage of its own
    rows = sum(len(tensor) for tensor in tensors)
    return first.detach().as_strided((rows, *first.shape[1:]), first.stride(), first.storage_offset())


def join(layers: list, edits: Edits) -> None:
    """Let the weights, biases and scales of layers lie in one storage, the same Parameters as views of it.

    Needs the bytes of the three once more for a moment. Layers that are not all alike stay as they are.
    """
    first = layers[0]
    if len(layers) == 1 or type(first) not in (nn.Linear, QuantLinear):
        return
    names = ["weight", "bias"] + ["weight_scale"] * (type(first) is QuantLinear)
    groups = [[getattr(layer, name, None) for layer in layers] for name in names]
    alike = all(type(layer) is type(first) for layer in layers) and not any(t is None for g in groups for t in g)
    if not alike or len({getattr(layer, "rule", None) for layer in layers}) > 1:
        return
    if getattr(first, "input_scale", None) is not None:
        if len({layer.input_scale.item() for layer in layers}) > 1:
            return
    for group in groups:
        if joined(group) is None:
            lay_out(group, edits)


def lay_out(tensors: list, edits: Edits) -> None:
    """Let tensors lie one behind the other in one new storage; undone, each has its own again."""

    def together():
        whole = torch.cat([tensor.data for tensor in tensors])
        for tensor, part in zip(tensors, whole.split([len(tensor) for tensor in tensors])):
            tensor.data = part

    def apart():
        for tensor in tensors:
            tensor.data = tensor.data.clone()

    edits.call(together, apart)


def apply_blocks(target, edits: Edits) -> int:
    """Give every block of a model the fused forward, and its q, k, v weights one storage; returns how many.

    DaxError("bad_request") for a block whose forward is not its class's own any more: hooks must come after DAX.
    """
    for i, block in enumerate(target.blocks()):
        if "forward" in vars(block):
            raise DaxError(
                "bad_request",
                f"blocks.{i}: its forward carries a hook already: enable it later, or set blocks.fused = false",
            )
    for block in target.blocks():
        join(projections(block.attn1), edits)
        edits.set_attribute(block, "forward", partial(forward_of(block), block))
    return len(target.blocks())


def forward_of(block):
    """The fused forward for a block's kind."""
    return control_forward if hasattr(block, "proj_in") else block_forward


def compile_kernels(target) -> None:
    """Compile what the blocks on a GPU will launch, all kernels at once: each kind of block sees a few tokens.

    The kernels serve any number of tokens. Blocks that wait elsewhere, as when offloaded, compile at their first call.
    """
    facts = target.facts
    kinds = {repr(block): block for block in target.blocks() if block.scale_shift_table.is_cuda}
    for block in kinds.values():
        device = block.scale_shift_table.device
        zeros = partial(torch.zeros, device=device, dtype=target.transformers[0].dtype)
        x, text = zeros(1, FEW_TOKENS, facts.width), zeros(1, facts.image_tokens + TEXT_TOKENS, facts.width)
        control = [x] * (forward_of(block) is control_forward)
        rotary = (torch.zeros(1, FEW_TOKENS, 1, facts.head_dim, device=device),) * 2
        with torch.cuda.device(device), torch.no_grad(), compiled_ahead():
            block(x, text, *control, zeros(1, 6, facts.width), rotary)


def segments(block) -> dict[str, bool]:
    """{segment: whether it runs fused now}: adapters and moves of the model may change it."""
    attn1, attn2, (ffn_in, _, ffn_out) = block.attn1, block.attn2, block.ffn.net
    qkv = projections(attn1)
    one_product = len(qkv) == 1 or joined([layer.weight for layer in qkv]) is not None
    return {
        "self-attention": one_product and plain(*qkv, attn1.to_out[0]),
        "cross-attention": plain(attn2.to_q, attn2.to_out[0]),
        "feed-forward": plain(ffn_in.proj, ffn_out),
    }


def plain(*layers) -> bool:
    """Whether the layers carry no adapter and, in pairs that hand over activations, the same scheme."""
    kinds = {(type(layer), getattr(layer, "rule", None)) for layer in layers}
    return len(kinds) == 1 and kinds.pop()[0] in (nn.Linear, QuantLinear)


def fused_segments(target) -> dict[str, int]:
    """{segment: in how many blocks it runs fused}."""
    counts: Counter = Counter()
    for block in target.blocks():
        counts.update(name for name, fused in segments(block).items() if fused)
    return {name: counts[name] for name in segments(target.blocks()[0])}
