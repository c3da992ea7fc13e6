"""The paths of the plugin's attention through the whole decoder: fused, sampled first, and plain PyTorch."""

import warnings

import pytest
import torch
from decoder_inputs import assert_same_answers, encoded, sams_own
from tolerances import DECODER_GRADIENTS, assert_matches

from stable_sam_cuda import DeformableSampler, UnfusedAttentionWarning
from stable_sam_cuda.modules import attention
from stable_sam_cuda.modules.attention import AttentionPath, choose_path, path_of
from stable_sam_cuda.ops import backends
from stable_sam_cuda.sam import plugin_of, stabilize
from stable_sam_cuda.sam.shared_decoder import ALL_MASKS, decode
from stable_sam_cuda.sam.stable_block import StableTwoWayAttentionBlock, stable_block_of

FUSED, SAMPLED = AttentionPath.FUSED, AttentionPath.SAMPLED
PATHS = {
    "fused": ("auto", FUSED),  # by the kernels of this machine
    "sampled": ("auto", SAMPLED),
    "reference": ("reference", FUSED),
}
HAS_KERNELS = choose_path("auto", torch.device("cpu"), torch.float32) is FUSED


def needs_kernels(name):
    return () if HAS_KERNELS or name != "fused" else (pytest.mark.skip(reason="no fused attention on the CPU"),)


BOTH = [pytest.param(name, marks=needs_kernels(name)) for name in ("fused", "reference")]


@pytest.fixture
def take(monkeypatch):
    """Sends a model's plugin down one of the paths; the calls of the fused one are counted in what it returns."""

    def take(sam, name):
        backend, path = PATHS[name]
        plugin_of(sam).backend = backend
        monkeypatch.setattr(attention, "choose_path", lambda *arguments, **options: path)
        calls = []
        own = StableTwoWayAttentionBlock.attend_fused
        monkeypatch.setattr(
            StableTwoWayAttentionBlock, "attend_fused", lambda *arguments: (calls.append(1), own(*arguments))[1]
        )
        return calls

    yield take


@pytest.fixture
def stable(sam, perturb):
    perturb(plugin_of(stabilize(sam)), scale=0.05)
    return sam


def answers(sam, inputs):
    return decode(sam, *inputs, ALL_MASKS)


@pytest.mark.parametrize("forward", [answers, lambda sam, inputs: sams_own(sam, *inputs)], ids=["shared", "own"])
@pytest.mark.parametrize("kind", ["one-point", "twelve-points", "mask"])
@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@torch.no_grad()
def test_all_paths_give_the_same_masks(stable, take, forward, kind, name, dtype):
    stable.mask_decoder.to(dtype)
    inputs = encoded(stable, kind)
    assert not take(stable, "sampled")
    expected = forward(stable, inputs)
    calls = take(stable, name)
    assert_same_answers(forward(stable, inputs), expected, dtype)
    assert calls == [1]


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_all_paths_give_the_plugin_the_same_gradients(stable, take, name, dtype):
    stable.mask_decoder.to(dtype)
    inputs = encoded(stable, "box-and-points")
    parameters = dict(plugin_of(stable).named_parameters())

    def gradients():
        logits, scores = answers(stable, inputs)
        return torch.autograd.grad(logits.square().mean() + scores.square().mean(), [*parameters.values()])

    take(stable, "sampled")
    expected = gradients()
    calls = take(stable, name)
    for parameter, one, other in zip(parameters, gradients(), expected, strict=True):
        assert_matches(f"gradient of {parameter}", one, other, DECODER_GRADIENTS[dtype])
    assert calls == [1]


@pytest.mark.parametrize("name", BOTH)
@torch.no_grad()
def test_half_precision_and_autocast_round_alike(stable, take, name):
    inputs = encoded(stable, "box-and-points")
    take(stable, "sampled")
    exact = answers(stable, inputs)[0]

    def errors():
        with torch.autocast("cpu", torch.bfloat16):
            cast = answers(stable, inputs)[0]
        half = answers(stable.bfloat16(), inputs)[0]
        stable.float()
        return [(found.float() - exact).square().mean() for found in (cast, half)]

    stable.bfloat16().float()  # so that all weights are bfloat16's
    exact = answers(stable, inputs)[0]
    sampled = errors()
    calls = take(stable, name)
    for ours, theirs in zip(errors(), sampled, strict=True):
        assert 0 < ours <= 1.5**2 * theirs
    assert calls == [1, 1]


@pytest.mark.parametrize("name", BOTH)
@torch.no_grad()
def test_without_a_router_the_deformed_features_stand_alone(sam, take, perturb, name):
    perturb(plugin_of(stabilize(sam, DeformableSampler(router_hidden=0))), scale=0.05)
    inputs = encoded(sam, "box")
    take(sam, "sampled")
    expected = answers(sam, inputs)
    calls = take(sam, name)
    assert_same_answers(answers(sam, inputs), expected, torch.float32)
    assert calls == [1]


@pytest.mark.parametrize("amplitude", ["location", "channel"])
@torch.no_grad()
def test_predicted_amplitudes_are_sampled_quietly(sam, amplitude):
    plugin = plugin_of(stabilize(sam, DeformableSampler(amplitude=amplitude, backend="reference")))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert path_of(plugin, torch.zeros(1, 8, 256)) is SAMPLED
        answers(sam, encoded(sam, "box"))


class Doubled(torch.nn.Linear):
    """As an adapter: the parameters of the layer, and more."""

    def forward(self, rows):
        return 2 * super().forward(rows)


@torch.no_grad()
def test_adapted_projections_are_sampled_quietly(stable, take):
    calls = take(stable, "reference")
    inputs = encoded(stable, "box")
    before = answers(stable, inputs)[0]
    assert calls == [1]
    stable_block_of(stable).cross_attn_token_to_image.k_proj.__class__ = Doubled
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapted = answers(stable, inputs)
    assert calls == [1]
    assert_same_answers(adapted, sams_own(stable, *inputs), torch.float32)
    assert not torch.allclose(adapted[0], before, rtol=1e-2)


@pytest.mark.parametrize(
    ("place", "fused"),
    [
        ("", False),
        ("router", True),
        ("offset_network", True),
        ("offset_network.projection", True),
        ("offset_network.depthwise", True),
        ("offset_network.norm", True),
    ],
    ids=lambda value: value or "plugin" if isinstance(value, str) else "",
)
@torch.no_grad()
def test_hooks_in_the_plugin_are_heeded(stable, take, place, fused):
    calls = take(stable, "reference")
    inputs = encoded(stable, "box")
    before = answers(stable, inputs)[0]

    def double(module, arguments, output):
        return tuple(2 * part for part in output) if isinstance(output, tuple) else 2 * output

    plugin_of(stable).get_submodule(place).register_forward_hook(double)
    calls.clear()
    hooked = answers(stable, inputs)
    assert calls == ([1] if fused else [])
    assert not torch.equal(hooked[0], before)
    take(stable, "sampled")
    assert_same_answers(hooked, answers(stable, inputs), torch.float32)


@torch.no_grad()
def test_many_queries_are_sampled_with_a_warning(stable, monkeypatch):
    monkeypatch.setattr(backends, "told", set())
    plugin_of(stable).backend = "reference"
    queries = torch.zeros(1, attention.MOST_FUSED_QUERIES + 1, 256)
    with pytest.warns(UnfusedAttentionWarning, match="more than 64 queries"):
        assert path_of(plugin_of(stable), queries) is SAMPLED
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert path_of(plugin_of(stable), queries) is SAMPLED, "told once"
        assert path_of(plugin_of(stable), queries[:, 1:]) is FUSED


@pytest.fixture
def chosen_anew():
    """What is chosen in a test is forgotten behind it."""
    backends.forget_choices()
    yield
    backends.forget_choices()


@pytest.mark.usefixtures("chosen_anew")
def test_a_backend_without_the_kernel_samples_quietly(monkeypatch):
    monkeypatch.setitem(backends.KERNELS, "deformable_attention", {})
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnfusedAttentionWarning)
        for gradients in (False, True):
            assert choose_path("auto", torch.device("cpu"), torch.float32, gradients=gradients) is SAMPLED
            assert choose_path("reference", torch.device("cpu"), torch.float32, gradients=gradients) is FUSED


@pytest.mark.parametrize("slower", [False, True], ids=["at-inference", "in-training"])
def test_what_was_measured_decides(monkeypatch, slower):
    monkeypatch.setattr(attention, "SLOWER_FUSED", frozenset({(backends.Backend.REFERENCE, slower)}))
    for gradients in (False, True):
        path = choose_path("reference", torch.device("cpu"), torch.float32, gradients=gradients)
        assert path is (SAMPLED if gradients is slower else FUSED)


def test_frozen_plugins_count_as_inference(monkeypatch):
    monkeypatch.setattr(attention, "SLOWER_FUSED", frozenset({(backends.Backend.REFERENCE, True)}))
    plugin, queries = DeformableSampler(backend="reference"), torch.zeros(1, 8, 256)
    assert path_of(plugin, queries) is SAMPLED
    with torch.no_grad():
        assert path_of(plugin, queries) is FUSED
    assert path_of(plugin.requires_grad_(False), queries) is FUSED
    assert path_of(plugin, queries.requires_grad_()) is SAMPLED
