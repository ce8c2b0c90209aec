"""The model a figure is about: a name DAX knows or a diffusers folder, as facts (no torch) and as a transformer."""

import json
from pathlib import Path

from dax.errors import DaxError
from dax.facts import Facts, facts_named
from dax.facts_config import facts_from_config, flow_shift_of

FEW_BLOCKS = 4  # what a figure for one layer is taken from
LOGIT_STD = 3.0  # how peaked attention is: about ten keys of 75 600 matter to a query, as in a trained model


def facts_of(model: str) -> Facts:
    """Facts of a known name, or of a diffusers folder from its JSON files. No header of a weight file is read."""
    folder = Path(model)
    if not folder.is_dir():
        return facts_named(model)
    index, config = read_json(folder / "model_index.json"), read_json(folder / "transformer" / "config.json")
    scheduler, second = folder / "scheduler" / "scheduler_config.json", folder / "transformer_2" / "config.json"
    shift = flow_shift_of(read_json(scheduler) if scheduler.is_file() else None)
    return facts_from_config(index, config, shift, read_json(second) if second.is_file() else None)


def blocks_of(facts: Facts, layers: int | None, usual: int | None = None) -> int:
    """How many blocks to build: as many as --layers says, else the usual number, at the most all (None).

    DaxError("bad_request") for a number that the model does not have.
    """
    if layers is None:
        return min(usual or facts.num_layers, facts.num_layers)
    if not 1 <= layers <= facts.num_layers:
        raise DaxError("bad_request", f"--layers {layers}: {facts.name} has 1 to {facts.num_layers}")
    return layers


def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DaxError("bad_model", f"{path}: no such file; --model takes a diffusers folder") from None
    except (OSError, ValueError) as error:
        raise DaxError("bad_model", f"{path}: {error}") from None


def build(facts: Facts, folder: str | None, device: str, num_layers: int):
    """The transformer: a folder's weights, cut to `num_layers`, or random ones made on the device, in bf16.

    Random weights are woken up: attention scores get a standard deviation of LOGIT_STD. As they come, attention would
    average 75 600 tokens into nothing, and no check of an attention kernel could fail.
    """
    return load(folder, device, num_layers) if folder else random(facts, device, num_layers)


def random(facts: Facts, device: str, num_layers: int):
    import torch

    from dax.models.wan import build_random

    model = build_random(facts, device, num_layers=num_layers)
    generator = torch.Generator(device).manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("norm_q.weight", "norm_k.weight", "norm_added_k.weight")):
                weight.normal_(1.0, 0.1, generator=generator).mul_(LOGIT_STD**0.5)
    return model


def load(folder: str, device: str, num_layers: int):
    """DaxError("bad_model") with the vendor's first line when the weights do not load."""
    import torch
    from diffusers import AutoModel

    try:
        model = AutoModel.from_pretrained(
            folder, subfolder="transformer", dtype=torch.bfloat16, local_files_only=True, low_cpu_mem_usage=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise DaxError("bad_model", f"{folder}/transformer: {str(error).splitlines()[0]}") from None
    del model.blocks[num_layers:]
    if control := getattr(model.config, "vace_layers", None):
        del model.vace_blocks[sum(layer < num_layers for layer in control) :]
    return model.to(device).eval()


def pipeline(transformers: list, facts: Facts):
    """A pipeline of a transformer, or of two experts, and the model's usual solver, nothing else. Not of VACE."""
    import diffusers

    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=facts.defaults.flow_shift
    )
    experts = dict(zip(("transformer", "transformer_2"), transformers), boundary_ratio=facts.boundary_ratio)
    parts = {"tokenizer": None, "text_encoder": None, "vae": None, "scheduler": scheduler, **experts}
    pipe = getattr(diffusers, facts.pipeline_class)(**parts, expand_timesteps=facts.token_time)
    pipe.set_progress_bar_config(disable=True)
    return pipe
