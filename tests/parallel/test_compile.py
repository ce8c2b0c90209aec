"""The overlap survives torch.compile: the generated code starts each exchange early and waits for it late."""

import re
from unittest import mock

import pytest
import torch
from torch._inductor.utils import run_and_get_code

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
    return steps_of(code)


def steps_of(code: str) -> list[tuple[str, int]]:
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


def test_what_auto_chooses_survives_in_a_compiled_block(two_ranks_on_paper):
    """From the plan to the generated code of Wan's own block: every chunk's exchange starts before the attention that
    hides it, and the last output is waited for after the last attention."""
    import dax
    from dax.parallel.cost import Cluster, Link
    from tests.parallel.tasks import build_pipe

    slow = Cluster(1e12, 1e9, 1e12, 1e12, 20, 2, Link(0.0, 1e9), Link(0.0, 1e9))  # attention hides all but the ends
    transformer = build_pipe(heads=6).transformer
    parallel = {"cfg": 1, "ulysses": 2, "overlap": "auto", "wire": "plain", "vae": "none"}
    torch.compiler.reset()
    with mock.patch("dax.parallel.planner.cluster_of", return_value=slow):
        engine = dax.optimize(transformer, attention={"kernel": "sdpa"}, compile="blocks", parallel=parallel)
    latents, text = torch.randn(1, 16, 3, 10, 6), torch.randn(1, 5, 32)
    with engine, torch.no_grad():
        _, (code, *_) = run_and_get_code(lambda: transformer(latents, torch.tensor([500]), text))
    chunks, order = engine.plan.parallel.overlap, steps_of(code)
    assert chunks > 2, "auto hides nothing here: the test would see nothing"
    attentions = [index for index, (step, _) in enumerate(order) if step == "attend"]
    assert len(attentions) >= chunks
    for chunk in range(chunks - 1):
        started = sum(step == "start" for step, _ in order[: attentions[chunk]])
        waited = sum(step == "wait" for step, _ in order[: attentions[chunk]])
        assert started >= 3 * (chunk + 2) + chunk - 1 and waited <= 3 * (chunk + 1) + chunk
