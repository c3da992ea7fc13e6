"""What `stabilize` and `unstabilize` refuse, and where plugins are found."""

import pytest
import torch
from segment_anything.modeling.transformer import TwoWayAttentionBlock
from torch import nn

from stable_sam_cuda import DeformableSampler
from stable_sam_cuda.sam import plugin_of, save_plugin, stabilize, unstabilize
from stable_sam_cuda.sam.base_models import VIT_NAMES


def test_stabilising_twice_is_refused(sam):
    stabilize(sam)
    with pytest.raises(ValueError, match=r"stabilised already \(call unstabilize\(sam\) first\)"):
        stabilize(sam)


@pytest.mark.parametrize("function", [unstabilize, plugin_of])
def test_a_plain_sam_has_no_plugin(sam, function):
    with pytest.raises(ValueError, match="sam: expected a stabilised SAM, got a plain one"):
        function(sam)


class OtherBlock(TwoWayAttentionBlock):
    pass


def test_other_objects_are_refused(sam):
    with pytest.raises(TypeError, match=r"sam: expected a segment_anything Sam model, got torch\.nn.*Linear"):
        stabilize(nn.Linear(2, 2))
    layers = sam.mask_decoder.transformer.layers
    layers[-1].__class__ = OtherBlock
    with pytest.raises(TypeError, match="sam: expected a TwoWayAttentionBlock as the decoder's last, got OtherBlock"):
        stabilize(sam)
    sam.mask_decoder.transformer = nn.Identity()
    with pytest.raises(TypeError, match="sam: expected a TwoWayTransformer in the mask decoder, got Identity"):
        stabilize(sam)


@pytest.mark.parametrize(
    ("plugin", "error", "message"),
    [
        (DeformableSampler(8), ValueError, "plugin: expected channels=256, that of SAM's mask decoder, got 8"),
        (DeformableSampler(token_channels=8), ValueError, "plugin: expected token_channels=256, .* got 8"),
        (nn.Identity(), TypeError, "plugin: expected None, a name, .* got Identity"),
        ("nonsense", ValueError, "plugin: expected the path of a .safetensors file or a shipped plugin .*'nonsense'"),
        ("auto", ValueError, "plugin: .* got 'auto' for a base model of its own"),
        ("absent.safetensors", FileNotFoundError, "plugin: .* absent.safetensors, which does not exist"),
    ],
    ids=["channels", "token-channels", "type", "name", "auto", "file"],
)
def test_bad_plugins_are_refused_and_leave_sam_alone(sam, plugin, error, message):
    flags = [parameter.requires_grad for parameter in sam.parameters()]
    with pytest.raises(error, match=message):
        stabilize(sam, plugin)
    assert type(sam.mask_decoder.transformer.layers[-1]) is TwoWayAttentionBlock
    assert [parameter.requires_grad for parameter in sam.parameters()] == flags


def test_plugin_of_another_base_model_is_refused(sam, tmp_path):
    path = tmp_path / "plugin.safetensors"
    save_plugin(DeformableSampler(), path, base_model="vit_b")
    with pytest.raises(ValueError, match=r"plugin: expected one trained on this model, got .*, trained on vit_b"):
        stabilize(sam, path)


def test_shipped_plugins_are_found_by_name_and_by_base_model(sam, tmp_path, monkeypatch, perturb):
    monkeypatch.setattr("stable_sam_cuda.sam.plugin_io.SHIPPED_PLUGINS_FOLDER", tmp_path)
    monkeypatch.setitem(VIT_NAMES, (64, 2), "vit_b")
    trained = perturb(DeformableSampler())
    save_plugin(trained, tmp_path / "stable_vit_b.safetensors", base_model="vit_b")
    for name in ("auto", "stable_vit_b"):
        assert torch.equal(plugin_of(stabilize(sam, name)).router.scale, trained.router.scale)
        unstabilize(sam)


def test_a_map_that_is_not_square_is_refused(sam):
    block = stabilize(sam).mask_decoder.transformer.layers[-1]
    with pytest.raises(ValueError, match=r"keys: expected a square image embedding, .* got 15 locations"):
        block.calibrate(torch.randn(1, 15, 256), torch.randn(1, 256))
