"""docs/faults.md and the tests name the same rows: no row without a test, no mark without a row."""

import ast
import re
from pathlib import Path

from dax.errors import EXIT_CODES

ROOT = Path(__file__).parents[1]
ROW = re.compile(r"\| (\d+) \| (.+?) \| (.+?) \| ([\d, -]+) \|$")


def rows(text: str) -> dict[int, tuple[str, ...]]:
    """{number: (fault, what DAX does, exit codes)} of the page's tables."""
    found = [ROW.match(line) for line in text.splitlines()]
    listed = [(int(match[1]), match.groups()[1:]) for match in found if match]
    assert len(dict(listed)) == len(listed), "a row is there twice"
    return dict(listed)


def marks(source: str) -> set[int]:
    """Rows that a file's `pytest.mark.fault(n)` name, as Python reads it: comments and text do not count."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return {call.args[0].value for call in calls if ast.unparse(call.func) == "pytest.mark.fault"}


def test_every_row_has_a_test_and_every_mark_a_row():
    page = rows((ROOT / "docs" / "faults.md").read_text())
    tested = set().union(*(marks(path.read_text()) for path in (ROOT / "tests").rglob("test_*.py")))
    assert set(page) - tested == set(), "rows without a test"
    assert tested - set(page) == set(), "marks without a row"


def test_exit_codes_are_those_of_the_program():
    known = {0, 141, *EXIT_CODES.values()}
    for number, (*_, codes) in rows((ROOT / "docs" / "faults.md").read_text()).items():
        assert {int(code) for code in re.findall(r"\d+", codes)} <= known, number


def test_a_missing_test_would_be_seen():
    text = "| 1 | a | b | 2 |\n| 2 | c | d | 0, 6 |\n| # | fault | what | exit |\n"
    assert set(rows(text)) == {1, 2}
    assert marks(
        "# pytest.mark.fault(1)\nimport pytest\n@pytest.mark.fault(2)\ndef test(): '@pytest.mark.fault(3)'"
    ) == {2}
