"""``stable-sam segment``: what it writes, and that nothing is written when something is wrong."""

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from stable_sam_cuda.cli import app
from stable_sam_cuda.modules.attention import choose_path
from stable_sam_cuda.sam import StableSamPredictor, load_sam, stabilize

BOX = ["--box", "20", "30", "150", "120"]


Segment = Callable[..., Result]


@pytest.fixture
def segment(checkpoint: Path, plugin: Path, photo: Path, tmp_path: Path) -> Segment:
    """Runs the verb in this process, writing to ``out`` below the test's directory unless told otherwise."""

    def run(*arguments: str, photo: Path = photo, out: Path = tmp_path / "out") -> Result:
        weights = ["--checkpoint", str(checkpoint), "--plugin", str(plugin), "--device", "cpu"]
        command = ["segment", str(photo), "--out", str(out), *weights, *arguments]
        return CliRunner().invoke(app, command, catch_exceptions=False)

    return run


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def read_mask(path: Path) -> np.ndarray:
    mask = np.asarray(Image.open(path))
    assert mask.dtype == np.uint8 and mask.ndim == 2
    assert set(np.unique(mask)) <= {0, 255}
    return mask == 255


def test_one_box_writes_mask_overlay_and_record(
    segment: Segment, out: Path, checkpoint: Path, plugin: Path, photo: Path
) -> None:
    result = segment(*BOX)
    assert result.exit_code == 0, result.output
    assert names(out) == ["photo.json", "photo_mask.png", "photo_overlay.png"]

    predictor = StableSamPredictor(load_sam("sam_lite", checkpoint, device="cpu"))
    predictor.set_image(np.array(Image.open(photo)))
    prompt = {"box": np.array([20, 30, 150, 120]), "multimask_output": False}
    plain, plain_scores, _ = predictor.predict(**prompt)
    stabilize(predictor.model, plugin)
    stable, stable_scores, _ = predictor.predict(**prompt)
    assert not np.array_equal(plain, stable), "the plugin of the fixture changes nothing, so this test proves nothing"
    assert np.array_equal(read_mask(out / "photo_mask.png"), stable[0])

    record = json.loads((out / "photo.json").read_text())
    (entry,) = record["objects"]
    assert entry["box"] == [20, 30, 150, 120]
    assert entry["points"] == entry["labels"] == []
    (mask,) = entry["masks"]
    assert mask["score"] == pytest.approx(float(stable_scores[0]), abs=1e-4)
    assert mask["sam_score"] == pytest.approx(float(plain_scores[0]), abs=1e-4)
    assert mask["pixels"] == stable.sum()
    assert record["image_size"] == {"width": 200, "height": 150}
    assert (record["model"], record["plugin"], record["device"]) == ("sam_lite", str(plugin), "cpu")
    assert record["backend"] in ("cpu", "reference")
    assert record["attention"] == choose_path("auto", torch.device("cpu"), torch.float32).value
    assert set(record["timings_ms"]) == {"model_loading", "encoder", "sam_decoder", "stable_decoder"}
    assert all(value > 0 for value in record["timings_ms"].values())
    assert record["versions"]["torch"] is not None

    overlay = Image.open(out / "photo_overlay.png")
    assert overlay.width > 2 * 560, "two panels side by side"


def test_each_box_is_an_object(segment: Segment, out: Path) -> None:
    result = segment(*BOX, "--box", "100", "0", "200", "150")
    assert result.exit_code == 0, result.output
    assert names(out) == ["photo.json", "photo_mask_1.png", "photo_mask_2.png", "photo_overlay.png"]
    assert len(json.loads((out / "photo.json").read_text())["objects"]) == 2


def test_multimask_and_points_with_a_box(segment: Segment, out: Path) -> None:
    result = segment(*BOX, "--point", "60", "70", "--point", "10", "10:0", "--multimask")
    assert result.exit_code == 0, result.output
    masks = [f"photo_mask_{number}.png" for number in (1, 2, 3)]
    assert names(out) == ["photo.json", *masks, "photo_overlay.png"]
    (entry,) = json.loads((out / "photo.json").read_text())["objects"]
    assert entry["points"] == [[60, 70], [10, 10]]
    assert entry["labels"] == [1, 0]
    assert [mask["file"] for mask in entry["masks"]] == masks


def test_sampling_points_of_every_object(segment: Segment, out: Path) -> None:
    result = segment(*BOX, "--box", "100", "0", "200", "150", "--sampling")
    assert result.exit_code == 0, result.output
    drawn = [np.asarray(Image.open(out / f"photo_sampling_{number}.png")) for number in (1, 2)]
    masks = [read_mask(out / f"photo_mask_{number}.png") for number in (1, 2)]
    assert [picture.shape for picture in drawn] == [(150, 200, 3)] * 2
    assert not np.array_equal(masks[0], masks[1])
    assert not np.array_equal(drawn[0], drawn[1])


def test_without_a_plugin_it_is_plain_sam(segment: Segment, out: Path) -> None:
    result = segment(*BOX, "--plugin", "none")
    assert result.exit_code == 0, result.output
    record = json.loads((out / "photo.json").read_text())
    assert record["plugin"] == "none" and record["backend"] is None and record["attention"] is None
    assert "stable_decoder" not in record["timings_ms"]
    mask = record["objects"][0]["masks"][0]
    assert mask["score"] == mask["sam_score"]
    assert Image.open(out / "photo_overlay.png").width < 2 * 560


def test_the_reference_backend_gives_the_same_mask(segment: Segment, tmp_path: Path) -> None:
    scores = {}
    for backend in ("auto", "reference"):
        result = segment(*BOX, "--backend", backend, out=tmp_path / backend)
        assert result.exit_code == 0, result.output
        record = json.loads((tmp_path / backend / "photo.json").read_text())
        scores[backend] = record["objects"][0]["masks"][0]["score"]
    assert record["attention"] == "fused"
    assert scores["auto"] == pytest.approx(scores["reference"], abs=1e-4)


def test_the_photo_is_segmented_as_it_is_shown(segment: Segment, out: Path, tmp_path: Path, photo: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 8  # show it rotated by 90 degrees counter-clockwise
    turned = tmp_path / "turned.jpg"
    Image.open(photo).save(turned, exif=exif)
    result = segment("--box", "5", "5", "140", "190", photo=turned)
    assert result.exit_code == 0, result.output
    assert read_mask(out / "turned_mask.png").shape == (200, 150)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "prompt: expected at least one --box or --point, got none"),
        (["--box", "1", "2", "nan", "4"], "--box: expected finite numbers, got '1 2 nan 4'"),
        (["--box", "500", "500", "600", "600"], "--box: expected a box that meets 0 <= X <= 200, 0 <= Y <= 150"),
        (["--box", "1", "2", "3"], "--box: expected four numbers X0 Y0 X1 Y1, got '1 2 3'"),
        (["--point", "500", "1"], "--point: expected 0 <= X <= 200"),
        ([*BOX, "--model", "vit_x"], "expected one of vit_b, vit_l, vit_h, sam_lite, got 'vit_x'"),
        ([*BOX, "--device", "tpu"], "--device: expected auto, cpu, cuda or cuda:N, got 'tpu'"),
        ([*BOX, "--device", "cuda:99"], "--device: expected a CUDA device of this machine"),
        ([*BOX, "--backend", "fpga"], "backend: expected one of 'auto', 'cuda', 'triton', 'cpu', 'reference', got"),
        ([*BOX, "--plugin", "no_such_plugin"], "got 'no_such_plugin'"),
        ([*BOX, "--plugin", "missing.safetensors"], "which does not exist"),
        ([*BOX, "--plugin", "none", "--sampling"], "--sampling: expected a plugin, got --plugin none"),
        ([*BOX, "--checkpoint", "missing.safetensors"], "which does not exist"),
    ],
    ids=lambda value: " ".join(value) or "no prompt" if isinstance(value, list) else "",
)
def test_bad_arguments(segment: Segment, out: Path, arguments: list[str], message: str) -> None:
    result = segment(*arguments)
    assert_refused(result, message)
    assert not (out).exists(), "a failed run left something behind"


def assert_refused(result: Result, message: str) -> None:
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1, "the error is one line"
    assert message in result.stderr


def test_unavailable_backend_says_why(segment: Segment, out: Path) -> None:
    if torch.cuda.is_available():
        result = segment(*BOX, "--backend", "cuda")
        assert_refused(result, "backend 'cuda' does not take tensors on 'cpu'")
    else:
        result = segment(*BOX, "--backend", "cuda")
        assert_refused(result, "backend 'cuda' is not available: ")
    assert not (out).exists()


@pytest.mark.parametrize("kind", ["text", "truncated", "huge", "missing", "directory"])
def test_bad_photos(segment: Segment, out: Path, tmp_path: Path, photo: Path, kind: str) -> None:
    bad = tmp_path / "bad.png"
    if kind == "text":
        bad.write_text("no picture")
    elif kind == "truncated":
        bad.write_bytes(photo.read_bytes()[:2000])
    elif kind == "huge":
        Image.new("1", (20_000, 20_000)).save(bad)
    elif kind == "directory":
        bad.mkdir()
    assert_refused(segment(*BOX, photo=bad), f"photo {bad}: expected")
    assert not (out).exists()


class Poison:
    def __reduce__(self) -> tuple:
        return Path.touch, (Path("poisoned"),)


def test_checkpoint_of_another_model(segment: Segment, out: Path, checkpoint: Path, plugin: Path) -> None:
    as_vit_b = ["--model", "vit_b", "--checkpoint", str(checkpoint)]
    assert_refused(segment(*BOX, *as_vit_b), "checkpoint: expected the weights of vit_b, got")
    as_sam_lite = ["--checkpoint", str(plugin)]
    assert_refused(segment(*BOX, *as_sam_lite), "checkpoint: expected")
    assert not (out).exists()


def test_truncated_and_poisoned_checkpoints(
    segment: Segment, out: Path, tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    truncated = tmp_path / "truncated.safetensors"
    truncated.write_bytes(checkpoint.read_bytes()[:100_000])
    assert_refused(segment(*BOX, "--checkpoint", str(truncated)), "checkpoint: expected")
    poisoned = tmp_path / "poisoned.pth"
    poisoned.write_bytes(pickle.dumps({"weight": Poison()}, protocol=2))
    as_vit_b = ["--model", "vit_b", "--checkpoint", str(poisoned)]
    assert_refused(segment(*BOX, *as_vit_b), "checkpoint: expected a PyTorch file")
    assert not (tmp_path / "poisoned").exists(), "code in the checkpoint was run"
    assert not (out).exists()


def test_plugin_of_another_model(segment: Segment, out: Path, checkpoint: Path) -> None:
    result = segment(*BOX, "--plugin", str(checkpoint))
    assert_refused(result, "plugin: expected a file of format")
    assert not (out).exists()


def test_directory_that_cannot_be_written(segment: Segment, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert_refused(segment(*BOX, out=tmp_path / "file" / "out"), "--out")
    assert names(tmp_path) == ["file"]


def test_earlier_results_survive_a_failed_run(segment: Segment, out: Path) -> None:
    assert segment(*BOX).exit_code == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert segment(*BOX, "--plugin", "no_such_plugin").exit_code == 2
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_as_a_real_process(out: Path, checkpoint: Path, plugin: Path, photo: Path) -> None:
    command = [str(Path(sys.executable).with_name("stable-sam")), "segment", str(photo), "--out", str(out)]
    command += ["--checkpoint", str(checkpoint), "--plugin", str(plugin)]
    good = subprocess.run([*command, *BOX], capture_output=True, text=True)
    assert good.returncode == 0, good.stderr
    assert "photo_mask.png" in good.stdout
    assert (out / "photo_mask.png").exists()
    bad = subprocess.run([*command, "--box", "1", "2", "inf", "4"], capture_output=True, text=True, env={**os.environ})
    assert bad.returncode == 2
    assert bad.stderr == "error: --box: expected finite numbers, got '1 2 inf 4'\n"
    assert bad.stdout == ""


def run(*words: object) -> Result:
    return CliRunner().invoke(app, ["segment", *map(str, words)], catch_exceptions=False)


@pytest.fixture
def folder(tmp_path: Path, photo: Path) -> Path:
    """Photographs of one name in several folders and formats, and of names that are no UTF-8."""
    picture = Image.open(photo)
    for name in ("a/cat.png", "b/cat.png", "a/dog.jpg", "a/Cat.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        picture.rotate(90 * len(list(tmp_path.rglob("*.*")))).save(tmp_path / name)
    return tmp_path


def test_several_photos_in_one_call(folder: Path, checkpoint: Path, plugin: Path, out: Path) -> None:
    photos = [folder / "a/cat.png", folder / "a/dog.jpg"]
    weights = ["--checkpoint", checkpoint, "--plugin", plugin]
    result = run(*photos, *BOX, "--out", out, *weights)
    assert result.exit_code == 0, result.output
    assert {path.stem.split("_")[0] for path in out.iterdir()} == {"cat", "dog"}
    alone = out.parent / "alone"
    assert run(photos[1], *BOX, "--out", alone, *weights).exit_code == 0
    for name in ("dog_mask.png", "dog_overlay.png"):
        assert (out / name).read_bytes() == (alone / name).read_bytes(), "the first photograph changes the second"


@pytest.mark.parametrize("other", ["b/cat.png", "a/Cat.jpg"], ids=["other_folder", "other_case"])
def test_photos_of_one_name_are_refused_together_and_one_after_the_other(
    folder: Path, checkpoint: Path, out: Path, other: str
) -> None:
    first, second = folder / "a/cat.png", folder / other
    options = (*BOX, "--out", out, "--checkpoint", checkpoint, "--plugin", "none")
    assert_refused(run(first, second, *options), "expected names of their own for each photograph, got")
    assert not out.exists()
    assert run(first, *options).exit_code == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    if other == "b/cat.png":
        assert_refused(run(second, *options), "got cat_mask.png, cat_overlay.png, cat.json (--overwrite replaces them)")
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before
        assert run(second, *options, "--overwrite").exit_code == 0
        assert (out / "cat.json").read_bytes() != before["cat.json"]


def test_a_photo_that_does_not_fit_is_named_among_several(folder: Path, checkpoint: Path, out: Path) -> None:
    small = folder / "small.png"
    Image.new("RGB", (10, 10)).save(small)
    result = run(folder / "a/cat.png", small, *BOX, "--out", out, "--checkpoint", checkpoint, "--plugin", "none")
    assert_refused(result, f"{small}: --box: expected a box that meets 0 <= X <= 10")
    assert not out.exists()


def test_masks_of_an_earlier_run_with_more_objects_go(segment: Segment, out: Path) -> None:
    assert segment(*BOX, "--box", "100", "0", "200", "150").exit_code == 0
    result = segment(*BOX)
    assert names(out) == ["photo.json", "photo_mask.png", "photo_overlay.png"]
    assert result.stderr.count("removed ") == 2 and "photo_mask_2.png, of an earlier run" in result.stderr


def test_a_mask_edited_by_hand_is_kept(segment: Segment, out: Path) -> None:
    assert segment(*BOX).exit_code == 0
    Image.new("L", (200, 150)).save(out / "photo_mask.png")
    before = (out / "photo_mask.png").read_bytes()
    assert_refused(segment(*BOX), "got photo_mask.png (--overwrite replaces them)")
    assert (out / "photo_mask.png").read_bytes() == before
    assert segment(*BOX, "--overwrite").exit_code == 0
    assert (out / "photo_mask.png").read_bytes() != before


def test_results_never_replace_a_photo_of_the_run(segment: Segment, out: Path, photo: Path, checkpoint: Path) -> None:
    assert segment(*BOX).exit_code == 0
    options = (*BOX, "--out", out, "--checkpoint", checkpoint, "--plugin", "none", "--overwrite")
    assert_refused(run(photo, out / "photo_mask.png", *options), "photo_mask.png is itself an input")


@pytest.mark.parametrize("box_format", ["xyxy", "xywh"])
def test_a_clipped_box_is_said(segment: Segment, out: Path, box_format: str) -> None:
    numbers = "20,30,150,190" if box_format == "xyxy" else "20,30,130,160"
    result = segment("--box", numbers, "--box-format", box_format)
    assert result.exit_code == 0, result.output
    assert "--box 20 30 150 190 is clipped to 20 30 150 150: the photo is 200 x 150" in result.stderr
    assert json.loads((out / "photo.json").read_text())["objects"][0]["box"] == [20, 30, 150, 150]


@pytest.mark.parametrize(
    "name", [b"caf\xe9.png", b"a [red]b.png", b"line\nfeed.png"], ids=["latin_1", "markup", "feed"]
)
def test_odd_names(photo: Path, checkpoint: Path, tmp_path: Path, name: bytes) -> None:
    odd, out = tmp_path / os.fsdecode(name), tmp_path / "out"
    try:
        odd.write_bytes(photo.read_bytes())
    except OSError:
        pytest.skip("this file system does not take the name")
    options = (*BOX, "--out", out, "--checkpoint", checkpoint, "--plugin", "none")
    for _ in range(2):
        result = run(odd, *options)
        assert result.exit_code == 0, result.output
    stem = name.removesuffix(b".png")
    assert sorted(map(os.fsencode, os.listdir(out))) == [
        stem + end for end in (b".json", b"_mask.png", b"_overlay.png")
    ]
    record = json.loads((out / os.fsdecode(stem + b".json")).read_text(encoding="utf-8"))
    assert record["photo"].isprintable() and record["files"].keys() == {
        record["overlay"],
        record["objects"][0]["masks"][0]["file"],
    }
    assert len(result.stdout.splitlines()) == 3
    odd.write_bytes(b"no picture")
    assert_refused(run(odd, *options), os.path.basename(record["photo"]))


@pytest.mark.parametrize("target", ["closed", "full"])
def test_output_that_nobody_takes_is_no_failure(target: str, photo: Path, checkpoint: Path, tmp_path: Path) -> None:
    command = [str(Path(sys.executable).with_name("stable-sam")), "segment", str(photo), "--out", str(tmp_path / "out")]
    command += ["--checkpoint", str(checkpoint), "--plugin", "none", *BOX]
    if target == "full" and not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    if target == "closed":
        reading, writing = os.pipe()
        os.close(reading)
    else:
        writing = os.open("/dev/full", os.O_WRONLY)
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert done.returncode == 0, done.stderr
    assert names(tmp_path / "out") == ["photo.json", "photo_mask.png", "photo_overlay.png"]
    full = "note: standard output: could not be written (No space left on device); the files are complete\n"
    assert done.stderr == ("" if target == "closed" else full)
