"""The pictures a clip starts from, and ends with: read and checked before a weight is, so that none is a surprise.

What a viewer would show otherwise than a decoder gives it (transparency, a turn in its EXIF, several pictures in one
file) is refused, not guessed at. Rows 62 and 63 of docs/faults.md.
"""

from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from dax.errors import DaxError
from dax.facts import Facts

FORMATS = ("PNG", "JPEG", "WEBP")
MODES = ("1", "L", "LA", "P", "RGB", "RGBA")  # 8 bits a channel, and no colours of print
MOST_PIXELS = 50_000_000
ORIENTATION = 0x0112  # the EXIF tag


@dataclass(frozen=True)
class Picture:
    """A picture in RGB. What is compared, shown and recorded of it is all but the pixels."""

    name: str
    sha256: str
    width: int
    height: int
    pixels: object = field(repr=False, compare=False)  # PIL.Image.Image

    def record(self) -> dict:
        return {"name": self.name, "sha256": self.sha256, "width": self.width, "height": self.height}


def read_images(facts: Facts, first: str | None, last: str | None) -> tuple[Picture, ...]:
    """The pictures a model starts from, as many as it takes. DaxError("bad_request") for more, fewer or a bad one."""
    given = [path for path in (first, last) if path is not None]
    if given and not facts.num_images:
        way_out = "give an image-to-video --model"
        if facts.token_time:
            way_out = "name WanImageToVideoPipeline in its model_index.json, with expand_timesteps, to start from one"
        raise DaxError("bad_request", f"--image: {facts.name} starts from text alone; {way_out}")
    if facts.num_images and first is None:
        raise DaxError("bad_request", f"no image: {facts.name} starts from one: --image first.png")
    if len(given) < facts.num_images:
        raise DaxError("bad_request", f"no last image: {facts.name} goes from one to another: --last-image last.png")
    if len(given) > facts.num_images:
        raise DaxError("bad_request", f"--last-image: {facts.name} takes a first image only")
    return tuple(map(read_image, given))


def read_image(path: str) -> Picture:
    """DaxError("bad_request") in one line for a file that is not one upright, opaque PNG, JPEG or WebP picture."""
    import io

    from PIL import Image, UnidentifiedImageError

    try:
        content = Path(path).read_bytes()
        image = Image.open(io.BytesIO(content), formats=FORMATS)
        check_header(path, image)
        image.load()
        rgba = image.convert("RGBA")
    except UnidentifiedImageError:
        raise bad(path, "not a PNG, JPEG or WebP picture") from None
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise bad(path, getattr(error, "strerror", None) or f"cannot be read: {str(error).splitlines()[0]}") from None
    if rgba.getchannel("A").getextrema()[0] < 255:
        raise bad(path, "is transparent in places: put it on a background")
    return Picture(Path(path).name, sha256(content).hexdigest(), *image.size, image.convert("RGB"))


def check_header(path: str, image) -> None:
    """What can be told before the pixels are decoded."""
    width, height = image.size
    if width * height > MOST_PIXELS:
        raise bad(path, f"{width}x{height} is {width * height / 1e6:.0f} megapixels: at most {MOST_PIXELS / 1e6:.0f}")
    if getattr(image, "n_frames", 1) > 1:
        raise bad(path, f"is animated, {image.n_frames} pictures: save the one that is meant")
    if (turn := image.getexif().get(ORIENTATION, 1)) != 1:
        raise bad(path, f"is turned by its EXIF orientation, {turn}: save it upright")
    if image.mode not in MODES:
        raise bad(path, f"has pixels of mode {image.mode}: save it as RGB with 8 bits a channel")


def stretched(pictures: tuple[Picture, ...], height: int, width: int) -> list[str]:
    """A remark for each picture whose shape the clip does not have, since it is scaled to the clip's size."""
    return [
        f"{p.name} is {p.width}x{p.height}: stretched to {width}x{height}"
        for p in pictures
        if abs(p.width * height / (p.height * width) - 1) > 0.02
    ]


def bad(path: str, what: str) -> DaxError:
    return DaxError("bad_request", f"image {path}: {what}")
