"""This machine is told as it is, and a card is never given another card's figures."""

import os
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from dax import hardware
from dax.errors import DaxError
from dax.hardware import MACHINES, card_key, machine


def test_this_cpu():
    here = machine("cpu")
    assert here.device == "cpu" and here.name and here.sm is None and not here.is_data_sheet
    assert here.cores == len(os.sched_getaffinity(0)) and here.memory_gib > 0.5
    assert here.packages["torch"] == torch.__version__.split("+")[0] or here.packages["torch"] == torch.__version__
    assert machine("cpu") is here, "asked once"


def test_a_device_that_is_not_here_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for device, code, says in (("tpu", 2, "known: cuda, cpu"), ("cuda:1", 2, "known"), ("cuda", 4, "sees no GPU")):
        with pytest.raises(DaxError, match=says) as caught:
            machine.__wrapped__(device)
        assert caught.value.exit_code == code


def test_data_sheets_are_plausible():
    for name, sheet in MACHINES.items():
        assert card_key(sheet.name) == name and sheet.device == "cuda" and sheet.is_data_sheet
        assert sheet.peak_tflops["int8"] == pytest.approx(2 * sheet.peak_tflops["bf16"], rel=0.05) or sheet.sm in (
            89,
            120,
        )
        assert ("fp8" in sheet.peak_tflops) == (sheet.sm >= 89)
        assert 0.5 < sheet.bandwidth_tbs < 10 and 20 < sheet.memory_gib < 200


@pytest.mark.parametrize(
    ("driver_name", "key"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA L40S", "l40s"),
    ],
)
def test_cards_by_their_drivers_name(driver_name, key):
    assert card_key(driver_name) == key and key in MACHINES


@pytest.mark.parametrize(
    "variant",
    [
        "NVIDIA H100 PCIe",
        "NVIDIA H100 NVL",
        "NVIDIA A100-SXM4-40GB",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA H20-3e",
        "Tesla T4",
    ],
)
def test_a_variant_gets_no_figures(variant):
    assert card_key(variant) not in MACHINES


def fake_gpu(monkeypatch, name: str, major: int, minor: int):
    properties = SimpleNamespace(name=name, major=major, minor=minor, total_memory=141 * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    return machine.__wrapped__("cuda")


def test_a_cpu_counts_as_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert machine.__wrapped__("cpu").num_gpus == 0


def test_a_known_and_an_unknown_gpu(monkeypatch):
    known = fake_gpu(monkeypatch, "NVIDIA H200", 9, 0)
    assert (known.sm, known.num_gpus, known.memory_gib) == (90, 2, 131.3) and not known.is_data_sheet
    assert known.peak_tflops == MACHINES["h200"].peak_tflops and known.bandwidth_tbs == 4.8
    unknown = fake_gpu(monkeypatch, "NVIDIA Z1000", 14, 3)
    assert (unknown.sm, unknown.peak_tflops, unknown.bandwidth_tbs) == (143, {}, None)


def test_a_kernel_package_that_does_not_import_is_told(monkeypatch, tmp_path):
    (tmp_path / "sageattention.py").write_text("raise ImportError('undefined symbol: x')\n")
    (tmp_path / "flash_attn.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("sageattention", "flash_attn"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    here = fake_gpu(monkeypatch, "NVIDIA H200", 9, 0)
    assert here.packages["flash_attn"] == "installed" and "flash_attn" not in here.broken
    assert here.broken == {"sageattention": "ImportError: undefined symbol: x"}


def test_import_failure_of_a_module_that_is_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "some_kernel", ModuleType("some_kernel"))
    assert hardware.import_failure("some_kernel") is None
