"""`dax bench load`: a transformer from disk to the device, as published and in 8 bits, the file cache emptied and warm.

Random weights at real size are written to a temporary folder in bf16 and in a plan's 8 bits. A fresh process loads each
twice the way `dax generate` does, after one load of the embedded model, so that imports and a GPU's context are not
counted. A load ends when all of it is there: on a CPU, where a tensor is a map of its file, when every page was
touched. No time is told unless every tensor has the bits that were written.
"""

import hashlib
import os
import shutil
import tempfile
import time
from pathlib import Path
from statistics import median

from dax.bench import report
from dax.bench.child import answer
from dax.bench.model import blocks_of, build, facts_of
from dax.bench.roofline import weight_bytes
from dax.errors import DaxError
from dax.plan import Linear, Plan
from dax.quant.scheme import rules_of

GiB = 2**30
PAGE = 4096
PART = 2**26  # bytes that are summed at once
ODD = 0x1E3779B97F4A7C15
VISITS = 3  # in turns; medians are told
COLUMNS = {
    "weights": "weights",
    "gib": "GiB on disk",
    "cold_s": "s, cold",
    "cold_from_disk_pct": "% read from disk",
    "warm_s": "s, warm",
    "warm_from_disk_pct": "% read from disk",
    "quantise_s": "s to quantise",
    "all_layers_gib": "all layers: GiB",
    "all_layers_cold_s": "s, cold",
    "all_layers_warm_s": "s, warm",
    "all_layers_quantise_s": "s to quantise",
}
METHOD = {
    "cold": "after fsync and posix_fadvise(DONTNEED) on every file; from_disk_pct is what the process then read from "
    "the block device, by /proc/self/io: a virtual disk's host may have kept it",
    "visits": "bf16 cold and warm in a fresh process, 8 bits likewise, and again; medians",
    "loaded": "the transformer alone, in bf16, also on a CPU; checked by a sum over all bytes, each times its place",
    "quantise_s": "from bf16 on the device, originals not kept, kernels compiled before",
    "all_layers": "extrapolated from the blocks that were built, by bytes",
}
CHILD = "import json, sys; from dax.bench.load import loaded; print(json.dumps(loaded(*sys.argv[1:])))"


def bench(model: str | None, num_layers: int | None, plan: str | None, device: str | None, log=print) -> dict:
    """The record: a row for bf16 and one for 8 bits, times in seconds, sizes in GiB.

    DaxError("bad_request") for a plan that leaves linear layers alone, ("cannot_write") where the temporary folder has
    too little room, ("check_failed") for a load that ends with other bits than were written.
    """
    from dax.hardware import machine

    facts, device = facts_of(model or "tiny"), machine(device).device
    part = Plan.load(plan or "balanced").linear
    if not part.active or part.activation == "static":
        raise DaxError(
            "bad_request", f"bench load: plan {plan} quantises nothing without measured scales: --plan balanced"
        )
    whole, layers = facts, blocks_of(facts, num_layers)
    facts = facts.cut(layers)
    with tempfile.TemporaryDirectory(prefix="dax-load-") as name:
        folders = {"bf16": Path(name) / "bf16", part.scheme: Path(name) / "8bits"}
        check_room(Path(name), weight_bytes(facts) + weight_bytes(facts, eight_bits=True))
        log(f"writing {layers} of {whole.num_layers} blocks of {facts.name} to {name}")
        digests, quantise_s = write(facts, part, *folders.values(), device)
        found = {(weights, cache): [] for weights in folders for cache in ("cold", "warm")}
        for _ in range(VISITS):
            for (weights, folder), written in zip(folders.items(), digests, strict=True):
                forget(folder)
                for cache, visit in started([str(folder), model or "tiny", device, weights]).items():
                    if visit["digest"] != written:
                        raise DaxError(
                            "check_failed", f"bench load: {weights}: what was loaded is not what was written"
                        )
                    found[weights, cache].append(visit)
                    log(f"{weights}, {cache}: {visit['seconds']:.2f} s")
        rows = []
        for weights, folder in folders.items():
            row = {"weights": weights, "gib": sum(map(size_of, files_of(folder))) / GiB}
            for cache in ("cold", "warm"):
                row |= middle(cache, found[weights, cache], row["gib"])
            rows.append(row | {"quantise_s": None if weights == "bf16" else quantise_s})
    for row in rows:
        row["all_layers_gib"] = weight_bytes(whole, eight_bits=row["weights"] != "bf16") / GiB
        for key in ("cold_s", "warm_s", "quantise_s"):
            seconds = row[key]
            row[f"all_layers_{key}"] = seconds and seconds * row["all_layers_gib"] / row["gib"]
    first, second = rows
    ratios = {f"{cache}_ratio": second[f"{cache}_s"] / first[f"{cache}_s"] for cache in ("cold", "warm")}
    about = {"model": facts.name, "num_blocks": layers, "plan": plan or "balanced"}
    return report.record("load", device, **about, method=METHOD, **ratios, rows=rows)


def write(facts, part: Linear, bf16: Path, eight: Path, device: str) -> tuple[tuple[str, str], float]:
    """Both folders, as diffusers and `dax.quant.register()` write them; their digests, and the seconds to quantise."""
    from dax.generate.stages import quiet
    from dax.quant import QuantLinear, Rule
    from dax.quant.apply import planned
    from dax.quant.diffusers import DaxConfig, DaxQuantizer

    config = DaxConfig(rules_of(part, facts)[0], part.granularity)
    with quiet():
        model = build(facts, None, device, facts.num_layers)
        model.save_pretrained(bf16 / "transformer")
        plain = digest(model)
        plan = planned(model, config.rules, config.granularity)
        for name in {tuple(model.get_submodule(name).weight.shape): name for name in plan}.values():
            QuantLinear.from_float(model.get_submodule(name), Rule(part.scheme, part.granularity))  # compiles kernels
        arrived(model)
        start = time.perf_counter()
        DaxQuantizer(config, pre_quantized=False).postprocess_model(model)  # as from_pretrained does in the end
        arrived(model)
        seconds = time.perf_counter() - start
        model.register_to_config(quantization_config=config)
        model.save_pretrained(eight / "transformer")
        return (plain, digest(model)), seconds


def loaded(folder: str, model: str, device: str, weights: str) -> dict[str, dict]:
    """What a fresh process finds, once as the file cache is and once more: {"cold": visit, "warm": visit}, each
    {seconds, read: bytes from the block device or None, digest}.
    """
    from dax.generate.stages import collect, import_vendor, load_transformer, quiet
    from dax.models.tiny import FOLDER

    facts = facts_of(model)
    import_vendor(facts, device)
    import dax.quant.diffusers  # noqa: F401  imported before the clock starts

    def visit() -> dict:
        before, start = bytes_read(), time.perf_counter()
        model = load_transformer(facts, Path(folder), "transformer", device, dtype(), weights != "bf16")
        arrived(model)
        seconds, after = time.perf_counter() - start, bytes_read()
        return {"seconds": seconds, "read": None if before is None else after - before, "digest": digest(model)}

    with quiet():
        arrived(load_transformer(facts_of("tiny"), FOLDER, "transformer", device, dtype(), False))
        cold = visit()
        collect()  # the next asks the device for memory of its own
        return {"cold": cold, "warm": visit()}


def started(arguments: list[str]) -> dict:
    """loaded() in a process of its own."""
    return answer("load", CHILD, arguments)


def dtype():
    import torch

    return torch.bfloat16


def arrived(model) -> None:
    """Wait until every tensor is where it is said to be; mapped pages are read in the order of the file."""
    import torch

    for tensor in sorted(model.state_dict().values(), key=lambda tensor: tensor.data_ptr()):
        if tensor.device.type == "cpu":
            tensor.detach().contiguous().flatten().view(torch.uint8)[::PAGE].sum()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def digest(model) -> str:
    """sha256 (hex) of every tensor's name, dtype, shape and checksum: codes and scales too."""
    total = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        total.update(f"{name} {tensor.dtype} {list(tensor.shape)} {checksum(tensor.detach())}\n".encode())
    return total.hexdigest()


def checksum(tensor) -> int:
    """The sum of a tensor's bytes, each times its place and an odd number, modulo 2^64; where the tensor is."""
    import torch

    total = 0
    for begin, part in enumerate(tensor.contiguous().flatten().view(torch.uint8).split(PART)):
        place = torch.arange(begin * PART + 1, begin * PART + 1 + len(part), device=part.device)
        total += (part * (place * ODD)).sum().item()
    return total % 2**64


def bytes_read() -> int | None:
    """What this process has caused to be fetched from storage so far; None where the kernel does not say."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes:"))


def middle(cache: str, visits: list[dict], gib: float) -> dict:
    """Median seconds, those of each visit, and the median percent of the files that came from storage, if known."""
    seconds, read = [visit["seconds"] for visit in visits], [visit["read"] for visit in visits]
    percent = None if None in read else 100 * median(read) / (gib * GiB)
    return {f"{cache}_s": median(seconds), f"{cache}_each_s": seconds, f"{cache}_from_disk_pct": percent}


def forget(folder: Path) -> None:
    """Have the kernel drop the files from its cache; pages not yet written would stay."""
    for path in files_of(folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def size_of(path: Path) -> int:
    return path.stat().st_size


def check_room(folder: Path, need: int) -> None:
    """DaxError("cannot_write") if what is to be written does not fit."""
    free = shutil.disk_usage(folder).free
    if need > free:
        raise DaxError(
            "cannot_write",
            f"bench load: writes {need / GiB:.1f} GiB to {folder}, where {free / GiB:.1f} are free: fewer --layers, or "
            "TMPDIR on a larger disk",
        )
