"""What the ranks of the tests do. Functions of this module are sent to every rank by name."""

import time

import torch
import torch.distributed as dist
from torch.nn.functional import scaled_dot_product_attention

from dax.parallel.sequence import Sequence
from dax.parallel.topology import Layout
from dax.parallel.ulysses import SequenceAttention
from dax.parallel.wire import DelayedWire, Wire, gather


def sdpa(q, k, v):
    return scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def qkv(B, S, H, D=16, dtype=torch.float32):
    generator = torch.Generator().manual_seed(S)
    return [torch.randn(B, S, H, D, generator=generator).to(dtype) for _ in range(3)]


def sequence_of(wire, S, H, ulysses, rows, align=1):
    sequence = Sequence(wire, H, ulysses, rows, align)
    sequence.layout = Layout(S, H, ulysses, rows, align)  # unchecked: a rank may have no token at all
    return sequence


def attention(B, S, H, ulysses, rows, align, chunks, dtype=torch.float32):
    """Largest difference to one process."""
    q, k, v = qkv(B, S, H, dtype=dtype)
    whole = sdpa(q, k, v)
    sequence = sequence_of(Wire(dist.group.WORLD), S, H, ulysses, rows, align)
    attend = SequenceAttention(sdpa, sequence, chunks)
    o = attend(*(sequence.shard(x, 1) for x in (q, k, v)))
    joined = sequence.gather(o, 1)
    return (joined.float() - whole.float()).abs().max().item()


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

    def attend(q, k, v):
        time.sleep(attend_s * q.shape[2] * inner.ranks / H)
        return q

    call = SequenceAttention(attend, sequence, chunks)
    shares = [sequence.shard(x, 1) for x in (q, k, v)]
    dist.barrier()
    start = time.perf_counter()
    call(*shares)
    return time.perf_counter() - start, wire.busy_s, wire.exposed_s
