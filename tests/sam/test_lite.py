"""sam_lite: SAM's shapes, SAM's predictor, and checkpoints that are refused for a reason."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from segment_anything import SamPredictor

from stable_sam_cuda.sam.lite import SHIPPED_CHECKPOINT, build_sam_lite, new_sam_lite, set_image_size
from stable_sam_cuda.training.sam_lite.weights import save_weights

SHIPPED_LIMIT = 20e6


@torch.inference_mode()
@pytest.mark.parametrize("variant", ["lite0", "lite1"])
def test_embedding_has_sams_shape(variant):
    sam = new_sam_lite(variant)
    assert sam.image_encoder(torch.zeros(1, 3, 512, 512)).shape == (1, 256, 64, 64)


@torch.inference_mode()
def test_sams_own_predictor_serves_it_unchanged():
    predictor = SamPredictor(new_sam_lite())
    predictor.set_image(np.zeros((50, 90, 3), np.uint8))
    masks, scores, logits = predictor.predict(box=np.array([10, 10, 40, 40]))
    assert masks.shape == (3, 50, 90)
    assert scores.shape == (3,)
    assert logits.shape == (3, 256, 256)


@torch.inference_mode()
def test_other_input_sizes_fit_all_parts():
    sam = new_sam_lite()
    set_image_size(sam, 128)
    embedding = sam.image_encoder(sam.preprocess(torch.zeros(1, 3, 100, 128)))
    assert embedding.shape[-2:] == sam.prompt_encoder.image_embedding_size == (16, 16)
    assert sam.prompt_encoder.get_dense_pe().shape[-2:] == (16, 16)


def test_shipped_weights_are_small_and_complete():
    assert SHIPPED_CHECKPOINT.stat().st_size < SHIPPED_LIMIT
    sam = build_sam_lite()
    assert not sam.training
    assert all(parameter.dtype == torch.float32 for parameter in sam.parameters())


def test_checkpoint_round_trip_keeps_variant_and_size(tmp_path):
    save_weights(new_sam_lite("lite1"), tmp_path / "lite1.safetensors", torch.float16, variant="lite1")
    assert build_sam_lite(tmp_path / "lite1.safetensors").image_encoder.variant == "lite1"


def _of_another_model(path):
    save_file({"weight": torch.zeros(1)}, path)


def _truncated(path):
    save_weights(new_sam_lite(), path, torch.float16, variant="lite0")
    path.write_bytes(path.read_bytes()[:-1000])


def _of_the_other_variant(path):
    save_weights(new_sam_lite("lite1"), path, torch.float16, variant="lite0")


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (_of_another_model, "metadata model=sam_lite"),
        (_truncated, "expected a whole .safetensors file"),
        (_of_the_other_variant, "does not fit sam_lite lite0"),
    ],
    ids=["another-model", "truncated", "other-variant"],
)
def test_bad_checkpoints_are_refused(write, message, tmp_path):
    write(tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match=message):
        build_sam_lite(tmp_path / "bad.safetensors")


def test_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing\.safetensors"):
        build_sam_lite(tmp_path / "missing.safetensors")
