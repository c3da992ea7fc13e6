"""The trial of other block sizes, rehearsed in Triton's interpreter."""

import sys

import pytest

from stable_sam_cuda.ops import libraries

pytestmark = pytest.mark.skipif(
    not libraries.triton_interprets(), reason="a rehearsal in Triton's interpreter, which is off where there is a GPU"
)


@pytest.fixture
def trial(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """Runs the script on a tiny map; returns its lines."""
    import attention_plans

    def trial(*words: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", ["attention_plans.py", "--tiny", "--check-only", *words])
        attention_plans.main()
        return capsys.readouterr().out.splitlines()

    return trial


def test_every_kernel_gets_its_plans_and_right_ones_pass(trial) -> None:
    lines = trial("--dtype", "float32", "--share", "1/3")
    assert [line.split(": ")[0] for line in lines] == [
        f"float32, 56 rows, {ladder}" for ladder in ("forward_plans", "tiles_plans", "rows_plans")
    ]
    assert not any("WRONG" in line for line in lines)


def test_a_wrong_plan_is_said(trial, monkeypatch: pytest.MonkeyPatch) -> None:
    import attention_plans
    import torch

    monkeypatch.setitem(attention_plans.LARGEST_ERROR, torch.float16, 1e-9)
    (line,) = trial("--dtype", "float16", "--share", "0/100")
    assert line.endswith(", WRONG")


def test_the_kernels_take_the_plan_and_then_their_own_again() -> None:
    import attention_plans
    import torch
    from attention_plans import forward, only, plan

    candidate, real = plan(16, 32, (4, 4), 4, 1), forward.forward_plans
    with only(forward, "forward_plans", candidate):
        assert forward.forward_plans(torch.float16, 256, 56, None) == [candidate]
    assert forward.forward_plans is real
    assert attention_plans.plan(16, 32, (4, 4), 4, 1) == candidate
