"""A SAM of segment_anything's own classes, small enough for tests: 128 px in, two encoder blocks, random weights."""

from copy import deepcopy
from functools import partial

import numpy as np
import pytest
import torch
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

IMAGE_SIDE = 128
EMBED_DIM = 256


def _build(encoder_width=64):
    grid = IMAGE_SIDE // 16
    return Sam(
        image_encoder=ImageEncoderViT(
            img_size=IMAGE_SIDE,
            embed_dim=encoder_width,
            depth=2,
            num_heads=2,
            out_chans=EMBED_DIM,
            norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            window_size=4,
            global_attn_indexes=(1,),
        ),
        prompt_encoder=PromptEncoder(EMBED_DIM, (grid, grid), (IMAGE_SIDE, IMAGE_SIDE), mask_in_chans=16),
        mask_decoder=MaskDecoder(
            transformer_dim=EMBED_DIM,
            transformer=TwoWayTransformer(depth=2, embedding_dim=EMBED_DIM, num_heads=8, mlp_dim=2048),
        ),
    ).eval()


@pytest.fixture(autouse=True)
def one_thread():
    """On tensors this small, threads that wait for each other take longer than one that works."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def build_small_sam():
    """The function that builds one, of another encoder width if need be."""
    return _build


@pytest.fixture(scope="session")
def _built_sam():
    torch.manual_seed(0)
    return _build()


@pytest.fixture
def sam(_built_sam):
    return deepcopy(_built_sam)


@pytest.fixture(scope="session")
def picture():
    """A picture (90, 120, 3) with shapes, so that random weights give masks neither empty nor full."""
    rows, columns = np.mgrid[:90, :120]
    disc = ((rows - 45) ** 2 + (columns - 50) ** 2 < 30**2)[..., None]
    gradient = np.stack([rows, columns, rows + columns], axis=-1)
    return np.where(disc, [200, 60, 40], gradient).astype(np.uint8)


@pytest.fixture
def perturb():
    def perturb(module, scale=0.2, seed=1):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator).to(parameter))
        return module

    return perturb
