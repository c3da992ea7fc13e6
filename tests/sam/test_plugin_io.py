import json
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from stable_sam_cuda import DeformableSampler
from stable_sam_cuda.sam import load_plugin, plugin_of, plugin_state_dict, save_plugin, stabilize
from stable_sam_cuda.sam.base_models import VIT_NAMES
from stable_sam_cuda.sam.plugin_io import read_plugin

SMALL = {"channels": 16, "token_channels": 12, "router_hidden": 8}


@pytest.fixture
def saved(tmp_path, perturb):
    path = tmp_path / "plugin.safetensors"
    save_plugin(perturb(DeformableSampler(**SMALL)), path, base_model="vit_b", epochs=2, note="short run")
    return path


def rewritten(path, tensors=None, drop=(), **metadata):
    """The file at ``path`` with other tensors or metadata."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    old = json.loads(content[8 : 8 + length])["__metadata__"]
    kept = {key: value for key, value in (old | metadata).items() if key not in drop}
    save_file(load_file(path) if tensors is None else tensors, path, kept)
    return path


@pytest.mark.parametrize(
    "sizes",
    [
        SMALL,
        SMALL | {"amplitude": "location", "max_offset": 1.5, "kernel_size": 3},
        SMALL | {"amplitude": "channel", "router_hidden": 0, "max_offset": 0.0},
        SMALL | {"blocks": 2},
    ],
    ids=["default", "location", "no-router", "both-blocks"],
)
def test_round_trip_keeps_weights_and_settings(tmp_path, perturb, sizes):
    sampler = perturb(DeformableSampler(**sizes))
    path = tmp_path / "plugin.safetensors"
    save_plugin(sampler, path)
    loaded = load_plugin(path)
    assert loaded.config() == sampler.config()
    assert loaded.state_dict().keys() == sampler.state_dict().keys()
    assert all(torch.equal(value, sampler.state_dict()[name]) for name, value in loaded.state_dict().items())
    features, token = torch.randn(1, 16, 6, 5), torch.randn(1, 12)
    # A file's tensors are not aligned as new ones are, and MKL's last digit depends on that.
    torch.testing.assert_close(loaded(features, token), sampler(features, token), rtol=1e-5, atol=1e-5)
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_record_is_kept(saved):
    _, record = read_plugin(saved)
    assert record.base_model == "vit_b"
    assert record.training == {"epochs": 2, "note": "short run"}


def test_only_plugins_for_more_blocks_are_of_a_newer_format(tmp_path, saved):
    versions = {}
    for blocks in (1, 2):
        path = tmp_path / f"{blocks}.safetensors"
        save_plugin(DeformableSampler(**SMALL, blocks=blocks), path)
        with safe_open(path, framework="pt") as file:
            versions[blocks] = file.metadata()["format_version"]
    assert versions == {1: "1", 2: "2"}
    assert load_plugin(rewritten(saved, drop=["blocks"])).blocks == 1, "files of version 1 may lack the number"


def test_a_stabilised_sam_saves_its_plugin_and_its_own_name(sam, tmp_path, perturb, monkeypatch):
    monkeypatch.setitem(VIT_NAMES, (64, 2), "vit_b")
    path = tmp_path / "plugin.safetensors"
    perturb(plugin_of(stabilize(sam)))
    save_plugin(sam, path)
    sampler, record = read_plugin(path)
    assert record.base_model == "vit_b"
    assert all(torch.equal(value, sampler.state_dict()[name]) for name, value in plugin_state_dict(sam).items())


def test_a_saved_plugin_stabilises_by_its_path(sam, tmp_path, perturb):
    path = tmp_path / "plugin.safetensors"
    trained = perturb(DeformableSampler())
    save_plugin(trained, path)
    stabilize(sam, str(path))
    assert all(torch.equal(value, trained.state_dict()[name]) for name, value in plugin_state_dict(sam).items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_files_load_as_float32(tmp_path, perturb, dtype):
    sampler = perturb(DeformableSampler(**SMALL)).to(dtype)
    path = tmp_path / "plugin.safetensors"
    save_plugin(sampler, path)
    loaded = load_plugin(path).state_dict()
    assert {tensor.dtype for tensor in loaded.values()} == {torch.float32}
    assert all(torch.equal(value, sampler.state_dict()[name].float()) for name, value in loaded.items())


def test_a_failed_save_leaves_the_old_file_and_no_other(saved, perturb, monkeypatch):
    before = saved.read_bytes()

    def full_disk(descriptor):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="no space left"):
        save_plugin(DeformableSampler(**SMALL), saved)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_what_cannot_be_saved_is_refused(sam, tmp_path):
    path = tmp_path / "plugin.safetensors"
    with pytest.raises(ValueError, match=r"path: expected a file name ending in \.safetensors, got .*plugin\.pth"):
        save_plugin(DeformableSampler(**SMALL), tmp_path / "plugin.pth")
    with pytest.raises(ValueError, match="sam: expected a stabilised SAM, got a plain one"):
        save_plugin(sam, path)
    with pytest.raises(TypeError, match="sam: expected a segment_anything Sam model"):
        save_plugin(torch.nn.Identity(), path)
    broken = DeformableSampler(**SMALL)
    broken.router.scale.data.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"expected finite weights, got NaN or infinity in router\.scale"):
        save_plugin(broken, path)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"plugin: expected a file, got .*absent\.safetensors, which does not exist"
    ):
        load_plugin(tmp_path / "absent.safetensors")


@pytest.mark.parametrize("length", [0, 4, 100, -1], ids=["empty", "in-length", "in-header", "in-weights"])
def test_truncated_files_are_refused(saved, length):
    content = saved.read_bytes()
    saved.write_bytes(content[:length])
    with pytest.raises(ValueError, match=r"plugin: expected a whole \.safetensors file, got .*plugin\.safetensors"):
        load_plugin(saved)


def test_a_pickle_in_disguise_is_not_run(saved):
    torch.save({"weights": torch.zeros(2)}, saved)
    with pytest.raises(ValueError, match=r"plugin: expected a whole \.safetensors file"):
        load_plugin(saved)


def test_faulty_weights_are_named(saved):
    good = load_file(saved)
    cases = {
        r"missing weights: router\.scale": {k: v for k, v in good.items() if k != "router.scale"},
        "unknown weights: extra": good | {"extra": torch.zeros(2)},
        r"router\.mlp\.0\.bias: expected shape \(8,\), got \(9,\)": good | {"router.mlp.0.bias": torch.zeros(9)},
        r"router\.scale: expected floating-point weights, got torch\.int64": good | {"router.scale": torch.tensor(1)},
        r"NaN or infinity in offset_network\.norm\.bias": good
        | {"offset_network.norm.bias": torch.tensor([float("nan")] * 16)},
        r"NaN or infinity in router\.scale": good | {"router.scale": torch.tensor(float("inf"))},
    }
    for message, tensors in cases.items():
        with pytest.raises(ValueError, match=message):
            load_plugin(rewritten(saved, tensors))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"format": "other"}, r"expected a file of format stable_sam_cuda\.plugin 1 or 2, got .* of format other 1"),
        ({"format_version": "3"}, r"of format stable_sam_cuda\.plugin 3"),
        ({"format_version": "2", "drop": ["blocks"]}, "expected metadata that describe a DeformableSampler, .*blocks"),
        ({"format_version": "2", "blocks": "0"}, "blocks: expected at least 1, got 0"),
        ({"drop": ["format"]}, "of format unknown"),
        ({"drop": ["channels"]}, "expected metadata that describe a DeformableSampler, got .*channels"),
        ({"channels": "-3"}, "channels: expected at least 1, got -3"),
        ({"channels": "100000000000000000"}, "expected metadata that describe a DeformableSampler"),
        ({"channels": "17"}, "does not fit its own metadata"),
        ({"amplitude": '"loud"'}, "amplitude: expected one of"),
        ({"max_offset": "NaN"}, "max_offset: expected a finite number"),
        ({"max_offset": "{"}, "expected metadata that describe a DeformableSampler"),
        ({"training": "{"}, "expected metadata that describe a DeformableSampler"),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_faulty_metadata_are_named(saved, metadata, message):
    with pytest.raises(ValueError, match=message):
        load_plugin(rewritten(saved, **metadata))
