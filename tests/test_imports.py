"""Imports without a search for garbage: what is there is left alone, what comes later is found as ever."""

import gc
import os
import subprocess
import sys

import pytest

from dax.imports import importing

CYCLE = """
import gc, sys, weakref
from dax.imports import importing
class Node: pass
def cycle():
    node = Node(); node.self = node
    return weakref.ref(node)
{before}
with importing():
    print(gc.isenabled(), end=" ")
    inside = cycle()
outside = cycle()
gc.collect()
print(gc.isenabled(), inside() is None, outside() is None, gc.get_freeze_count() > 0)
"""


@pytest.mark.parametrize(
    ("before", "said"),
    [
        ("", "False True False True True"),
        ("sys.modules['diffusers'] = None", "True True True True False"),  # models may be there
        ("gc.disable()", "False False True True False"),  # as its owner wanted it
    ],
)
def test_only_what_imports_bring_is_never_looked_through_again(before, said):
    done = subprocess.run([sys.executable, "-c", CYCLE.format(before=before)], capture_output=True, text=True)
    assert (done.stdout.split(), done.stderr) == (said.split(), "")


def test_a_failed_import_gives_the_collector_back():
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ModuleNotFoundError):
        patch.delitem(sys.modules, "diffusers", raising=False)
        patch.setattr("dax.imports.gc.freeze", lambda: None)
        patch.setattr("dax.imports.atexit.register", lambda function: None)
        with importing():
            assert not gc.isenabled()
            import no_such_module  # noqa: F401
    assert gc.isenabled()


VENDOR = """
import gc, sys
from types import SimpleNamespace
from dax.facts import facts_named
from dax.generate.stages import import_vendor
begin = lambda: print("gpu", "diffusers" in sys.modules, gc.isenabled())
sys.modules["dax.kernels.start"] = SimpleNamespace(begin=begin)
for _ in range(2):
    import_vendor(facts_named("tiny"), sys.argv[1])
print("done", "diffusers" in sys.modules, gc.isenabled())
"""


@pytest.mark.parametrize(("device", "said"), [("cuda", "gpu False False done True True"), ("cpu", "done True True")])
def test_a_gpu_begins_beside_the_first_import_of_diffusers(device, said, tmp_path, monkeypatch):
    (tmp_path / "diffusers.py").write_text("WanPipeline = WanTransformer3DModel = None")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run([sys.executable, "-c", VENDOR, device], capture_output=True, text=True)
    assert (done.stdout.split(), done.stderr) == (said.split(), "")
