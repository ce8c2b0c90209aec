"""Wan text-to-video transformers: building one of random weights where it will run."""

from dax.facts import Facts


def build_random(facts: Facts, device: str = "cpu", num_layers: int | None = None):
    """A WanTransformer3DModel of seeded random weights, made on the device: bf16, the vendor's fp32 parts in fp32."""
    import torch
    from diffusers import WanTransformer3DModel

    config = facts.transformer_config() | ({} if num_layers is None else {"num_layers": num_layers})
    with torch.device("meta"):
        model = WanTransformer3DModel(**config)
    rope = type(model.rope)(facts.head_dim, facts.patch, facts.rope_max_seq_len)
    kept = WanTransformer3DModel._keep_in_fp32_modules
    for name, parameter in list(model.named_parameters()):
        dtype = torch.float32 if any(part in kept for part in name.split(".")) else torch.bfloat16
        owner, _, leaf = name.rpartition(".")
        made = torch.nn.Parameter(torch.empty_like(parameter, device=device, dtype=dtype), requires_grad=False)
        setattr(model.get_submodule(owner), leaf, made)
    model.rope = rope.to(device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and "norm" in name and name.endswith("weight"):
                parameter.normal_(1.0, 0.1, generator=generator)
            else:
                std = 0.02 if parameter.ndim < 2 else parameter[0].numel() ** -0.5
                parameter.normal_(0.0, std, generator=generator)
    return model
