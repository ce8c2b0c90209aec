"""A plan in Python, on disk, and as a hash that stands in every clip made with it."""

import tempfile
from pathlib import Path

import dax

plan, where_from = dax.Plan.from_layers([("mine", {"attention.kernel": "sdpa", "cache": {"policy": "none"}})])
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "mine.yaml"
    plan.save(path)
    print(path.read_text())
    assert dax.Plan.load(path) == plan
for key, value in plan.leaves().items():
    print(f"{key} = {value}, from {where_from[key]}")
print("hash", plan.hash()[:8])
try:
    dax.Plan.from_layers([("mine", {"attention.kernl": "sdpa"})])
except dax.DaxError as error:
    print(error)
