"""What is timed against what: stock diffusers in its known arrangements, and DAX under any plan.

Every row runs on a twin of one model: new modules, the same tensors. So rows differ in how they run and in nothing
else, and can take turns in one process. A row says how far its result may lie from the eager one.
"""

import copy
from contextlib import contextmanager
from dataclasses import dataclass

from dax.bench import costs
from dax.errors import DaxError, nearest

ROUNDING = 0.05  # bf16 throughout: another order of summation
EIGHT_BITS = 0.15  # attention or linear layers with 8-bit operands
TECHNIQUES = ("blocks", "attention", "linear", "compile")  # parts of a plan, in the order a waterfall adds them


@dataclass(frozen=True)
class Row:
    """One arrangement: a name for --rows, a label for people, and how to turn a twin into it.

    `backend` is diffusers' name of its attention; `plan` a DAX plan (then the other two are not looked at).
    `limit` is the largest relative error of what the blocks add to their input.
    """

    name: str
    label: str
    backend: str = "native"
    compiled: bool = False
    fullgraph: bool = True
    limit: float = ROUNDING
    plan: object = None


RIVALS = {
    row.name: row
    for row in (
        Row("eager", "diffusers eager"),
        Row("compiled", "diffusers compiled blocks", compiled=True),
        Row("eager-cudnn", "diffusers eager, cuDNN attention", "_native_cudnn"),
        Row("compiled-cudnn", "diffusers compiled blocks, cuDNN attention", "_native_cudnn", True),
        Row("fa3", "diffusers eager, FlashAttention-3", "_flash_3"),
        Row("compiled-fa3", "diffusers compiled blocks, FlashAttention-3", "_flash_3", True),
        Row("sage", "diffusers eager, SageAttention", "sage", limit=EIGHT_BITS),
        Row("compiled-sage", "diffusers compiled (graph breaks), SageAttention", "sage", True, False, EIGHT_BITS),
    )
}
DEFAULT_ROWS = ("eager", "compiled-cudnn", "fa3", "compiled-fa3", "sage", "compiled-sage")
NEEDS_CUDA = ("_native_cudnn", "_flash_3", "sage")


def chosen(text: str | None, known, beside: list | tuple = ()) -> list[str]:
    """The names of `--rows a,b`, each once and in that order; None: all that are known.

    beside   what is timed as well: then no name will do
    DaxError("bad_request") for a name that is not known, or nothing at all.
    """
    names = known if text is None else dict.fromkeys(name.strip() for name in text.split(",") if name.strip())
    for name in names:
        if name not in known:
            raise DaxError("bad_request", f"--rows: unknown row {name!r}{nearest(name, known)}")
    if not (names or beside):
        raise DaxError("bad_request", f"--rows: nothing to time; known: {', '.join(known)}")
    return list(names)


def rows_named(text: str | None, plans: list[str], as_waterfall: bool = False) -> list[Row]:
    """The rows of `--rows a,b` (None: the usual ones) and one per `--plan`, or its waterfall.

    DaxError("bad_request") if unknown.
    """
    names = DEFAULT_ROWS if text is None else chosen(text, RIVALS, plans)
    rows: dict[str, Row] = {name: RIVALS[name] for name in names}
    for plan in plans:
        for row in waterfall(plan) if as_waterfall else [plan_row(plan)]:
            rows[row.name] = row
    return list(rows.values())


def plan_row(name_or_path: str) -> Row:
    """The row of DAX under a plan."""
    from dax.plan import Plan

    return row_of(Plan.load(name_or_path), f"dax {name_or_path}", f"DAX, plan {name_or_path}")


def row_of(plan, name: str, label: str) -> Row:
    from dax.attention import KERNELS

    exact = plan.attention.kernel == "auto" or KERNELS[plan.attention.kernel].exact
    return Row(name, label, limit=ROUNDING if exact and not plan.linear.active else EIGHT_BITS, plan=plan)


def waterfall(name_or_path: str) -> list[Row]:
    """A plan's techniques added one after the other to stock diffusers; a part that adds nothing has no row."""
    from dax.plan import Blocks, Plan

    full = Plan.load(name_or_path)
    reached = Plan(blocks=Blocks(fused=False))
    rows = [row_of(reached, "dax stock", "DAX, attention.kernel auto alone")]
    for part in TECHNIQUES:
        following = reached.model_copy(update={part: getattr(full, part)})
        if following != reached:
            rows.append(row_of(following, f"dax +{part}", f"+ {part}"))
        reached = following
    return rows


def twin(model):
    """A copy of the module tree that shares every parameter and buffer with the original, so it costs no memory."""
    shared = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    return copy.deepcopy(model, shared)


def arrange(model, row: Row, device: str, alone: bool = False) -> tuple[object, str | None]:
    """(a twin of `model` arranged as the row says, None), or (None, why this machine cannot run the row).

    alone   a DAX row may change the model itself, so that weights it replaces are freed
    """
    if row.plan is not None:
        from dax.optimize import optimize

        arranged = model if alone else twin(model)  # a twin shares its weights with others: none may be moved
        plan = row.plan.model_copy(update={"linear": row.plan.linear.model_copy(update={"keep_original": "none"})})
        optimize(arranged, plan, strict=True)
        return arranged, None
    if row.backend in NEEDS_CUDA and not device.startswith("cuda"):
        return None, f"{row.backend.strip('_')} attention needs an NVIDIA GPU"
    arranged = twin(model)
    try:
        arranged.set_attention_backend(row.backend)
    except (RuntimeError, ValueError, ImportError) as error:
        return None, str(error).splitlines()[0]
    if row.compiled:
        arranged.compile_repeated_blocks(fullgraph=row.fullgraph)
    return arranged, None


def arithmetic(row: Row) -> tuple[str, str]:
    """(dtype of the row's linear layers, dtype of its attention), as the roofline names them."""
    if row.plan is None:
        return "bf16", "int8" if row.backend == "sage" else "bf16"
    return tuple(costs.arithmetic(row.plan).values())


def choice_kept(call):
    """The call, with torch's process-wide choice of attention put back after it: a compiled graph may leave its own."""
    from torch.backends import cuda

    switches = {
        cuda.enable_flash_sdp: cuda.flash_sdp_enabled(),
        cuda.enable_mem_efficient_sdp: cuda.mem_efficient_sdp_enabled(),
        cuda.enable_math_sdp: cuda.math_sdp_enabled(),
        cuda.enable_cudnn_sdp: cuda.cudnn_sdp_enabled(),
    }

    def kept():
        try:
            return call()
        finally:
            for switch, on in switches.items():
                switch(on)

    return kept


@contextmanager
def backends_restored():
    """Rows may pick attention backends inside; diffusers' process-wide default and its log level come back after."""
    from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend
    from diffusers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()  # it warns once a row that backends are experimental
    try:
        with attention_backend(AttentionBackendName.NATIVE):
            yield
    finally:
        logging.set_verbosity(level)
