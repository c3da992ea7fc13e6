"""Where there is no terminal, a line now and then."""

import pytest

from stable_sam_cuda.progress import ProgressBars, ProgressLines, duration, progress_shown


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_first_line_after_ten_seconds_then_one_a_minute(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    lines = ProgressLines(clock)
    lines.begin("evaluating", 200, 20)
    for _ in range(180):
        clock.now += 1
        lines.advance()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "evaluating: 30 of 200, about 3 min left",
        "evaluating: 90 of 200, about 2 min left",
        "evaluating: 150 of 200, about 50 s left",
    ]


def test_what_is_done_soon_is_silent_and_notes_stand_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    lines = ProgressLines(clock)
    lines.begin("embeddings", 5)
    lines.advance(5)
    lines.begin("training", 10)
    lines.note("loss 0.5")
    clock.now = 11
    lines.advance()
    assert capsys.readouterr().err == "training: 1 of 10, about 2 min left  loss 0.5\n"


def test_lines_without_a_terminal_and_nothing_where_it_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_shown() as progress:
        assert isinstance(progress, ProgressLines)
    with progress_shown(quiet=True) as progress:
        progress.begin("checking", 3)
        progress.advance()
        progress.note("words")
    assert capsys.readouterr() == ("", "")


def test_bars_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stable_sam_cuda.progress.on_terminal", lambda: True)
    with progress_shown(transient=True) as progress:
        assert isinstance(progress, ProgressBars)
        progress.begin("[/x]", 3)
        progress.advance()
        progress.note("[/y]")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0 s"), (89, "89 s"), (600, "10 min"), (11_100, "3 h 5 min")], ids=str
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
