"""`pytest bench`: what its JSON says of each benchmark, and that a wrong contestant is found instead of timed."""

import json
import os
import subprocess
import sys
from itertools import groupby
from pathlib import Path

import pytest
import torch
from segment_anything.modeling.transformer import Attention

ROOT = Path(__file__).resolve().parents[2]
FACTS = {
    *("operation", "contestant", "mode", "cache", "dtype", "device", "B", "T", "C", "H", "W", "max_offset", "backend"),
    *("commit", "error", "errors", "ratios", "ideal_bytes", "flops", "gb_per_s", "percent_of_copy"),
    *("percent_of_matmul", "peak_bytes", "host_work"),
}
MACHINE = {
    *("device", "gpu", "multiprocessors", "l2_bytes", "torch", "triton", "cuda", "python", "cpu", "instruction_set"),
    *("compiler", "load_average", "allow_tf32", "copy_gb_per_s", "matmul_tflop_per_s", "commit"),
}
SAMPLERS = {"cpu", "cpu, NCHW", "eager", "deform_conv2d"}
ATTENTIONS = {"fused", "plain", "plain, sdpa", "eager"}
GROUPS = {
    "deformable_sample forward-fp32-B2": SAMPLERS,
    "deformable_sample forward+backward-fp32-B2": SAMPLERS,
    "deformable_attention forward-fp32-B2": ATTENTIONS,
    "layer forward+backward-bf16-B1": ATTENTIONS,
    "offset_head forward-fp32-B2": {"fused", "eager"},
    "decoder forward-fp32-B2": {"fused", "sampled", "fused, both blocks", "sam", "sam, shared"},
    "predict forward-fp32-B1": {"fused", "sam", "sam, shared"},
    "set_image + predict forward-fp32-B1": {"fused", "sam", "sam, shared"},
    "training_step step-fp32-B4": {"fused", "eager", "reference"},
}

# Two contestants of one group: a percent too much, and a pixel that is not written.
PLANTED = """
import torch

def pytest_configure():
    import contestants

    eager, torchvision = contestants.sample_eagerly, contestants.sample_by_torchvision

    def without_a_pixel(inputs):
        right = torchvision(inputs)
        written = torch.empty_like(right)
        written[..., :-1] = right[..., :-1]
        written[..., :-1, -1] = right[..., :-1, -1]
        return written

    contestants.sample_eagerly = lambda inputs: 1.01 * eager(inputs)
    contestants.sample_by_torchvision = without_a_pixel
"""


def run_bench(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment = clean | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "300"} | variables
    command = [sys.executable, "-m", "pytest", "--quick", "-p", "no:cacheprovider", *words]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The file of the whole suite, at its tiny sizes."""
    path = tmp_path_factory.mktemp("suite") / "quick.json"
    done = run_bench("bench", "--benchmark-only", f"--benchmark-json={path}")
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(path.read_text())


@pytest.mark.slow
def test_every_benchmark_says_what_was_measured(quick: dict) -> None:
    assert set(quick["machine_info"]) >= MACHINE
    assert quick["machine_info"]["copy_gb_per_s"] > 0 and quick["machine_info"]["matmul_tflop_per_s"] > 0
    for benchmark in quick["benchmarks"]:
        facts = benchmark["extra_info"]
        assert set(facts) >= FACTS, benchmark["fullname"]
        assert 0 <= facts["error"] < 1
        if facts["ideal_bytes"] is not None:
            assert facts["gb_per_s"] * benchmark["stats"]["median"] * 1e9 == pytest.approx(facts["ideal_bytes"])
            assert facts["percent_of_copy"] == pytest.approx(
                100 * facts["gb_per_s"] / quick["machine_info"]["copy_gb_per_s"]
            )


@pytest.mark.slow
def test_contestants_of_one_size_stand_together_and_their_ratios_are_of_the_turns(quick: dict) -> None:
    groups = {name: list(group) for name, group in groupby(quick["benchmarks"], key=lambda each: each["group"])}
    assert len(groups) == len({benchmark["group"] for benchmark in quick["benchmarks"]}), "a group is torn"
    contestants = {name: {each["extra_info"]["contestant"] for each in group} for name, group in groups.items()}
    assert contestants.items() >= GROUPS.items()
    for group in groups.values():
        times = {each["extra_info"]["contestant"]: each["stats"]["median"] for each in group}
        for benchmark in group:
            own = times[benchmark["extra_info"]["contestant"]]
            others = {name: time / own for name, time in times.items() if time != own}
            assert benchmark["extra_info"]["ratios"] == pytest.approx(others)  # of one round there is one ratio


@pytest.mark.slow
def test_a_wrong_contestant_fails_and_the_others_are_timed(tmp_path: Path) -> None:
    (tmp_path / "planted.py").write_text(PLANTED)
    file = tmp_path / "planted.json"
    words = ("bench/test_deformable_sample.py", "-k", "forward-fp32", f"--benchmark-json={file}", "-p", "planted")
    done = run_bench(*words, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1, done.stdout + done.stderr
    for name in ("eager", "deform_conv2d"):
        assert f"FAILED bench/test_deformable_sample.py::test_deformable_sample[forward-fp32-B2-{name}]" in done.stdout
    assert done.stdout.count("wrong results, not timed: relative errors {'output': ") >= 2
    timed = {
        each["extra_info"]["contestant"]: each["extra_info"] for each in json.loads(file.read_text())["benchmarks"]
    }
    assert set(timed) == {"cpu", "cpu, NCHW"}
    assert set(timed["cpu"]["ratios"]) == {"cpu, NCHW"}


@pytest.mark.slow
def test_what_became_slower_fails(quick: dict, tmp_path: Path) -> None:
    for benchmark in quick["benchmarks"]:
        benchmark["stats"]["median"] /= 1e6
    (tmp_path / "before.json").write_text(json.dumps(quick))
    words = ("-k", "forward-fp32-B2-cpu", f"--benchmark-compare={tmp_path / 'before.json'}")
    done = run_bench("bench/test_deformable_sample.py", *words, "--benchmark-compare-fail=median:5%")
    assert done.returncode != 0
    assert "Performance has regressed" in done.stdout + done.stderr


@pytest.mark.slow
def test_on_a_gpu_every_state_of_the_caches_is_a_group() -> None:
    done = run_bench("bench", "--device=cuda", "--collect-only", "-q")
    assert done.returncode == 0, done.stdout + done.stderr
    names = [line.partition("::")[2] for line in done.stdout.splitlines() if "::" in line]
    assert len(names) == len(set(names))
    assert {f"test_deformable_sample[{size}-eager]" for size in ("forward-fp32-B2", "forward-fp32-B2-warm")} <= set(
        names
    )
    assert {"test_layer[forward-bf16-B1-graph-plain]", "test_layer[backward-bf16-B1-eager]"} <= set(names)


def test_sizes_on_a_gpu_begin_with_the_most_telling() -> None:
    from cases import Run

    pairs = Run(torch.device("cuda"), False, False, False).dtypes_and_batches(on_cpu=(1,))
    assert pairs[0] == (torch.bfloat16, 64)
    assert len(set(pairs)) == 12


def test_when_the_time_is_up_benchmarks_are_skipped() -> None:
    from cases import Contestant, Group
    from turns import Turns

    def unreachable() -> None:
        raise AssertionError("it was begun")

    late = Turns(torch.device("cpu"), quick=True, deadline=float("-inf"))
    group = Group("op", "forward", torch.float32, 1, "warm", torch.device("cpu"), {}, unreachable, [], 1)
    with pytest.raises(pytest.skip.Exception, match="out of time"):
        late.report(group, Contestant("own", unreachable), benchmark=None)


def test_the_plain_attention_is_sams_own() -> None:
    from contestants import attend_by_sdpa, attend_plainly
    from shapes import ATTENTION, HEADS, INNER, Size, make_inputs

    inputs = make_inputs(Size(torch.float32, 2, 1.0, 7, 256, 5, 6), torch.device("cpu"))
    attention = Attention(256, HEADS, downsample_rate=256 // INNER)
    attention.load_state_dict({name.replace("_", "_proj."): inputs[name] for name in ATTENTION})
    pixels, encoding = (inputs[name].flatten(2).transpose(1, 2) for name in ("features", "key_pe"))
    with torch.no_grad():
        expected = attention(q=inputs["queries"], k=pixels + encoding, v=pixels)
    for step in (attend_plainly, attend_by_sdpa):
        torch.testing.assert_close(step(inputs), expected)


def test_fresh_memory_holds_nan_while_results_are_compared() -> None:
    from timing import poisoned

    with poisoned([torch.zeros(1)]):
        assert torch.empty(1000).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()
