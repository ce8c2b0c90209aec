"""The overlap survives torch.compile: the generated code starts each exchange early and waits for it late."""

import re

import pytest
import torch

from dax.attention.backend import Turn, backend_of
from dax.compile import OVERLAP
from dax.parallel.sequence import Sequence
from dax.parallel.ulysses import shared
from dax.parallel.wire import Wire

H, D, S = 4, 8, 12
STEPS = {  # of the generated code
    r"(\w+) = torch\.ops\._c10d_functional\.all_to_all_single": "start",
    r"torch\.ops\._c10d_functional\.wait_tensor\.default\((\w+)": "wait",
    r"(\w+) = torch\.ops\.aten\._scaled_dot_product": "attend",
}


@pytest.fixture
def two_ranks_on_paper():
    """A process group of two that moves nothing: enough to compile for it."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield Wire(dist.group.WORLD)
    dist.destroy_process_group()


def generated_order(wire, chunks: int, options) -> list[tuple[str, int]]:
    """[("start", 0), ("wait", 0), ...] in the order of the compiled code; exchanges are numbered as they start."""
    from torch._inductor.utils import run_and_get_code

    sequence = Sequence(wire, H, 2, 1)
    sequence.begin(S)
    backend = shared(backend_of("sdpa"), sequence, chunks)

    def attention(x, weight):
        q, k, v = (x @ weight[i] for i in range(3))
        operands = backend.prepare(q, k, v, H, Turn(), None)
        return backend.attend(operands, S).flatten(2) @ weight[3]

    torch.compiler.reset()
    compiled = torch.compile(attention, fullgraph=True, options=options)
    _, (code,) = run_and_get_code(lambda: compiled(torch.randn(1, S // 2, H * D), torch.randn(4, H * D, H * D)))
    found, numbers = [], {}
    for line in code.splitlines():
        for pattern, step in STEPS.items():
            if match := re.match(r"\s*" + pattern, line):
                number = numbers.setdefault(match[1], len(numbers)) if step != "attend" else 0
                found.append((step, number))
    return found


def test_exchanges_start_before_the_attention_that_hides_them(two_ranks_on_paper):
    order = generated_order(two_ranks_on_paper, 2, OVERLAP)
    first_attention = order.index(("attend", 0))
    started = [number for step, number in order[:first_attention] if step == "start"]
    waited = [number for step, number in order[:first_attention] if step == "wait"]
    assert (len(started), len(waited)) == (6, 3)  # both head chunks of q, k, v are on their way, one was waited for
    assert sum(step == "start" for step, _ in order) == 8 == sum(step == "wait" for step, _ in order)


def test_the_order_would_be_lost_without_the_option(two_ranks_on_paper):
    order = generated_order(two_ranks_on_paper, 2, None)
    started = [number for step, number in order[: order.index(("attend", 0))] if step == "start"]
    assert len(started) == 3, "Inductor keeps the order by itself: OVERLAP can go"
