"""What this machine is: device, peak rates, memory, packages. Asked once, lazily, never at import.

`MACHINES` holds data sheets of cards for planning without one. A card that is not in the table has no peaks, and then
no ceiling is stated for it.
"""

import os
import platform
import re
import shutil
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import import_module, metadata, util

from dax.errors import DaxError

LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "triton", "av")
KERNEL_PACKAGES = {  # module: distribution
    "flash_attn_interface": "flash_attn_3",
    "flash_attn": "flash_attn",
    "sageattention": "sageattention",
}


@dataclass(frozen=True)
class Machine:
    """One device and what surrounds it.

    peak_tflops    {"bf16", "int8", "fp8": dense TFLOP/s or TOP/s with 32-bit accumulation}; empty when unknown
    bandwidth_tbs  device memory, TB/s;  memory_gib  of the device (host memory for a CPU);  sm  90 for Hopper
    packages       {library or kernel package: version}; None for a machine that is only a data sheet
    broken         {kernel package: why its import failed}
    """

    device: str
    name: str
    sm: int | None = None
    memory_gib: float | None = None
    peak_tflops: dict[str, float] = field(default_factory=dict)
    bandwidth_tbs: float | None = None
    cores: int | None = None
    num_gpus: int = 1
    compiler: str | None = None
    packages: dict[str, str] | None = None
    broken: dict[str, str] = field(default_factory=dict)

    @property
    def is_data_sheet(self) -> bool:
        """A card from the table, whose packages are not known."""
        return self.packages is None


def card(name: str, sm: int, memory_gib: float, bandwidth_tbs: float, **peak_tflops: float) -> Machine:
    """A data sheet."""
    return Machine("cuda", name, sm, memory_gib, peak_tflops, bandwidth_tbs)


# Vendors' data sheets: SXM boards unless named otherwise, dense rates, 32-bit accumulation, memory as drivers show it.
MACHINES = {
    "a100": card("NVIDIA A100 80GB", 80, 79.2, 2.039, bf16=312, int8=624),
    "l20": card("NVIDIA L20", 89, 44.5, 0.864, bf16=119.5, int8=239, fp8=239),
    "l40s": card("NVIDIA L40S", 89, 44.4, 0.864, bf16=362, int8=733, fp8=733),
    "rtx4090": card("NVIDIA GeForce RTX 4090", 89, 23.6, 1.008, bf16=165.2, int8=660.6, fp8=330.3),
    "h20": card("NVIDIA H20", 90, 95.1, 4.0, bf16=148, int8=296, fp8=296),
    "h100": card("NVIDIA H100", 90, 79.1, 3.35, bf16=989.5, int8=1979, fp8=1979),
    "h200": card("NVIDIA H200", 90, 139.8, 4.8, bf16=989.5, int8=1979, fp8=1979),
    "b200": card("NVIDIA B200", 100, 178.4, 8.0, bf16=2250, int8=4500, fp8=4500),
    "rtx5090": card("NVIDIA GeForce RTX 5090", 120, 31.4, 1.792, bf16=209.5, int8=838, fp8=419),
}


# Share of a data sheet's rate that kernels reach: of the peak of their arithmetic, or of the bandwidth. Measured on
# Wan2.1 14B at 720p in whole blocks on an H100 (benchmarks/block.h100.json; int8 products and attention as they are
# now, block_attention.h100.json); FlashAttention 3, SageAttention 2 and DAX's bf16 alone, on an H200
# (benchmarks/attention_bf16.h200.json); fp8 products alone, on an H100; cross-attention goes by cudnn's.
ATTENTION_REACHES = {"sdpa": 0.6, "cudnn": 0.569, "flash": 0.684, "bf16": 0.679, "sage": 0.412, "int8": 0.546}
ATTENTION_DTYPE = {"sage": "int8", "int8": "int8"}  # the arithmetic of each kernel; bf16 unless named
SDPA_REACHES_ON_HOPPER = 0.36  # FlashAttention 2, which uses none of what came after Ampere
LINEAR_REACHES = {"bf16": 0.77, "int8": 0.82, "fp8": 0.69}
TRAFFIC_REACHES = {"stock": 0.63, "compiled": 0.346, "fused": 0.736}


def attention_reaches(kernel: str, machine: Machine) -> float:
    """The share of its arithmetic's peak that an attention kernel reaches there."""
    old = kernel == "sdpa" and (machine.sm or 0) >= 90
    return SDPA_REACHES_ON_HOPPER if old else ATTENTION_REACHES[kernel]


def no_kernels(machine: Machine, min_sm: int = 80) -> str | None:
    """Why DAX's own GPU kernels do not run there, or None. On a CPU their references do."""
    if machine.device != "cuda":
        return None
    if machine.sm is not None and machine.sm < min_sm:
        return f"needs compute capability {min_sm / 10} or newer, {machine.name} has {machine.sm / 10}"
    if not machine.is_data_sheet and "triton" not in machine.packages:
        return "package triton is not installed: pip install triton"
    return None


@cache
def machine(device: str | None = None) -> Machine:
    """This machine, seen from "cuda" or "cpu" (default: the first GPU, or the CPU without one). Imports torch.

    DaxError("bad_request") for another word, "unsupported" for "cuda" where there is no GPU.
    """
    import torch

    if device not in (None, "cuda", "cpu"):
        raise DaxError("bad_request", f"unknown device {device!r}; known: cuda, cpu")
    if device == "cuda" and torch.cuda.device_count() == 0:
        raise DaxError(
            "unsupported", "device cuda: torch sees no GPU here (dax doctor tells more); leave it out for cpu"
        )
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    here = {
        "cores": len(os.sched_getaffinity(0)),
        "num_gpus": torch.cuda.device_count(),
        "compiler": os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++"),
        "packages": versions(),
    }
    if device != "cuda":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
        return Machine("cpu", cpu_name(), memory_gib=round(memory, 1), **here)
    properties = torch.cuda.get_device_properties(0)
    found = {name: import_failure(name) for name in KERNEL_PACKAGES if name in here["packages"]}
    broken = {name: failure for name, failure in found.items() if failure}
    known = MACHINES.get(card_key(properties.name), Machine("cuda", properties.name))
    return replace(
        known,
        name=properties.name,
        sm=10 * properties.major + properties.minor,
        memory_gib=round(properties.total_memory / 2**30, 1),
        broken=broken,
        **here,
    )


def card_key(name: str) -> str:
    """The key in MACHINES of a card as its driver names it; a variant with other rates has no key.

    "NVIDIA H100 80GB HBM3" -> "h100"; "NVIDIA H100 PCIe" -> "h100pcie", which is not in the table.
    """
    plain = re.sub(r"nvidia|geforce|sxm\d?|hbm\w*|\b(80|141|180|192)gb\b", " ", name.lower().replace("-", " "))
    return "".join(plain.split())


def versions() -> dict[str, str]:
    """{library or kernel package: version} of what is installed, without importing it."""
    found = {name: version_of(name) for name in LIBRARIES}
    for module, distribution in KERNEL_PACKAGES.items():
        found[module] = (version_of(distribution) or "installed") if util.find_spec(module) else None
    return {name: version for name, version in found.items() if version}


def version_of(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def import_failure(module: str) -> str | None:
    """None if the module imports, else the first line of why not: a binary package may not fit this torch."""
    try:
        import_module(module)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return None


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
