"""Makes the embedded tiny Wan from nothing: scenes -> vae -> transformer (with its text encoder) -> evaluate."""
