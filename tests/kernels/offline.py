"""What kernels can show without a GPU; each part runs in a process of its own, since Triton keeps one driver.

    python -m tests.kernels.offline compile    the kernels that the ops' cases launch, for sm_90a, as ptxas sees them
    python -m tests.kernels.offline tokens     the kernels of different numbers of tokens: they must be the same
    python -m tests.kernels.offline interpret  the Triton kernels, run by Triton's interpreter
Prints one JSON object a line.
"""

import contextlib
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile

COMPILED = {  # the cases of an op that differ in the code they need; of others, the first and the last
    "attention_bf16": ("63 in two batches", "257 to 512", "fp16"),
    "attention_int8": ("63 in two batches", "500 to 1361", "portable, 63 in two batches", "portable, 500 to 1361"),
    "scaled_linear": ("odd, int8", "odd, no bias, e4m3", "gelu, int8", "gate and residual, int8"),
}
INEXACT_IN_THE_INTERPRETER = ("float8_e4m3fn", "float8_e5m2")  # its casts neither round nor saturate as GPUs do


def load_ops() -> dict:
    import dax.kernels
    from dax.kernels.op import OPS

    for module in pkgutil.iter_modules(dax.kernels.__path__):
        importlib.import_module(f"dax.kernels.{module.name}")
    return OPS


def arguments(op, case, device="cpu"):
    import torch

    return op.cases[case](torch.Generator(device).manual_seed(0), device)


def compile_all() -> None:
    from triton.backends.nvidia.compiler import get_ptxas

    from dax.kernels.start import compiled_ahead

    pretend_hopper()
    seen = set()
    for name, op in load_ops().items():
        cases = list(op.cases)
        for case in COMPILED.get(name) or dict.fromkeys((cases[0], cases[-1])):
            kernels = []
            try:
                with compiled_ahead() as kernels:
                    given = on_meta(arguments(op, case))
                    op.launch(*given)
                    into_rooms(name, op, given)
            except Exception as error:
                said = f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}"
                print(json.dumps({"op": name, "case": case, "failed": said}), flush=True)
                continue
            for kernel in map(finished, kernels):
                if kernel.hash not in seen:
                    seen.add(kernel.hash)
                    said = assemble(kernel.asm["ptx"], get_ptxas(90).path)
                    spilled = sum(map(int, re.findall(r"(\d+) bytes spill stores", said)))
                    serial = re.findall(r".*C75(?:10|12|15).*", said)
                    print(json.dumps({"op": name, "case": case, "kernel": kernel.name, "spilled": spilled,
                                      "serialized": serial, "assembled": "Used" in said}), flush=True)  # fmt: skip


def into_rooms(name, op, given) -> None:
    """The same kernel as it writes to several places, if it can."""
    from dax.kernels import attention_bf16, attention_int8, k_quantize, q_quantize, v_quantize
    from dax.kernels.rooms import addresses

    if name == "attention_int8" and not given[-1]:
        attention_int8.attention_int8_into(*given[:-1], [op.reference(*given)])
    if name == "attention_bf16":
        attention_bf16.attention_bf16_into(*given, [op.reference(*given)])
    start = {
        "q_quantize": q_quantize.start_q_quantize,
        "k_quantize": k_quantize.start_k_quantize,
        "v_quantize": v_quantize.start_v_quantize,
    }.get(name)
    if start:
        rooms = [op.reference(*given)[0]]
        given = given[:2] if name == "v_quantize" else (*given, 1e-6)
        start(*given, rooms[0], addresses(rooms, 1))


def compile_for_tokens() -> None:
    """The kernels that each operation needs for different numbers of tokens, by their hash."""
    import torch

    from dax.kernels import (
        attention_bf16,
        attention_int8,
        gated_residual,
        k_quantize,
        norm_modulate,
        q_quantize,
        qk_norm_rope,
        quantize,
        scaled_linear,
        token_stats,
        v_quantize,
    )
    from dax.kernels.start import compiled_ahead

    pretend_hopper()
    ops = load_ops()
    cases = {
        "attention_bf16": lambda s: attention_bf16.case(1, s, s, 2, 128),
        "attention_int8": lambda s: attention_int8.case(1, s, s, 2, 128),
        "gated_residual": lambda s: gated_residual.case(1, s, 384, 1),
        "residual_norm_modulate": lambda s: norm_modulate.residual_case(1, s, 384, (1, 1), (1, 1)),
        "norm_modulate_quantize": lambda s: norm_modulate.case(1, s, 384, 1, torch.int8),
        "qk_norm_rope": lambda s: qk_norm_rope.case(1, s, 2, 128, fused=True),
        "q_quantize": lambda s: q_quantize.q_case(1, s, 2, 128, fused=True),
        "k_quantize": lambda s: k_quantize.k_case(1, s, 2, 128, fused=True),
        "quantize_rows": lambda s: quantize.case(s, 384, torch.int8),
        "scaled_linear": lambda s: scaled_linear.case((1, s, 384), 256, torch.int8),
        "key_means": lambda s: token_stats.turned_case(1, s, 2, 128, fused=True),
        "v_quantize": lambda s: v_quantize.case(1, s, 2, 128, fused=True),
    }
    for name, case in cases.items():
        for tokens in (1, 128, 201):
            with compiled_ahead() as kernels:
                ops[name].launch(*on_meta(case(tokens)(torch.Generator().manual_seed(0), "cpu")))
            print(json.dumps({"op": name, "kernels": [finished(kernel).hash for kernel in kernels]}), flush=True)


def pretend_hopper() -> None:
    """From here on Triton compiles for an H100 that is not there, and loads nothing."""
    import torch
    import triton
    from triton.backends.compiler import GPUTarget

    import dax.kernels.start

    class NoDriver:
        get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device=None: 0)
        get_active_torch_device = staticmethod(lambda: torch.device("meta"))

    triton.runtime.driver.set_active(NoDriver())
    torch.cuda.device_of = lambda x: contextlib.nullcontext()
    torch.cuda.current_device = lambda: 0
    torch.cuda.set_device = lambda device: None
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    torch.cuda.get_device_properties = lambda device=None: type("Properties", (), {"multi_processor_count": 132})
    dax.kernels.start.load = lambda kernel: None


def on_meta(given) -> list:
    import torch

    return [x.to("meta") if isinstance(x, torch.Tensor) else x for x in given]


def finished(kernel):
    return kernel.result() if hasattr(kernel, "result") else kernel


def assemble(ptx: str, ptxas: str) -> str:
    """What ptxas says of the code: registers, spills, warnings."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [ptxas, "-v", "--gpu-name=sm_90a", file.name, "-o", "/dev/null"]
        done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout + done.stderr


def interpret() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    import torch

    torch.cuda.device_of = lambda x: contextlib.nullcontext()
    torch.cuda.get_device_capability = lambda device=None: (8, 0)
    for name, op in load_ops().items():
        for case in op.cases if op.min_sm <= 80 else ():  # Gluon has no interpreter
            given = arguments(op, case)
            wanted = op.reference(*given)
            tensors = [x for x in (*given, *listed(wanted)) if isinstance(x, torch.Tensor)]
            kinds = {str(x.dtype).removeprefix("torch.") for x in tensors}
            if kinds & set(INEXACT_IN_THE_INTERPRETER):
                continue
            with poisoned():
                got = op.launch(*given)
            print(json.dumps({"op": name, "case": case, **errors(op, given, got, wanted)}), flush=True)


def listed(outputs) -> tuple:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def errors(op, given, got, wanted) -> dict:
    """Relative distance of the kernel's and of the reference's outputs from exact ones, and whether they look alike."""
    import torch

    exactly = op.exact or op.reference
    exact = exactly(*(x.float() if half(x) and not op.exact else x for x in given))
    decode = op.decode or (lambda outputs: torch.cat([x.float().flatten() for x in listed(outputs)]))
    exact, got_, wanted_ = (decode(x) if x is not exact or not op.exact else x for x in (exact, got, wanted))
    alike = all(a.shape == b.shape and a.dtype == b.dtype for a, b in zip(listed(got), listed(wanted)))
    return {"kernel": relative(got_, exact), "reference": relative(wanted_, exact), "alike": alike}


def half(x) -> bool:
    import torch

    return isinstance(x, torch.Tensor) and x.dtype in (torch.bfloat16, torch.float16)


def relative(x, exact) -> float:
    x, exact = x.double().flatten(), exact.double().flatten()
    return ((x - exact).norm() / exact.norm().clamp_min(1e-30)).item()


@contextlib.contextmanager
def poisoned():
    """Fresh memory is full of NaN meanwhile, so that what a kernel does not write shows."""
    import torch

    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


if __name__ == "__main__":
    {"compile": compile_all, "tokens": compile_for_tokens, "interpret": interpret}[sys.argv[1]]()
