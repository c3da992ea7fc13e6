import os
import pickle

import pytest
import torch
from safetensors.torch import save_file
from segment_anything import sam_model_registry

from stable_sam_cuda.sam import load_sam
from stable_sam_cuda.sam.base_models import base_model_name
from stable_sam_cuda.sam.lite import new_sam_lite


class Poison:
    """Creates a file when unpickled."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.fixture(autouse=True)
def small_vit_b(monkeypatch, build_small_sam):
    """``vit_b`` in miniature: the reading is the same, and a hundred times faster."""
    monkeypatch.setitem(sam_model_registry, "vit_b", build_small_sam)


@pytest.fixture
def checkpoint(sam, tmp_path):
    path = tmp_path / "sam.pth"
    torch.save(sam.state_dict(), path)
    return path


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_every_format_gives_the_same_model(sam, tmp_path, kind):
    path = tmp_path / ("sam.safetensors" if kind == "safetensors" else "sam.pth")
    if kind == "safetensors":
        save_file(sam.state_dict(), path)
    else:
        torch.save(sam.state_dict(), path, _use_new_zipfile_serialization=kind == "zip")
    loaded = load_sam("vit_b", path, device="cpu")
    assert not loaded.training
    assert [name for name, value in loaded.state_dict().items() if not torch.equal(value, sam.state_dict()[name])] == []
    image = torch.rand(1, 3, 128, 128)
    with torch.no_grad():
        assert torch.equal(loaded.image_encoder(image), sam.image_encoder(image))
    assert torch.equal(loaded.pixel_mean, sam.pixel_mean)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_spares_coordinates(checkpoint, dtype):
    sam = load_sam("vit_b", checkpoint, device="cpu", dtype=dtype)
    assert {p.dtype for p in sam.image_encoder.parameters()} == {p.dtype for p in sam.mask_decoder.parameters()}
    assert next(sam.mask_decoder.parameters()).dtype == dtype
    assert {tensor.dtype for tensor in sam.prompt_encoder.state_dict().values()} == {torch.float32}


def test_the_real_models_are_told_apart(build_small_sam):
    for name in ("vit_l", "vit_h"):
        with torch.device("meta"):
            assert base_model_name(sam_model_registry[name]()) == name
    assert base_model_name(new_sam_lite(image_size=64)) == "sam_lite"
    assert base_model_name(build_small_sam()) is None


def test_code_in_a_checkpoint_is_never_run(tmp_path):
    marker = tmp_path / "ran"
    for number, write in enumerate(
        (
            lambda path: torch.save({"weight": Poison(marker)}, path),
            lambda path: torch.save({"weight": Poison(marker)}, path, _use_new_zipfile_serialization=False),
            lambda path: path.write_bytes(pickle.dumps(Poison(marker), protocol=2)),
        )
    ):
        path = tmp_path / f"poison{number}.pth"
        write(path)
        with pytest.raises(ValueError, match=r"checkpoint: expected a .*PyTorch file.*poison\d\.pth"):
            load_sam("vit_b", path, device="cpu")
    assert not marker.exists()


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999], ids=["empty", "start", "half", "end"])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_truncated_checkpoints_are_refused(sam, tmp_path, share, zipped):
    path = tmp_path / "sam.pth"
    torch.save(sam.state_dict(), path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"checkpoint: expected a .*PyTorch file.*, got .*sam\.pth"):
        load_sam("vit_b", path, device="cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("mask_decoder.iou_token.weight"), r"missing weights: mask_decoder\.iou_token\.weight"),
        (lambda state: state.update(extra=torch.zeros(1)), "unknown weights: extra"),
        (
            lambda state: state.update({"mask_decoder.iou_token.weight": torch.zeros(1, 255)}),
            r"mask_decoder\.iou_token\.weight: expected shape \(1, 256\), got \(1, 255\)",
        ),
        (
            lambda state: state.update({"mask_decoder.iou_token.weight": torch.full((1, 256), float("nan"))}),
            r"expected finite weights, got NaN or infinity in mask_decoder\.iou_token\.weight",
        ),
        (lambda state: state.clear(), "expected a dictionary of named tensors, got OrderedDict"),
        (lambda state: state.update(epoch=3), "expected tensors alone, got int as 'epoch'"),
    ],
    ids=["missing", "unknown", "shape", "nan", "nothing", "number"],
)
def test_faulty_weights_are_named(sam, tmp_path, change, message):
    state = sam.state_dict()
    change(state)
    path = tmp_path / "sam.pth"
    torch.save(state, path)
    with pytest.raises(ValueError, match=message):
        load_sam("vit_b", path, device="cpu")


def test_a_checkpoint_of_another_model_is_recognised(tmp_path, build_small_sam):
    path = tmp_path / "sam.pth"
    torch.save(build_small_sam(encoder_width=1024).state_dict(), path)
    with pytest.raises(ValueError, match=r"expected the weights of vit_b, got .*sam\.pth \(it looks like vit_l\)"):
        load_sam("vit_b", path, device="cpu")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"name": "vit_x"}, ValueError, "name: expected one of vit_b, vit_l, vit_h, sam_lite, got 'vit_x'"),
        (
            {"name": "vit_b", "dtype": torch.int8},
            ValueError,
            r"dtype: expected one of torch\.float32, .* got torch\.int8",
        ),
        (
            {"name": "vit_b", "checkpoint": "absent.pth"},
            FileNotFoundError,
            r"checkpoint: .* absent\.pth, which does not",
        ),
    ],
    ids=["name", "dtype", "file"],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        load_sam(**arguments, device="cpu")
