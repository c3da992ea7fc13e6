"""The training of the base model: good prompts, folded batch norms, a decoder that heeds its prompt."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from stable_sam_cuda.data.dataset import find_masked_images
from stable_sam_cuda.data.prompts import PromptBatch, boxes_from_masks
from stable_sam_cuda.sam.lite import LiteBackbone, new_sam_lite
from stable_sam_cuda.training.sam_lite.batches import draw_batch
from stable_sam_cuda.training.sam_lite.loss import add_corrective_click, draw_good_prompts, training_step
from stable_sam_cuda.training.sam_lite.weights import BATCH_NORM_EPS, _fold, load_weights, open_to_prompts, save_weights


@pytest.fixture
def batch(picture_folder):
    return draw_batch(find_masked_images(picture_folder)[:3], 64, 2, np.random.default_rng(0))


def test_a_folded_batch_norm_is_the_batch_norm():
    convolution = torch.nn.Conv2d(3, 5, 3)
    state = {"conv.weight": torch.randn(5, 3, 3, 3)}
    names = ("weight", "bias", "running_mean", "running_var")
    state |= {f"bn.{name}": torch.rand(5) + 0.1 for name in names}
    _fold(convolution, state, "conv", "bn")
    x = torch.randn(2, 3, 8, 8)
    weight, bias, mean, variance = (state[f"bn.{name}"] for name in names)
    expected = F.batch_norm(F.conv2d(x, state["conv.weight"]), mean, variance, weight, bias, eps=BATCH_NORM_EPS)
    torch.testing.assert_close(convolution(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", ["lite0", "lite1"])
def test_backbone_has_strides_4_to_32(variant):
    features = LiteBackbone(variant)(torch.randn(1, 3, 64, 96))
    assert {stride: tuple(value.shape) for stride, value in features.items()} == {
        4: (1, 24, 16, 24),
        8: (1, 40, 8, 12),
        16: (1, 112, 4, 6),
        32: (1, 320, 2, 3),
    }


def test_prompts_are_good_ones(batch):
    """Boxes stay within SAM's jitter of the tight box, and positive points lie on the object."""
    exact, generator = boxes_from_masks(batch.masks), torch.Generator().manual_seed(0)
    limit = 20 / 1024 * 64
    kinds = set()
    for _ in range(200):
        prompts = draw_good_prompts(batch, generator)
        kinds.add((prompts.boxes is not None, prompts.points is not None))
        if prompts.boxes is not None:
            assert ((prompts.boxes - exact).abs() <= limit + 1).all()
        if prompts.points is not None:
            for mask, points, labels in zip(batch.masks, prompts.points, prompts.labels, strict=True):
                x, y = points.long().unbind(1)
                assert torch.equal(mask[y, x].float(), labels)
    assert kinds == {(True, False), (False, True), (True, True)}


def test_a_corrective_click_falls_on_the_error_with_its_label(batch):
    generator = torch.Generator().manual_seed(0)
    wrong = F.avg_pool2d((~batch.masks[:, None]).float(), 2) * 20 - 10
    prompts = PromptBatch(batch.image_index, boxes=boxes_from_masks(batch.masks))
    add_corrective_click(prompts, batch.masks, wrong, generator)
    assert prompts.masks is wrong
    for mask, point, label in zip(batch.masks, prompts.points[:, 0].long(), prompts.labels[:, 0], strict=True):
        assert mask[point[1], point[0]].float() == label


def test_opened_cross_attention_finds_where_a_prompt_is(small_sam):
    """As an untrained cross-attention sees it, the image location most similar to a point is the point itself."""
    points = torch.rand(50, 2, generator=torch.Generator().manual_seed(0)) * 64
    encoder = small_sam.prompt_encoder
    with torch.no_grad():
        at_points = encoder.pe_layer.forward_with_coords(points[None].clone(), (64, 64))[0]
        everywhere = encoder.get_dense_pe()[0].flatten(1).T

        def share_found(attention):
            similarity = attention.q_proj(everywhere) @ attention.k_proj(at_points).T
            found = torch.stack([similarity.argmax(0) % 8, similarity.argmax(0) // 8], dim=1)
            return ((found - (points / 8).floor()).abs().amax(1) <= 1).float().mean().item()

        blocks = small_sam.mask_decoder.transformer.layers
        before = [share_found(block.cross_attn_image_to_token) for block in blocks]
        open_to_prompts(small_sam)
        after = [share_found(block.cross_attn_image_to_token) for block in blocks]
    assert max(before) < 0.5
    assert min(after) > 0.9


def test_training_lowers_the_loss_on_one_batch(small_sam, batch):
    open_to_prompts(small_sam)
    optimizer = torch.optim.AdamW(small_sam.parameters(), lr=5e-4)
    losses = []
    for _ in range(12):
        loss, _ = training_step(small_sam, batch, torch.Generator().manual_seed(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_weights_survive_the_round_trip(small_sam, tmp_path):
    save_weights(small_sam, tmp_path / "weights.safetensors", variant="lite0")
    other = new_sam_lite("lite0", 64)
    load_weights(other, tmp_path / "weights.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(small_sam.parameters(), other.parameters(), strict=True))
