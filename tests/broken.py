"""Ways to break a copy of a model folder, and what a refusal of it must look like."""

import json

import pytest

from dax.errors import DaxError
from dax.generate.preflight import preflight

WEIGHTS = "diffusion_pytorch_model.safetensors"
PART = {"transformer": WEIGHTS, "vae": WEIGHTS, "text_encoder": "model.safetensors"}


def refused(folder, *says: str) -> str:
    with pytest.raises(DaxError) as caught:
        preflight(folder)
    message = str(caught.value)
    assert caught.value.exit_code == 3 and "\n" not in message
    assert all(text in message for text in says), message
    return message


def change(path, **values) -> None:
    """Set keys of a JSON file; None removes one."""
    content = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def edit(path, function) -> None:
    """Rewrite the tensors of a safetensors file."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    function(tensors)
    save_file(tensors, path)
