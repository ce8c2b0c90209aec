"""Whether the model and the diffusers at hand are those DAX knows, asked before anything is changed.

Not by versions or sources: DAX's processor and its fused block run beside the vendor's own on small numbers. An edit of
diffusers that changes nothing breaks nobody, one that does is seen.
"""

from contextlib import contextmanager
from copy import deepcopy
from functools import cache

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from dax.attention.backend import backend_of
from dax.errors import DaxError
from dax.models.token_time import Modulation
from dax.models.wan import TEXT_TOKENS, Target, WanProcessor, vendor
from dax.models.wan_block import forward_of


def check_seams(target: Target) -> None:
    """DaxError unless every block carries the attention DAX knows, with the vendor's processor, not compiled."""
    _, WanAttnProcessor = vendor()
    expected = len(target.blocks())
    for cross in (False, True):
        found = len(target.attentions(cross))
        if found != expected or expected == 0:
            kind = "cross" if cross else "self"
            raise DaxError(
                "bad_model",
                f"plan attention.kernel: {found} of {expected} {kind}-attention layers matched in "
                f"{target.facts.transformer_class}; this diffusers is not one DAX knows",
            )
    for expert, transformer in zip(("transformer", "transformer_2"), target.transformers):
        for name, module in transformer.named_modules():
            if getattr(module, "_compiled_call_impl", None) is not None:
                where = f"{expert}.{name}" if name else f"the {expert}"
                raise DaxError(
                    "bad_request", f"{where} is compiled already: pass an uncompiled model and set compile = blocks"
                )
        for name, processor in transformer.attn_processors.items():
            if type(processor) is not WanAttnProcessor:
                raise DaxError(
                    "bad_request",
                    f"{expert}.{name} is already {type(processor).__name__}: undo that change before dax.optimize",
                )
            if processor._parallel_config is not None:
                raise DaxError(
                    "bad_request", f"{expert}.{name}: diffusers' context parallelism cannot be combined with DAX"
                )
    check_processor()


@contextmanager
def small_numbers():
    """For a check on the CPU: seeded, without gradients, by plain mathematics whatever kernel the process chose."""
    with torch.random.fork_rng(devices=[]), torch.no_grad(), torch.device("cpu"), sdpa_kernel(SDPBackend.MATH):
        torch.manual_seed(0)
        yield


@cache
def check_processor() -> None:
    """Run DAX's processor and the vendor's on one small layer of each kind. DaxError("check_failed") if they differ."""
    WanAttention, WanAttnProcessor = vendor()
    S, T, H, D = 6, 5, 2, 8
    kinds = {"self": (0, {}), "cross": (T, {"cross_attention_dim_head": D})}
    kinds["image"] = (T + TEXT_TOKENS, kinds["cross"][1] | {"added_kv_proj_dim": H * D})
    angle = torch.arange(S * D / 2).view(1, S, 1, D // 2).repeat_interleave(2, dim=-1)
    with small_numbers():
        for kind, (tokens, options) in kinds.items():
            layer = WanAttention(H * D, H, D, eps=1e-6, **options)
            for parameter in layer.parameters():
                parameter.normal_()
            x, text = torch.randn(1, S, H * D), torch.randn(1, tokens, H * D) if tokens else None
            rotary = None if tokens else (angle.cos(), angle.sin())
            theirs = WanAttnProcessor()(layer, x, text, None, rotary)
            ours = WanProcessor(backend_of("sdpa"))(layer, x, text, None, rotary)
            error = ((ours - theirs).norm() / theirs.norm()).item()
            if not error < 1e-5:
                import diffusers

                raise DaxError(
                    "check_failed",
                    f"diffusers {diffusers.__version__} computes Wan's {kind}-attention "
                    f"otherwise than DAX (relative difference {error:.1e}): install another diffusers, or report it",
                )


@cache
def block_difference(control: bool) -> str | None:
    """Run the fused block and the vendor's own on small numbers: how they differ, or None if they do not.

    control   a control block of VACE, too
    """
    import diffusers

    try:
        found = [forward_error(*each) for each in small_blocks(control)]
    except (ImportError, TypeError, AttributeError, ValueError, RuntimeError) as problem:
        return f"diffusers {diffusers.__version__} builds Wan's block otherwise ({type(problem).__name__}: {problem})"
    if not all(error < 1e-5 for error in found):
        return (
            f"diffusers {diffusers.__version__} computes Wan's block otherwise (relative difference {max(found):.1e})"
        )
    return None


def small_blocks(control: bool):
    """(a vendor's block, its arguments, those of the fused one) with one timestep, with two, and of VACE."""
    from diffusers.models.transformers.transformer_wan import WanTransformerBlock

    S, T, H, D, split = 6, TEXT_TOKENS + 5, 2, 8, 2  # 5 tokens of an image
    options = {"cross_attn_norm": True, "added_kv_proj_dim": H * D}
    with small_numbers():
        angle = torch.arange(S * D / 2).view(1, S, 1, D // 2).repeat_interleave(2, dim=-1)
        rotary = angle.cos(), angle.sin()
        x, text, temb = torch.randn(2, S, H * D), torch.randn(2, T, H * D), torch.randn(2, 2, 6, H * D)
        tokens = temb.repeat_interleave(torch.tensor([split, S - split]), 1)
        block = WanTransformerBlock(H * D, 32, H, **options)
        yield block, (x, text, temb[:, 0], rotary), (x, text, temb[:, 0], rotary)
        yield block, (x, text, tokens, rotary), (x, text, Modulation(temb, split), rotary)
        if control:
            from diffusers.models.transformers.transformer_wan_vace import WanVACETransformerBlock

            block = WanVACETransformerBlock(
                H * D, 32, H, **options, apply_input_projection=True, apply_output_projection=True
            )
            given = x, text, torch.randn(2, S, H * D), temb[:, 0], rotary
            yield block, given, given


def forward_error(block, theirs, ours) -> float:
    """Relative difference of the fused forward to the block's own; its weights become random."""
    with small_numbers():
        for parameter in block.eval().parameters():
            parameter.normal_()
        wanted = block(*theirs)
        twin = deepcopy(block)
        for attn in (twin.attn1, twin.attn2):
            attn.set_processor(WanProcessor(backend_of("sdpa")))
        got = forward_of(twin)(twin, *ours)
        if isinstance(got, tuple):
            got, wanted = torch.stack(got), torch.stack(wanted)
    return ((got - wanted).norm() / wanted.norm()).item()
