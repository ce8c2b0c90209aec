"""The door to diffusers' own loading: `register()` makes "dax" a quantization config of `from_pretrained`.

Weights are quantised once they are loaded, or come quantised from `save_pretrained`. diffusers casts every float tensor
to the dtype it loads in; scales are set aside before that, so that they stay fp32 bit for bit.
"""

from enum import Enum

import torch
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin

from dax.edits import Edits
from dax.quant.apply import planned, replace
from dax.quant.linear import QuantLinear
from dax.quant.scheme import ROTATION, check_rotation
from dax.quant.upload import upload

SCALES = (".weight_scale", ".input_scale")


class Method(str, Enum):  # noqa: UP042  diffusers reads .value of a str
    DAX = "dax"


class DaxConfig(QuantizationConfigMixin):
    """`from_pretrained(..., quantization_config=DaxConfig({"blocks": "int8"}))`; rules as of quantize_.

    `rotation` is what a saved model says of itself. DaxError("bad_model") for another than this version's.
    """

    def __init__(self, rules: dict[str, str], granularity="token-channel", quant_method="dax", rotation=ROTATION):
        check_rotation(rotation, "quantization_config")
        self.quant_method, self.rules, self.granularity = Method(quant_method), dict(rules), granularity

    @classmethod
    def from_dict(cls, config_dict: dict, return_unused_kwargs: bool = False, **kwargs):
        """As any config's; one that was saved without a rotation had none."""
        return super().from_dict({"rotation": None} | config_dict, return_unused_kwargs, **kwargs)

    def to_dict(self) -> dict:
        words = {"quant_method": "dax", "rules": self.rules, "granularity": self.granularity}
        return words | {"rotation": ROTATION}

    to_diff_dict = to_dict


class DaxQuantizer(DiffusersQuantizer):
    """What diffusers asks while it loads and saves a model with a DaxConfig."""

    use_keep_in_fp32_modules = True
    is_serializable = True
    is_trainable = False

    def __init__(self, quantization_config: DaxConfig, **kwargs):
        super().__init__(quantization_config, **kwargs)
        self.scales: dict = {}
        self.device: torch.device | None = None  # the GPU that all weights go to

    def get_cuda_warm_up_factor(self) -> int:
        """By what diffusers divides the bytes of a bf16 model when it takes room at once: 8-bit weights need half."""
        return 2

    def _process_model_before_weight_loading(self, model, device_map=None, **_):
        self.device = only_gpu(device_map)
        if not self.pre_quantized:
            return
        config = self.quantization_config
        for name, rule in planned(model, config.rules, config.granularity).items():
            old = model.get_submodule(name)
            new = QuantLinear(old.in_features, old.out_features, old.bias is not None, rule, "meta")
            model.set_submodule(name, new)

    def maybe_update_state_dict(self, state_dict):
        if self.device is not None:
            state_dict = upload(state_dict, self.device)
        self.scales |= {name: tensor for name, tensor in state_dict.items() if name.endswith(SCALES)}
        return state_dict

    def check_if_quantized_param(self, model, param_value, param_name, state_dict, **_):
        return param_name in self.scales

    def create_quantized_param(self, model, param_value, param_name, target_device, *_, **__):
        owner, _, leaf = param_name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, self.scales.pop(param_name).to(target_device))

    def _process_model_after_weight_loading(self, model, **_):
        if not self.pre_quantized:
            config = self.quantization_config
            replace(model, planned(model, config.rules, config.granularity), Edits(), keep=False)
        return model


def only_gpu(device_map) -> torch.device | None:
    """The GPU that all of a model goes to by diffusers' map of modules to places, or None."""
    places = set(device_map.values()) if isinstance(device_map, dict) else set()
    if len(places) != 1 or "disk" in places:
        return None
    device = torch.device(places.pop())
    return device if device.type == "cuda" else None


def register() -> type[DaxConfig]:
    """Enter "dax" into diffusers' two tables of quantization methods, for this process; returns the config's class."""
    auto.AUTO_QUANTIZER_MAPPING["dax"] = DaxQuantizer
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING["dax"] = DaxConfig
    return DaxConfig
