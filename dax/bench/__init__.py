"""Figures with their ceilings: what a model costs on paper, and what it costs on the machine at hand."""
