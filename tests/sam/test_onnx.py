"""A stabilised SAM goes into ONNX as segment_anything exports it; kernels do not, and say what to do."""

import numpy as np
import onnxruntime
import pytest
import torch
from segment_anything.utils.onnx import SamOnnxModel

from stable_sam_cuda import BackendUnavailableError, DeformableSampler
from stable_sam_cuda.sam import plugin_of, stabilize

NAMES = ["image_embeddings", "point_coords", "point_labels", "mask_input", "has_mask_input", "orig_im_size"]

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(1, 256, 8, 8, generator=generator),
        torch.tensor([[[20.0, 15], [80, 75], [50, 45]]]),
        torch.tensor([[2.0, 3.0, 1.0]]),
        torch.randn(1, 1, 32, 32, generator=generator),
        torch.zeros(1),
        torch.tensor([90.0, 120.0]),
    )


def exported(sam, inputs, path, **options):
    model = SamOnnxModel(sam, return_single_mask=False).eval()
    torch.onnx.export(model, inputs, path, input_names=NAMES, dynamo=False, opset_version=17, **options)
    return model


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("blocks", [1, 2])
def test_the_exported_model_says_the_same(sam, perturb, inputs, tmp_path, blocks, backend):
    stabilize(sam, perturb(DeformableSampler(blocks=blocks), scale=0.05))
    plugin_of(sam).backend = backend
    model = exported(sam, inputs, tmp_path / "sam.onnx")
    with torch.no_grad():
        expected = model(*inputs)  # by the kernels
    session = onnxruntime.InferenceSession(tmp_path / "sam.onnx")
    feeds = {name: tensor.numpy() for name, tensor in zip(NAMES, inputs, strict=True)}
    found = session.run(None, {entry.name: feeds[entry.name] for entry in session.get_inputs()})
    for wanted, got in zip(expected, found, strict=True):
        np.testing.assert_allclose(got, wanted.numpy(), atol=1e-3 * float(wanted.abs().max()))


def test_a_kernel_asked_for_by_name_is_refused(sam, inputs, tmp_path):
    plugin_of(stabilize(sam)).backend = "cpu"
    with pytest.raises(BackendUnavailableError, match=r"'cpu' does not go into ONNX: set .* to 'auto' or 'reference'"):
        exported(sam, inputs, tmp_path / "sam.onnx")


def test_the_kernels_serve_again_after_an_export(sam, perturb, inputs, tmp_path, monkeypatch):
    plugin = plugin_of(stabilize(sam, perturb(DeformableSampler(), scale=0.05)))
    model = exported(sam, inputs, tmp_path / "sam.onnx")
    plugin.backend = "cpu"
    with torch.no_grad():
        by_name = model(*inputs)
        plugin.backend = "auto"
        for wanted, got in zip(by_name, model(*inputs), strict=True):
            assert torch.equal(got, wanted)
