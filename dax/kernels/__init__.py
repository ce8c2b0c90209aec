"""Kernels: one operation per file, each with its plain torch reference. `op.py` says what belongs to one."""
