"""What is wanted: one frozen Plan, the same in Python, YAML, the command line and clip metadata.

A plan is built from layers, lowest first (preset, file, --set, flag); every leaf remembers which layer gave its value.
Nothing unknown, ambiguous or contradictory passes: each refusal is a DaxError("bad_request") that names the place.
"""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from dax.errors import DaxError, nearest
from dax.plan_file import parse_scalar, read_yaml

DEFAULT_PRESET = "exact"
PLANS = Path(__file__).parent / "plans"


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    def hash(self) -> str:
        """sha256 (hex) of the canonical JSON."""
        canonical = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def __hash__(self):
        return hash(self.hash())


class Attention(Part):
    kernel: Literal["auto", "sdpa", "cudnn", "flash", "bf16", "sage", "int8"] = "auto"


class Linear(Part):
    """`rules` {layer or pattern: scheme or none} over the scheme; `scales` is a file of static scales, or none."""

    scheme: Literal["none", "int8", "fp8", "fp8_e5m2", "int8_weight_only"] = "none"
    granularity: Literal["token-channel", "tensor-channel", "tensor"] = "token-channel"
    activation: Literal["dynamic", "static"] = "dynamic"
    scales: str = "none"
    rules: dict[str, str] = {}
    keep_original: Literal["cpu", "none"] = "cpu"

    @property
    def active(self) -> bool:
        """Whether any layer is to be quantised."""
        return any(scheme != "none" for scheme in (self.scheme, *self.rules.values()))

    @property
    def schemes(self) -> tuple[str, ...]:
        """The schemes named, each once."""
        return tuple(dict.fromkeys(s for s in (self.scheme, *self.rules.values()) if s != "none"))

    @model_validator(mode="after")
    def consistent(self):
        if self.activation == "static" and "int8_weight_only" in self.schemes:
            raise ValueError("int8_weight_only leaves activations as they are: none of its layers can be static")
        return self


class Blocks(Part):
    fused: bool = True


class Cache(Part):
    """Which steps are predicted. `auto` is what the policy's authors publish, or what was calibrated for the model."""

    policy: Literal["none", "teacache", "magcache", "calibrated", "mask"] = "none"
    reuse: Literal["velocity", "residual"] = "velocity"  # what a skipped step reuses; residual: as first published
    threshold: Annotated[float, Field(ge=0)] | Literal["auto"] = "auto"  # teacache, magcache
    ret_steps: bool = True  # teacache: the form that retains the first steps
    retention: Annotated[float, Field(ge=0, le=1)] | Literal["auto"] = "auto"  # magcache
    max_skips: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"  # magcache's K
    mask: str = ""  # mask: 1 computed, 0 predicted, one letter a step
    file: str = "auto"  # of dax calibrate; auto: the one that ships for this checkpoint
    budget: Annotated[float, Field(gt=0, le=1)] = 0.4  # calibrated: share of the forwards to compute at most
    min_psnr: Annotated[float, Field(ge=0)] = 0.0  # calibrated: instead, the latent fidelity in dB to hold; 0: budget
    uncond_every: Annotated[int, Field(ge=1)] = 1  # uncond is computed in every n-th computed step only
    drop_uncond: Annotated[int, Field(ge=0)] = 0  # no guidance in the last n steps

    @field_validator("mask", mode="before")
    @classmethod
    def digits(cls, value):
        """--set cache.mask=1101 reads as a number; its digits are meant."""
        return str(value) if type(value) is int else value

    @model_validator(mode="after")
    def consistent(self):
        if (self.policy == "mask") != bool(self.mask):
            raise ValueError("cache.policy = mask and cache.mask belong together")
        if self.reuse == "residual" and self.policy == "calibrated":
            raise ValueError("a calibrated plan predicts velocities: cache.reuse = residual is for the other policies")
        return self


Auto = Literal["auto"]
Degree = Auto | Annotated[int, Field(ge=1)]


class Parallel(Part):
    """How ranks share the work. `auto` is the planner's choice; on one rank there is nothing to share."""

    cfg: Auto | Annotated[int, Field(ge=1, le=2)] = "auto"  # guidance branches at a time
    ulysses: Degree = "auto"  # head groups
    rows: Degree = "auto"  # query groups
    overlap: Auto | Annotated[int, Field(ge=0, le=64)] = "auto"  # head chunks that hide the exchange; 0: hide nothing
    wire: Literal["auto", "plain", "8bit"] = "auto"  # q, k, v as they are, or as 8-bit attention takes them
    vae: Literal["auto", "split", "none"] = "auto"  # decoded by all ranks, a strip each, or by every rank alone

    @property
    def wire_bytes(self) -> int:
        """Of each element of q, k and v on the wire, once that is decided."""
        return 1 if self.wire == "8bit" else 2


class Plan(Part):
    """How a model is to be run. Frozen and hashable; `Plan()` is the preset `exact`."""

    attention: Attention = Attention()
    linear: Linear = Linear()
    blocks: Blocks = Blocks()
    cache: Cache = Cache()
    parallel: Parallel = Parallel()
    compile: Literal["none", "blocks"] = "none"
    offload: Literal["none", "experts"] = "none"  # experts: the idle one of two waits in host memory

    @classmethod
    def load(cls, name_or_path: "str | Path | Plan") -> "Plan":
        """A preset by name, or a YAML file by path. DaxError("bad_request") names the file and line."""
        if isinstance(name_or_path, Plan):
            return name_or_path
        return cls.from_layers([plan_layer(name_or_path)])[0]

    @classmethod
    def from_layers(cls, layers: list[tuple[str, dict]]) -> "tuple[Plan, dict[str, str]]":
        """Merge (source, values) layers, lowest precedence first, into a Plan and {key: source}.

        `values` may be nested ({"attention": {"kernel": "sdpa"}}), dotted ({"attention.kernel": "sdpa"}) or both.
        One source that gives a key two different values contradicts itself and is refused.
        """
        leaves: dict[str, Any] = {}
        provenance = dict.fromkeys(plan_keys(), "default")
        order = ["default"]
        for source, values in layers:
            given = flatten(values, source)
            check_keys(given, source)
            order.append(source)
            for key, value in given.items():
                if is_mapping(key) and isinstance(value, dict):
                    value = leaves.get(key, {}) | value  # entries of a higher layer come on top
                elif key in leaves and provenance[key] == source and leaves[key] != value:
                    raise DaxError(
                        "bad_request", f"{source} sets {key} to both {leaves[key]!r} and {value!r}: keep one of them"
                    )
                leaves[key], provenance[key] = value, source
        settle(leaves, provenance, order)
        nested: dict[str, Any] = {}
        for key, value in leaves.items():
            check_value(key, value, provenance[key])
            *parents, last = key.split(".")
            part = nested
            for parent in parents:
                part = part.setdefault(parent, {})
            part[last] = value
        try:
            return cls.model_validate(nested), provenance
        except ValidationError as error:
            first = error.errors()[0]
            path = ".".join(map(str, first["loc"]))
            key = next((leaf for leaf in provenance if path == leaf or path.startswith(f"{leaf}.")), path)
            where = provenance.get(key, "plan")
            same = [e for e in error.errors() if ".".join(map(str, e["loc"])).startswith(key)]  # one per kind of value
            said = " or ".join(dict.fromkeys(e["msg"].removeprefix("Value error, ") for e in same))
            raise DaxError("bad_request", f"{where}: {key} = {first['input']!r}: {said}") from None

    def to_yaml(self) -> str:
        import yaml

        return yaml.safe_dump(self.model_dump(), sort_keys=False)

    def save(self, path: "str | Path") -> None:
        """Write the plan as YAML that `Plan.load` reads back. DaxError("cannot_write") if the path refuses."""
        try:
            Path(path).write_text(self.to_yaml(), encoding="utf-8")
        except OSError as error:
            raise DaxError("cannot_write", f"plan file {path}: {error.strerror}") from None

    def leaves(self) -> dict[str, Any]:
        """{"attention.kernel": "auto", "compile": "none"}: every key with its value."""
        return {key: self[key] for key in plan_keys()}

    def __getitem__(self, key: str) -> Any:
        value: Any = self
        for name in key.split("."):
            value = getattr(value, name)
        return value


def settle(leaves: dict[str, Any], provenance: dict[str, str], order: list[str]) -> None:
    """A fused block is not compiled: of the two, the one a higher layer asked for wins; one layer cannot ask for both.

    Static activations have one scale, so they are never per token.
    """
    fused, compiled = leaves.get("blocks.fused", Blocks().fused), leaves.get("compile", "none")
    if fused is True and compiled == "blocks":
        by_fused, by_compile = provenance["blocks.fused"], provenance["compile"]
        if by_fused == by_compile:
            raise DaxError(
                "bad_request",
                f"{by_compile}: compile = blocks and blocks.fused = true: a fused block is not compiled; keep one",
            )
        if order.index(by_compile) > order.index(by_fused):
            leaves["blocks.fused"], provenance["blocks.fused"] = False, by_compile
        else:
            leaves["compile"], provenance["compile"] = "none", by_fused
    granularity = leaves.get("linear.granularity", Linear().granularity)
    if leaves.get("linear.activation") == "static" and granularity == "token-channel":
        raise DaxError(
            "bad_request",
            f"{provenance['linear.activation']}: linear.activation = static: one scale measured before cannot be per "
            "token; set linear.granularity = tensor-channel or tensor",
        )


def presets() -> tuple[str, ...]:
    """Names of the presets that exist."""
    return tuple(sorted(path.stem for path in PLANS.glob("*.yaml")))


def plan_keys(part: type[BaseModel] = Plan, prefix: str = "") -> tuple[str, ...]:
    """Every leaf of the Plan in dotted form, in order."""
    keys: list[str] = []
    for name, field in part.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            keys += plan_keys(kind, f"{prefix}{name}.")
        else:
            keys.append(prefix + name)
    return tuple(keys)


def plan_layer(name_or_path: "str | Path") -> tuple[str, dict]:
    """(source, values) of a preset ("preset exact") or a plan file ("file x.yaml"), for Plan.from_layers."""
    name = str(name_or_path)
    if name in presets():
        return f"preset {name}", read_yaml(PLANS / f"{name}.yaml")
    if isinstance(name_or_path, str) and "/" not in name and not name.endswith((".yaml", ".yml")):
        if not Path(name).exists():
            raise DaxError("bad_request", f"unknown plan {name!r}{nearest(name, presets())}")
    values = read_yaml(Path(name))
    values.pop("measured", None)  # of a tuned plan: what dax/provenance.py reads, no part of the plan
    return f"file {name}", values


def parse_set(text: str) -> dict[str, Any]:
    """`attention.kernel=sdpa` -> {"attention.kernel": "sdpa"}; the value is read as a YAML scalar."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip() or not value.strip():
        raise DaxError("bad_request", f"--set {text!r}: write it as key=value, for example attention.kernel=sdpa")
    return {key.strip(): parse_scalar(value.strip(), f"--set {text}")}


def flatten(values: Any, source: str, prefix: str = "") -> dict[str, Any]:
    """Nested or dotted mapping -> {dotted key: value}. An empty part adds nothing."""
    if not isinstance(values, dict):
        raise DaxError("bad_request", f"{source}: a plan is a mapping of keys, not {type(values).__name__}")
    leaves: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        is_part = isinstance(value, dict) and not is_mapping(key)
        if key == "parallel" and value == "auto":  # the one group that has a word for all of its keys
            inner = {leaf: "auto" for leaf in plan_keys() if leaf.startswith("parallel.")}
        else:
            inner = flatten(value, source, f"{key}.") if is_part else {key: value}
        for leaf, leaf_value in inner.items():
            if leaf in leaves and leaves[leaf] != leaf_value:
                raise DaxError(
                    "bad_request", f"{source} sets {leaf} to both {leaves[leaf]!r} and {leaf_value!r}: keep one of them"
                )
            leaves[leaf] = leaf_value
    return leaves if prefix else entries_of_mappings(leaves)


def entries_of_mappings(leaves: dict[str, Any]) -> dict[str, Any]:
    """{"linear.rules.blocks.0": "none"} -> {"linear.rules": {"blocks.0": "none"}}: names in a mapping may have dots."""
    found: dict[str, Any] = {}
    for key, value in leaves.items():
        mapping = next((known for known in plan_keys() if is_mapping(known) and key.startswith(f"{known}.")), None)
        if mapping is None:
            found[key] = value
        else:
            found[mapping] = found.get(mapping, {}) | {key.removeprefix(f"{mapping}."): value}
    return found


def check_keys(leaves: dict[str, Any], source: str) -> None:
    """Refuse an unknown key with the nearest known one, and a group of keys that stands for one."""
    known = plan_keys()
    for key in leaves:
        if key in known:
            continue
        if wanted := [name for name in known if name.startswith(f"{key}.")]:
            raise DaxError("bad_request", f"{source}: {key!r} is a group of keys: write {' or '.join(wanted)}")
        raise DaxError("bad_request", f"{source}: unknown plan key {key!r}{nearest(key, known)}")


def check_value(key: str, value: Any, source: str) -> None:
    """Refuse a word that is not one of the key's choices, with the nearest one. Other types are pydantic's to check."""
    choices = plan_choices(key)
    if choices and (value not in choices or not isinstance(value, str)):
        hint = nearest(value, choices) if isinstance(value, str) else f"; known: {', '.join(choices)}"
        raise DaxError("bad_request", f"{source}: {key} = {value!r} is not known{hint}")


def plan_choices(key: str) -> tuple[str, ...]:
    """The words a key accepts; () for a key that is not one of words."""
    annotation = annotation_of(key)
    return get_args(annotation) if get_origin(annotation) is Literal else ()


def is_mapping(key: str) -> bool:
    """Whether a key's value is itself a mapping, as that of linear.rules."""
    return key in plan_keys() and get_origin(annotation_of(key)) is dict


def annotation_of(key: str) -> Any:
    part: Any = Plan
    for name in key.split("."):
        part = part.model_fields[name].annotation
    return part
