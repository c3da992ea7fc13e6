"""What was decided or lost on reading files is said once a reason, and counted."""

import threading
import warnings

import pytest

from stable_sam_cuda.cli.notices import notices_shown
from stable_sam_cuda.notes import note


def test_the_first_of_a_reason_and_the_number_of_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    with notices_shown():
        for subject in ("a.png", "b.png", "a.png", "c.png"):
            note("soft edges", subject)
        note("stretched", "d[/x].png")
    assert capsys.readouterr().err.splitlines() == [
        "note: a.png: soft edges",
        "note: d[/x].png: stretched",
        "note: ... and 2 more: soft edges",
    ]


def test_threads_are_counted_together(capsys: pytest.CaptureFixture[str]) -> None:
    with notices_shown():
        threads = [threading.Thread(target=note, args=("soft edges", f"{index}.png")) for index in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert "... and 19 more: soft edges" in capsys.readouterr().err


def test_said_before_an_error_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError), notices_shown():
        note("soft edges", "a.png")
        note("soft edges", "b.png")
        raise ValueError
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_other_warnings_are_as_before_and_the_filters_are_restored() -> None:
    before = list(warnings.filters)
    with pytest.warns(RuntimeWarning, match="another"), notices_shown():
        warnings.warn("another", RuntimeWarning, stacklevel=1)
    assert warnings.filters == before


def test_other_processes_of_torchrun_say_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    with notices_shown():
        note("soft edges", "a.png")
    assert capsys.readouterr().err == ""
