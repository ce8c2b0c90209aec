"""Keys and values of text and image in every cross-attention layer, computed once a prompt, not once a forward.

They depend on the embeddings of prompt and image and on weights alone. A forward of the transformer announces the ones
it was given; what was computed for them serves as long as those very tensors live, neither they nor a weight were
changed in place, and the loop goes on. The results are the same bits as without. A layer under an adapter is not
remembered, since an adapter's strength is no tensor; a weight written through `.data` torch cannot tell.
"""

import weakref
from collections.abc import Callable
from contextlib import contextmanager
from itertools import chain

import torch

from dax.cache.run import around_loop
from dax.edits import Edits

MOST_PROMPTS = 4  # remembered at a time: guidance has two


class TextMemory:
    """{prompt and image embedding: {layer: operands}} of a pipeline's transformer, of two the one that ran last.

    It keeps no embedding alive.
    """

    def __init__(self):
        self.known: dict[tuple, tuple] = {}  # ids of transformer and embeddings: (references, state, {layer: entry})
        self.layers: dict | None = None  # of the forward under way; None: remember nothing

    def announce(self, transformer, args, kwargs) -> None:
        """A hook before the transformer's forward: whose text the coming layers see."""
        text = kwargs.get("encoder_hidden_states", args[2] if len(args) > 2 else None)
        image = kwargs.get("encoder_hidden_states_image", args[3] if len(args) > 3 else None)
        given = (text,) if image is None else (text, image)
        state = None if text is None or torch.is_grad_enabled() else version(transformer.condition_embedder, *given)
        if state is None:
            self.layers = None
            return
        key = id(transformer), *map(id, given)
        for other in [other for other in self.known if other[0] != key[0]]:  # experts take turns: 0.8 GB each at 14B
            del self.known[other]
        known = self.known.get(key)
        if known is None or known[1] != state or any(ref() is not x for ref, x in zip(known[0], given)):
            while len(self.known) >= MOST_PROMPTS:
                del self.known[next(iter(self.known))]
            known = tuple(weakref.ref(x, lambda gone: self.forget(key, gone)) for x in given), state, {}
            self.known[key] = known
        self.layers = known[2]

    def conclude(self, transformer, args, output) -> None:
        """A hook after the forward, whether it succeeded or not."""
        self.layers = None

    def get(self, attn, text, compute: Callable):
        """What compute(attn, text) gives, remembered where possible. Not in a compiled block: a graph has no memory."""
        if torch.compiler.is_compiling() or self.layers is None:
            return compute(attn, text)
        state = version(attn)
        entry = self.layers.get(id(attn))
        if state is None or entry is None or entry[0] != state:
            entry = self.layers[id(attn)] = (state, compute(attn, text))
        return entry[1]

    @contextmanager
    def loop(self):
        """A pipeline's loop runs inside: when it ends, the memory is given back."""
        try:
            yield
        finally:
            self.clear()

    def forget(self, key: tuple, gone) -> None:
        if key in self.known and any(ref is gone for ref in self.known[key][0]):
            del self.known[key]

    def clear(self) -> None:
        """Give the memory back."""
        self.known.clear()
        self.layers = None


def version(module, *tensors) -> tuple | None:
    """Changes when a tensor of the module, or one given, is replaced or changed in place; None if it cannot be told."""
    if any(hasattr(part, "base_layer") for part in module.modules()):  # an adapter can be turned up and down
        return None
    try:
        return tuple((id(x), x._version) for x in chain(module.parameters(), module.buffers(), tensors))
    except RuntimeError:  # made under inference_mode
        return None


def remember_text(target, edits: Edits) -> TextMemory:
    """A memory fed by the forwards of the target's transformers, cleared by undo and when a pipeline's loop ends."""
    memory = TextMemory()
    for transformer in target.transformers:
        edits.hook(transformer.register_forward_pre_hook, memory.announce, with_kwargs=True)
        edits.hook(transformer.register_forward_hook, memory.conclude, always_call=True)
    edits.call(lambda: None, memory.clear)
    if target.pipe is not None:
        around_loop(target.pipe, memory.loop, edits)
    return memory
