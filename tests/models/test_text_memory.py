"""The text's keys and values: computed once a prompt, the same bits, and never those of another prompt or weight."""

import gc

import pytest
import torch

import dax
from dax.models import wan, wan_guard


@pytest.fixture
def counted(random_pipe, monkeypatch):
    """(pipe, calls): `calls` collects the layers whose text was projected anew."""
    calls = []

    def text_operands(attn, text, right=wan.text_operands):
        calls.append(attn)
        return right(attn, text)

    wan_guard.check_processor()  # both checks run layers of their own, once a process
    wan_guard.block_difference(False)
    monkeypatch.setattr(wan, "text_operands", text_operands)
    return random_pipe, calls


def run(pipe, prompt="a cat", **options):
    size = {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 3, "output_type": "latent"}
    generator = torch.Generator().manual_seed(3)
    return pipe(prompt, negative_prompt="b", guidance_scale=4.0, generator=generator, **size, **options).frames


def forward(transformer, text, seed=0):
    latents = torch.randn(1, 16, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return transformer(latents, torch.tensor([500.0]), text).sample


def test_once_a_prompt_and_the_same_bits(counted):
    pipe, calls = counted
    with dax.optimize(pipe) as engine:
        remembered = run(pipe)
        layers = len(pipe.transformer.blocks)
        assert len(calls) == 2 * layers  # the prompt and the negative one, for three steps
        memory = pipe.transformer.blocks[0].attn2.processor.text
        assert memory.known == {} and memory.layers is None  # given back at the end of the run
        calls.clear()
        pipe.transformer._forward_pre_hooks.clear()  # nothing is announced: nothing is remembered
        assert torch.equal(run(pipe), remembered) and len(calls) == 6 * layers
        assert engine.active


def test_every_change_is_seen(counted):
    pipe, calls = counted
    model, layers = pipe.transformer, len(pipe.transformer.blocks)
    text = torch.randn(1, 7, 32)
    with dax.optimize(model) as engine:
        assert torch.equal(forward(model, text), forward(model, text)) and len(calls) == layers
        for change in (
            lambda: text.mul_(2),
            lambda: model.blocks[1].attn2.to_k.weight.mul_(2),
            lambda: model.condition_embedder.text_embedder.linear_1.bias.add_(1),
        ):
            before = forward(model, text)
            with torch.no_grad():
                change()
            after = forward(model, text)
            assert not torch.equal(before, after)
            assert torch.equal(after, forward(model, text.clone()))  # another tensor of the same values
        memory = model.blocks[0].attn2.processor.text
        assert memory.known
        del text
        gc.collect()
        assert not memory.known  # holds no embedding alive, and nothing beyond it
        text = torch.randn(1, 7, 32)
        forward(model, text)
        assert memory.known
        engine.undo()
        assert not memory.known and not model._forward_pre_hooks and not model._forward_hooks


class Adapter(torch.nn.Module):
    """A layer on top of another whose strength is a number, as peft has it."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer, self.strength = base_layer, 1.0

    def forward(self, x):
        return (1 + self.strength) * self.base_layer(x)


@pytest.mark.parametrize("where", ["blocks.0.attn2.to_v", "condition_embedder.text_embedder.linear_1"])
def test_an_adapter_that_is_turned_down_between_steps_is_heard(random_pipe, where):
    parent, _, leaf = where.rpartition(".")
    parent = random_pipe.transformer.get_submodule(parent)
    adapter = Adapter(getattr(parent, leaf))
    setattr(parent, leaf, adapter)

    def turn_down(pipe, step, timestep, tensors):
        adapter.strength = 0.0
        return {}

    def clip():
        adapter.strength = 1.0
        return run(random_pipe, callback_on_step_end=turn_down)

    stock = clip()
    with dax.optimize(random_pipe):
        assert ((clip() - stock).norm() / stock.norm()).item() < 1e-5


def test_a_loop_that_fails_leaves_nothing(random_pipe):
    texts = {name: torch.randn(1, 512, 32) for name in ("prompt_embeds", "negative_prompt_embeds")}
    memory_of = lambda: random_pipe.transformer.blocks[0].attn2.processor.text  # noqa: E731
    seen = []

    def fail(*_):
        seen.append(len(memory_of().known))
        raise RuntimeError("stop")

    with dax.optimize(random_pipe):
        with pytest.raises(RuntimeError, match="stop"):
            random_pipe(**texts, height=64, width=64, num_frames=9, num_inference_steps=2, callback_on_step_end=fail)
        assert seen == [2] and memory_of().known == {}


def test_nothing_is_remembered_with_gradients_or_in_inference_mode(counted):
    pipe, calls = counted
    model, layers = pipe.transformer, len(pipe.transformer.blocks)
    latents, timestep = torch.randn(1, 16, 3, 8, 8), torch.tensor([500.0])
    with dax.optimize(model):
        text = torch.randn(1, 7, 32, requires_grad=True)
        for _ in range(2):
            model(latents, timestep, text)
        assert len(calls) == 2 * layers
        with torch.inference_mode():
            text = torch.randn(1, 7, 32)
            for _ in range(2):
                model(latents, timestep, text)
        assert len(calls) == 4 * layers


def test_many_prompts_are_not_hoarded(counted):
    pipe, calls = counted
    texts = [torch.randn(1, 7, 32) for _ in range(9)]
    with dax.optimize(pipe.transformer):
        for text in texts:
            forward(pipe.transformer, text)
        assert len(pipe.transformer.blocks[0].attn2.processor.text.known) == 4
