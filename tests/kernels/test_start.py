"""How a GPU begins beside imports."""

import pytest
import torch

from dax.kernels.start import begin


def test_a_gpu_begins_in_a_thread_and_what_fails_there_is_not_told_there(monkeypatch, capsys):
    cache = pytest.importorskip("triton.runtime.cache")
    asked = []

    def no_memory(*shape, device):
        asked.append(str(device))
        raise RuntimeError("out of memory")

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)  # of the caller's thread
    monkeypatch.setattr(torch, "zeros", no_memory)
    monkeypatch.setattr(cache, "triton_key", lambda: asked.append("key"))
    begin().join()
    assert asked == ["cuda:1", "key"] and capsys.readouterr().err == ""
