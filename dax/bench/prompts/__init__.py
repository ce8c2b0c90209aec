"""The prompts of a comparison: one a line in a text file, empty lines and lines that begin with # left out."""

from pathlib import Path

from dax.errors import DaxError
from dax.generate.request import check_text

HERE = Path(__file__).parent
MAX_PROMPTS = 1000
MAX_BYTES = 10_000_000


def default_prompts(model: str, held_out: bool = False) -> Path:
    """The file that ships with DAX for a model: captions of its own world for the tiny one, else everyday scenes."""
    if model == "tiny":
        return HERE / ("tiny_held_out.txt" if held_out else "tiny.txt")
    return HERE / "general.txt"


def read_prompts(path: str | Path) -> list[str]:
    """Every prompt of the file. DaxError("bad_request") names every bad line, or what is wrong with it."""
    path = Path(path)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise DaxError("bad_request", f"prompts file {path}: larger than {MAX_BYTES // 10**6} MB")
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise DaxError("bad_request", f"prompts file {path}: {error.strerror}") from None
    prompts, wrong = [], []
    for number, raw in enumerate(lines, 1):
        try:
            line = raw.decode("utf-8").strip()
            if line and not line.startswith("#"):
                check_text("the prompt", line)
                prompts.append(line)
        except UnicodeDecodeError:
            wrong.append(f"line {number} is not UTF-8")
        except DaxError as error:
            wrong.append(f"line {number}: {error}")
    if wrong:
        raise DaxError("bad_request", f"prompts file {path}: {'; '.join(wrong)}")
    if not 0 < len(prompts) <= MAX_PROMPTS:
        raise DaxError("bad_request", f"prompts file {path}: {len(prompts)} prompts; give 1 to {MAX_PROMPTS}")
    return prompts
