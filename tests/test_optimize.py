"""optimize() changes what it says, equals stock diffusers, and gives the model back; or it changes nothing at all."""

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import WanTransformer3DModel

import dax
from dax.attention.self_check import Verdict
from dax.errors import DaxError
from dax.facts import FACTS
from dax.hardware import MACHINES, Machine
from dax.models import wan
from dax.optimize import OPTIMIZED
from dax.plan import Blocks, Plan
from dax.resolve import resolve

H200 = replace(MACHINES["h200"], packages={"triton": "3.6.0"}, compiler="g++")
TINY = FACTS["tiny"]
EXACT_SDPA = Plan.from_layers([("test", {"attention.kernel": "sdpa"})])[0]


def render(pipe) -> torch.Tensor:
    """Latents of a short run with guidance, always the same."""
    generator = torch.Generator().manual_seed(3)
    size = {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 2, "output_type": "latent"}
    return pipe("a cat", negative_prompt="b", guidance_scale=4.0, generator=generator, **size).frames


def velocity(transformer) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    latents, text = torch.randn(1, 16, 3, 8, 8, generator=generator), torch.randn(1, 7, 32, generator=generator)
    return transformer(latents, torch.tensor([500.0]), text).sample


def relative(a, b) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def anatomy(model) -> list:
    """Every object a model is made of, by identity, with the bytes of its tensors."""
    parts = []
    for name, module in model.named_modules():
        own = {key: value for key, value in vars(module).items() if key not in ("_parameters", "_buffers", "_modules")}
        parts.append((name, id(module), type(module), {key: id(value) for key, value in own.items()}))
        parts += [(name, key, id(p)) for key, p in (*module._parameters.items(), *module._buffers.items())]
    return parts + [(name, tensor.clone().numpy().tobytes()) for name, tensor in model.state_dict().items()]


@pytest.fixture
def compiler(monkeypatch):
    """Blocks compile with a counting stand-in for Inductor; graphs is the list of what it was given."""
    graphs = []

    def count(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr("dax.compile.BACKEND", count)
    monkeypatch.setattr("dax.optimize.machine", lambda device: Machine("cpu", "CPU", packages={}, compiler="g++"))
    yield graphs
    torch._dynamo.reset()


def test_exact_equals_stock(random_pipe):
    stock = render(random_pipe)
    with dax.optimize(random_pipe) as engine:
        assert relative(render(random_pipe), stock) < 1e-5
    assert engine.plan.attention.kernel != "auto" and engine.fallbacks == ()


def test_exact_equals_stock_on_the_embedded_model():
    pipe = dax.load_tiny()
    pipe.set_progress_bar_config(disable=True)
    assert wan.target_of(pipe).facts == TINY
    stock = render(pipe)
    with dax.optimize(pipe, "exact"):
        assert relative(render(pipe), stock) < 1e-5
    assert torch.equal(render(pipe), stock)


def test_the_comparison_would_notice(random_pipe, monkeypatch):
    """The kernel that optimize installs is the one that runs: spoil it, and the output moves."""
    from dax.attention import dense

    stock, right = render(random_pipe), dense.sdpa
    monkeypatch.setitem(dense.RUN, "sdpa", lambda q, k, v, scale: 0.9 * right(q, k, v, scale))
    with dax.optimize(random_pipe, attention={"kernel": "sdpa"}):
        assert relative(render(random_pipe), stock) > 1e-2


@pytest.mark.fault(20)
def test_undo_is_bit_identical(random_pipe, compiler):
    stock, before = render(random_pipe), anatomy(random_pipe.transformer)  # a first run adds diffusers' own registry
    for _ in range(2):  # optimize, undo, optimize, undo
        engine = dax.optimize(random_pipe, compile="blocks")
        assert anatomy(random_pipe.transformer) != before
        render(random_pipe)
        engine.undo()
        assert anatomy(random_pipe.transformer) == before
        assert torch.equal(render(random_pipe), stock)
    engine.undo()
    assert anatomy(random_pipe.transformer) == before and not engine.active


@pytest.mark.parametrize("loaded_inside", [False, True])
@pytest.mark.parametrize("plan", ["exact", "balanced"])
def test_inference_mode_changes_nothing_for_later(plan, loaded_inside):
    from tests.conftest import build_random_pipe

    with torch.inference_mode(loaded_inside):
        pipe = build_random_pipe()
    stock = render(pipe)
    with torch.inference_mode(), dax.optimize(pipe, plan):
        inside = render(pipe)
    if not loaded_inside:
        pipe.transformer.requires_grad_(True).requires_grad_(False)  # torch refuses it for what inference mode made
    with dax.optimize(pipe, plan):
        assert torch.equal(render(pipe), inside)
    assert torch.equal(render(pipe), stock)


def test_leaving_the_context_undoes_after_an_error_too(random_pipe):
    before = anatomy(random_pipe.transformer)
    with pytest.raises(RuntimeError, match="inside"), dax.optimize(random_pipe):
        raise RuntimeError("inside")
    assert anatomy(random_pipe.transformer) == before


@pytest.mark.fault(20)
@pytest.mark.parametrize("second", ["pipe", "transformer"])
def test_optimizing_twice_is_refused(random_pipe, second):
    model = random_pipe if second == "pipe" else random_pipe.transformer
    with dax.optimize(random_pipe) as engine:
        during = anatomy(random_pipe.transformer)
        with pytest.raises(DaxError, match="already: call engine.undo") as caught:
            dax.optimize(model)
        assert caught.value.exit_code == 2 and anatomy(random_pipe.transformer) == during and engine.active
    dax.optimize(model).undo()


@pytest.mark.fault(20)
def test_a_copy_of_an_optimized_model_is_refused(random_pipe):
    import copy

    with dax.optimize(random_pipe), pytest.raises(DaxError, match="already WanProcessor"):
        dax.optimize(copy.deepcopy(random_pipe.transformer))


@pytest.mark.fault(20)
@pytest.mark.parametrize("how", ["wrapped", "wrapped in pipe", "in place", "blocks"])
def test_a_compiled_model_is_refused(random_pipe, how):
    model = random_pipe
    if how == "wrapped":
        model = torch.compile(random_pipe.transformer)
    elif how == "wrapped in pipe":
        random_pipe.transformer = torch.compile(random_pipe.transformer)
    elif how == "in place":
        random_pipe.transformer.compile()
    else:
        random_pipe.transformer.compile_repeated_blocks()
    with pytest.raises(DaxError, match="compiled already") as caught:
        dax.optimize(model)
    assert caught.value.exit_code == 2


@pytest.mark.fault(18)
def test_diffusers_context_parallelism_is_refused(random_pipe):
    random_pipe.transformer.blocks[1].attn1.processor._parallel_config = object()
    with pytest.raises(DaxError, match="context parallelism"):
        dax.optimize(random_pipe)


@pytest.mark.fault(19)
@pytest.mark.parametrize("fault", ["no blocks", "renamed", "another class"])
def test_a_plan_that_matches_nothing_or_only_some_is_an_error(random_pipe, fault):
    transformer = random_pipe.transformer
    if fault == "no blocks":
        transformer.blocks = torch.nn.ModuleList()
    elif fault == "renamed":
        transformer.blocks[0].attention = transformer.blocks[0]._modules.pop("attn1")
    else:
        transformer.blocks[1].attn2 = torch.nn.Identity()
    before = anatomy(transformer)
    with pytest.raises(DaxError, match=r"plan attention.kernel: \d of \d (self|cross)-attention layers") as caught:
        dax.optimize(random_pipe)
    assert caught.value.exit_code == 3 and anatomy(transformer) == before


def test_a_failure_half_way_changes_nothing(random_pipe, monkeypatch, compiler):
    before = anatomy(random_pipe.transformer)

    def broken(self, **_):
        raise RuntimeError("no compiler after all")

    monkeypatch.setattr(type(random_pipe.transformer.blocks[1]), "compile", broken)
    with pytest.raises(RuntimeError, match="after all"):
        dax.optimize(random_pipe, compile="blocks")
    assert anatomy(random_pipe.transformer) == before and random_pipe.transformer not in OPTIMIZED


def test_counts_are_checked(random_pipe, monkeypatch):
    before = anatomy(random_pipe.transformer)
    monkeypatch.setattr("dax.compile.apply_compile", lambda blocks, edits, overlap: 1)
    monkeypatch.setattr("dax.optimize.machine", lambda device: Machine("cpu", "CPU", packages={}, compiler="g++"))
    with pytest.raises(DaxError, match="plan compile = blocks: 1 of 2 transformer blocks matched"):
        dax.optimize(random_pipe, compile="blocks")
    assert anatomy(random_pipe.transformer) == before


@pytest.mark.fault(34)
@pytest.mark.parametrize(
    "config",
    [{"in_channels": 32}, {"image_dim": 16, "added_kv_proj_dim": 64}, {"in_channels": 48, "out_channels": 16}],
    ids=["32 channels", "i2v image tokens", "48 channels to 16"],
)
def test_other_wans_are_refused_without_their_weights(config):
    with torch.device("meta"):  # no weight exists that could be read
        model = WanTransformer3DModel(num_layers=1, num_attention_heads=2, attention_head_dim=12, ffn_dim=8, **config)
    with pytest.raises(DaxError, match="supported: Wan2.1 text-to-video") as caught:
        dax.optimize(model)
    assert caught.value.exit_code == 3


@pytest.mark.fault(34)
def test_other_families_and_other_objects_are_refused(random_pipe):
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        flux = FluxTransformer2DModel(num_layers=1, num_single_layers=1, num_attention_heads=2, attention_head_dim=8)
    two_experts = SimpleNamespace(transformer=random_pipe.transformer, config={"boundary_ratio": 0.9})
    for model in (flux, torch.nn.Linear(2, 2), object(), None, "a path", random_pipe.vae, two_experts):
        with pytest.raises(DaxError) as caught:
            dax.optimize(model)
        assert caught.value.exit_code == 3 and "\n" not in str(caught.value)


@pytest.mark.fault(34)
def test_half_a_pair_of_experts_is_refused(random_pipe):
    from diffusers import WanPipeline

    parts = random_pipe.components
    for more, says in (
        ({"boundary_ratio": 0.9}, "two experts need both"),
        ({"transformer_2": parts["transformer"]}, "two experts need both"),
        ({"boundary_ratio": 0.9, "transformer_2": parts["transformer"]}, "the very module that transformer is"),
    ):
        with pytest.raises(DaxError, match=says):
            dax.optimize(WanPipeline(**parts | more))


@pytest.mark.fault(19)
def test_another_diffusers_is_noticed(random_pipe, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers.models.transformers.transformer_wan", None)
    with pytest.raises(DaxError, match="not one DAX knows") as caught:
        dax.optimize(random_pipe)
    assert caught.value.exit_code == 4


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        ({"compil": "blocks"}, "optimize(): unknown plan key 'compil', did you mean 'compile'"),
        ({"attention": "sdpa"}, "write attention.kernel"),
        ({"compile": "all"}, "optimize(): compile = 'all' is not known"),
    ],
)
def test_bad_overrides_are_refused_before_anything_changes(random_pipe, overrides, text):
    before = anatomy(random_pipe.transformer)
    with pytest.raises(DaxError) as caught:
        dax.optimize(random_pipe, **overrides)
    assert text in str(caught.value) and caught.value.exit_code == 2 and anatomy(random_pipe.transformer) == before


def test_overrides_win_over_the_plan(random_pipe, tmp_path, compiler):
    (tmp_path / "plan.yaml").write_text("attention:\n  kernel: sdpa\ncompile: none\n")
    with dax.optimize(random_pipe, str(tmp_path / "plan.yaml"), compile="blocks") as engine:
        assert (engine.plan.attention, engine.plan.compile) == (EXACT_SDPA.attention, "blocks")
        assert engine.plan.blocks == Blocks(fused=False)


def test_a_bare_transformer(random_pipe):
    transformer = random_pipe.transformer
    stock = velocity(transformer)
    with dax.optimize(transformer, EXACT_SDPA):
        assert relative(velocity(transformer), stock) < 1e-5


def test_blocks_compile_as_one_graph_and_come_back(random_pipe, compiler):
    stock = velocity(random_pipe.transformer)
    engine = dax.optimize(random_pipe, compile="blocks")
    assert "compile = blocks: 2 of 2 transformer blocks" in engine.summary()
    assert relative(velocity(random_pipe.transformer), stock) < 1e-5
    assert len(compiler) == 1, "the blocks share their code, so one graph serves both"
    engine.undo()
    assert torch.equal(velocity(random_pipe.transformer), stock) and len(compiler) == 1


def test_summary_names_every_change_and_fallback(random_pipe):
    with dax.optimize(random_pipe, attention={"kernel": "sage"}) as engine:
        lines = engine.summary().splitlines()
    assert lines[0].startswith(f"plan {engine.plan.hash()[:8]} on wan-t2v-2x64")
    assert "  attention.kernel = sdpa: 2 of 2 self-attention layers" in lines
    assert "  attention.kernel = sdpa: 2 of 2 cross-attention layers" in lines
    assert any(line.startswith("  fallback: attention.kernel = sage: needs") for line in lines)
    assert engine.summary().splitlines()[0].endswith("(undone)")


def test_strict_makes_a_fallback_an_error(random_pipe):
    before = anatomy(random_pipe.transformer)
    with pytest.raises(DaxError, match="--strict: attention.kernel = sage: needs") as caught:
        dax.optimize(random_pipe, attention={"kernel": "sage"}, strict=True)
    assert caught.value.exit_code == 4 and anatomy(random_pipe.transformer) == before


@pytest.fixture
def sound(monkeypatch):
    """DAX's own attention kernels pass their self-check on machines that are not there."""
    monkeypatch.setattr("dax.attention.backend.self_check", lambda kernel: Verdict())


def test_resolve_decides_every_auto_and_is_pure(sound):
    resolved = resolve(Plan(), TINY, H200)
    assert resolved.plan.attention.kernel == "bf16" and resolved.fallbacks == ()
    assert resolved.notes == ("attention.kernel: auto is bf16 on NVIDIA H200 in bfloat16",)
    assert resolve(Plan(), TINY, H200) == resolved and resolve(resolved.plan, TINY, H200).plan == resolved.plan
    assert resolve(Plan(), TINY, H200, dtype="float32").plan.attention.kernel == "sdpa"


@pytest.mark.fault(54)
@pytest.mark.fault(57)
def test_resolve_falls_back_by_name(sound):
    plan = Plan.from_layers([("test", {"attention.kernel": "flash", "compile": "blocks"})])[0]
    resolved = resolve(plan, TINY, replace(H200, compiler=None))
    assert resolved.plan.leaves().items() >= {"attention.kernel": "bf16", "compile": "none"}.items()
    assert [text.split(":")[0] for text in resolved.fallbacks] == ["attention.kernel = flash", "compile = blocks"]
    with pytest.raises(DaxError, match="attention.kernel = flash.*; compile = blocks"):
        resolve(plan, TINY, replace(H200, compiler=None), strict=True)
    on_paper = resolve(plan, TINY, MACHINES["h200"], strict=True).plan  # a data sheet is taken to have what it needs
    assert on_paper.leaves().items() >= {"attention.kernel": "flash", "compile": "blocks"}.items()


def test_an_engine_keeps_no_model_alive(random_pipe):
    import gc
    import weakref

    dax.optimize(random_pipe.transformer)
    watch = weakref.ref(random_pipe.transformer.blocks[0])
    random_pipe.transformer = None
    gc.collect()
    assert watch() is None


def test_build_random_keeps_the_vendors_fp32_parts():
    model = wan.build_random(TINY, num_layers=2)
    assert len(model.blocks) == 2 and not model.training and model.dtype == torch.bfloat16
    kept = WanTransformer3DModel._keep_in_fp32_modules
    for name, weight in model.named_parameters():
        fp32 = any(part in kept for part in name.split("."))
        assert weight.dtype == (torch.float32 if fp32 else torch.bfloat16), name
        assert weight.device.type == "cpu" and weight.float().std() > 0 and weight.isfinite().all(), name
    with torch.device("cpu"):
        stock = WanTransformer3DModel(**TINY.transformer_config())
    assert torch.equal(model.rope.freqs_cos, stock.rope.freqs_cos) and model.rope.freqs_cos.dtype == torch.float32
    again = wan.build_random(TINY, num_layers=2).state_dict()
    assert all(torch.equal(weight, again[name]) for name, weight in model.state_dict().items())
    other = wan.build_random(TINY, num_layers=2, seed=1).state_dict()
    assert not torch.equal(again["proj_out.weight"], other["proj_out.weight"])


def test_build_random_runs():
    model = wan.build_random(TINY, num_layers=1)
    latents, text = torch.randn(1, 16, 2, 4, 4).bfloat16(), torch.randn(1, 5, TINY.text_dim).bfloat16()
    with dax.optimize(model):
        out = model(latents, torch.tensor([500]), text).sample
    assert out.isfinite().all() and 0.05 < out.float().std() < 20


def test_load_tiny_is_a_pipeline_dax_knows(monkeypatch, random_folder):
    import dax.models.tiny

    monkeypatch.setattr(dax.models.tiny, "FOLDER", random_folder)
    pipe = dax.load_tiny()
    assert type(pipe).__name__ == "WanPipeline" and pipe.transformer.dtype == torch.float32
    assert wan.target_of(pipe).facts.num_layers == 2


def test_load_tiny_names_a_broken_installation(monkeypatch, tmp_path):
    import dax.models.tiny

    monkeypatch.setattr(dax.models.tiny, "FOLDER", tmp_path)
    with pytest.raises(DaxError, match="reinstall dax-engine") as caught:
        dax.load_tiny()
    assert caught.value.exit_code == 3


def test_importing_the_function_keeps_the_module_callable(random_pipe):
    import importlib

    module = importlib.import_module("dax.optimize")
    assert dax.optimize is module is sys.modules["dax.optimize"]
    module(random_pipe).undo()
