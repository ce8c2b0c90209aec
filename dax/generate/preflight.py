"""A checkpoint, checked before it is loaded: configs and headers only, no weights, no torch, a few milliseconds.

What diffusers would load anyway (missing tensors filled with random numbers, silent casts, foreign code) is refused
here, in one line that names the file. Rows 22 to 34 and 36 of docs/faults.md.
"""

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from dax.errors import DaxError
from dax.facts import Facts, facts_from_config
from dax.generate import shapes
from dax.generate.checkpoint import (
    bad,
    check_digests,
    check_finite,
    check_shapes,
    read_bytes,
    read_json,
    read_weights,
    stat_file,
)

STEMS = {
    "transformer": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}
PARTS = ("scheduler", "text_encoder", "tokenizer", "transformer", "vae")
CLASSES = {"vae": "AutoencoderKLWan", "scheduler": ("UniPCMultistepScheduler", "FlowMatchEulerDiscreteScheduler")}
WANTED = ["*.json", "*.safetensors", "*.model", "*.txt"]
HUB_ID = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")


@dataclass(frozen=True)
class Checked:
    """A folder that may be loaded. `bytes` of weights; `digest` of configs, headers and sizes (sha256, hex)."""

    folder: Path
    facts: Facts
    files: tuple[Path, ...]
    bytes: int
    digest: str
    stamps: tuple[tuple[int, int, int], ...]

    def unchanged(self) -> None:
        """DaxError("bad_model") if a file was replaced since it was checked."""
        for file, stamp in zip(self.files, self.stamps, strict=True):
            if stamp_of(file) != stamp:
                raise bad(file, "replaced while it was loaded: run again")


def locate(model: str) -> Path:
    """The local folder of a path or a hub id; the hub's cache first, the network only where it is allowed."""
    path = Path(model).expanduser()
    if os.path.lexists(path) or not HUB_ID.fullmatch(model):
        return path
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=WANTED, local_files_only=True))
    except Exception:  # not in the cache, for whatever reason: ask the network
        pass
    try:
        return Path(snapshot_download(model, allow_patterns=WANTED, etag_timeout=5))
    except Exception as error:
        raise DaxError(
            "bad_model",
            f"model {model}: not found locally and the hub is unreachable ({type(error).__name__}); set HF_HOME or "
            "give --model DIR",
        ) from None


def preflight(folder: Path, verify: bool = False) -> Checked:
    """Check a diffusers folder of a Wan text-to-video pipeline.

    verify   also read every weight: finite, and as `SHA256SUMS` or the hub's blob names say
    DaxError("bad_model") names the first file that is wrong.
    """
    folder = check_folder(Path(folder))
    index = read_json(folder / "model_index.json")
    facts = facts_from_config(index, read_json(folder / "transformer" / "config.json"))
    for part in PARTS:
        if index.get(part) in (None, [None, None]):
            raise bad(folder / "model_index.json", f"names no {part}")
    files = [folder / "model_index.json", *(folder / part / "config.json" for part in STEMS)]
    encoder, vae = (read_json(folder / part / "config.json") for part in ("text_encoder", "vae"))
    check_configs(folder, facts, encoder, vae)
    expected = {
        "transformer": shapes.transformer_shapes(facts),
        "text_encoder": shapes.text_encoder_shapes(encoder),
        "vae": shapes.vae_shapes(vae),
    }
    headers, all_tensors = [], {}
    for part, stem in STEMS.items():
        tensors, weights, raws = read_weights(folder / part, stem)
        if part == "text_encoder":  # the input embedding goes by two names, and either may be left out
            name = "encoder.embed_tokens.weight"
            if name in tensors and "shared.weight" not in tensors:
                tensors["shared.weight"] = tensors.pop(name)
        check_shapes(folder / part, tensors, expected[part], frozenset({"encoder.embed_tokens.weight"}))
        files += weights
        headers += raws
        all_tensors |= {f"{part}.{name}": tensor for name, tensor in tensors.items()}
    files += check_tokenizer(folder / "tokenizer")
    files.append(folder / "scheduler" / "scheduler_config.json")
    check_scheduler(files[-1])
    if verify:
        check_finite(all_tensors)
        check_digests(folder, files)
    return Checked(
        folder=folder,
        facts=facts,
        files=tuple(files),
        bytes=sum(stat_file(file).st_size for file in files if file.suffix == ".safetensors"),
        digest=digest(folder, files, headers),
        stamps=tuple(map(stamp_of, files)),
    )


def check_folder(folder: Path) -> Path:
    """The folder, which must be one, hold a pipeline and bring no code."""
    try:
        if not folder.is_dir():
            folder.stat()
            raise bad(folder, "a file, not a diffusers folder")
        code = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.py"))
    except FileNotFoundError:
        raise bad(folder, "no such folder") from None
    except OSError as error:
        raise bad(folder, error.strerror or str(error)) from None
    if code:
        raise bad(folder / code[0], "the folder brings code, which is never run: remove it")
    return folder


def check_configs(folder: Path, facts: Facts, encoder: dict, vae: dict) -> None:
    """The text encoder and the VAE are of the classes DAX knows and fit the transformer."""
    where = folder / "text_encoder" / "config.json"
    if "auto_map" in encoder or "auto_map" in vae:
        raise bad(where if "auto_map" in encoder else folder / "vae" / "config.json", "auto_map points at code")
    if encoder.get("architectures", ["UMT5EncoderModel"]) not in (["UMT5EncoderModel"], ["UMT5Model"]):
        raise bad(where, f"architectures = {encoder['architectures']!r}; supported: UMT5EncoderModel")
    if encoder.get("d_model", 512) != facts.text_dim:
        raise bad(where, f"d_model = {encoder.get('d_model')!r}, but the transformer's text_dim is {facts.text_dim}")
    where = folder / "vae" / "config.json"
    if vae.get("_class_name") != CLASSES["vae"]:
        raise bad(where, f"_class_name = {vae.get('_class_name')!r}; supported: {CLASSES['vae']}")
    z = vae.get("z_dim", 16)
    if z != facts.in_channels:
        raise bad(where, f"z_dim = {z!r}, but the transformer's in_channels is {facts.in_channels}")
    for key in ("latents_mean", "latents_std"):
        values = vae.get(key)
        real = isinstance(values, list) and all(type(v) in (int, float) and abs(v) < 1e6 for v in values)
        if values is not None and (not real or len(values) != z or (key == "latents_std" and min(values) <= 0)):
            raise bad(where, f"{key} must be {z} numbers" + (" above 0" if key == "latents_std" else ""))


def check_tokenizer(folder: Path) -> list[Path]:
    """The files of a T5 tokenizer that are there; a vocabulary is among them and parses."""
    files = [path for path in (folder / "tokenizer_config.json", folder / "special_tokens_map.json") if path.exists()]
    for path in files:
        if "auto_map" in read_json(path):
            raise bad(path, "auto_map points at code")
    vocabulary = [path for path in (folder / "tokenizer.json", folder / "spiece.model") if os.path.lexists(path)]
    if not vocabulary:
        raise bad(folder / "tokenizer.json", "missing, and so is spiece.model")
    for path in vocabulary:
        if path.suffix == ".json":
            if not isinstance(read_json(path).get("model"), dict):
                raise bad(path, "holds no tokenizer model")
        elif len(read_bytes(path, 100_000_000)) < 16:
            raise bad(path, "too short to be a vocabulary")
    return files + vocabulary


def check_scheduler(path: Path) -> None:
    """A flow-matching scheduler that the pipeline can use."""
    config = read_json(path)
    name = config.get("_class_name")
    if name not in CLASSES["scheduler"]:
        raise bad(path, f"_class_name = {name!r}; supported: {', '.join(CLASSES['scheduler'])}")
    if name == "UniPCMultistepScheduler" and config.get("prediction_type") != "flow_prediction":
        raise bad(path, f"prediction_type = {config.get('prediction_type')!r}; Wan predicts flow_prediction")


def stamp_of(file: Path) -> tuple[int, int, int]:
    found = stat_file(file)
    return found.st_ino, found.st_size, found.st_mtime_ns


def digest(folder: Path, files: list[Path], headers: list[bytes]) -> str:
    """sha256 over names, sizes, configs and weight files' headers: tells a model from another without reading it."""
    total = hashlib.sha256()
    for file in sorted(files):
        total.update(f"{file.relative_to(folder).as_posix()}\0{stat_file(file).st_size}\0".encode())
        if file.suffix == ".json":
            total.update(read_bytes(file, 100_000_000))
    for raw in headers:
        total.update(raw)
    return total.hexdigest()
