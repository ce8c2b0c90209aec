"""The parallel part of a plan, applied to a model: groups made, tokens, branches and the VAE's decode shared out."""

from functools import partial

from dax.parallel import mesh as meshes
from dax.parallel.admit import admitted, ways_of
from dax.parallel.cfg import Guidance, apply_guidance
from dax.parallel.sequence import Sequence, apply_sequence
from dax.parallel.topology import Topology
from dax.parallel.ulysses import shared
from dax.parallel.vae import apply_vae
from dax.parallel.window import opened


def apply_parallel(target, parallel, device: str, plain, turn, auto: bool, tokens: int | None, eager: bool, edits):
    """Share the work of `target` out over all ranks; collective.

    Returns ([(key, value, what, count, total) of each part], the plan's part, what was found out on the way: lines, the
    Sequence of each transformer whose tokens are shared).

    target     .pipe, .transformers, .facts, .blocks(), .attentions(cross)
    parallel   the plan's part, every key decided
    plain      the backend whose operands are q, k, v themselves;  turn  one that leaves them as they are
    auto       whether the number of head chunks may change to none, if that is faster here
    tokens     of the clips to come, None if not known: then the model's own size is measured
    eager      whether blocks run as they are: only those may exchange through a window
    """
    topology = Topology(parallel.cfg, parallel.ulysses, parallel.rows)
    mesh = meshes.build(topology, device)
    window, said, way, sequences, shared_layers, all_blocks, divided = None, [], None, [], 0, 0, 0
    pixels = target.facts.defaults
    size = tokens or target.facts.tokens(pixels.height, pixels.width, pixels.num_frames)
    if topology.sequence > 1 and eager:
        window, why = opened(mesh.sequence, device)
        if window:
            edits.call(lambda: None, window.close)
        elif device == "cuda":
            said.append(f"parallel: exchanges are messages: {why}")
    for transformer in target.transformers:
        if topology.sequence > 1:
            inside = set(transformer.modules())
            layers = [layer for layer in target.attentions(cross=False) if layer in inside]
            align = max(layer.processor.backend.token_align for layer in layers)
            sequence = Sequence(mesh.sequence, target.facts.num_heads, topology.ulysses, topology.rows, align)
            blocks = apply_sequence(transformer, sequence, edits)
            own = layers[0].processor.backend
            travel = plain if parallel.wire == "plain" and own.layout != plain.layout else None
            if way is None:
                ways = ways_of(parallel.overlap, auto and device == "cuda", window)
                way = ways[-1]
                if len(ways) > 1 and device == "cuda":
                    way, times = admitted(own, sequence, size, ways, target.facts.head_dim, turn, device, travel)
                    told = ", ".join(f"{spent:.2f} ms {each}" for spent, each in zip(times, ways))
                    said.append(f"parallel: one attention of {size} tokens takes {told}; taken: {way}")
                    if window and not way.window:
                        window.close()
                parallel = parallel.model_copy(update={"overlap": way.chunks})
            sequence.window = way.window
            sequences.append(sequence)
            for layer in layers:
                backend = shared(layer.processor.backend, sequence, way.chunks, travel)
                edits.set_attribute(layer, "processor", layer.processor.around(backend))
            shared_layers, all_blocks = shared_layers + len(layers), all_blocks + blocks
        if topology.cfg > 1:
            guided = partial(getattr, target.pipe, "do_classifier_free_guidance")
            guidance = Guidance(mesh.cfg, guided, target.facts.out_channels)
            divided += apply_guidance(transformer, guidance, edits)
    changes = []
    if topology.sequence > 1:
        value = f"{topology.ulysses} x rows {topology.rows}"
        changes.append(("parallel.ulysses", value, "self-attention layers", shared_layers, all_blocks))
    if topology.cfg > 1:
        changes.append(("parallel.cfg", "2", "transformers", divided, len(target.transformers)))
    if parallel.vae == "split" and getattr(target.pipe, "vae", None) is not None:
        count = apply_vae(target.pipe.vae, mesh.world, edits)
        changes.append(("parallel.vae", "split", "layers of the VAE's decoder that look sideways", count, count))
    return changes, parallel, said, sequences
