import copy
import pickle

import pytest
import torch

from stable_sam_cuda.modules import DeformableSampler
from stable_sam_cuda.modules.sampler import AMPLITUDES
from stable_sam_cuda.ops.reference import deformable_sample as reference

SMALL = {"channels": 16, "token_channels": 12, "router_hidden": 8}


def perturbed(seed=0, dtype=torch.float32, **arguments):
    """A sampler no weight of which is at its initial value."""
    torch.manual_seed(seed)
    sampler = DeformableSampler(**{**SMALL, **arguments}).to(dtype)
    with torch.no_grad():
        for parameter in sampler.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return sampler


def relative_error(calibrated, expected):
    """Mean error over mean size: a rounded offset moves its location, so single pixels err by the features' slope."""
    return (calibrated.float() - expected).abs().mean() / expected.abs().mean()


def test_parameter_count_is_the_papers():
    assert sum(parameter.numel() for parameter in DeformableSampler(256).parameters()) == 81_829


@pytest.mark.parametrize("amplitude", AMPLITUDES)
@pytest.mark.parametrize("shape", [(2, 256, 64, 64), (1, 256, 13, 7), (3, 256, 1, 1)], ids=str)
def test_untrained_sampler_is_the_identity(amplitude, shape):
    torch.manual_seed(0)
    features, tokens = torch.randn(shape), torch.randn(shape[0], 256)
    calibrated = DeformableSampler(256, amplitude=amplitude)(features, tokens)
    torch.testing.assert_close(calibrated, features, rtol=1e-6, atol=1e-6)


def test_calibrated_features_follow_the_equation():
    sampler = perturbed(dtype=torch.float64)
    features, tokens = torch.randn(2, 16, 9, 7).double(), torch.randn(2, 12).double()
    projected, offsets = sampler.offset_network(features)
    expected = reference(projected, offsets, features, sampler.router(tokens), None, 4.0)
    torch.testing.assert_close(sampler(features, tokens), expected)
    assert not torch.allclose(expected, features, atol=0.1)


@pytest.mark.parametrize(("amplitude", "channels"), [("location", 1), ("channel", 16)])
def test_predicted_amplitude_multiplies_the_sampled_features(amplitude, channels):
    sampler = perturbed(dtype=torch.float64, amplitude=amplitude)
    features, tokens = torch.randn(2, 16, 9, 7).double(), torch.randn(2, 12).double()
    projected, offsets = sampler.offset_network(features)
    factors = 2 * torch.sigmoid(sampler.amplitude_head(projected))
    assert factors.shape == (2, channels, 9, 7)
    expected = reference(features, offsets, features, sampler.router(tokens), factors, 4.0)
    torch.testing.assert_close(sampler(features, tokens), expected)


@pytest.mark.parametrize("amplitude", AMPLITUDES)
def test_one_image_serves_many_tokens(amplitude):
    sampler = perturbed(amplitude=amplitude)
    features, tokens = torch.randn(1, 16, 9, 7), torch.randn(3, 12)
    expected = sampler(features.expand(3, -1, -1, -1), tokens)
    torch.testing.assert_close(sampler(features, tokens), expected)


@pytest.mark.parametrize("layout", ["contiguous", "channels-last", "strided"])
def test_any_layout_gives_channels_last(layout):
    sampler = perturbed()
    features, tokens = torch.randn(2, 16, 8, 6), torch.randn(2, 12)
    expected = sampler(features, tokens)
    if layout == "channels-last":
        features = features.contiguous(memory_format=torch.channels_last)
    elif layout == "strided":
        features = features.repeat_interleave(2, dim=3)[..., ::2]
    calibrated = sampler(features, tokens)
    torch.testing.assert_close(calibrated, expected)
    assert calibrated.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("amplitude", AMPLITUDES)
def test_gradients_reach_every_parameter(amplitude):
    sampler = perturbed(amplitude=amplitude)
    features, tokens = torch.randn(2, 16, 9, 7, requires_grad=True), torch.randn(2, 12, requires_grad=True)
    sampler(features, tokens).square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in sampler.named_parameters()}
    gradients |= {"image_features": features.grad, "output_token": tokens.grad}
    dead = [name for name, gradient in gradients.items() if gradient is None or not gradient.abs().max() > 0]
    assert dead == []


def test_without_a_router_the_deformed_features_stand_alone():
    sampler = perturbed(router_hidden=0)
    assert sampler.router is None
    features = torch.randn(2, 16, 9, 7)
    projected, offsets = sampler.offset_network(features)
    expected = reference(projected, offsets, None, None, None, 4.0)
    torch.testing.assert_close(sampler(features, torch.randn(2, 12)), expected)


def test_without_displacement_only_projection_and_routing_remain():
    sampler = perturbed(max_offset=0)
    features, tokens = torch.randn(2, 16, 9, 7), torch.randn(2, 12)
    alpha = sampler.router(tokens)[:, :, None, None]
    expected = alpha[:, :1] * sampler.offset_network.projection(features) + alpha[:, 1:] * features
    torch.testing.assert_close(sampler(features, tokens), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_stays_near_float32(dtype):
    sampler = perturbed()
    features, tokens = torch.randn(2, 16, 9, 7), torch.randn(2, 12)
    expected = sampler(features, tokens)
    calibrated = copy.deepcopy(sampler).to(dtype)(features.to(dtype), tokens.to(dtype))
    assert calibrated.dtype == dtype
    assert relative_error(calibrated, expected) < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("amplitude", AMPLITUDES)
def test_runs_under_autocast(amplitude):
    sampler = perturbed(amplitude=amplitude)
    features, tokens = torch.randn(2, 16, 9, 7), torch.randn(2, 12)
    expected = sampler(features, tokens)
    with torch.autocast("cpu", torch.bfloat16):
        calibrated = sampler(features, tokens)
    assert calibrated.dtype == torch.bfloat16
    assert relative_error(calibrated, expected) < 4 * torch.finfo(torch.bfloat16).eps


def through_pickle(sampler):
    return pickle.loads(pickle.dumps(sampler))


@pytest.mark.parametrize("clone", [copy.deepcopy, through_pickle])
def test_clones_compute_the_same(clone):
    sampler = perturbed(amplitude="channel", max_offset=2.5, kernel_size=3)
    features, tokens = torch.randn(2, 16, 9, 7), torch.randn(2, 12)
    assert clone(sampler).config() == sampler.config()
    assert torch.equal(clone(sampler)(features, tokens), sampler(features, tokens))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"channels": 0}, ValueError, "channels: expected at least 1, got 0"),
        ({"token_channels": 0, "router_hidden": 0}, ValueError, "token_channels: expected at least 1, got 0"),
        ({"router_hidden": -1}, ValueError, "router_hidden: expected at least 0, got -1"),
        ({"kernel_size": 2}, ValueError, "kernel_size: expected an odd number"),
        ({"max_offset": -1.0}, ValueError, "max_offset: expected a finite number of at least 0, got -1.0"),
        ({"max_offset": float("nan")}, ValueError, "max_offset: .* got nan"),
        ({"max_offset": float("inf")}, ValueError, "max_offset: .* got inf"),
        ({"max_offset": "4"}, TypeError, "max_offset: expected a number, got '4'"),
        ({"amplitude": "pixel"}, ValueError, "amplitude: expected one of conv, location, channel, got 'pixel'"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        DeformableSampler(**arguments)


@pytest.mark.parametrize(
    ("features", "tokens", "message"),
    [
        ((16, 8, 8), (1, 12), r"image_features: expected shape \(B, 16, H, W\), got \(16, 8, 8\)"),
        ((1, 15, 8, 8), (1, 12), r"image_features: .* got \(1, 15, 8, 8\)"),
        ((1, 16, 8, 8), (12,), r"output_token: expected shape \(B, 12\), got \(12,\)"),
        ((1, 16, 8, 8), (1, 16), r"output_token: .* got \(1, 16\)"),
        ((2, 16, 8, 8), (3, 12), "output_token: expected a batch of 2 or 1, that of image_features, got 3"),
    ],
    ids=["features-3d", "features-channels", "token-1d", "token-channels", "batches"],
)
def test_bad_input_is_named(features, tokens, message):
    with pytest.raises(ValueError, match=message):
        DeformableSampler(**SMALL)(torch.randn(features), torch.randn(tokens))
