"""Wan: where DAX stands in diffusers' WanTransformer3DModel, and how to build one of random weights.

The seams are the list of blocks and the processor of each attention. The processor restates the vendor's own around a
backend of DAX, in functions that a fused block calls too; `wan_guard` holds both to the vendor's before a model is
touched.
"""

from dataclasses import dataclass

import torch
from torch import nn

from dax.attention.backend import Backend, Turn
from dax.attention.dense import turned
from dax.errors import DaxError
from dax.facts import Facts
from dax.facts_config import facts_from_config, flow_shift_of
from dax.models.text_memory import TextMemory

TEXT_TOKENS = 512  # the vendor's: with an image, whatever comes before the last 512 tokens is of the image
INDEX_KEYS = ("_class_name", "transformer", "transformer_2", "boundary_ratio", "expand_timesteps")


@dataclass(frozen=True)
class Target:
    """What `optimize` was given: the pipeline (None for a bare transformer), its transformers and what they are."""

    pipe: object | None
    transformers: tuple[nn.Module, ...]
    facts: Facts

    def blocks(self) -> list[nn.Module]:
        """Of all transformers; VACE's control blocks too."""
        lists = ((each.blocks, getattr(each, "vace_blocks", ())) for each in self.transformers)
        return [block for pair in lists for blocks in pair for block in blocks]

    def attentions(self, cross: bool) -> list[nn.Module]:
        """The self- or the cross-attention layer of every block that has one as DAX knows it."""
        WanAttention, _ = vendor()
        layers = [getattr(block, "attn2" if cross else "attn1", None) for block in self.blocks()]
        return [layer for layer in layers if isinstance(layer, WanAttention)]


def vendor() -> tuple[type, type]:
    """diffusers' attention layer of Wan and its processor. DaxError("unsupported") if it keeps them elsewhere."""
    try:
        from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor
    except ImportError as error:
        raise DaxError(
            "unsupported", f"this diffusers is not one DAX knows ({error}): install diffusers 0.42"
        ) from None
    return WanAttention, WanAttnProcessor


def target_of(model) -> Target:
    """A pipeline of a Wan, or its bare transformer, as a Target; of two experts, both.

    DaxError("bad_model") for any other family, from class names and configs alone.
    """
    if hasattr(model, "_orig_mod"):
        raise DaxError("bad_request", "the model is compiled already: pass it uncompiled and set compile = blocks")
    if not hasattr(model, "config"):
        raise DaxError(
            "bad_model", f"{type(model).__name__} is not a diffusers pipeline or transformer: it has no config"
        )
    if isinstance(model, nn.Module):
        return Target(None, (model,), facts_from_config(None, config_of(model)))
    transformer = getattr(model, "transformer", None)
    if not hasattr(transformer, "config"):
        raise DaxError("bad_model", f"{type(model).__name__} has no transformer that DAX knows")
    index = {key: value for key, value in config_of(model).items() if key in INDEX_KEYS}  # schedulers may be one's own
    shift = flow_shift_of(getattr(getattr(model, "scheduler", None), "config", None))
    experts = {"transformer": transformer, "transformer_2": getattr(model, "transformer_2", None)}
    configs = [None if x is None else config_of(getattr(x, "_orig_mod", x)) for x in experts.values()]
    facts = facts_from_config(index, configs[0], shift, configs[1])
    for name, expert in experts.items():
        if hasattr(expert, "_orig_mod"):
            raise DaxError(
                "bad_request", f"pipe.{name} is compiled already: pass it uncompiled and set compile = blocks"
            )
    if experts["transformer"] is experts["transformer_2"]:
        raise DaxError(
            "bad_model", "transformer_2 is the very module that transformer is: load each expert's own weights"
        )
    return Target(model, tuple(experts.values())[: facts.num_experts], facts)


def config_of(model) -> dict:
    """A live model's config as its JSON file has it: with the class name, tuples as lists."""
    config = {key: list(value) if isinstance(value, tuple) else value for key, value in dict(model.config).items()}
    return config | {"_class_name": type(model).__name__}


class WanProcessor:
    """The attention of a Wan layer around a backend. One object serves every layer of a kind.

    hidden_states  [B, S, C]   encoder_hidden_states  [B, I + T, C] or None: self-attention
    rotary_emb     (cos, sin), each [1, S, 1, D] with every value twice, or None
    returns        [B, S, C]
    text           the memory of the text's and image's keys and values, or None to compute them anew each time
    """

    def __init__(self, backend: Backend, text: TextMemory | None = None):
        self.backend = backend
        self.text = text

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        if attention_mask is not None:
            raise DaxError("bad_request", "attention_mask: Wan's attention takes none, and DAX's kernels have no mask")
        if encoder_hidden_states is None:
            o = attend_heads(attn, *project(attn, hidden_states), rotary_emb, self.backend)
        else:
            o = attend_text(attn, attn.to_q(hidden_states), encoder_hidden_states, self.backend, self.text)
        projection, dropout = attn.to_out
        return dropout(projection(o))

    def around(self, backend: Backend) -> "WanProcessor":
        """The same processor around another backend, such as one that asks other ranks."""
        return type(self)(backend, self.text)

    def __repr__(self):
        return f"WanProcessor({self.backend.name!r})"

    def _refuse(self, value):
        if value is not None:
            raise DaxError(
                "bad_request",
                f"diffusers' attention setting {value!r} has no effect under DAX: set attention.kernel in the plan",
            )

    # What diffusers' set_attention_backend and enable_parallelism write to: refused instead of ignored.
    _attention_backend = property(lambda self: None, _refuse)
    _parallel_config = property(lambda self: None, _refuse)


def attend_heads(attn, q, k, v, rotary_emb, backend: Backend):
    """Self-attention of a layer, from its projections to what its output projection takes.

    q, k, v     [B, S, C]  as projected; rows may be strided, as thirds of a fused projection are
    rotary_emb  (cos, sin), each [1, S, 1, D] with every value twice, or None
    returns     [B, S, C]
    """
    turn = turn_of(attn, rotary_emb)
    stats = backend.stats(k, v, attn.heads, turn)
    operands = backend.prepare(q, k, v, attn.heads, turn, stats)
    return backend.attend(operands, k.shape[1]).flatten(2).type_as(q)


def attend_text(attn, q, text, backend: Backend, memory: TextMemory | None = None):
    """Cross-attention of a layer, from its projected queries to what its output projection takes.

    q        [B, S, C]       text  [B, T, C]  the embedded text, after the I tokens of an image where the model has one
    returns  [B, S, C]       attention over the text plus attention over the image; their keys and values come from
                             `memory` if it has them
    """
    operands = text_operands(attn, text) if memory is None else memory.get(attn, text, text_operands)
    turn = turn_of(attn, None)
    q = turned(q, attn.heads, turn.q_weight, None, None, turn.eps)
    results = [backend.attend((q, k, v), k.shape[1]).flatten(2) for k, v in operands]
    return sum(results[1:], start=results[0])


def text_operands(attn, text):
    """((keys, values) of the text, and those of the image where the model has one): [B, T, H, D] each, keys normed."""
    if attn.add_k_proj is None:
        return (key_value(attn, text, "to_kv", "to_k", "to_v", attn.norm_k),)
    images = text.shape[1] - TEXT_TOKENS
    return (
        key_value(attn, text[:, images:], "to_kv", "to_k", "to_v", attn.norm_k),
        key_value(attn, text[:, :images], "to_added_kv", "add_k_proj", "add_v_proj", attn.norm_added_k),
    )


def key_value(attn, x, both: str, key: str, value: str, norm):
    """Keys, normed, and values [B, T, H, D] of tokens, by the layer's projections of those names."""
    if attn.fused_projections:
        k, v = getattr(attn, both)(x).chunk(2, dim=-1)
    else:
        k, v = getattr(attn, key)(x), getattr(attn, value)(x)
    return turned(k, attn.heads, norm.weight, None, None, norm.eps), v.unflatten(2, (attn.heads, -1))


def turn_of(attn, rotary_emb) -> Turn:
    """The norms of a layer and the rotation of its tokens, as the backends take them."""
    cos, sin = (None, None) if rotary_emb is None else (table[0, :, 0] for table in rotary_emb)
    return Turn(attn.norm_q.weight, attn.norm_k.weight, cos, sin, attn.norm_q.eps)


def project(attn, x):
    """q, k, v [B, S, C] of a self-attention layer, through its fused projection where it has one."""
    return attn.to_qkv(x).chunk(3, dim=-1) if attn.fused_projections else (attn.to_q(x), attn.to_k(x), attn.to_v(x))


def build_random(facts: Facts, device: str = "cpu", num_layers: int | None = None, seed: int = 0):
    """A Wan transformer of random weights made on `device`: bf16, the vendor's fp32 parts in fp32.

    num_layers   fewer blocks than the model has, for a bench of some of them
    The same seed on the same device gives the same weights. Costs the model's bytes on the device, nothing elsewhere.
    """
    import diffusers

    if num_layers is not None:
        facts = facts.cut(num_layers)
    with torch.device("meta"):
        model = getattr(diffusers, facts.transformer_class)(**facts.transformer_config())
    model.rope = type(model.rope)(facts.head_dim, facts.patch, facts.rope_max_seq_len).to(device)  # a table, no weight
    generator = torch.Generator(device).manual_seed(seed)
    for name, planned in list(model.named_parameters()):
        path, _, leaf = name.rpartition(".")
        kept = any(part in model._keep_in_fp32_modules for part in name.split("."))
        weight = torch.empty(planned.shape, device=device, dtype=torch.float32 if kept else torch.bfloat16)
        if leaf == "weight" and planned.ndim == 1:  # of a norm
            weight.normal_(1.0, 0.1, generator=generator)
        elif leaf == "bias":
            weight.normal_(0.0, 0.02, generator=generator)
        else:  # keeps the variance: 1 / sqrt(inputs)
            weight.normal_(
                0.0, planned[0].numel() ** -0.5 if leaf == "weight" else facts.width**-0.5, generator=generator
            )
        setattr(model.get_submodule(path), leaf, nn.Parameter(weight, requires_grad=False))
    return model.eval()
