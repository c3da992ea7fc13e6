import pytest
import torch

from stable_sam_cuda.modules import DynamicRouter


def test_parameter_count():
    assert sum(parameter.numel() for parameter in DynamicRouter().parameters()) == 8_354 + 1


def test_weights_sum_to_the_scale_which_starts_at_one():
    router = DynamicRouter(24, 8)
    tokens = torch.randn(5, 24)
    alpha = router(tokens)
    assert alpha.shape == (5, 2)
    torch.testing.assert_close(alpha.sum(1), torch.ones(5))
    with torch.no_grad():
        router.scale.fill_(0.25)
    torch.testing.assert_close(router(tokens), 0.25 * alpha)


def test_follows_the_token():
    alpha = DynamicRouter(24, 8)(torch.randn(2, 24))
    assert not torch.allclose(alpha[0], alpha[1])


@pytest.mark.parametrize("name", ["token_channels", "hidden"])
def test_bad_sizes_are_named(name):
    with pytest.raises(ValueError, match=f"{name}: expected at least 1, got 0"):
        DynamicRouter(**{name: 0})
