"""A checkpoint, checked before it is loaded: configs and headers only, no weights, no torch, a few milliseconds.

What diffusers would load anyway (missing tensors filled with random numbers, silent casts, foreign code) is refused
here, in one line that names the file. Rows 23 to 34 and 36 of docs/faults.md.
"""

import hashlib
import os
import re
from dataclasses import dataclass
from math import prod
from pathlib import Path

from dax.errors import DaxError
from dax.facts import CLIP_TOKENS, Facts
from dax.facts_config import OWN_COMPONENTS, facts_from_config, flow_shift_of, named
from dax.generate import shapes
from dax.generate.checkpoint import (
    bad,
    check_digests,
    check_dtypes,
    check_finite,
    check_shapes,
    read_bytes,
    read_json,
    read_weights,
    stat_file,
)
from dax.quant.scheme import Rule
from dax.quant.stored import stored_layers, stored_tensors

STEMS = {
    "transformer": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}
PARTS = ("scheduler", "text_encoder", "tokenizer", "transformer", "vae")
SCHEDULERS = ("UniPCMultistepScheduler", "FlowMatchEulerDiscreteScheduler")
WANTED = ["*.json", "*.safetensors", "*.model", "*.txt"]
HUB_ID = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")
POSITIONS = "embeddings.position_ids"  # a table that older files of the image encoder hold
EMBEDDING = "encoder.embed_tokens.weight"  # the text encoder's other name for shared.weight


@dataclass(frozen=True)
class Checked:
    """A folder that may be loaded. `parameters` of all parts and, of those, the text encoder's; `digest` (sha256, hex)
    tells a model from another.

    `stored` are the linear layers of the transformer, of two experts each, that were saved in 8 bits.
    """

    folder: Path
    facts: Facts
    files: tuple[Path, ...]
    parameters: int
    text_parameters: int
    digest: str
    stamps: tuple[tuple[int, int, int], ...]
    stored: dict[str, Rule]

    def unchanged(self) -> None:
        """DaxError("bad_model") if a file was replaced since it was checked."""
        for file, stamp in zip(self.files, self.stamps, strict=True):
            if stamp_of(file) != stamp:
                raise bad(file, "replaced while it was loaded: run again")


def locate(model: str) -> Path:
    """The local folder of a path or a hub id. Without a network the hub's cache is all there is."""
    path = Path(model).expanduser()
    if os.path.lexists(path) or not HUB_ID.fullmatch(model):
        return path
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=WANTED, etag_timeout=5))
    except Exception as error:  # of the network, the hub or the cache: many kinds
        raise DaxError(
            "bad_model",
            f"model {model}: not found locally and the hub is unreachable or has none ({type(error).__name__}); set "
            "HF_HOME or give --model DIR",
        ) from None


def preflight(folder: Path) -> Checked:
    """Check a diffusers folder of a Wan pipeline. DaxError("bad_model") names the first file at fault."""
    check_folder(folder)
    index = read_json(folder / "model_index.json")
    check_code(folder)
    configs = {part: read_config(folder / part / "config.json") for part in STEMS}
    if index.get("boundary_ratio") is not None and index.get("transformer_2") not in (None, [None, None]):
        configs["transformer_2"] = read_config(folder / "transformer_2" / "config.json")
    facts = facts_from_config(index, configs["transformer"], second_config=configs.get("transformer_2"))
    image = ("image_encoder", "image_processor") if facts.image_tokens else ()
    for part in PARTS + image:
        if index.get(part) in (None, [None, None]):
            raise bad(folder / "model_index.json", f"names no {part}")
    for part in OWN_COMPONENTS["WanImageToVideoPipeline"]:
        if index.get(part) not in (None, [None, None]) and part not in image:
            raise bad(folder / "model_index.json", f"names an {part}, and the transformer takes no image tokens")
    check_encoder(folder / "text_encoder" / "config.json", configs["text_encoder"], facts)
    check_vae(folder / "vae" / "config.json", configs["vae"], facts)
    expected = {
        "transformer": shapes.transformer_shapes(facts),
        "text_encoder": shapes.text_encoder_shapes(configs["text_encoder"]),
        "vae": shapes.vae_shapes(configs["vae"]),
    }
    stored = stored_layers(configs["transformer"], facts)
    if facts.num_experts == 2:
        expected["transformer_2"] = expected["transformer"]
        if stored_layers(configs["transformer_2"], facts, "transformer_2") != stored:
            raise bad(folder / "transformer_2" / "config.json", "not quantised as transformer is")
    scales, dtypes = stored_tensors(stored, expected["transformer"])
    if image:
        configs["image_encoder"] = read_config(folder / "image_encoder" / "config.json")
        expected["image_encoder"] = shapes.image_encoder_shapes(configs["image_encoder"], facts.image_dim, CLIP_TOKENS)
    files = [folder / "model_index.json", *(folder / part / "config.json" for part in configs)]
    for part in configs:
        stem = STEMS.get(part.removesuffix("_2"), "model")
        tensors, weights = read_weights(folder / part, stem)
        if part == "text_encoder" and EMBEDDING in tensors:
            tensors.setdefault("shared.weight", tensors[EMBEDDING])
        if part == "image_encoder":
            tensors = {name.removeprefix("vision_model."): tensor for name, tensor in tensors.items()}
        of_transformer = part.startswith("transformer")
        check_dtypes(tensors, dtypes if of_transformer else {})
        wanted = expected[part] | (scales if of_transformer else {})
        check_shapes(folder / part, tensors, wanted, frozenset({EMBEDDING, POSITIONS}))
        files += weights
    files += check_tokenizer(folder / "tokenizer")
    if image:
        files.append(check_image_processor(folder / "image_processor" / "preprocessor_config.json"))
    scheduler = check_scheduler(folder / "scheduler" / "scheduler_config.json")
    files.append(scheduler)
    parameters = {part: sum(map(prod, tensors.values())) for part, tensors in expected.items()}
    return Checked(
        folder=folder,
        facts=named(facts, flow_shift_of(read_json(scheduler))),
        files=tuple(files),
        parameters=sum(parameters.values()),
        text_parameters=parameters["text_encoder"],
        digest=digest(folder, files),
        stamps=tuple(map(stamp_of, files)),
        stored=stored,
    )


def verify(checked: Checked) -> list[str]:
    """Read all weights: finite, and as `SHA256SUMS` or the hub's cache records them. Returns what could not be told."""
    weights = [file for file in checked.files if file.suffix == ".safetensors"]
    check_finite(weights)
    compared = check_digests(checked.folder, checked.files)
    total = len(checked.files)
    return [] if compared == total else [f"--verify: {total - compared} of {total} files have no recorded digest"]


def check_folder(folder: Path) -> None:
    try:
        folder.stat()
    except FileNotFoundError:
        raise bad(folder, "no such folder") from None
    except OSError as error:
        raise bad(folder, error.strerror or str(error)) from None
    if not folder.is_dir():
        raise bad(folder, "not a diffusers folder")


def check_code(folder: Path) -> None:
    code = sorted([*folder.glob("*.py"), *folder.glob("*/*.py")])
    if code:
        raise bad(code[0], "the folder brings code, which is never run: remove it")


def read_config(path: Path) -> dict:
    config = read_json(path)
    if "auto_map" in config:
        raise bad(path, "auto_map points at code, which is never run: remove it")
    return config


def check_encoder(path: Path, config: dict, facts: Facts) -> None:
    """The text encoder is of the class DAX knows and as wide as the transformer wants it."""
    if config.get("architectures", ["UMT5EncoderModel"]) not in (["UMT5EncoderModel"], ["UMT5Model"]):
        raise bad(path, f"architectures = {config['architectures']!r}; supported: UMT5EncoderModel")
    if config.get("d_model", 512) != facts.text_dim:
        raise bad(path, f"d_model = {config.get('d_model')!r}, but the transformer's text_dim is {facts.text_dim}")


def check_vae(path: Path, config: dict, facts: Facts) -> None:
    """The VAE is of the class DAX knows, its latents those of the transformer and scaled by sane numbers."""
    if config.get("_class_name") != "AutoencoderKLWan":
        raise bad(path, f"_class_name = {config.get('_class_name')!r}; supported: AutoencoderKLWan")
    z = config.get("z_dim", 16)
    if z != facts.out_channels:
        raise bad(path, f"z_dim = {z!r}, but the transformer's out_channels is {facts.out_channels}")
    for axis, usual, known in (("spatial", 8, facts.vae_spatial), ("temporal", 4, facts.vae_temporal)):
        if (factor := config.get(f"scale_factor_{axis}", usual)) != known:
            raise bad(path, f"scale_factor_{axis} = {factor!r}, but {facts.family} has {known}")
    for key in ("latents_mean", "latents_std"):
        values = config.get(key)
        real = isinstance(values, list) and all(type(v) in (int, float) and abs(v) < 1e6 for v in values)
        if values is not None and (not real or len(values) != z or (key == "latents_std" and min(values) <= 0)):
            raise bad(path, f"{key} must be {z} numbers" + (" above 0" if key == "latents_std" else ""))


def check_tokenizer(folder: Path) -> list[Path]:
    """The files of a T5 tokenizer that are there; a vocabulary is among them, and JSON parses."""
    names = ("tokenizer_config.json", "special_tokens_map.json", "tokenizer.json", "spiece.model")
    files = [folder / name for name in names if os.path.lexists(folder / name)]
    for path in files:
        if path.suffix == ".json":
            config = read_config(path)
            if path.name == "tokenizer.json" and not isinstance(config.get("model"), dict):
                raise bad(path, "holds no tokenizer model")
        elif len(read_bytes(path)) < 16:
            raise bad(path, "too short to be a vocabulary")
    if not any(path.name in names[2:] for path in files):
        raise bad(folder / "tokenizer.json", "missing, and so is spiece.model")
    return files


def check_image_processor(path: Path) -> Path:
    """One that gives the image encoder the pictures it was made for."""
    config = read_config(path)
    size = config.get("crop_size", {"height": 224, "width": 224})
    if size not in (224, {"height": 224, "width": 224}):
        raise bad(path, f"crop_size = {size!r}; supported: 224")
    return path


def check_scheduler(path: Path) -> Path:
    """A flow-matching scheduler that the pipeline can use."""
    config = read_json(path)
    name = config.get("_class_name")
    if name not in SCHEDULERS:
        raise bad(path, f"_class_name = {name!r}; supported: {', '.join(SCHEDULERS)}")
    if name == "UniPCMultistepScheduler" and config.get("prediction_type") != "flow_prediction":
        raise bad(path, f"prediction_type = {config.get('prediction_type')!r}; Wan predicts flow_prediction")
    return path


def stamp_of(file: Path) -> tuple[int, int, int]:
    found = stat_file(file)
    return found.st_ino, found.st_size, found.st_mtime_ns


def digest(folder: Path, files: list[Path]) -> str:
    """sha256 over the name, size, first and last MiB of every file: all of a config, the ends of a weight file."""
    total, part = hashlib.sha256(), 2**20
    for file in sorted(files):
        size = stat_file(file).st_size
        total.update(f"{file.relative_to(folder).as_posix()}\0{size}\0".encode())
        with file.open("rb") as opened:
            total.update(opened.read(part))
            opened.seek(max(part, size - part))
            total.update(opened.read(part))
    return total.hexdigest()
