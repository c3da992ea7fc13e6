"""The log of a run is JSON, whatever came in."""

import json
import math

import pytest

from stable_sam_cuda.notes import DataWarning
from stable_sam_cuda.training.record import RunLog, drop_newer, json_line

WHOLE = {"step": 1, "loss": 0.5, "iou": 0.5}


def strict(path):
    def refuse(constant):
        raise AssertionError(constant)

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_becomes_null_at_any_depth(value):
    record = {"loss": value, "alpha_1": {"box": value, "point": 0.5}, "kinds": [value, "box"]}
    assert json.loads(json_line(record)) == {
        "loss": None, "alpha_1": {"box": None, "point": 0.5}, "kinds": [None, "box"],
    }  # fmt: skip


def test_steps_without_an_object_do_not_count_for_the_means(tmp_path):
    log = RunLog(tmp_path)
    log.add({"step": 1, "loss": math.nan, "iou": math.nan})
    assert (log.loss, log.iou) == (None, None)
    log.add({"step": 2, "loss": 0.5, "iou": 0.25})
    log.add({"step": 3, "loss": math.nan, "iou": math.nan})
    log.close()
    assert [line["loss"] for line in strict(tmp_path / "log.jsonl")] == [None, 0.5, None]
    again = RunLog(tmp_path, 3)
    again.close()
    assert (again.loss, again.iou) == (0.5, 0.25)


def test_a_log_with_nan_of_an_earlier_version_is_json_afterwards(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1, "loss": NaN, "iou": NaN}\n{"step": 2, "loss": 0.5, "iou": 0.5}\n')
    log = RunLog(tmp_path, 2)
    log.close()
    assert log.loss == 0.5
    assert strict(path)[0] == {"step": 1, "loss": None, "iou": None}


@pytest.mark.parametrize(
    "line",
    [b"", b"no json", b"[1, 2]", b"3", b"null", b'{"loss": 1}', b'{"step": "2", "loss": 1}', b'{"step": true}',
     b'{"step": 2, "loss": "low", "iou": 0.5}', b'{"step": 2, "loss": [1], "iou": 0.5}', b"\xff\xfe", b"[" * 100000],
    ids=lambda line: line[:30].decode("latin-1"),
)  # fmt: skip
def test_lines_that_are_no_records_are_dropped_and_said(line, tmp_path):
    whole = json.dumps(WHOLE).encode()
    (tmp_path / "log.jsonl").write_bytes(b"\n".join([whole, line, whole, b'{"step": 2, "lo']))
    with pytest.warns(DataWarning, match="no records"):
        log = RunLog(tmp_path, 5)
    log.close()
    assert strict(tmp_path / "log.jsonl") == [WHOLE, WHOLE]


@pytest.mark.filterwarnings("error")
def test_a_broken_last_line_is_dropped_in_silence(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text(json.dumps(WHOLE) + '\n{"step": 2, "lo')
    assert drop_newer(path, 5) == [WHOLE]
