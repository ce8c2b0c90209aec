"""What the ranks of the tests need, imported once in the process they are forked from."""

import torch.distributed  # noqa: F401
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel  # noqa: F401
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel  # noqa: F401

import dax.models.wan  # noqa: F401
import tests.parallel.tasks  # noqa: F401
