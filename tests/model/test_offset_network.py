import pytest
import torch

from stable_sam_cuda.modules import OffsetNetwork


def test_parameter_count_is_the_papers():
    assert sum(parameter.numel() for parameter in OffsetNetwork(256).parameters()) == 73_474


def test_initial_projection_is_the_identity_and_offsets_are_zero():
    features = torch.randn(2, 24, 9, 7)
    projected, offsets = OffsetNetwork(24)(features)
    torch.testing.assert_close(projected, features, rtol=0, atol=1e-6)
    assert offsets.shape == (2, 2, 9, 7)
    assert torch.equal(offsets, torch.zeros_like(offsets))


def test_agrees_with_the_layers_of_figure_3b_written_out():
    torch.manual_seed(0)
    network = OffsetNetwork(16, kernel_size=3).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_()
    features = torch.randn(2, 16, 6, 5, dtype=torch.float64)
    projected, offsets = network(features)

    expected = torch.einsum("oc,bchw->bohw", network.projection.weight[:, :, 0, 0], features)
    expected = expected + network.projection.bias[:, None, None]
    torch.testing.assert_close(projected, expected)
    hidden = network.depthwise(expected)
    mean, variance = hidden.mean(1, keepdim=True), hidden.var(1, keepdim=True, unbiased=False)
    hidden = (hidden - mean) / (variance + network.norm.eps).sqrt()
    hidden = hidden * network.norm.weight[:, None, None] + network.norm.bias[:, None, None]
    hidden = 0.5 * hidden * (1 + torch.erf(hidden / 2**0.5))
    torch.testing.assert_close(offsets, network.pointwise(hidden))


def test_channels_last_memory_is_kept():
    features = torch.randn(2, 16, 8, 8).contiguous(memory_format=torch.channels_last)
    projected, _ = OffsetNetwork(16)(features)
    assert projected.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"channels": 0}, ValueError, "channels: expected at least 1, got 0"),
        ({"channels": 2.5}, TypeError, "channels: expected an integer, got 2.5"),
        ({"channels": True}, TypeError, "channels: expected an integer, got True"),
        ({"channels": 4, "kernel_size": 4}, ValueError, "kernel_size: expected an odd number.* got 4"),
        ({"channels": 4, "kernel_size": -1}, ValueError, "kernel_size: expected at least 1, got -1"),
    ],
    ids=["no-channels", "fraction", "bool", "even-kernel", "negative-kernel"],
)
def test_bad_sizes_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        OffsetNetwork(**arguments)
