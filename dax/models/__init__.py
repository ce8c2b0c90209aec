"""Model families: what of each DAX changes, and how to build one. Only here are diffusers' model classes known."""
