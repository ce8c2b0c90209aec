"""The tensors each part of a Wan pipeline must hold, name by name, from its config alone: {name: shape}, no torch.

What diffusers would fill with random numbers, or ignore, is seen here before a weight is read. The tests hold these
lists to the vendors' own classes.
"""

from dax.errors import DaxError
from dax.facts import Facts

Shapes = dict[str, tuple[int, ...]]


def linear(name: str, outputs: int, inputs: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def conv(name: str, outputs: int, inputs: int, *kernel: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs, *kernel), f"{name}.bias": (outputs,)}


def transformer_shapes(facts: Facts) -> Shapes:
    """WanTransformer3DModel, with or without the parts for images, or WanVACETransformer3DModel."""
    C, F = facts.width, facts.ffn_dim
    embedder = "condition_embedder"
    shapes = {
        **conv("patch_embedding", C, facts.in_channels, *facts.patch),
        **linear(f"{embedder}.time_embedder.linear_1", C, facts.freq_dim),
        **linear(f"{embedder}.time_embedder.linear_2", C, C),
        **linear(f"{embedder}.time_proj", 6 * C, C),
        **linear(f"{embedder}.text_embedder.linear_1", C, facts.text_dim),
        **linear(f"{embedder}.text_embedder.linear_2", C, C),
    }
    if width := facts.image_dim:
        image = f"{embedder}.image_embedder"
        shapes |= linear(f"{image}.ff.net.0.proj", width, width) | linear(f"{image}.ff.net.2", C, width)
        for norm, size in (("norm1", width), ("norm2", C)):
            shapes |= {f"{image}.{norm}.weight": (size,), f"{image}.{norm}.bias": (size,)}
        if facts.image_positions:
            shapes[f"{image}.pos_embed"] = (1, facts.image_tokens, width)
    control = [f"vace_blocks.{i}" for i in range(len(facts.control_layers))]
    if control:
        shapes |= conv("vace_patch_embedding", C, facts.control_channels, *facts.patch)
        shapes |= linear(f"{control[0]}.proj_in", C, C)
        for block in control:
            shapes |= linear(f"{block}.proj_out", C, C)
    for block in (*(f"blocks.{i}" for i in range(facts.num_layers)), *control):
        for attention in ("attn1", "attn2"):
            for projection in ("to_q", "to_k", "to_v", "to_out.0"):
                shapes |= linear(f"{block}.{attention}.{projection}", C, C)
            shapes |= {f"{block}.{attention}.{norm}.weight": (C,) for norm in ("norm_q", "norm_k")}
        if facts.image_tokens:
            shapes |= linear(f"{block}.attn2.add_k_proj", C, C) | linear(f"{block}.attn2.add_v_proj", C, C)
            shapes[f"{block}.attn2.norm_added_k.weight"] = (C,)
        if facts.cross_attn_norm:
            shapes |= {f"{block}.norm2.weight": (C,), f"{block}.norm2.bias": (C,)}
        shapes |= linear(f"{block}.ffn.net.0.proj", F, C) | linear(f"{block}.ffn.net.2", C, F)
        shapes[f"{block}.scale_shift_table"] = (1, 6, C)
    _, height, width = facts.patch
    outputs = facts.out_channels * facts.patch[0] * height * width
    return shapes | linear("proj_out", outputs, C) | {"scale_shift_table": (1, 2, C)}


def text_encoder_shapes(config: dict) -> Shapes:
    """UMT5EncoderModel; the input embedding is listed once, as `shared.weight`."""
    number = reader(config, "text_encoder/config.json")
    d, heads, kv, ff = number("d_model", 512), number("num_heads", 6), number("d_kv", 64), number("d_ff", 1024)
    gated = str(config.get("feed_forward_proj", "gated-gelu")).startswith("gated-")
    shapes: Shapes = {"shared.weight": (number("vocab_size", 250112), d), "encoder.final_layer_norm.weight": (d,)}
    for i in range(number("num_layers", 8)):
        attention, feed = f"encoder.block.{i}.layer.0", f"encoder.block.{i}.layer.1"
        shapes |= {f"{attention}.SelfAttention.{x}.weight": (heads * kv, d) for x in "qkv"}
        shapes[f"{attention}.SelfAttention.o.weight"] = (d, heads * kv)
        buckets = number("relative_attention_num_buckets", 32)
        shapes[f"{attention}.SelfAttention.relative_attention_bias.weight"] = (buckets, heads)
        for wi in ("wi_0", "wi_1") if gated else ("wi",):
            shapes[f"{feed}.DenseReluDense.{wi}.weight"] = (ff, d)
        shapes[f"{feed}.DenseReluDense.wo.weight"] = (d, ff)
        shapes |= {f"{layer}.layer_norm.weight": (d,) for layer in (attention, feed)}
    return shapes


def image_encoder_shapes(config: dict, width: int, tokens: int) -> Shapes:
    """CLIPVisionModel, without the prefix that older files have. DaxError("bad_model") for other tokens or width."""
    where = "image_encoder/config.json"
    number = reader(config, where)
    if config.get("architectures", ["CLIPVisionModel"]) != ["CLIPVisionModel"]:
        raise DaxError("bad_model", f"{where}: architectures = {config['architectures']!r}; supported: CLIPVisionModel")
    d, ff, patch = number("hidden_size", 768), number("intermediate_size", 3072), number("patch_size", 32)
    if d != width:
        raise DaxError("bad_model", f"{where}: hidden_size = {d}, but the transformer's image_dim is {width}")
    found = (number("image_size", 224) // patch) ** 2 + 1
    if found != tokens or number("image_size", 224) != 224:
        raise DaxError("bad_model", f"{where}: makes {found} tokens of a picture, not {tokens} at 224 pixels")
    norm = lambda name: {f"{name}.weight": (d,), f"{name}.bias": (d,)}
    shapes: Shapes = {
        "embeddings.class_embedding": (d,),
        "embeddings.patch_embedding.weight": (d, number("num_channels", 3), patch, patch),
        "embeddings.position_embedding.weight": (tokens, d),
        **norm("pre_layrnorm"),
        **norm("post_layernorm"),
    }
    for i in range(number("num_hidden_layers", 12)):
        layer = f"encoder.layers.{i}"
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= linear(f"{layer}.self_attn.{projection}", d, d)
        shapes |= linear(f"{layer}.mlp.fc1", ff, d) | linear(f"{layer}.mlp.fc2", d, ff)
        shapes |= norm(f"{layer}.layer_norm1") | norm(f"{layer}.layer_norm2")
    return shapes


def vae_shapes(config: dict) -> Shapes:
    """AutoencoderKLWan: the plain one of Wan2.1, or the residual one in patches of Wan2.2 TI2V-5B."""
    where = "vae/config.json"
    if config.get("attn_scales") not in ([], None):
        raise DaxError("bad_model", f"{where}: attn_scales = {config['attn_scales']!r} must be empty")
    number = reader(config, where)
    base, z, blocks = number("base_dim", 96), number("z_dim", 16), number("num_res_blocks", 2)
    nested = config.get("is_residual") or False  # residual levels hold their layers, plain ones stand in one list
    if type(nested) is not bool:
        raise DaxError("bad_model", f"{where}: is_residual = {nested!r} must be true or false")
    side = 1 if config.get("patch_size") is None else number("patch_size", 1)
    pixel = 3 * side**2
    for key in ("in_channels", "out_channels"):
        if number(key, 3) != pixel:
            raise DaxError("bad_model", f"{where}: {key} = {config.get(key, 3)} must be 3 for each pixel of a patch")
    if number("scale_factor_spatial", 8) != 8 * side:
        raise DaxError("bad_model", f"{where}: scale_factor_spatial must be {8 * side}, with patches of {side} pixels")
    multiples, halved = config.get("dim_mult", [1, 2, 4, 4]), config.get("temperal_downsample", [False, True, True])
    if not (
        isinstance(multiples, list)
        and isinstance(halved, list)
        and all(type(m) is int and 0 < m < 1000 for m in multiples)
        and all(type(h) is bool for h in halved)
        and len(multiples) == len(halved) + 1 == 4
    ):
        raise DaxError(
            "bad_model", f"{where}: dim_mult = {multiples!r} and temperal_downsample = {halved!r} do not fit"
        )
    if halved.count(True) != 2:
        raise DaxError("bad_model", f"{where}: temperal_downsample = {halved!r} must halve the frames twice")
    shapes = conv("encoder.conv_in", base, pixel, 3, 3, 3)
    width, index = base, 0
    for level, multiple in enumerate(multiples):
        out, down = base * multiple, "encoder.down_blocks"
        for i in range(blocks):
            shapes |= residual(f"{down}.{level}.resnets.{i}" if nested else f"{down}.{index}", width, out)
            width, index = out, index + 1
        if level < len(halved):
            name = f"{down}.{level}.downsampler" if nested else f"{down}.{index}"
            shapes |= conv(f"{name}.resample.1", out, out, 3, 3)
            if halved[level]:
                shapes |= conv(f"{name}.time_conv", out, out, 3, 1, 1)
            index += 1
    shapes |= middle("encoder", width)
    shapes |= {"encoder.norm_out.gamma": (width, 1, 1, 1)} | conv("encoder.conv_out", 2 * z, width, 3, 3, 3)
    shapes |= conv("quant_conv", 2 * z, 2 * z, 1, 1, 1) | conv("post_quant_conv", z, z, 1, 1, 1)
    base = base if config.get("decoder_base_dim") is None else number("decoder_base_dim", base)
    width = base * multiples[-1]
    shapes |= conv("decoder.conv_in", width, z, 3, 3, 3) | middle("decoder", width)
    for level, multiple in enumerate(reversed(multiples)):
        out, block = base * multiple, f"decoder.up_blocks.{level}"
        for i in range(blocks + 1):
            shapes |= residual(f"{block}.resnets.{i}", width, out)
            width = out
        if level < len(halved):
            name, width = (f"{block}.upsampler", out) if nested else (f"{block}.upsamplers.0", out // 2)
            shapes |= conv(f"{name}.resample.1", width, out, 3, 3)
            if halved[::-1][level]:
                shapes |= conv(f"{name}.time_conv", 2 * out, out, 3, 1, 1)
    return shapes | {"decoder.norm_out.gamma": (width, 1, 1, 1)} | conv("decoder.conv_out", pixel, width, 3, 3, 3)


def residual(name: str, inputs: int, outputs: int) -> Shapes:
    shapes = {f"{name}.norm1.gamma": (inputs, 1, 1, 1), f"{name}.norm2.gamma": (outputs, 1, 1, 1)}
    shapes |= conv(f"{name}.conv1", outputs, inputs, 3, 3, 3) | conv(f"{name}.conv2", outputs, outputs, 3, 3, 3)
    return shapes | (conv(f"{name}.conv_shortcut", outputs, inputs, 1, 1, 1) if inputs != outputs else {})


def middle(name: str, width: int) -> Shapes:
    attention = f"{name}.mid_block.attentions.0"
    return (
        residual(f"{name}.mid_block.resnets.0", width, width)
        | residual(f"{name}.mid_block.resnets.1", width, width)
        | {f"{attention}.norm.gamma": (width, 1, 1)}
        | conv(f"{attention}.to_qkv", 3 * width, width, 1, 1)
        | conv(f"{attention}.proj", width, width, 1, 1)
    )


def reader(config: dict, where: str):
    """number(key, default): a positive whole number of the config, or DaxError("bad_model")."""

    def number(key: str, default: int) -> int:
        value = config.get(key, default)
        if type(value) is not int or not 0 < value < 10_000_000:
            raise DaxError("bad_model", f"{where}: {key} = {value!r} must be a positive whole number")
        return value

    return number
