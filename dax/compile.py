"""`compile: blocks`: torch.compile on each transformer block, undone like any other change.

The blocks share their code, so one compilation serves them all. A second video size costs one more, for any size.
"""

from collections.abc import Iterable

from dax.edits import Edits

BACKEND = "inductor"


def apply_compile(blocks: Iterable, edits: Edits, backend: str | None = None) -> int:
    """Compile every block in place, as one graph each (a graph break is an error); returns how many.

    Nothing is compiled yet: the first run does it, which takes from seconds to minutes.
    """
    count = 0
    for block in blocks:
        edits.set_attribute(block, "_compiled_call_impl", block._compiled_call_impl)  # what .compile() is about to set
        block.compile(backend=backend or BACKEND, fullgraph=True)
        count += 1
    return count
