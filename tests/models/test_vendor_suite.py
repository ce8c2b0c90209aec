"""diffusers' own tests of the Wan transformers pass on models under DAX. Opt-in: they are in no release of diffusers.

git clone https://github.com/huggingface/diffusers
DAX_DIFFUSERS=diffusers python -m pytest tests/models/test_vendor_suite.py
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LEFT_OUT = {
    "Training": "DAX is for inference: its operations have no gradients",
    "BitsAndBytes": "weights from the hub",
    "TorchAo": "weights from the hub",
    "GGUF": "weights from the hub",
    "SingleFile": "weights from the hub",
}


@pytest.mark.skipif("DAX_DIFFUSERS" not in os.environ, reason="DAX_DIFFUSERS names no checkout of diffusers")
@pytest.mark.parametrize("model", ["wan", "wan_vace"])
def test_the_vendors_own_tests_pass(model):
    checkout = Path(os.environ["DAX_DIFFUSERS"]).resolve()
    command = [sys.executable, "-m", "pytest", f"tests/models/transformers/test_models_transformer_{model}.py"]
    command += ["-q", "-p", "no:cacheprovider", "-p", "vendor_suite", "-k", " and ".join(f"not {x}" for x in LEFT_OUT)]
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests" / "models")))
    done = subprocess.run(command, cwd=checkout, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 15
