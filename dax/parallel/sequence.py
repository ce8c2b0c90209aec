"""One branch's tokens over several ranks: each runs the blocks on its share; only attention sees the whole.

The tokens are cut where the blocks begin and joined after the head, where they are 80 times smaller. Cross-attention,
norms, linears and the embeddings of text and time need no other rank.
"""

from torch.nn.functional import pad

from dax.errors import DaxError
from dax.parallel.topology import Layout
from dax.parallel.wire import gather


class Sequence:
    """The group of ranks that share one branch's tokens, and the split of the forward that runs now.

    window   the memory through which attention exchanges (window.py), or None: by messages over the wire
    """

    def __init__(self, wire, heads: int, ulysses: int, rows: int, align: int = 1):
        self.wire, self.heads, self.ulysses, self.rows, self.align = wire, heads, ulysses, rows, align
        self.layout: Layout | None = None
        self.window = None

    def through(self, window) -> None:
        """Exchange through another window from now on, or None; the one before gives its memory back. Collective."""
        if self.window:
            self.window.close()
        self.window = window

    def begin(self, tokens: int) -> None:
        """A forward of that many tokens starts. DaxError("bad_request") if they cannot be shared out."""
        if self.layout is None or self.layout.tokens != tokens:
            self.layout = Layout(tokens, self.heads, self.ulysses, self.rows, self.align).check()

    def shard(self, x, dim: int):
        """This rank's tokens of a tensor that has them all; a view."""
        start, end = self.layout.token_range(self.wire.rank)
        return x.narrow(dim, start, end - start)

    def gather(self, x, dim: int):
        """All tokens, on every rank of the group."""
        return gather(self.wire, x, self.layout.token_sizes, dim)


def apply_sequence(transformer, sequence: Sequence, edits) -> int:
    """Cut the tokens after the patch embedding and join them after the head; returns the number of blocks in between.

    The rotary table, which the vendor makes first, is cut too: each rank rotates its own tokens before any exchange.
    So are timesteps, where each token has its own, and the control tokens of VACE. Nothing is hooked to a block, so
    blocks may be compiled, fused or replaced.
    """

    def shard_table(rope, inputs, tables):
        sequence.begin(tables[0].shape[1])
        return tuple(sequence.shard(table, 1) for table in tables)  # [1, S, 1, D] each

    def shard_times(embedder, args, kwargs):
        if (tokens := kwargs.get("timestep_seq_len")) is not None:
            times = sequence.shard(args[0].unflatten(0, (-1, tokens)), 1)  # of [B S]
            return (times.flatten(), *args[1:]), kwargs | {"timestep_seq_len": times.shape[1]}

    def shard_tokens(embedding, inputs, patches):
        return sequence.shard(patches.flatten(2), 2).unflatten(2, (-1, 1, 1))  # [B, C, s, 1, 1]

    def shard_control(embedding, inputs, patches):
        missing = sequence.layout.tokens - patches[0, 0].numel()  # the vendor adds zeros where control ends earlier
        if missing < 0:
            raise DaxError("bad_request", f"control_hidden_states: {-missing} tokens more than the video has")
        return shard_tokens(embedding, inputs, pad(patches.flatten(2), (0, missing)))

    def gather_tokens(head, inputs, output):
        return sequence.gather(output, 1)

    edits.hook(transformer.rope.register_forward_hook, shard_table)
    edits.hook(transformer.condition_embedder.register_forward_pre_hook, shard_times, with_kwargs=True)
    edits.hook(transformer.patch_embedding.register_forward_hook, shard_tokens)
    edits.hook(transformer.proj_out.register_forward_hook, gather_tokens)
    if hasattr(transformer, "vace_blocks"):
        edits.hook(transformer.vace_patch_embedding.register_forward_hook, shard_control)
    return len(transformer.blocks) + len(getattr(transformer, "vace_blocks", ()))
