"""Tensors of a mapped file on a GPU."""

import pytest
import torch

from dax.quant.diffusers import only_gpu
from dax.quant.upload import PIECE, upload


@pytest.mark.parametrize(
    "device_map, place",
    [
        (None, None),
        ("auto", None),
        ({"": "cpu"}, None),
        ({"": "disk"}, None),
        ({"": "cuda"}, "cuda"),
        ({"": torch.device("cuda:1")}, "cuda:1"),
        ({"blocks.0": "cuda:0", "blocks.1": "cpu"}, None),
    ],
    ids=str,
)
def test_only_a_model_that_goes_to_one_gpu_is_brought_there_by_threads(device_map, place):
    assert only_gpu(device_map) == (place and torch.device(place))


@pytest.mark.gpu
def test_what_several_threads_bring_over_is_the_same_bits_and_in_its_own_memory():
    generator = torch.Generator().manual_seed(0)

    def bytes_of(count):
        return torch.randint(256, (count,), generator=generator, dtype=torch.int16).to(torch.uint8)

    tensors = {f"{i}": bytes_of(PIECE * i // 3 + 1 + i).view(torch.int8) for i in range(40)}
    tensors |= {
        "odd bf16": bytes_of(2 * (PIECE + 3)).view(torch.bfloat16)[: PIECE + 1],
        "e4m3": bytes_of(4096 * 96).view(torch.float8_e4m3fn).reshape(4096, 96),
        "scalar": torch.tensor(0.1),
        "empty": torch.empty(0, 7),
        "turned": torch.randn(300, 200, generator=generator).T,
    }
    with torch.cuda.stream(torch.cuda.Stream()):
        found = upload(tensors, torch.device("cuda"))
        for name, tensor in tensors.items():
            got = found[name]
            assert got.is_cuda and got.dtype == tensor.dtype and got.shape == tensor.shape, name
            same = got.cpu().contiguous().flatten().view(torch.uint8), tensor.contiguous().flatten().view(torch.uint8)
            assert torch.equal(*same), name
    places = {tensor.untyped_storage().data_ptr() for tensor in found.values() if tensor.numel()}
    assert len(places) == len(tensors) - 1
