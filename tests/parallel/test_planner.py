"""The planner takes what the arithmetic says, and its numbers behave as links and cards do."""

from dataclasses import replace

import pytest

from dax.bench import costs
from dax.errors import DaxError
from dax.facts import FACTS
from dax.hardware import MACHINES
from dax.parallel.cost import Link, cluster_of, predict, window_bytes
from dax.parallel.messages import Axes
from dax.parallel.planner import Ranks, predictions, resolve_parallel
from dax.parallel.topology import Layout, Topology, topologies
from dax.parallel.window import places
from dax.plan import Parallel, Plan

WAN14, WAN1 = FACTS["wan2.1-t2v-14b"], FACTS["wan2.1-t2v-1.3b"]
S = WAN14.tokens(720, 1280, 81)
H200 = cluster_of(MACHINES["h200"], "int8", "8bit")
L20 = cluster_of(MACHINES["l20"], "int8", "8bit")


def first(facts, count, cluster=H200, **options):
    guided = options.get("branches", 2) == 2
    return predictions(facts, S, topologies(count, facts.num_heads, guided), cluster, **options)[0]


def test_one_rank_takes_the_time_of_the_rates():
    alone = predict(WAN14, S, Topology(), H200)
    assert alone.speedup == 1 and alone.exchange_ms == alone.exposed_ms == alone.tax_ms == 0
    assert alone.layer_ms == pytest.approx(142.0, abs=1)  # what the parts add up to on an H200


@pytest.mark.parametrize("kernel", ["bf16", "cudnn", "sdpa", "flash", "sage", "int8"])
@pytest.mark.parametrize("linear", ["none", "int8"])
def test_one_rank_takes_what_a_card_is_expected_to(kernel, linear):
    """The planner and `dax explain` count one block alike, whatever multiplies; they round its traffic otherwise."""
    plan = Plan(attention={"kernel": kernel}, linear={"scheme": linear}, blocks={"fused": True})
    alone = predict(WAN14, S, Topology(), costs.cluster(plan, costs.CARD))
    assert alone.layer_ms == pytest.approx(costs.block_ms(linear, kernel, "none", True), rel=0.015)


def test_branches_first_then_heads_inside_a_node():
    assert first(WAN14, 2).topology == Topology(2, 1, 1)
    assert first(WAN14, 8).topology == Topology(2, 4, 1)
    assert first(WAN14, 16).topology == Topology(2, 8, 1), "each branch's exchange stays inside its node"
    assert first(WAN14, 8, branches=1).topology == Topology(1, 8, 1)
    assert first(WAN1, 8, branches=1).topology != Topology(1, 8, 1), "12 heads on 8 ranks leave half of them waiting"


def test_hiding_pays_more_on_a_slow_link():
    two = Topology(1, 2, 1)
    gains = []
    for cluster in (H200, L20, replace(H200, inside=Link(60e-6, 14e9))):
        shown, hidden = predict(WAN14, S, two, cluster, 0), predict(WAN14, S, two, cluster, 5)
        assert hidden.exposed_ms < 0.4 * shown.exposed_ms and shown.exposed_ms == pytest.approx(shown.exchange_ms)
        gains.append(shown.layer_ms / hidden.layer_ms)
    assert gains[0] < gains[1] and gains[0] < gains[2]


def test_eight_bits_halve_what_q_k_and_v_take_on_the_wire():
    link = replace(H200, inside=Link(0.0, 100e9))
    plain, small = (predict(WAN14, S, Topology(1, 2, 1), link, 0, wire_bytes).exchange_ms for wire_bytes in (2, 1))
    assert small / plain == pytest.approx((3 * 1 + 2) / (4 * 2), abs=0.01)  # the output keeps 16; means are few


def test_a_window_costs_less_than_messages():
    """No copies around it but of what a rank keeps; what it hides is taxed alike; not beyond a node, nor compiled."""
    two = Topology(1, 2, 1)
    for chunks in (0, 5):
        messages, window = (predict(WAN14, S, two, H200, chunks, 1, window=through) for through in (False, True))
        hidden = window.exchange_ms - window.exposed_ms
        assert window.layer_ms < messages.layer_ms and window.tax_ms == pytest.approx(hidden * 360 / 250)
        assert window.compute_ms < messages.compute_ms and window.exposed_ms < messages.exposed_ms
    assert first(WAN14, 2, wire_bytes=1, branches=1).window
    assert not first(WAN14, 2, wire_bytes=1, branches=1, eager=False).window
    assert not first(WAN14, 2, cluster=L20, branches=1).window and not first(WAN14, 2).window, "nothing to exchange"
    assert not first(WAN14, 4, cluster=replace(H200, node=2), branches=1).window


def test_what_a_window_keeps_is_known_before():
    """The planner's estimate beside what the ranks allot, for 8-bit operands with their scales."""
    from dax.attention.int8 import LAYOUT

    for u, r in ((2, 1), (4, 2), (1, 2)):
        layout, own = Layout(S, 40, u, r, 128), -(-S // (128 * u * r))
        shapes = (40, 128 * own, 128), (40, 128 * own), (40, own, 128, 128), (40, own), (40, own, 128, 128), (40, 128)
        forms = tuple(((1, *shape), 1 if len(shape) > 2 else 4) for shape in shapes)
        axes = tuple(Axes(tokens, heads, per, query=i < 2) for i, (heads, tokens, per) in enumerate(LAYOUT))
        _, operands = places(layout, forms, axes, 0, 5)
        outputs = 2 * layout.token_sizes[0] * 40 * 128
        assert window_bytes(WAN14, S, Topology(1, u, r), 1) == pytest.approx(operands + outputs, rel=0.02)


def test_more_ranks_are_faster_and_never_more_than_all_of_them():
    before = 1.0
    for count in (2, 4, 8, 16, 32):
        found = first(WAN14, count)
        assert before < found.speedup <= count and found.efficiency_pct <= 100
        before = found.speedup


def test_a_plan_is_resolved_without_a_data_sheet():
    machine = replace(MACHINES["h200"], peak_tflops={})
    plan, (note,) = resolve_parallel(Parallel(), WAN1, machine, Ranks(8), travels=False)
    assert (plan.cfg, plan.ulysses, plan.rows, plan.overlap, plan.wire, plan.vae) == (2, 4, 1, 0, "plain", "split")
    assert "predicted" not in note


def test_what_is_asked_is_kept_or_refused():
    h200 = MACHINES["h200"]
    plan, _ = resolve_parallel(Parallel(cfg=1, overlap=3), WAN14, h200, Ranks(4), travels=True)
    assert (plan.cfg, plan.ulysses * plan.rows, plan.overlap, plan.wire, plan.wire_bytes) == (1, 4, 3, "8bit", 1)
    plan, _ = resolve_parallel(Parallel(wire="plain"), WAN14, h200, Ranks(4), travels=True)
    assert (plan.wire, plan.wire_bytes) == ("plain", 2)
    with pytest.raises(DaxError, match="parallel.wire = 8bit: this attention kernel has no"):
        resolve_parallel(Parallel(wire="8bit"), WAN14, h200, Ranks(2), travels=False)
    with pytest.raises(DaxError, match="320 tokens in blocks of 128 do not give each of 4 ranks a share"):
        resolve_parallel(Parallel(cfg=1), WAN14, h200, Ranks(4, tokens=320, align=128), travels=True)
    plan, _ = resolve_parallel(Parallel(), WAN14, h200, Ranks(4, tokens=320, align=128), travels=True)
    assert plan.cfg == 2, "two ranks a branch have enough"


def test_guidance_is_not_divided_when_its_branches_compute_different_steps():
    plan, _ = resolve_parallel(Parallel(), WAN14, MACHINES["h200"], Ranks(2), joint=False)
    assert plan.cfg == 1
    with pytest.raises(DaxError, match="parallel.cfg = 2: the step cache computes the branches at different steps"):
        resolve_parallel(Parallel(cfg=2), WAN14, MACHINES["h200"], Ranks(2), joint=False)


def test_explain_says_what_to_expect():
    from dax.bench.explain import explain
    from dax.bench.explain_text import text

    result = explain("wan2.1-t2v-14b", None, [], (None,) * 3, None, "h200", gpus=16, per_node=8)
    own = result["ranks"][0]
    assert own["topology"] == "cfg 2 x ulysses 8 x rows 1" and 12 < own["speedup"] < 16
    assert "16 ranks, 8 per node" in text(result)
    with pytest.raises(DaxError, match="--gpus 2: name the card"):
        explain("wan2.1-t2v-14b", None, [], (None,) * 3, None, None, gpus=2)
