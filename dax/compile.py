"""`compile: blocks`: torch.compile on each transformer block, undone like any other change.

The blocks share their code, so one compilation serves them all. A second video size costs one more, for any size.
"""

from collections.abc import Iterable

from dax.edits import Edits

BACKEND = "inductor"
# Left alone, Inductor puts every wait right behind its exchange, and nothing is hidden. These keep waits late.
OVERLAP = {
    "reorder_for_compute_comm_overlap": True,
    "reorder_for_compute_comm_overlap_passes": ["sink_waits", "raise_comms"],
}


def apply_compile(blocks: Iterable, edits: Edits, overlap: bool = False) -> int:
    """Compile every block in place, as one graph each (a graph break is an error); returns how many.

    overlap   keep the order in which exchanges between ranks are started and waited for
    Nothing is compiled yet: the first run does it, which takes from seconds to minutes.
    """
    count = 0
    for block in blocks:
        edits.set_attribute(block, "_compiled_call_impl", block._compiled_call_impl)  # what .compile() is about to set
        block.compile(backend=BACKEND, fullgraph=True, options=dict(OVERLAP) if overlap else None)
        count += 1
    return count
