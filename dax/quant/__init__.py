"""Linear layers in 8 bits: schemes and rules, the layer, static scales, checkpoints. Imported when first used."""

from importlib import import_module

PUBLIC = {
    "QuantLinear": "linear",
    "Rule": "scheme",
    "Scales": "scales",
    "apply_linear": "apply",
    "calibrate": "calibration",
    "load": "checkpoint",
    "quantize_": "apply",
    "register": "diffusers",
    "save": "checkpoint",
}
__all__ = sorted(PUBLIC)


def __getattr__(name: str):
    if name not in PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{PUBLIC[name]}"), name)
