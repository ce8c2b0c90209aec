"""What 8 bits a linear layer gets: a table of schemes, rules per layer, and where each scheme runs. Without torch.

A rule is a pattern and a scheme. It holds for every layer it names and for all below ("blocks.0" holds for
"blocks.0.ffn.net.2"); `*` and `?` stand for any text. The longest matching pattern wins; `none` keeps a layer as it is.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from dax.errors import DaxError, nearest
from dax.hardware import Machine, no_kernels

NONE = "none"
ROTATION = 8  # neighbouring inputs that are mixed before they are quantised, see Rule.rotated; files name it


@dataclass(frozen=True)
class Scheme:
    """weight, activation: torch dtypes by name; activation None keeps it as it comes. min_sm: of the kernel."""

    weight: str
    activation: str | None
    min_sm: int


SCHEMES = {
    "int8": Scheme("int8", "int8", 80),
    "fp8": Scheme("float8_e4m3fn", "float8_e4m3fn", 89),
    "fp8_e5m2": Scheme("float8_e4m3fn", "float8_e5m2", 89),
    "int8_weight_only": Scheme("int8", None, 80),
}
GRANULARITIES = {  # (one activation scale per token, one weight scale per output channel); else one for the tensor
    "token-channel": (True, True),
    "tensor-channel": (False, True),
    "tensor": (False, False),
}


@dataclass(frozen=True)
class Rule:
    """How one linear layer is quantised. `static` needs an input scale measured before."""

    scheme: str
    granularity: str = "token-channel"
    static: bool = False

    def __post_init__(self):
        for word, known in ((self.scheme, SCHEMES), (self.granularity, GRANULARITIES)):
            if word not in known:
                raise DaxError("bad_request", f"linear: {word!r} is not known{nearest(word, known)}")
        if self.static and self.per_token:
            raise DaxError(
                "bad_request", "linear: one static scale cannot be per token: granularity tensor-channel or tensor"
            )

    @property
    def per_token(self) -> bool:
        return GRANULARITIES[self.granularity][0]

    @property
    def per_channel(self) -> bool:
        return GRANULARITIES[self.granularity][1]

    @property
    def rotated(self) -> bool:
        """Whether weight and input go through a Hadamard transform of ROTATION neighbours first.

        It brings int8 nearer; floats hold loud and quiet channels as they are, a scale for all tokens was measured
        on what comes unrotated.
        """
        return self.per_token and SCHEMES[self.scheme].activation == "int8"


def check_rotation(rotation, where: str) -> None:
    """DaxError("bad_model") unless saved codes were rotated as this version does it."""
    if rotation != ROTATION:
        raise DaxError(
            "bad_model", f"{where}: rotation = {rotation!r}, this version reads {ROTATION}: quantise the weights again"
        )


def reason(scheme: str, machine: Machine) -> str | None:
    """Why `scheme` does not run there, or None. A CPU runs the reference of every scheme."""
    return no_kernels(machine, SCHEMES[scheme].min_sm)


def rules_of(part, facts) -> tuple[dict[str, str], list[str]]:
    """(rules, patterns that may match nothing) of a plan's part `linear` for a model.

    Embedders and output projection stay as they are (facts.full_precision) unless a rule says otherwise.
    """
    kept = dict.fromkeys(facts.full_precision, NONE)
    return {"*": part.scheme, **kept, **part.rules}, [name for name in ("*", *kept) if name not in part.rules]


def match(names: Iterable[str], rules: Mapping[str, str], optional: Iterable[str] = ()) -> dict[str, str]:
    """{layer: scheme} for the layers the rules quantise.

    DaxError("bad_request") for an unknown scheme, and for a pattern that names no layer, unless it is `optional`.
    """
    names = list(names)
    for pattern, scheme in rules.items():
        if scheme != NONE and scheme not in SCHEMES:
            known = [NONE, *SCHEMES]
            raise DaxError("bad_request", f"linear.rules: {pattern}: {scheme!r} is not known{nearest(scheme, known)}")
        if pattern not in optional and not any(covers(pattern, name) for name in names):
            parents = {name.rsplit(".", depth)[0] for name in names for depth in range(name.count(".") + 1)}
            raise DaxError(
                "bad_request", f"linear.rules: {pattern!r} matches no linear layer{nearest(pattern, parents)}"
            )
    found = {}
    for name in names:
        matching = [pattern for pattern in rules if covers(pattern, name)]
        scheme = rules[max(matching, key=len)] if matching else NONE
        if scheme != NONE:
            found[name] = scheme
    return found


def covers(pattern: str, name: str) -> bool:
    """Whether a pattern names a layer or one of its parents."""
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:depth]), pattern) for depth in range(1, len(parts) + 1))
