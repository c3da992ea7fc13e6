"""The training that waits for a GPU, rehearsed without one, and what it hands from machine to machine."""

import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from stable_sam_cuda.sam import load_sam
from stable_sam_cuda.sam.lite import new_sam_lite

ROOT = Path(__file__).resolve().parents[2]
RETURNED_BYTES, RETURNED_FILES = 16 * 2**20, 8


def on_gpu(out: Path, *words: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OUT": str(out), "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    command = [str(word) for word in (ROOT / "study" / "on_gpu.sh", *words)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.fixture
def call_main(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The command line in this process, whose own way of ending is left alone."""
    import on_gpu

    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(on_gpu.signal, "signal", lambda *arguments: None)

    def call(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["on_gpu.py", *words])
        return on_gpu.main()

    return call


@pytest.fixture(scope="module")
def checkpoint() -> dict:
    """That of a training after two steps."""
    torch.manual_seed(0)
    sam = new_sam_lite("lite0", 64)
    average = torch.optim.swa_utils.AveragedModel(sam)
    optimizer = torch.optim.AdamW([{"params": list(sam.parameters()), "scale": 0.3}], lr=1e-3)
    for _ in range(2):
        for parameter in sam.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        average.update_parameters(sam)
    parts = {"model": sam.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict()}
    return {"options": {"variant": "lite0", "image_size": 64}, "step": 2, "minutes": 1.5, **parts}


@pytest.mark.slow
def test_a_rehearsal_pauses_the_base_goes_on_elsewhere_and_runs_rows(tmp_path: Path) -> None:
    done = on_gpu(tmp_path, "--dry-run")
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "on_gpu.json").read_text())
    assert (record["base"], record["finished"], record["dry_run"]) == ("finished", True, True)
    assert record["rows"] == {"sam_lite-0": "passed", "points-0": "passed"}
    assert {path.name for path in tmp_path.iterdir()} == {"on_gpu.json", "results.tar", "sam_lite.safetensors"}
    with tarfile.open(tmp_path / "results.tar") as tar:
        names = tar.getnames()
        rows = [json.load(tar.extractfile(name)) for name in names if name.startswith("records/")]
    assert {"base/log.jsonl", "base/run.json", "base/curve.png", "on_gpu.log"} <= set(names)
    assert any(name.startswith("base/tensorboard/") for name in names)
    assert any(name.endswith("points-0/plugin.safetensors") for name in names)
    assert {row["row"]: list(row["figures"]) for row in rows} == {
        "sam_lite": ["val", "test", "val_protocol", "test_protocol"],
        "points": ["val"],
    }
    assert len({row["base_sha256"] for row in rows}) == 1
    assert load_sam("sam_lite", tmp_path / "sam_lite.safetensors", device="cpu").image_encoder.img_size == 64


def test_a_handover_fits_and_keeps_the_state_to_half_precision(checkpoint: dict, tmp_path: Path) -> None:
    from handover import read_handover, write_base, write_handover
    from on_gpu import PART_BYTES

    write_base(checkpoint, tmp_path / "sam_lite.safetensors")
    write_handover(checkpoint, tmp_path, PART_BYTES)
    sizes = [path.stat().st_size for path in tmp_path.iterdir()]
    assert max(sizes) <= RETURNED_BYTES
    assert len(sizes) + 2 <= RETURNED_FILES  # results.tar and on_gpu.json are still to come
    found = read_handover(tmp_path, tmp_path / "sam_lite.safetensors")
    assert (found["step"], found["minutes"], found["options"]) == (2, 1.5, checkpoint["options"])
    for part in ("model", "average"):
        assert found[part].keys() == checkpoint[part].keys()
        for name, value in checkpoint[part].items():
            torch.testing.assert_close(found[part][name], value, rtol=1e-3, atol=1e-6)  # handed over in float16
    trainable = new_sam_lite("lite0", 64)
    optimizer = torch.optim.AdamW([{"params": list(trainable.parameters()), "scale": 0.0}])
    optimizer.load_state_dict(found["optimizer"])
    assert optimizer.param_groups[0]["scale"] == 0.3
    for old, new in zip(checkpoint["optimizer"]["state"].values(), optimizer.state.values(), strict=True):
        torch.testing.assert_close(new["exp_avg_sq"], old["exp_avg_sq"], rtol=0.01, atol=1e-12)  # in bfloat16
        assert new["step"] == old["step"]


def test_the_same_base_keeps_its_file_and_another_one_replaces_it(checkpoint: dict, tmp_path: Path) -> None:
    from handover import write_base

    path = tmp_path / "sam_lite.safetensors"
    write_base(checkpoint, path)
    before = path.stat().st_mtime_ns, path.read_bytes()
    write_base(checkpoint, path)
    assert (path.stat().st_mtime_ns, path.read_bytes()) == before
    other = {name: value + 1 if value.is_floating_point() else value for name, value in checkpoint["average"].items()}
    write_base({**checkpoint, "average": other}, path)
    assert path.read_bytes() != before[1]


def test_without_a_gpu_and_without_a_rehearsal_nothing_is_done(
    call_main: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert call_main() == 1
    assert "no CUDA device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_rows_that_do_not_exist_are_said_before_anything_is_done(
    call_main: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        call_main("--dry-run", "--rows", "cake")
    assert ended.value.code == 2
    assert "rows: expected some of sam_lite, stable" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
