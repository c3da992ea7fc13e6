"""What is kept between calls must never be stale: every change of the model shows in the next call."""

import gc
from copy import deepcopy

import pytest
import torch
from tolerances import DECODER, assert_matches

from stable_sam_cuda.sam import image_keys, memo
from stable_sam_cuda.sam.image_keys import position_of
from stable_sam_cuda.sam.lite import set_image_size
from stable_sam_cuda.sam.shared_decoder import decode


@pytest.fixture(autouse=True, params=memo.Rule, ids=lambda rule: rule.value)
def rule(request, monkeypatch):
    """As on a CPU, by values, and as on a GPU, by identity."""
    if request.param is memo.Rule.IDENTITY:
        monkeypatch.setattr(memo, "rule_for", memo.rule_on_a_gpu)
    return request.param


def position(sam, dtype=torch.float32):
    return position_of(sam.prompt_encoder, sam.mask_decoder, dtype)


def answers(sam):
    """Of the shared decoder and of SAM's own, for one box."""
    side = sam.prompt_encoder.input_image_size[0]
    sparse, dense = sam.prompt_encoder(None, torch.tensor([[0.1, 0.2, 0.7, 0.8]]) * side, None)
    image = torch.randn(1, 256, *sam.prompt_encoder.image_embedding_size, generator=torch.Generator().manual_seed(0))
    dtype = next(sam.mask_decoder.parameters()).dtype
    image, pe, sparse, dense = (t.to(dtype) for t in (image, sam.prompt_encoder.get_dense_pe(), sparse, dense))
    return decode(sam, image, sparse, dense)[0], sam.mask_decoder(image, pe, sparse, dense, False)[0]


def assert_fresh(sam):
    """Twice, since the second call may be answered from what the first has kept."""
    for _ in range(2):
        found, expected = answers(sam)
        assert_matches("logits", found.detach(), expected.detach(), DECODER[expected.dtype])


def new_weights(sam):
    return {name: value + 0.1 * torch.randn_like(value) for name, value in sam.state_dict().items()}


def in_place(sam):
    sam.mask_decoder.transformer.layers[1].cross_attn_token_to_image.k_proj.weight.mul_(1.5)


def through_data(sam):
    sam.mask_decoder.transformer.final_attn_token_to_image.k_proj.bias.data.add_(1.0)
    sam.mask_decoder.transformer.layers[0].cross_attn_image_to_token.q_proj.weight.data.mul_(-1)


def by_assignment(sam):
    projection = sam.mask_decoder.transformer.layers[0].cross_attn_token_to_image.k_proj
    projection.weight = torch.nn.Parameter(projection.weight * 2)


def frequencies(sam):
    sam.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix.mul_(0.5)


CHANGES = {
    "in place": in_place,
    "through .data": through_data,
    "another parameter": by_assignment,
    "the encoding's frequencies": frequencies,
    "load_state_dict": lambda sam: sam.load_state_dict(new_weights(sam)),
    "load_state_dict, assigned": lambda sam: sam.load_state_dict(new_weights(sam), assign=True),
    "another dtype": lambda sam: sam.mask_decoder.double(),
    "half precision and back": lambda sam: sam.mask_decoder.to(torch.bfloat16).float(),
    "through another device": lambda sam: sam.to_empty(device="meta").to_empty(device="cpu").load_state_dict(sam.kept),
    "another image size": lambda sam: set_image_size(sam, 96),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
@torch.no_grad()
def test_every_change_of_the_model_shows(sam, change):
    # PyTorch counts no writes through .data, so on a GPU nothing is kept of weights that may be written so.
    sam.requires_grad_(change is through_data)
    assert_fresh(sam)
    before = answers(sam)[0]
    sam.kept = new_weights(sam)
    change(sam)
    assert_fresh(sam)
    after = answers(sam)[0]
    assert after.shape != before.shape or not torch.equal(after.float(), before.float())


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}], ids=["plain", "foreach", "fused"])
def test_an_optimisers_steps_show(sam, options):
    sam.mask_decoder.requires_grad_(True)
    optimizer = torch.optim.SGD(sam.mask_decoder.parameters(), lr=0.1, **options)
    for _ in range(2):
        with torch.no_grad():
            assert_fresh(sam)
        answers(sam)[0].square().mean().backward()
        optimizer.step()
    assert_fresh(sam)


def test_frozen_projections_are_kept_and_trained_ones_are_not(sam, rule):
    sam.mask_decoder.requires_grad_(False)
    assert position(sam) is position(sam)
    sam.mask_decoder.requires_grad_(True)
    trained = position(sam)
    assert trained is not position(sam)
    assert trained.final_keys.requires_grad
    with torch.no_grad():
        assert (position(sam) is position(sam)) == (rule is memo.Rule.VALUES)  # a GPU cannot tell whether they changed
        assert not position(sam).final_keys.requires_grad


def test_what_inference_mode_has_kept_serves_training(sam):
    sam.mask_decoder.requires_grad_(False)
    with torch.inference_mode():
        kept = position(sam)
    assert position(sam) is kept
    sam.mask_decoder.mask_tokens.requires_grad_(True)
    answers(sam)[0].square().mean().backward()
    assert sam.mask_decoder.mask_tokens.weight.grad.abs().max() > 0


def test_two_models_do_not_meet_and_nothing_outlives_them(sam):
    sam.requires_grad_(False)
    other = deepcopy(sam)
    in_place(other)
    assert not torch.equal(position(sam).blocks[1].keys, position(other).blocks[1].keys)
    assert_fresh(sam)
    assert_fresh(other)
    gc.collect()  # models of other tests
    count = len(image_keys._positions)
    del other
    gc.collect()
    assert len(image_keys._positions) == count - 1
