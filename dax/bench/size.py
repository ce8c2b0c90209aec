"""The size of a video, and which sizes a model can run."""

from dataclasses import asdict, dataclass

from dax.errors import DaxError
from dax.facts import Facts


@dataclass(frozen=True)
class Size:
    """Pixels and frames of the video whose tokens are run."""

    height: int
    width: int
    num_frames: int


def checked_size(facts: Facts, size: tuple[int | None, int | None, int | None]) -> Size:
    """The asked size, defaults filled in. DaxError("bad_request") for one the model's patches do not divide."""
    defaults = facts.defaults
    height, width, num_frames = (
        given if given is not None else default
        for given, default in zip(size, (defaults.height, defaults.width, defaults.num_frames))
    )
    for name, pixels in (("--height", height), ("--width", width)):
        if pixels <= 0 or pixels % facts.size_multiple:
            raise DaxError("bad_request", f"{name} {pixels}: must be a positive multiple of {facts.size_multiple}")
    if num_frames <= 0 or (num_frames - 1) % facts.vae_temporal:
        raise DaxError("bad_request", f"--num-frames {num_frames}: must be a multiple of {facts.vae_temporal} plus 1")
    return Size(height, width, num_frames)


def named(facts: Facts, size: Size) -> dict:
    """What a record says of its subject: {"model", "height", "width", "num_frames", "tokens"}."""
    pixels = asdict(size)
    return {"model": facts.name, **pixels, "tokens": facts.tokens(**pixels)}
