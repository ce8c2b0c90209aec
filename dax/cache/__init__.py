"""Step caching: a table, built before the loop, of which denoising steps run the model and which are predicted.

`step_plan` is the table and `gate` runs it; `teacache`, `magcache` and `optimal` make tables, `calibrate` measures what
they need, `policy` turns a plan's words into one of them.
"""
