"""What is typed wrongly is told in one line, by the option's own name, before anything is done."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from stable_sam_cuda.cli import app

SEGMENT = ["segment", "PHOTO", "--box", "20", "30", "150", "120", "--out", "OUT"]
EVALUATE = ["evaluate", "--data", "DATA", "--out", "OUT"]
TRAIN = ["train", "--data", "DATA", "--out", "OUT"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nope"], "No such command 'nope' (stable-sam --help lists the options)"),
        (["--nope"], "No such option: --nope"),
        (["segment"], "Missing argument 'PHOTO"),
        ([*SEGMENT, "--nope", "3"], "(stable-sam segment --help lists the options)"),
        ([*SEGMENT, "--out="], "--out: expected a value, got an empty one"),
        ([*SEGMENT, "--out", ""], "--out: expected a value, got an empty one"),
        ([*SEGMENT, "--plugin", ""], "--plugin: expected a value, got an empty one"),
        ([*SEGMENT, ""], "PHOTO: expected a value, got an empty one"),
        ([*SEGMENT, "-"], "photo -: expected a picture file, got the standard input"),
        ([*SEGMENT, "PHOTO"], "expected each photograph once, got it twice"),
        ([*SEGMENT, "OUTSIDE"], "photo OUTSIDE: expected a picture file, got a path where no file is"),
        ([*SEGMENT, "DATA"], "expected a picture file, got a directory"),
        ([*SEGMENT, "--box"], "--box: expected four numbers X0 Y0 X1 Y1, got ''"),
        ([*SEGMENT, "--box-format", "cxcywh"], "--box-format: expected xyxy or xywh, got 'cxcywh'"),
        ([*SEGMENT, "--point", "3", "4", "0"], "write 3 4:0"),
        ([*SEGMENT, "--model", "vit_x"], "--model: expected one of vit_b"),
        ([*SEGMENT, "--plugin", "nope"], "--plugin: expected the path of a .safetensors file"),
        (
            [*SEGMENT, "--plugin", "nope.safetensors"],
            "--plugin: expected a .safetensors file, got nope.safetensors, wh",
        ),
        ([*SEGMENT, "--checkpoint", "nope"], "--checkpoint: expected a file, got nope, which does not exist"),
        ([*SEGMENT, "--checkpoint", "DATA"], "--checkpoint: expected a file, got the directory"),
        ([*SEGMENT, "--backend", "fpga"], "--backend: expected one of"),
        ([*SEGMENT, "--device", "cuda:x"], "--device: expected auto, cpu, cuda or cuda:N, got 'cuda:x'"),
        (["automask", "PHOTO", "--points-per-side", "x"], "--points-per-side: expected a whole number, got 'x'"),
        (["automask", "PHOTO", "--min-score", "x"], "--min-score: expected a number, got 'x'"),
        (["automask", "PHOTO", "--min-score", "1e400"], "--min-score: expected a number from 0 to 1, got inf"),
        (["evaluate", "--out", "OUT"], "Missing option '--data'"),
        (["evaluate", "--out", "OUT", "--data", "nope"], "--data: expected a folder or a COCO file, got nope, which"),
        ([*EVALUATE, "--draws", "0"], "--draws: expected at least 1, got '0'"),
        ([*EVALUATE, "--draws=1.5"], "--draws: expected a whole number, got '1.5'"),
        ([*EVALUATE, "--every", "0"], "--every: expected at least 1, got '0'"),
        ([*EVALUATE, "--limit", "-3"], "--limit: expected at least 1, got '-3'"),
        ([*EVALUATE, "--split", ""], "--split: expected a value, got an empty one"),
        ([*EVALUATE, "--split", "val"], "--split: expected splits named in"),
        ([*EVALUATE, "--prompts", ""], "--prompts: expected a value, got an empty one"),
        ([*EVALUATE, "--prompts", "gt_box,"], "--prompts: expected some of gt_box"),
        ([*EVALUATE, "--prompts", "gt_box,gt_box"], "--prompts: expected each kind once, got gt_box twice"),
        ([*EVALUATE, "--device", "gpu"], "--device: expected auto, cpu, cuda or cuda:N, got 'gpu'"),
        ([*EVALUATE, "--device", "cuda:99"], "--device: expected a CUDA device of this machine"),
        ([*EVALUATE, "--model", "vit_x"], "--model: expected one of vit_b"),
        ([*EVALUATE, "--plugin", "nope"], "--plugin: expected"),
        ([*EVALUATE, "--layout", "zip"], "--layout: expected one of"),
        ([*EVALUATE, "--masks", "soft"], "--masks: expected one of"),
        ([*EVALUATE, "--crowds", "some"], "--crowds: expected one of"),
        ([*EVALUATE, "--average-precision"], "--data: expected pictures of a COCO file"),
        ([*TRAIN, "--epochs", "0"], "--epochs: expected at least 1, got '0'"),
        ([*TRAIN, "--blocks", "3"], "--blocks: expected at most 2, got '3'"),
        ([*TRAIN, "--lr", "nan"], "--lr: expected a finite number above 0, got nan"),
        ([*TRAIN, "--time-budget", "nan"], "--time-budget: expected "),
        ([*TRAIN, "--data", "nope"], "--data: expected a folder or a COCO file, got nope, which does not exist"),
        ([*TRAIN, "--model", "vit_x"], "--model: expected one of vit_b"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_one_line(words: list[str], message: str, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from stable_sam_cuda.sam import build

    def load(*arguments: object, **options: object) -> None:
        pytest.fail("a model was loaded first")

    monkeypatch.setattr(build, "build_sam_lite", load)
    data, out = tmp_path / "data", tmp_path / "out"
    for part in ("images", "masks"):
        (data / part).mkdir(parents=True)
        (data / part / "0.png").write_bytes(b"not looked at")
    known = {"PHOTO": str(photo), "DATA": str(data), "OUT": str(out)}
    result = CliRunner().invoke(app, [known.get(word, word) for word in words], catch_exceptions=False)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    assert message in result.stderr
    assert result.stdout == ""
    assert not out.exists() or not list(out.iterdir())


def test_a_file_named_like_an_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("--cat.jpg").write_bytes(b"")
    result = CliRunner().invoke(app, ["segment", "--cat.jpg", "--point", "1", "2"])
    assert (result.exit_code, "a file of that name is ./--cat.jpg" in result.stderr) == (2, True)
