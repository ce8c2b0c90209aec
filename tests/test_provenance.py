"""A tuned plan says where its fidelity was measured, and promises nothing elsewhere."""

import pytest

from dax.errors import DaxError
from dax.generate.run import Job, generate
from dax.generate.settle import check_model
from dax.hardware import machine
from dax.plan import Plan
from dax.provenance import Measured, computes, read_measured, to_yaml
from dax.resolve import resolve

REQUEST = {"height": 32, "width": 48, "num_frames": 5, "steps": 4, "guidance_scale": 4.0, "flow_shift": 3.0}
GIVEN = {"prompt": "a red circle moves right over a black background", "height": 32, "width": 48, "num_frames": 5}


@pytest.fixture
def tuned(tmp_path):
    """write(**changes) -> path of a plan measured at 30 dB on this very machine, but for the changes."""
    plan, _ = Plan.from_layers([("test", {"cache.policy": "mask", "cache.mask": "1101"})])
    checked, here = check_model(None), machine("cpu")
    resolved = resolve(plan, checked.facts, here, dtype="float32").plan

    def write(**changes):
        measured = Measured(**{
            "psnr_db": 30.0, "psnr_p10_db": 28.5, "floor_db": 60.0, "prompts": 16, "cost": 0.75, "cost_of": "forwards",
            "model": "tiny", "model_digest": checked.digest, "device": here.name, "dtype": "float32",
            "request": REQUEST, "computes": computes(resolved), "versions": {"torch": "2.13.0"},
            "date": "2026-11-25T12:00:00Z", "command": "dax tune --min-psnr 30", **changes,
        })  # fmt: skip
        (tmp_path / "tuned.yaml").write_text(to_yaml(plan, measured))
        return str(tmp_path / "tuned.yaml")

    return write


def run(path, output, **changes):
    changes.setdefault("given", {**GIVEN, "steps": 4})
    return generate(Job(output=str(output), plan=path, **changes))


def test_what_was_measured_travels_with_the_plan_and_is_no_part_of_it(tuned):
    path = tuned()
    plain, _ = Plan.from_layers([("test", {"cache.policy": "mask", "cache.mask": "1101"})])
    assert Plan.load(path) == plain and read_measured(path).psnr_db == 30
    assert read_measured("exact") is None


def lora(folder) -> str:
    import torch
    from safetensors.torch import save_file

    layer = "transformer.blocks.0.attn2.to_out.0"
    save_file({f"{layer}.lora_{x}.weight": torch.ones(shape) for x, shape in (("A", (1, 192)), ("B", (192, 1)))},
              folder / "style.safetensors")  # fmt: skip
    return str(folder / "style.safetensors")


@pytest.mark.fault(60)
def test_the_gate_refuses_what_was_measured_lower_elsewhere_or_never(tuned, tmp_path, monkeypatch):
    monkeypatch.setattr("dax.generate.run.load", lambda *_: pytest.fail("a model was loaded"))
    plain = tmp_path / "plain.yaml"
    plain.write_text("cache:\n  policy: mask\n  mask: '1101'\n")
    never = {"given": {**GIVEN, "steps": 4}, "min_psnr": 29.0}
    cases = [
        (tuned(), {"min_psnr": 31.0}, 8, "measured at 30.0 dB, p10 28.5 (28 is needed), on 16 held-out prompts"),
        (tuned(), {"min_psnr": 29.0, "sets": ("cache.mask=1011",)}, 8, "other kernels (cache.mask = 1011"),
        (tuned(), {"min_psnr": 29.0, "given": {**GIVEN, "steps": 4, "height": 48}}, 8, "another request (height 48"),
        (tuned(), {"min_psnr": 29.0, "loras": (lora(tmp_path),)}, 8, "other weights (a LoRA is added"),
        (str(plain), never, 2, "carries no measured fidelity"),
        (tuned(), {"min_psnr": float("nan")}, 2, "must be a number"),
    ]
    for path, changes, code, says in cases:
        with pytest.raises(DaxError) as refusal:
            run(path, tmp_path / "clip.npz", **changes)
        assert refusal.value.exit_code == code and says in str(refusal.value)
        assert not (tmp_path / "clip.npz").exists()
    with pytest.raises(DaxError, match="another model"):
        run(tuned(model_digest="0" * 64), tmp_path / "clip.npz", min_psnr=29.0)
    with pytest.raises(DaxError, match=r"at 30.0 dB, p10 26.9 \(27 is needed\)"):  # the mean alone would pass
        run(tuned(psnr_p10_db=26.9), tmp_path / "clip.npz", min_psnr=30.0)


def test_the_gate_lets_through_what_holds_it(tuned, tmp_path):
    record = run(tuned(psnr_p10_db=27.0), tmp_path / "a.npz", min_psnr=30.0)
    assert record["computed"]["cond"] == 3 and record["warnings"] == []
    small = {"given": {**GIVEN, "steps": 1}}
    assert run("exact", tmp_path / "b.npz", min_psnr=80.0, **small)["plan"]["cache"]["policy"] == "none"


def test_a_plan_from_elsewhere_is_named_and_refused_under_strict(tuned, tmp_path):
    path = tuned(device="NVIDIA H200")
    record = run(path, tmp_path / "a.npz")
    (warning,) = record["warnings"]
    assert "another device" in warning and "measured on NVIDIA H200" in warning
    with pytest.raises(DaxError, match="was measured elsewhere: another device") as refusal:
        run(path, tmp_path / "b.npz", strict=True)
    assert refusal.value.code == "unsupported" and not (tmp_path / "b.npz").exists()


def test_a_damaged_measurement_is_refused(tuned, tmp_path):
    path = tuned()
    text = open(path).read()
    (tmp_path / "damaged.yaml").write_text(text.replace("psnr_db: 30.0", "psnr_db: high", 1))
    with pytest.raises(DaxError, match="measured.psnr_db"):
        run(str(tmp_path / "damaged.yaml"), tmp_path / "clip.npz")
