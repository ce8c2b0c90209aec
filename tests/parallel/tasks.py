"""What the ranks of the tests do. Functions of this module are sent to every rank by name."""

import time
from dataclasses import replace
from unittest import mock

import torch
import torch.distributed as dist

from dax.attention.backend import Turn, backend_of
from dax.kernels.rooms import fill
from dax.parallel import shared_memory
from dax.parallel.admit import admitted, ways_of
from dax.parallel.sequence import Sequence
from dax.parallel.topology import Layout
from dax.parallel.ulysses import shared
from dax.parallel.window import Window, opened
from dax.parallel.wire import Wire, gather
from tests.parallel import slow_link
from tests.parallel.slow_link import DelayedWire


def attend_with(backend, q, k, v, scale=None):
    """Attention of a backend on q, k, v [B, s, H, D]."""
    heads, num_keys, turn = q.shape[2], k.shape[1], Turn()
    q, k, v = (x.flatten(2) for x in (q, k, v))
    operands = backend.prepare(q, k, v, heads, turn, backend.stats(k, v, heads, turn), scale)
    return backend.attend(operands, num_keys, scale)


def qkv(B, S, H, D=16, dtype=torch.float32):
    generator = torch.Generator().manual_seed(S)
    return [torch.randn(B, S, H, D, generator=generator).to(dtype) for _ in range(3)]


def sequence_of(wire, S, H, ulysses, rows, align=1, window=False):
    sequence = Sequence(wire, H, ulysses, rows, align)
    sequence.window = Window(wire, "cpu") if window else None
    sequence.layout = Layout(S, H, ulysses, rows, align)  # unchecked: a rank may have no token at all
    return sequence


def attention(B, S, H, ulysses, rows, align, chunks, dtype=torch.float32, window=False):
    """Largest difference to one process."""
    q, k, v = qkv(B, S, H, dtype=dtype)
    whole = attend_with(backend_of("sdpa"), q, k, v)
    sequence = sequence_of(Wire(dist.group.WORLD), S, H, ulysses, rows, align, window)
    o = attend_with(shared(backend_of("sdpa"), sequence, chunks), *(sequence.shard(x, 1) for x in (q, k, v)))
    joined = sequence.gather(o, 1)
    return (joined.float() - whole.float()).abs().max().item()


def int8(B, S, H, ulysses, rows, chunks, wire="8bit", window=False, D=64):
    """Relative difference of int8 attention on all ranks to one process, 0 if equal bit for bit, as rank 0 sees it."""
    backend = backend_of("int8")
    q, k, v = qkv(B, S, H, D, torch.bfloat16)
    sequence = sequence_of(Wire(dist.group.WORLD), S, H, ulysses, rows, backend.token_align, window)
    travel = None if wire == "8bit" else backend_of("sdpa")
    o = attend_with(shared(backend, sequence, chunks, travel), *(sequence.shard(x, 1) for x in (q, k, v)))
    together = sequence.gather(o, 1)
    if dist.get_rank() != 0:
        return 0.0
    whole = attend_with(backend, q, k, v)
    return 0.0 if torch.equal(together, whole) else relative(together.float(), whole.float())


def admission(latency_s, exchange_s, attend_s, window=False):
    """(chunks, whether through the window, milliseconds of each way) that is admitted of 8 head chunks or none on such
    a link, when attention takes attend_s.

    window   there is one, which is no slow link
    """
    S, H, D = 64, 16, 16
    inner = Wire(dist.group.WORLD)
    leaving = 4 * S * H * D * 4 / inner.ranks * (inner.ranks - 1) / inner.ranks
    wire = DelayedWire(inner, leaving / exchange_s, latency_s)

    def attend(operands, num_keys, scale):
        time.sleep(attend_s * operands[0].shape[2] * inner.ranks / H)
        return operands[0]

    sequence = Sequence(wire, H, inner.ranks, 1)
    ways = ways_of(8, True, Window(inner, "cpu") if window else None)
    way, times = admitted(replace(backend_of("sdpa"), attend=attend), sequence, S, ways, D, Turn(), "cpu")
    return way.chunks, way.window is not None, *times


def in_a_row(kernel, layouts, chunks, late_rank=None, without=None, device="cpu"):
    """Whether attentions through one window are, bit for bit, what they are by messages.

    kernel      with ", straight" it writes each token's output to its rank itself, on CPUs what stands for it does
    layouts     (B, S, H, ulysses, rows) of each: other sizes, other data, one memory
    late_rank   sleeps before it writes, before it attends and before it looks at the output
    without     the kind of barrier that is left out, once memory is there: 0 of operands, 1 of outputs; on CPUs
    """
    kernel, _, straight = kernel.partition(", ")
    backend, wire = backend_of(kernel), Wire(dist.group.WORLD)
    window, barrier, barriers, scale = Window(wire, device), shared_memory.OnHost.barrier, [], 0.2

    def late():
        if wire.rank == late_rank:
            time.sleep(0.02) if device == "cpu" else torch.cuda._sleep(40_000_000)  # some 20 ms

    def attend(*args):
        late()
        return backend.attend(*args)

    def attend_into(operands, num_keys, rooms, scale):
        late()
        if device == "cuda":
            return backend.attend_into(operands, num_keys, rooms, scale)
        o = backend.attend(operands, num_keys, scale)
        into = rooms(o.shape[0], o.shape[3], o.dtype)
        fill(into, o, 1)
        return into[0]

    late_one = replace(backend, attend=attend, attend_into=attend_into if straight else None)

    def counted(memory):
        barriers.append(memory)
        if (len(barriers) - 1) % 2 != without:
            barrier(memory)

    shares, wanted, same = [], [], []
    for number, (B, S, H, ulysses, rows) in enumerate(layouts):
        sequence = sequence_of(wire, S, H, ulysses, rows, backend.token_align)
        whole = (x.to(device) + number for x in qkv(B, S, H, 64, torch.bfloat16))
        shares.append((sequence, [sequence.shard(x, 1) for x in whole]))
        wanted.append(attend_with(shared(backend, sequence, chunks), *shares[-1][1], scale))
        sequence.window = window
    for sequence, share in shares[:1] * (without is not None):
        attend_with(shared(backend, sequence, chunks), *share, scale)
    with mock.patch.object(shared_memory.OnHost, "barrier", counted if without is not None else barrier):
        for (sequence, share), other in zip(shares, wanted):
            late()
            found = attend_with(shared(late_one, sequence, chunks), *share, scale)
            late()
            same.append((found == other).all())  # looked at in the end: until then nobody waits
    held = {name: memory.size for name, memory in window.held.items()}
    window.close()
    dist.barrier()
    return all(map(bool, same)), held, window.held


def not_opened(fault):
    """What `opened` answers on CPUs that count as seeing each other, with a fault on rank 1."""
    wire = Wire(dist.group.WORLD)
    wrong = wire.rank == 1

    class Faulty(shared_memory.OnHost):
        def __init__(self, wire, size):
            super().__init__(wire, size)
            if wrong and fault == "raises":
                raise RuntimeError("no memory to be seen\nat all")
            if wrong and fault == "unseen":
                self.peers = [torch.zeros_like(peer) for peer in self.peers]

    with seen_on_cpus(), mock.patch.object(shared_memory, "OnHost", Faulty):
        window, why = opened(wire, "cpu")
    return window is None, why


def gather_of(sizes, dtype, dim):
    wire = Wire(dist.group.WORLD)
    whole = torch.arange(sum(sizes) * 6).view(2, sum(sizes), 3).to(dtype).movedim(1, dim)
    start = sum(sizes[: wire.rank])
    share = whole.narrow(dim, start, sizes[wire.rank])
    return torch.equal(gather(wire, share, sizes, dim), whole)


def delayed(S, H, chunks, attend_s, exchange_s):
    """Seconds of attention when the whole exchange takes exchange_s on the link and attending all heads attend_s."""
    q, k, v = qkv(1, S, H)
    inner = Wire(dist.group.WORLD)
    bytes_each = 4 * q[:, : S // inner.ranks].numel() * 4 * (inner.ranks - 1) // inner.ranks
    wire = DelayedWire(inner, bytes_each / exchange_s)
    sequence = sequence_of(wire, S, H, inner.ranks, 1)

    def attend(operands, num_keys, scale):
        time.sleep(attend_s * operands[0].shape[2] * inner.ranks / H)
        return operands[0]

    backend = shared(replace(backend_of("sdpa"), attend=attend), sequence, chunks)
    shares = [sequence.shard(x, 1) for x in (q, k, v)]
    dist.barrier()
    start = time.perf_counter()
    attend_with(backend, *shares)
    return time.perf_counter() - start, wire.busy_s, wire.exposed_s


class VirtualTime:
    """A clock that only moves when somebody sleeps."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


def schedule(H, chunks, attend_s, exchange_s, latency_s):
    """(seconds that nothing attends on such a link, the same by the planner's arithmetic), on a clock without noise.

    exchange_s   of q, k, v or o, whole
    """
    from dax.parallel.cost import waits_s
    from dax.parallel.topology import chunk_sizes

    S, D, clock, inner = 32, 4, VirtualTime(), Wire(dist.group.WORLD)
    leaving = S * H * D * 4 / inner.ranks * (inner.ranks - 1) / inner.ranks
    heads = H // inner.ranks
    q, k, v = qkv(1, S, H, D)

    def attend(operands, num_keys, scale):
        clock.sleep(attend_s * operands[0].shape[2] / heads)
        return operands[0]

    with mock.patch.object(slow_link, "time", clock):
        wire = DelayedWire(inner, leaving / exchange_s, latency_s)
        sequence = sequence_of(wire, S, H, inner.ranks, 1)
        backend = shared(replace(backend_of("sdpa"), attend=attend), sequence, chunks)
        attend_with(backend, *(sequence.shard(x, 1) for x in (q, k, v)))
    parts = [size / heads for size in chunk_sizes(heads, chunks)]
    leave = [latency_s + exchange_s * part for part in parts]
    arithmetic = waits_s([3 * each for each in leave], [attend_s * part for part in parts], leave)
    return clock.now - attend_s, arithmetic


def order_of_int8():
    """What happens until 8-bit operands are made, in order."""
    from dax.attention import int8

    events, inner = [], Wire(dist.group.WORLD)
    backend = backend_of("int8")
    q, k, v = qkv(1, 384, 2, 64, torch.bfloat16)
    sequence = sequence_of(inner, 384, 2, inner.ranks, 1, backend.token_align)
    q, k, v = (sequence.shard(x, 1).flatten(2) for x in (q, k, v))

    def noted(name, call):
        def run(*args):
            events.append(name)
            return call(*args)

        return run

    inner.issue, inner.wait = noted("issue", inner.issue), noted("wait", inner.wait)
    quantize = {name: noted(name, getattr(int8, name)) for name in ("Q_QUANTIZE", "K_QUANTIZE", "V_QUANTIZE")}
    with mock.patch.multiple(int8, **quantize):
        way = shared(backend, sequence)
        way.prepare(q, k, v, 2, Turn(), way.stats(k, v, 2, Turn()))
    return events


def vae_decode(columns, residual=False):
    """(relative difference of the split decode to the whole one, layers split, whether undo gave the VAE back)."""
    from dax.edits import Edits
    from dax.parallel.vae import apply_vae
    from tests.conftest import build_random_pipe, build_ti2v_pipe

    vae = (build_ti2v_pipe() if residual else build_random_pipe()).vae
    z = torch.randn(1, vae.config.z_dim, 3, 5, columns, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = vae.decode(z, return_dict=False)[0]
        edits = Edits()
        count = apply_vae(vae, Wire(dist.group.WORLD), edits)
        split = vae.decode(z, return_dict=False)[0]
        again = vae.decode(z).sample
        edits.undo()
        restored = torch.equal(vae.decode(z, return_dict=False)[0], whole)
    return ((split - whole).norm() / whole.norm()).item(), count, restored and torch.equal(split, again)


def vae_too_narrow():
    """(whether 3 columns on more ranks give the whole clip, whether the warning says so)"""
    import warnings

    from dax.edits import Edits
    from dax.parallel.vae import apply_vae
    from tests.conftest import build_random_pipe

    vae = build_random_pipe().vae
    z = torch.randn(1, 16, 1, 5, 3, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        whole = vae.decode(z, return_dict=False)[0]
        apply_vae(vae, Wire(dist.group.WORLD), Edits())
        same = torch.equal(vae.decode(z, return_dict=False)[0], whole)
    return same, "3 latent columns on 4 ranks; none instead" in str([w.message for w in caught])


def build_pipe(heads=12):
    """The random pipeline with a transformer of that many heads of 16."""
    from diffusers import WanTransformer3DModel

    from tests.conftest import RANDOM_TRANSFORMER, build_random_pipe

    pipe = build_random_pipe()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        shape = RANDOM_TRANSFORMER | {"num_attention_heads": heads, "attention_head_dim": 16}
        pipe.transformer = WanTransformer3DModel(**shape).eval().requires_grad_(False)
        with torch.no_grad():
            for block in pipe.transformer.blocks:
                block.scale_shift_table[:, [2, 5]] += 1.0
                block.attn1.to_out[0].weight.mul_(3.0)
    return pipe


def run_pipe(pipe, guidance_scale=4.0, output_type="latent", steps=2):
    """80 x 48 x 9 is 45 tokens: odd."""
    text = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(2))
    return pipe(
        prompt_embeds=text[:1],
        negative_prompt_embeds=text[1:],
        height=80,
        width=48,
        num_frames=9,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        generator=torch.Generator().manual_seed(3),
        output_type=output_type,
    ).frames


def cached(parallel, cache):
    """Relative difference of the latents under a step cache to those of one process under the same cache."""
    import dax

    pipe = build_pipe()
    with dax.optimize(pipe, cache=cache, parallel=parallel) as engine:
        together = run_pipe(pipe, steps=4)
        computed = engine.gate.last.computed
    from dax import optimize

    with mock.patch.object(optimize, "num_ranks", lambda: 1), dax.optimize(pipe, cache=cache):
        alone = run_pipe(pipe, steps=4)
    full = run_pipe(pipe, steps=4)
    return relative(together, alone), relative(alone, full), computed


def groups_after_engines(parallel, count):
    """Process groups that were ever made here, after each of `count` engines in a row that is used and undone."""
    import dax

    pipe, found = build_pipe(), []
    for _ in range(count):
        with dax.optimize(pipe, attention={"kernel": "sdpa"}, parallel=parallel):
            run_pipe(pipe)
        found.append(dist.get_pg_count())
    return found


def seen_on_cpus():
    """Ranks on CPUs exchange through a window too, as GPUs that see each other's memory do."""
    return mock.patch("dax.parallel.window.problem", lambda wire, device: None)


def through_a_window(task, *args):
    """What another task of this module gives when ranks on CPUs exchange through windows."""
    with seen_on_cpus(), mock.patch.object(Window, "give_back", autospec=True, side_effect=Window.give_back) as given:
        answer = globals()[task](*args)
    assert given.called
    return answer


def bench_ways():
    """(rows of the bench's ways on all ranks, labels of those whose exchanges went through a window)"""
    from dax.bench import parallel_ways
    from dax.bench.parallel_parts import Job
    from dax.bench.ranks_clock import RanksClock
    from dax.facts import FACTS

    class Clock(RanksClock):
        def sustained_ms(self, call, share=1.0):
            with mock.patch.object(Window, "give_back", autospec=True, side_effect=Window.give_back) as given:
                answer = super().sustained_ms(call, share)
            through.append(given.called)
            return answer

    through, pixels, short = [], {"height": 128, "width": 128, "num_frames": 33}, (0.001, 0.001)
    job = Job(FACTS["tiny"], pixels, 1, "balanced", dist.get_world_size(), "cpu", *short, 2, print)
    with torch.no_grad():
        with mock.patch("dax.optimize.num_ranks", lambda: 1), mock.patch("dax.parallel.join.num_ranks", lambda: 1):
            before = parallel_ways.one_rank(job)
        with seen_on_cpus():
            rows = parallel_ways.way_rows(job, Clock("cpu", *short, lambda text: None), before)
    return rows, {row["label"] for row, went in zip(rows, through) if went}


def windowed(parallel):
    """(relative difference of the latents to one process, whether they are those of messages bit for bit, chunks that
    went through the window of all layers, memories that undo gave back)"""
    import dax

    pipe = build_pipe()
    alone = run_pipe(pipe)
    with dax.optimize(pipe, attention={"kernel": "sdpa"}, parallel=parallel):
        messages = run_pipe(pipe)
    with seen_on_cpus():
        engine = dax.optimize(pipe, attention={"kernel": "sdpa"}, parallel=parallel)
    (window,) = {sequence.window for sequence in engine.sequences}
    with mock.patch.object(Window, "give_back", autospec=True, side_effect=Window.give_back) as given:
        together = run_pipe(pipe)
    held = len(window.held)
    engine.undo()
    return relative(together, alone), torch.equal(together, messages), given.call_count, held - len(window.held)


def switched(parallel):
    """(whether the latents stay bit for bit when the engine's exchanges go through a window instead, chunks that went
    through it, memories that it gave back when they became messages again, chunks that went through it then)"""
    import dax

    pipe, window = build_pipe(), Window(Wire(dist.group.WORLD), "cpu")
    with (
        dax.optimize(pipe, attention={"kernel": "sdpa"}, parallel=parallel) as engine,
        mock.patch.object(Window, "give_back", autospec=True, side_effect=Window.give_back) as given,
    ):
        (sequence,), messages = engine.sequences, run_pipe(pipe)
        sequence.through(window)
        same, chunks, held = torch.equal(run_pipe(pipe), messages), given.call_count, len(window.held)
        sequence.through(None)
        same = same and torch.equal(run_pipe(pipe), messages)
    return same, chunks, held - len(window.held), given.call_count - chunks


def model(parallel, guidance_scale=4.0, kernel="sdpa", heads=12):
    """(relative difference of the latents to one process, of the frames, whether undo gives the model back, summary)"""
    import dax

    pipe = build_pipe(heads)
    alone = run_pipe(pipe, guidance_scale)
    frames = torch.from_numpy(run_pipe(pipe, guidance_scale, "np"))
    engine = dax.optimize(pipe, attention={"kernel": kernel}, parallel=parallel)
    together = run_pipe(pipe, guidance_scale)
    more = torch.from_numpy(run_pipe(pipe, guidance_scale, "np"))
    summary = engine.summary()
    engine.undo()
    restored = torch.equal(run_pipe(pipe, guidance_scale), alone)
    return relative(together, alone), (more - frames).abs().max().item(), restored, summary


def member(builder, option, parallel, size, keys):
    """(relative difference of the latents to one process, whether undo gives the model back) of another Wan.

    builder   the name of one of tests.conftest's, called with `option`;  keys  more of the plan
    """
    import dax
    from tests import conftest
    from tests.models import test_image_to_video, test_vace

    latents = (test_vace if builder == "build_vace_pipe" else test_image_to_video).latents
    pipe = getattr(conftest, builder)(option)
    alone = latents(pipe, **size)
    with dax.optimize(pipe, parallel=parallel, **keys):
        together = latents(pipe, **size)
    return relative(together, alone), torch.equal(latents(pipe, **size), alone)


def other_control():
    """(relative difference of the velocity under control of fewer frames to one process, what more frames raise)"""
    import dax
    from dax.errors import DaxError
    from tests.conftest import build_vace_pipe

    model, generator = build_vace_pipe().transformer, torch.Generator().manual_seed(0)
    video, text, control = (
        torch.randn(*s, generator=generator) for s in ((1, 16, 3, 10, 6), (1, 5, 32), (1, 96, 4, 10, 6))
    )

    def velocity(frames):
        given = {"control_hidden_states": control[:, :, :frames], "return_dict": False}
        return model(video, torch.tensor([500]), text, **given)[0]

    alone = velocity(2)
    with dax.optimize(model):
        together = velocity(2)
        try:
            velocity(4)
        except DaxError as error:
            said = str(error)
    return relative(together, alone), said


def two_experts(parallel, image, more):
    """(relative difference of the latents to one process, whether undo gives the model back, summary)"""
    import dax
    from dax import optimize
    from tests.conftest import build_expert_pipe
    from tests.models.test_two_experts import latents

    pipe = build_expert_pipe(image)
    stock = latents(pipe)
    with mock.patch.object(optimize, "num_ranks", lambda: 1), dax.optimize(pipe, **more):
        alone = latents(pipe)
    with dax.optimize(pipe, parallel=parallel, **more) as engine:
        together, summary = latents(pipe), engine.summary()
        latents(pipe)
    return relative(together, alone), torch.equal(latents(pipe), stock), summary


def relative(x, reference):
    return ((x - reference).norm() / reference.norm()).item()


def faulty(fault):
    """Relative difference of the velocity to one process when something is wrong on one rank."""
    import dax
    from dax.parallel import messages

    pipe = build_pipe()
    latents, time_step = torch.randn(1, 16, 3, 10, 6, generator=torch.Generator().manual_seed(0)), torch.tensor([500])
    text = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(2))
    alone = pipe.transformer(latents, time_step, text).sample
    engine = dax.optimize(pipe.transformer)
    original = messages.to_heads
    wrong = dist.get_rank() == 1

    def rope_off_by_one(rope, inputs, tables):
        return tuple(table.roll(1, dims=1) for table in tables) if wrong else tables

    def heads_swapped(wire, layout, operands, axes, *chunk):
        if wrong and axes[0].query:
            operands = [x.flip(axis.heads) for x, axis in zip(operands, axes)]
        return original(wire, layout, operands, axes, *chunk)

    if fault == "rope":
        pipe.transformer.rope.register_forward_hook(rope_off_by_one)
    elif fault == "heads":
        messages.to_heads = heads_swapped
    try:
        together = pipe.transformer(latents, time_step, text).sample
    finally:
        messages.to_heads = original
        engine.undo()
    return relative(together, alone)


def collectives():
    """Collectives of (one cross-attention, one self-attention, a whole forward) of a model of two layers."""
    from torch.distributed.tensor.debug import CommDebugMode

    import dax

    pipe = build_pipe()
    latents, time_step, text = torch.randn(1, 16, 3, 10, 6), torch.tensor([500]), torch.randn(1, 5, 32)
    counts = []
    with dax.optimize(pipe.transformer, parallel={"overlap": 0}), torch.no_grad():
        block = pipe.transformer.blocks[0]
        pipe.transformer(latents, time_step, text)
        share = torch.randn(1, 45 // 2 + (dist.get_rank() == 0), 192)
        for call in (
            lambda: block.attn2(share, torch.randn(1, 5, 192), None, None),
            lambda: block.attn1(share, None, None, None),
            lambda: pipe.transformer(latents, time_step, text),
        ):
            with CommDebugMode() as seen:
                call()
            counts.append(seen.get_total_counts())
    return counts
