"""The training form of the autoencoder computes what diffusers' own class computes, value and gradient."""

import torch
from diffusers import AutoencoderKLWan

from training.tiny_wan import whole_clip


def small_vae():
    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 2, 4, 6], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    for parameter in vae.parameters():  # so that norms and biases count
        parameter.data += 0.1 * torch.randn_like(parameter)
    return vae.double()


def test_encode_and_decode_equal_diffusers():
    vae = small_vae()
    clip = torch.rand(2, 3, 17, 32, 32, dtype=torch.float64) * 2 - 1
    posterior = vae.encode(clip).latent_dist
    mean, logvar = whole_clip.encode(vae, clip)
    torch.testing.assert_close(mean, posterior.mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logvar, posterior.parameters.chunk(2, 1)[1], rtol=1e-5, atol=1e-6)
    z = torch.randn(2, 4, 5, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(whole_clip.decode(vae, z).clamp(-1, 1), vae.decode(z).sample, rtol=1e-5, atol=1e-5)


def test_gradients_reach_every_parameter():
    vae = small_vae()
    mean, logvar = whole_clip.encode(vae, torch.rand(1, 3, 5, 16, 16, dtype=torch.float64))
    (whole_clip.decode(vae, mean).square().mean() + logvar.square().mean()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in vae.parameters())
