"""The parallel part of a plan, applied to a model: groups made, tokens, branches and the VAE's decode shared out."""

from functools import partial

from dax.parallel import mesh as meshes
from dax.parallel.admit import admitted
from dax.parallel.cfg import Guidance, apply_guidance
from dax.parallel.sequence import Sequence, apply_sequence
from dax.parallel.topology import Topology
from dax.parallel.ulysses import shared
from dax.parallel.vae import apply_vae


def apply_parallel(target, parallel, device: str, plain, turn, measure: bool, edits):
    """Share the work of `target` out over all ranks; collective.

    Returns ([(key, value, what, count, total) of each part], the plan's part, what measuring it said or None).

    target     .pipe, .transformers, .facts, .blocks(), .attentions(cross)
    parallel   the plan's part, every key decided
    plain      the backend whose operands are q, k, v themselves;  turn  one that leaves them as they are
    measure    on GPUs, time whether the head chunks pay here, and do without them if they do not
    """
    topology = Topology(parallel.cfg, parallel.ulysses, parallel.rows)
    mesh = meshes.build(topology, device)
    said, shared_layers, all_blocks, divided = None, 0, 0, 0
    for transformer in target.transformers:
        if topology.sequence > 1:
            inside = set(transformer.modules())
            layers = [layer for layer in target.attentions(cross=False) if layer in inside]
            align = max(layer.processor.backend.token_align for layer in layers)
            sequence = Sequence(mesh.sequence, target.facts.num_heads, topology.ulysses, topology.rows, align)
            blocks = apply_sequence(transformer, sequence, edits)
            own = layers[0].processor.backend
            travel = plain if parallel.wire == "plain" and own.layout != plain.layout else None
            if measure and parallel.overlap > 0 and device == "cuda" and said is None:
                facts, planned = target.facts, parallel.overlap
                size = facts.defaults
                tokens = facts.tokens(size.height, size.width, size.num_frames)
                chunks, *times = admitted(own, sequence, tokens, planned, facts.head_dim, turn, device, travel)
                parallel = parallel.model_copy(update={"overlap": chunks})
                said = "parallel.overlap: auto is {}; one attention takes {:.2f} ms serial, {:.2f} in {} chunks".format(
                    chunks, *times, planned
                )
            for layer in layers:
                backend = shared(layer.processor.backend, sequence, parallel.overlap, travel)
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
    return changes, parallel, said
