"""`offload`: where the second of two experts is while the first works.

Both experts have the same shapes. With `experts` the blocks of both take turns in one set of device tensors: as soon as
a block has run for the last time before the boundary, the other expert's weights are copied over its own, on a stream
of their own, while the next blocks run. Nothing is copied back, since weights do not change: the host keeps both, in
pinned memory. Whatever is asked of an expert that is not there brings it first, block by block.
"""

from collections.abc import Callable
from contextlib import contextmanager
from functools import partial

import torch

from dax.edits import Edits
from dax.errors import DaxError

ALIGN = 256  # bytes, of a tensor in a host buffer


class Turns:
    """The blocks of two experts in one set of device tensors. `resident[i]` is the expert that block i is of now.

    position   (timestep, timesteps) -> the step
    tensors    [expert][block] parameters and buffers, always the same objects; what they point to moves
    slots      [block] the memory on the device;  host  [expert][block] copies, which an idle expert's tensors point to
    What stands outside the blocks is on the device for both.
    """

    def __init__(self, target, position: Callable):
        self.pipe, self.facts, self.position = target.pipe, target.facts, position
        self.tensors = in_memory_order([[tensors_of(block) for block in x.blocks] for x in target.transformers])
        self.device = target.transformers[0].device
        self.homes = [tensor.device for block in self.tensors[1] for tensor in block]
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.resident = [0] * len(self.tensors[0])
        self.arrived = [None] * len(self.resident)  # events of copies that nobody has waited for yet
        self.branch: str | None = None
        self.leaving = False  # whether the forward under way is the last before the other expert's turn
        self.timesteps, self.turns = None, ()

    def begin(self) -> None:
        """Copy both to the host, and let the second go from wherever it is."""
        self.slots = [[tensor.data for tensor in block] for block in self.tensors[0]]
        self.host = [host_copies(blocks, self.stream is not None) for blocks in self.tensors]
        for block, copies in zip(self.tensors[1], self.host[1]):
            point(block, copies)

    def cast(self, i: int) -> tuple | None:
        """(dtype then, dtype now) of a tensor of block i that was cast, and so has left the slots; None without one."""
        for block in (blocks[i] for blocks in self.tensors):
            for tensor, slot in zip(block, self.slots[i]):
                if tensor.dtype != slot.dtype:
                    return slot.dtype, tensor.dtype
        return None

    def end(self) -> None:
        """Both as they were before; blocks that were cast meanwhile stay what they are, on the first one's device."""
        for i in range(len(self.resident)):
            if self.cast(i):
                point(self.tensors[0][i], [tensor.data.to(self.device, copy=True) for tensor in self.tensors[0][i]])
            else:
                self.bring(0, i)
        if self.stream is not None:
            self.stream.synchronize()
        homes = iter(self.homes)
        for block in self.tensors[1]:
            for tensor in block:
                tensor.data = tensor.data.to(next(homes), copy=True)  # and the host buffer goes

    def bring(self, expert: int, i: int) -> None:
        """Block i of an expert into the device's tensors, after whatever is queued to run in them.

        DaxError("bad_request") if either was cast since they began to take turns.
        """
        if self.resident[i] == expert:
            return
        if cast := self.cast(i):
            raise DaxError(
                "bad_request",
                f"offload = experts: blocks.{i} was cast from {cast[0]} to {cast[1]} while experts take turns: call "
                "engine.undo(), which leaves it cast, and optimize again",
            )
        with self.beside() as event:
            for slot, source in zip(self.slots[i], self.host[expert][i]):
                slot.copy_(source, non_blocking=True)
        point(self.tensors[1 - expert][i], self.host[1 - expert][i])
        point(self.tensors[expert][i], self.slots[i])
        self.resident[i], self.arrived[i] = expert, event

    @contextmanager
    def beside(self):
        """What is queued here runs on the side stream, behind all that was queued before; the event is its end.

        None on a CPU, where copies are made at once.
        """
        if self.stream is None:
            yield None
            return
        event = torch.cuda.Event()
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            yield event
            event.record()

    def before_block(self, expert: int, i: int, *_) -> None:
        """A hook: the block's weights are there when it runs, and those of all that follow are on their way."""
        if self.resident[i] != expert:
            for later in range(i, len(self.resident)):
                self.bring(expert, later)
        if self.arrived[i] is not None:
            torch.cuda.current_stream(self.device).wait_event(self.arrived[i])
            self.arrived[i] = None

    def after_block(self, expert: int, i: int, *_) -> None:
        """A hook: in an expert's last forward a block that has run makes room."""
        if self.leaving:
            self.bring(1 - expert, i)

    @contextmanager
    def cache_context(self, vendors: Callable, name: str, **announced):
        """The vendor's, overheard."""
        with vendors(name, **announced):
            self.branch = name
            try:
                yield
            finally:
                self.branch = None

    def before_forward(self, expert: int, transformer, args, kwargs) -> None:
        """A hook: whether this forward is the expert's last, so far as the pipeline announces what it does."""
        timestep = kwargs.get("timestep", args[1] if len(args) > 1 else None)
        self.leaving = self.branch is not None and timestep is not None and self.is_last(expert, timestep)

    def after_forward(self, expert: int, *_) -> None:
        """A hook: blocks that did not run, because the step was predicted or another rank's, are brought now."""
        if self.leaving:
            for i in range(len(self.resident)):
                self.bring(1 - expert, i)
        self.leaving = False

    def is_last(self, expert: int, timestep: torch.Tensor) -> bool:
        """Whether the next step, or after the last one the next clip's first, is the other expert's."""
        guided = self.pipe.do_classifier_free_guidance
        if self.branch != ("uncond" if guided else "cond"):
            return False
        scheduler = self.pipe.scheduler
        if self.timesteps is not scheduler.timesteps:  # a new loop; the host waits for the device once
            self.timesteps = scheduler.timesteps
            steps = self.facts.expert_steps(self.timesteps.tolist(), scheduler.config.num_train_timesteps)
            self.turns = [number for number, count in enumerate(steps) for _ in range(count)]
        step = self.position(timestep, self.timesteps)
        return self.turns[(step + 1) % len(self.turns)] != expert


def bring_together(target, offload: str, edits: Edits) -> int:
    """Move the second of two experts beside the first where it lies elsewhere; returns how many tensors moved.

    Before weights are laid side by side, which moving would undo. With `experts` its blocks stay where they are.
    DaxError("bad_request") where diffusers' own offloading moves the experts already.
    """
    if len(target.transformers) == 1:
        return 0
    first, second = target.transformers
    if any(hasattr(transformer, "_hf_hook") for transformer in target.transformers):
        if offload == "experts":
            raise DaxError("bad_request", "offload = experts: diffusers' own offloading is on: choose one of the two")
        return 0
    of_blocks = {id(tensor) for block in second.blocks for tensor in tensors_of(block)}
    moved = [
        t for t in tensors_of(second) if t.device != first.device and (offload == "none" or id(t) not in of_blocks)
    ]
    for tensor in moved:
        move(tensor, first.device, edits)
    return len(moved)


def apply_turns(target, position: Callable, edits: Edits) -> int:
    """Let the blocks of two experts take turns on the device; returns how many of each. See Turns.

    DaxError("bad_request") for experts whose blocks differ, as by an adapter.
    """
    turns = Turns(target, position)
    for i, pair in enumerate(zip(*turns.tensors)):
        mine, theirs = ([(tensor.shape, tensor.dtype) for tensor in block] for block in pair)
        if mine != theirs:
            raise DaxError(
                "bad_request", f"offload = experts: blocks.{i} of the two experts differ; set offload = none"
            )
    edits.call(turns.begin, turns.end)
    for expert, transformer in enumerate(target.transformers):
        for i, block in enumerate(transformer.blocks):
            edits.hook(block.register_forward_pre_hook, partial(turns.before_block, expert, i))
            edits.hook(block.register_forward_hook, partial(turns.after_block, expert, i))
        before, after = partial(turns.before_forward, expert), partial(turns.after_forward, expert)
        edits.hook(transformer.register_forward_pre_hook, before, with_kwargs=True)
        edits.hook(transformer.register_forward_hook, after, always_call=True)
        edits.set_attribute(transformer, "cache_context", partial(turns.cache_context, transformer.cache_context))
    return len(turns.resident)


def tensors_of(module) -> list[torch.Tensor]:
    """All that moves with a module."""
    return [*module.parameters(), *module.buffers()]


def in_memory_order(experts: list[list[list[torch.Tensor]]]) -> list[list[list[torch.Tensor]]]:
    """The tensors of each block by the address of the first expert's: what adjoins there does in a host copy."""
    orders = [sorted(range(len(block)), key=lambda k: block[k].data_ptr()) for block in experts[0]]
    return [[[block[k] for k in order] for block, order in zip(blocks, orders)] for blocks in experts]


def point(tensors: list, places: list) -> None:
    """Let tensors, the same objects, mean other memory."""
    for tensor, place in zip(tensors, places):
        tensor.data = place


def move(tensor: torch.Tensor, device, edits: Edits) -> None:
    """To a device as an edit, which undo() takes back to where it was."""
    home = tensor.device

    def go(where):
        tensor.data = tensor.data.to(where)

    edits.call(partial(go, device), partial(go, home))


def host_copies(blocks: list[list[torch.Tensor]], pinned: bool) -> list[list[torch.Tensor]]:
    """Copies in one host buffer: pinned memory is handed out in powers of two.

    DaxError("out_of_memory") if the host has not that much.
    """
    size = sum(-(-tensor.nbytes // ALIGN) * ALIGN for block in blocks for tensor in block)
    try:
        buffer, start, found = torch.empty(size, dtype=torch.uint8, pin_memory=pinned), 0, []
    except RuntimeError as error:
        raise DaxError(
            "out_of_memory",
            f"offload = experts: the host gives no {size / 2**30:.1f} GiB of pinned memory for an expert: set "
            "linear.scheme = int8, linear.keep_original = none, or offload = none",
        ) from error
    for block in blocks:
        found.append([])
        for tensor in block:
            copy = buffer[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            found[-1].append(copy.copy_(tensor.data))
            start += -(-tensor.nbytes // ALIGN) * ALIGN
    return found
