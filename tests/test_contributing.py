"""What CONTRIBUTING.md says to change for a new family is there to be changed: files, and the names in them."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def paragraphs(page: str) -> list[str]:
    """The numbered steps and closing words of "Add a family"."""
    section = page.partition("## Add a family\n")[2].partition("\n## ")[0]
    return re.split(r"\n(?=\d+\. )|\n\n", section.strip())[3:]


def missing(paragraph: str) -> list[str]:
    """Paths in it that do not exist, and names in backticks that none of its files has."""
    quoted = re.findall("`([^`]+)`", paragraph)
    paths = [word for word in quoted if re.search(r"/.*\.\w+$", word)]
    lost = [path for path in paths if not (ROOT / path).is_file()]
    text = "\n".join((ROOT / path).read_text() for path in paths if path not in lost)
    names = [word for word in quoted if re.fullmatch(r"\w+", word)]
    return lost + [name for name in names if not re.search(rf"\b{name}\b", text)]


@pytest.mark.parametrize("paragraph", paragraphs((ROOT / "CONTRIBUTING.md").read_text()), ids=lambda text: text[:25])
def test_every_file_and_name_is_in_the_tree(paragraph):
    assert "`" in paragraph and missing(paragraph) == []


def test_a_wrong_name_is_seen():
    assert missing("1. `Facts` and `Fictions` in `dax/facts.py`, `dax/none.py`") == ["dax/none.py", "Fictions"]
    assert len(paragraphs((ROOT / "CONTRIBUTING.md").read_text())) >= 12
