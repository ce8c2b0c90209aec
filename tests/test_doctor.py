"""`dax doctor`: every library, every kernel with its reason, and an exit code when something needed is not there."""

import json
from importlib import metadata

import pytest
import typer

from dax.cli import doctor


def test_it_names_every_requirement_and_kernel():
    result = doctor.examine()
    names = {need["name"] for need in result["requirements"]}
    assert {"torch", "diffusers", "transformers", "av"} <= names
    assert result["attention"]["sdpa"] is None
    assert all(reason is None or reason for reason in result["attention"].values())
    shown = doctor.text(result)
    assert "sdpa: runs" in shown
    assert "cores" in shown


def test_json_is_one_object(capsys):
    doctor.command(as_json=True)
    assert json.loads(capsys.readouterr().out).keys() == {"machine", "requirements", "optional", "attention"}


def test_a_missing_library_is_named_and_ends_with_4(monkeypatch, capsys):
    stock = metadata.version

    def version(name):
        if name == "av":
            raise metadata.PackageNotFoundError(name)
        return "0.1" if name == "diffusers" else stock(name)

    monkeypatch.setattr(doctor.metadata, "version", version)
    with pytest.raises(typer.Exit) as caught:
        doctor.command(as_json=False)
    assert caught.value.exit_code == 4
    shown = capsys.readouterr().out
    assert "missing: pip install av" in shown
    assert "too old: pip install -U diffusers" in shown
