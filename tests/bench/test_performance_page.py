"""docs/performance.md: what it says of the records there are, of a GPU's, and of none."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COPY, MATMUL = 4000.0, 780.0  # GB/s, TFLOP/s
CPU = {"gpu": None, "device": "Made Up CPU, 2 threads", "cpu": "Made Up", "load_average": [0.1, 0.2, 0.3]}
GPU = {"gpu": "Made Up 1", "device": "Made Up 1", "multiprocessors": 132}
BYTES = {"ideal_bytes": 4e8, "percent_of_copy": 88.0, "percent_of_matmul": 1.0}


def benchmark(operation: str, contestant: str, batch: int, seconds: float, **facts: object) -> dict:
    """One as pytest-benchmark writes it: on a GPU unless ``facts`` say otherwise."""
    info = {"operation": operation, "contestant": contestant, "B": batch, "mode": "forward", "dtype": "bfloat16"}
    info |= {"cache": "cold", "ratios": {}, "peak_bytes": 2**20, "error": 1e-6, "T": 8, "C": 256, **facts}
    name = "-".join(map(str, (operation, contestant, batch, *facts.values())))
    stats = {"median": seconds, "q1": 0.9 * seconds, "q3": 1.1 * seconds, "rounds": 9}
    return {"fullname": f"bench/test_made_up.py::{name}", "extra_info": info, "stats": stats}


def record(machine: dict, *benchmarks: dict, day: int = 1, **more: object) -> dict:
    ceilings = {"copy_gb_per_s": COPY, "matmul_tflop_per_s": MATMUL, "commit": f"abc{day}", "torch": "2.11.0"}
    return {"machine_info": machine | ceilings, "datetime": f"2030-01-0{day}", "benchmarks": list(benchmarks), **more}


def on_gpu(**more: object) -> dict:
    """A run on a GPU that there is not: the decoder at one size of twelve, the training step never."""
    layers = {"fused": 5e-6, "plain": 5.5e-6, "plain, sdpa": 3e-6}
    return record(
        GPU,
        benchmark("deformable_sample", "cuda", 64, 1e-4, **BYTES),
        benchmark("deformable_sample", "eager", 64, 3.5e-4, **BYTES),
        *(benchmark("layer", name, batch, batch * t) for name, t in layers.items() for batch in (16, 64, 256)),
        benchmark("decoder", "fused", 64, 5e-3, peak_bytes=30 * 2**20),
        benchmark("decoder", "sam", 64, 9e-3, peak_bytes=60 * 2**20),
        **more,
    )


def on_cpu(ratio: float = 13.0, day: int = 1) -> dict:
    facts = {"dtype": "float32", "cache": "warm", "peak_bytes": None}
    return record(
        CPU,
        *(benchmark("deformable_sample", "cpu", b, 1e-4 * b, **facts, ratios={"eager": ratio}) for b in (1, 16)),
        *(benchmark("deformable_sample", "eager", b, 1e-3 * b, **facts) for b in (1, 16)),
        day=day,
    )


@pytest.fixture
def write(tmp_path: Path):
    """Writes the page from records that are given as folder and content; returns it."""
    import performance_page

    def write(*records: tuple[str, object]) -> str:
        for place, (folder, content) in enumerate(records):
            path = tmp_path / "results" / folder / f"{place}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(content))
        performance_page.write(tmp_path / "results", tmp_path / "docs" / "performance.md")
        return (tmp_path / "docs" / "performance.md").read_text()

    return write


def row(page: str, start: str) -> list[str]:
    """Cells of the one row that begins so."""
    (line,) = [line for line in page.splitlines() if line.startswith(f"| {start} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_committed_page_is_what_the_records_give(tmp_path: Path) -> None:
    import performance_page

    performance_page.write(ROOT / "bench" / "results", tmp_path / "performance.md")
    committed = (ROOT / "docs" / "performance.md").read_text()
    assert (tmp_path / "performance.md").read_text() == committed, "run make performance"
    drawn = {path.name for path in tmp_path.glob("images/*")}
    assert drawn == {path.name for path in (ROOT / "docs" / "images").glob("performance_*")}


def test_without_a_gpu_record_nothing_is_claimed(write, tmp_path: Path) -> None:
    page = write(("cpu", on_cpu()))
    assert "**Nothing on this page was measured on a GPU" in page
    gpu_rows = page.partition("## Targets on a GPU")[2].partition("## Targets on a CPU")[0].splitlines()
    rows = [line for line in gpu_rows if line.startswith("| ")][1:]
    assert len(rows) == 12 and all("not measured on a GPU yet" in line for line in rows)
    assert "There is no record, and so no figure and no plot." in page
    assert [path.name for path in (tmp_path / "docs" / "images").iterdir()] == [
        "performance_made-up-made-up-cpu-2-threads_times.png"
    ]


def test_a_ratio_of_turns_counts_more_than_that_of_the_medians(write) -> None:
    page = write(("cpu", on_cpu(ratio=11.0)))
    assert row(page, "sampler forward, B = 1 | eager chain")[3:] == ["11 x as fast (float32, B = 1)", "**missed**"]
    assert row(page, "sampler forward, B = 16 | eager chain")[-1] == "passed"
    assert row(page, "sampler forward and backward, B = 1 | eager chain")[3:] == ["no record", ""]
    cells = row(page, "forward, float32, B = 16")
    assert cells == ["forward, float32, B = 16", "1.6 ms (1.44 to 1.76)", "16 ms, 11.00 x", "", "1e-06"]


def test_p20_and_p80_are_of_all_rounds_where_they_are_recorded(tmp_path: Path) -> None:
    from records import read

    content = on_cpu()
    content["benchmarks"][0]["stats"]["data"] = [0.1 * n for n in range(1, 10)]
    (tmp_path / "one.json").write_text(json.dumps(content))
    first, second, *_ = read(tmp_path / "one.json", "one.json")
    assert (first.p20, first.p80) == pytest.approx((0.26, 0.74))
    assert (second.p20, second.p80) == pytest.approx((0.9 * 16e-4, 1.1 * 16e-4))


@pytest.mark.parametrize(
    "content", [[], {"results": []}, {"benchmarks": [{"stats": {"median": 1}}]}, record(CPU, benchmark("", "", 1, 1.0))]
)
def test_files_of_another_kind_are_named_and_left_out(write, capsys: pytest.CaptureFixture, content: object) -> None:
    if isinstance(content, dict) and content.get("machine_info"):
        del content["benchmarks"][0]["extra_info"]["contestant"]
    page = write(("cpu", content), ("cpu", on_cpu()))
    assert "left out: bench/results/cpu/0.json: expected this project's benchmarks" in capsys.readouterr().err
    assert "cpu/0.json" not in page and "cpu/1.json" in page


def test_targets_stand_beside_a_gpus_figures(write, tmp_path: Path) -> None:
    page = write(("made-up-1", on_gpu()))
    assert "measured on a GPU:" not in page and "not measured on a GPU yet" not in page
    forward = "sampler forward, B = 64, bf16"
    assert row(page, f"{forward} | copy, ideal bytes")[3:] == ["88 % of the copy (bfloat16, B = 64)", "passed"]
    assert row(page, f"{forward} | eager chain")[3:] == ["3.5 x as fast (bfloat16, B = 64)", "**missed**"]
    assert row(page, f"{forward} | `torch.compile`")[3:] == ["not measured on this GPU yet", ""]
    plain = "plugin and attention, B = 16 to 256, bf16 | plain SAM's attention, no plugin, "
    assert row(page, plain + "eager")[-1] == "passed"
    assert row(page, plain + "by SDPA")[-1] == "**missed**"
    decoder = [line for line in page.splitlines() if line.startswith("| stabilised decoder")]
    assert len(decoder) == 2 and all("open: 1 of 12 sizes measured" in line for line in decoder)
    assert "0.5 x its peak memory (bfloat16, B = 64, the worst of 1)" in decoder[1]
    assert f"copy moved {COPY:.0f} GB/s" in page and f"ran at {MATMUL:.3g} TFLOP/s" in page
    for picture in ("roofline", "times"):
        path = tmp_path / "docs" / "images" / f"performance_made-up-1_{picture}.png"
        assert path.read_bytes().startswith(b"\x89PNG") and f"images/{path.name}" in page


def test_the_newest_record_of_a_group_counts_and_older_ones_fill_in(write) -> None:
    samplers = [benchmark("deformable_sample", name, 64, t) for name, t in (("cuda", 1e-4), ("eager", 5e-4))]
    page = write(("made-up-1", on_gpu()), ("made-up-1", record(GPU, *samplers, day=2)))
    assert row(page, "sampler forward, B = 64, bf16 | eager chain")[3] == "5 x as fast (bfloat16, B = 64)"
    assert row(page, "sampler forward, B = 64, bf16 | copy, ideal bytes")[3] == "not measured on this GPU yet"
    assert "commit abc2" in page and "commit abc1" in page
    assert row(page, "plugin and attention, B = 64, bf16 | eager chain")[3] == "not measured on this GPU yet"
    assert row(page, "stabilised decoder, B = 1 to 256 | `segment_anything`'s decoder, no plugin | <= 1 x its time")


def test_a_rehearsal_is_no_record(write) -> None:
    assert "Made Up 1" not in write(("made-up-1", on_gpu(dry_run=True)))


def test_figures_of_two_machines_are_not_compared(write) -> None:
    other = record(GPU | {"device": "Made Up 2"}, benchmark("deformable_sample", "eager", 64, 1.0), day=2)
    page = write(("made-up-1", on_gpu()), ("made-up-2", other))
    first, second = (line for line in page.splitlines() if line.startswith("| sampler forward, B = 64, bf16 | eager"))
    assert "3.5 x as fast" in first + second and "not measured on this GPU yet" in first + second
