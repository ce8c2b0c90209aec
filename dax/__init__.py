"""DAX: Diffusion Accelerated eXecution."""

__version__ = "0.1.0"
