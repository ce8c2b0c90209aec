"""Stage 2: the tokenizer, the text encoder and the transformer, trained together on latents of stage 1.

    python -m training.tiny_wan.transformer --vae build/vae --out build --seconds 900 [--resume build/state.pt]

Rectified flow with velocity target v = noise - x0 at x = (1 - sigma) x0 + sigma noise; one caption in ten is dropped,
so that guidance works. Text encoder and transformer are the classes of transformers and diffusers; averaged weights are
saved. The 490-odd padding tokens of a 512-token prompt are all alike, so training keeps one of them and adds the log of
their number to its attention logit: the same function at a tenth of the cost.
"""

import argparse
import json
import math
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

from . import scenes, whole_clip

TEXT_LENGTH = 512
TEXT_DIM = 192
TRANSFORMER = dict(
    patch_size=(1, 2, 2), num_attention_heads=3, attention_head_dim=128, in_channels=16, out_channels=16,
    text_dim=TEXT_DIM, freq_dim=256, ffn_dim=1024, num_layers=4, cross_attn_norm=True,
    qk_norm="rms_norm_across_heads", rope_max_seq_len=1024,
)  # fmt: skip
FLOW_SHIFT = 3.0


def make_tokenizer() -> T5Tokenizer:
    """A unigram T5 tokenizer that knows the captions' words whole and spells every other one."""
    letters = [chr(c) for c in range(33, 127)]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -4.0)]
    pieces += [("\u2581" + w, -2.0) for w in scenes.words()] + [(c, -6.0) for c in letters]
    pieces += [(f"<extra_id_{i}>", 0.0) for i in reversed(range(8))]
    return T5Tokenizer(vocab=pieces, extra_ids=8, model_max_length=TEXT_LENGTH)


def make_text_encoder(vocab_size: int) -> UMT5EncoderModel:
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=vocab_size, d_model=TEXT_DIM, d_kv=48, d_ff=384, num_layers=3, num_heads=4, dropout_rate=0.0,
            feed_forward_proj="gated-gelu", pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
        )
    )  # fmt: skip


class PaddedCrossAttention(WanAttnProcessor):
    """Cross-attention whose last text token stands for all padding tokens; `bias` [B, 1, 1, T] holds log counts."""

    bias = None

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        return super().__call__(
            attn, hidden_states, encoder_hidden_states, self.bias.to(hidden_states.dtype), rotary_emb
        )


def encode(text_encoder, ids, mask):
    """Text embeddings [B, T + 1, C], the last one the zero padding token, and its attention bias [B, 1, 1, T + 1]."""
    text = text_encoder(ids, mask).last_hidden_state * mask[..., None]
    text = torch.cat([text, text.new_zeros(len(text), 1, text.shape[-1])], 1)
    bias = torch.where(mask.bool(), 0.0, float("-inf"))
    count = (TEXT_LENGTH - mask.sum(1, keepdim=True)).float().log()
    return text, torch.cat([bias, count], 1)[:, None, None]


@torch.no_grad()
def encode_clips(vae, num_clips, device, seed):
    """Normalised latents [N, 16, 5, 16, 16] bf16 of fresh training clips, and their scenes."""
    mean = torch.tensor(vae.config.latents_mean, device=device).view(1, -1, 1, 1, 1)
    std = torch.tensor(vae.config.latents_std, device=device).view(1, -1, 1, 1, 1)
    drawn, latents = [], []
    for start in range(0, num_clips, 64):
        batch_scenes, _, x = scenes.batch(64, seed + start, device)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            z = whole_clip.encode(vae, x * 2 - 1)[0].float()
        latents.append(((z - mean) / std).bfloat16())
        drawn += batch_scenes
    return torch.cat(latents), drawn


def train(
    vae_dir: Path,
    out: Path,
    seconds: float,
    wall: float,
    state: Path,
    num_clips: int,
    batch: int,
    lr: float,
    device="cuda",
    compile=True,
):
    """Train for `seconds` of wall time; this call ends after `wall` seconds, preparation included, leaving `state`."""
    entered = time.monotonic()
    torch.manual_seed(1)
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    tokenizer = make_tokenizer()
    text_encoder = make_text_encoder(len(tokenizer)).to(device)
    model = WanTransformer3DModel(**TRANSFORMER).to(device)
    cross = PaddedCrossAttention()
    for block in model.blocks:
        block.attn2.set_processor(cross)
        torch.nn.init.normal_(block.ffn.net[2].weight, std=0.02)
    modules = torch.nn.ModuleDict(dict(text_encoder=text_encoder, transformer=model))
    parameters = dict(modules.named_parameters())
    average = {k: v.detach().clone() for k, v in parameters.items()}
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01, fused=device == "cuda"
    )
    elapsed, step = 0.0, 0
    if state.exists():
        saved = torch.load(state, map_location=device, weights_only=True)
        modules.load_state_dict(saved["modules"])
        optimizer.load_state_dict(saved["optimizer"])
        average, elapsed, step = saved["average"], saved["elapsed"], saved["step"]

    cache = state.with_name("latents.pt")
    start = time.monotonic()
    if cache.exists():
        saved = torch.load(cache, map_location=device, weights_only=True)
        latents, seed = saved["latents"], saved["seed"]
        drawn = [s for k in range(0, len(latents), 64) for s in _scenes_of(64, seed + k)]
    else:
        vae = AutoencoderKLWan.from_pretrained(vae_dir).to(device).eval()
        seed = 1_000_000
        latents, drawn = encode_clips(vae, num_clips, device, seed)
        torch.save(dict(latents=latents, seed=seed), cache)
        del vae
    rng = random.Random(step)
    # eight wordings of every scene, tokenised once
    texts = [[scenes.caption(s, rng) for s in drawn] for _ in range(4)]
    length = 40
    pad = lambda t: tokenizer(t, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    tokens = [pad(t) for t in texts]
    ids = torch.stack([t.input_ids for t in tokens]).to(device)
    masks = torch.stack([t.attention_mask for t in tokens]).to(device)
    empty = pad([""])
    print(
        json.dumps(
            dict(
                clips=len(latents),
                prepared_s=round(time.monotonic() - start, 1),
                std=latents.float().std().item(),
                longest=int(masks.sum(-1).max()),
            )
        ),
        flush=True,
    )

    if compile:
        for block in model.blocks:
            block.compile()
    begin, log = time.monotonic(), []
    while (progress := (elapsed + time.monotonic() - begin) / seconds) < 1 and time.monotonic() - entered < wall:
        rate = (
            lr
            * min(1, (step + 1) / 300)
            * (0.01 + 0.99 * min(1.0, 0.5 * (1 + math.cos(math.pi * max(0, progress - 0.3) / 0.7))))
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        pick = torch.randint(len(latents), (batch,), device=device)
        wording = torch.randint(len(ids), (batch,), device=device)
        x0 = latents[pick].float()
        token, mask = ids[wording, pick], masks[wording, pick]
        dropped = torch.rand(batch, 1, device=device) < 0.1
        token = torch.where(dropped, empty.input_ids.to(device), token)
        mask = torch.where(dropped, empty.attention_mask.to(device), mask)
        u = torch.sigmoid(torch.randn(batch, device=device) * 1.2)
        sigma = (FLOW_SHIFT * u / (1 + (FLOW_SHIFT - 1) * u)).view(-1, 1, 1, 1, 1)
        noise = torch.randn_like(x0)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            text, cross.bias = encode(text_encoder, token, mask)
            v = model((1 - sigma) * x0 + sigma * noise, sigma.flatten() * 1000, text, return_dict=False)[0]
        loss = F.mse_loss(v.float(), noise - x0)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        decay = min(0.9993, (step + 1) / (step + 20))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.values()), [p.detach() for p in parameters.values()], 1 - decay)
        if step % 250 == 0 or step < 3:
            log.append(
                dict(
                    step=step,
                    t=round(time.monotonic() - begin, 1),
                    progress=round(progress, 3),
                    loss=round(loss.item(), 4),
                    norm=round(float(norm), 3),
                )
            )
            print(json.dumps(log[-1]), flush=True)
        step += 1
    elapsed += time.monotonic() - begin
    out.mkdir(parents=True, exist_ok=True)
    torch.save(
        dict(
            modules=modules.state_dict(), optimizer=optimizer.state_dict(), average=average, elapsed=elapsed, step=step
        ),
        state,
    )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(average[name])
    for block in model.blocks:
        block.attn2.set_processor(WanAttnProcessor())
    tokenizer.save_pretrained(out / "tokenizer")
    text_encoder.to(torch.bfloat16).save_pretrained(out / "text_encoder")
    for name, parameter in model.named_parameters():  # what diffusers keeps in fp32 stays fp32
        if not any(k in name for k in model._keep_in_fp32_modules):
            parameter.data = parameter.data.bfloat16()
    model.save_pretrained(out / "transformer", max_shard_size="12MB")
    (out / "transformer" / "training.json").write_text(
        json.dumps(dict(steps=step, batch=batch, seconds=elapsed, clips=len(latents), log=log), indent=1)
    )


def _scenes_of(size, seed):
    rng = random.Random(seed)
    return [scenes.draw_scene(rng) for _ in range(size)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--vae", type=Path, default=Path("build/vae"))
    parser.add_argument("--out", type=Path, default=Path("build"))
    parser.add_argument("--seconds", type=float, default=900, help="length of the whole schedule")
    parser.add_argument(
        "--wall", type=float, default=math.inf, help="end this call after so many seconds; run again to go on"
    )
    parser.add_argument("--state", type=Path, default=Path("build/state.pt"))
    parser.add_argument("--clips", type=int, default=40_000)
    parser.add_argument("--batch", type=int, default=384)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--no-compile", action="store_true")
    a = parser.parse_args()
    train(a.vae, a.out, a.seconds, a.wall, a.state, a.clips, a.batch, a.lr, a.device, not a.no_compile)
