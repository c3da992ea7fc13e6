"""docs/performance.md: what it says of the records there are, of a GPU's, and of none."""

import json
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "bench"
COPY, MATMUL = 4000.0, 780.0  # GB/s, TFLOP/s


def figure(operation: str, provider: str, batch: int, median: float, peak: int, mode: str = "forward") -> dict:
    facts = {"operation": operation, "provider": provider, "dtype": "bfloat16", "B": batch, "mode": mode}
    ideal = {"ideal_bytes": 4e8, "flops": 7e8, "percent_of_copy": 88.0, "percent_of_matmul": 1.0}
    times = {"median": median, "p20": median, "p80": median, "runs": 9}
    return facts | ideal | {"cache": "cold", "microseconds": times, "peak_bytes": peak}


@pytest.fixture
def made_up() -> dict:
    """A run on a GPU that there is not: the decoder was measured at one size of twelve, the training step never."""
    records = {
        "sampler": [
            figure("deformable_sample", "cuda", 64, 100.0, 1),
            figure("deformable_sample", "eager", 64, 350.0, 1),
            {"operation": "deformable_sample", "provider": "torch.compile", "dtype": "bfloat16", "B": 64}
            | {"skipped": "out of time"},
        ],
        "attention": [
            figure(operation, provider, batch, batch * median, 1)
            for operation, provider, median in (
                ("layer", "fused", 5.0),
                ("plain", "eager", 5.5),
                ("plain", "sdpa", 3.0),
            )
            for batch in (16, 64, 256)
        ],
        "decoder": [figure("decoder", "fused", 64, 5000.0, 30), figure("decoder", "sam", 64, 9000.0, 60)],
    }
    parts = {
        name: {"machine": {"torch": "2.11.0"}, "copy_gb_per_s": COPY, "matmul_tflop_per_s": MATMUL, "records": found}
        for name, found in records.items()
    }
    return {"device": "Made Up 1", "commit": "abc", "date": "2030-01-01", "dry_run": False, "parts": {}} | parts


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """The repository's own CPU records, in a folder of the test's."""
    folder = tmp_path / "results"
    shutil.copytree(BENCH / "results" / "cpu", folder / "cpu")
    return folder


@pytest.fixture
def write(results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import report

    def write(*records: dict) -> str:
        for place, record in enumerate(records):
            (results / "made-up-1").mkdir(exist_ok=True)
            (results / "made-up-1" / f"{record['date']}-{place}.json").write_text(json.dumps(record))
        report.write(results, tmp_path / "docs" / "performance.md")
        return (tmp_path / "docs" / "performance.md").read_text()

    return write


def row(page: str, start: str) -> list[str]:
    """Cells of the one row that begins so."""
    (line,) = [line for line in page.splitlines() if line.startswith(f"| {start} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_committed_page_is_what_the_records_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    import report

    report.write(BENCH / "results", tmp_path / "performance.md")
    assert (tmp_path / "performance.md").read_text() == (ROOT / "docs" / "performance.md").read_text(), (
        "run make performance"
    )
    drawn = {path.name for path in (tmp_path / "images").iterdir()}
    assert drawn == {path.name for path in (ROOT / "docs" / "images").glob("performance_*")}


def test_without_a_gpu_record_nothing_is_claimed(write, tmp_path: Path) -> None:
    page = write()
    assert "**Nothing on this page was measured on a GPU" in page
    gpu_rows = page.partition("## Targets on a GPU")[2].partition("## Targets on a CPU")[0].splitlines()
    rows = [line for line in gpu_rows if line.startswith("| ")][1:]
    assert len(rows) == 12 and all("not measured on a GPU yet" in line for line in rows)
    assert "no roofline" in page
    assert [path.name for path in (tmp_path / "docs" / "images").iterdir()] == ["performance_cpu.png"]


def test_a_rehearsal_is_no_record(write, made_up: dict) -> None:
    assert "Made Up 1" not in write(made_up | {"dry_run": True})


def test_targets_stand_beside_a_gpus_figures(write, made_up: dict, tmp_path: Path) -> None:
    page = write(made_up)
    assert "measured on a GPU:" not in page and "not measured on a GPU yet" not in page
    forward = "sampler forward, B = 64, bf16"
    assert row(page, f"{forward} | copy, ideal bytes")[3:] == ["88 % (bfloat16, B = 64)", "passed"]
    assert row(page, f"{forward} | eager chain")[3:] == ["3.5 x as fast (bfloat16, B = 64)", "**missed**"]
    assert row(page, f"{forward} | `torch.compile`")[3:] == ["not in this record", ""]
    plain = "plugin and attention, B = 16 to 256, bf16 | plain SAM's attention, no plugin, "
    assert row(page, plain + "eager")[-1] == "passed"
    assert row(page, plain + "by SDPA")[-1] == "**missed**"
    decoder = [line for line in page.splitlines() if line.startswith("| stabilised decoder")]
    assert len(decoder) == 2 and all("open: 1 of 12 sizes measured" in line for line in decoder)
    assert "0.5 x its peak memory (bfloat16, B = 64, the worst of 1)" in decoder[1]
    assert f"copy moved {COPY:.0f} GB/s" in page and f"ran at {MATMUL:.1f} TFLOP/s" in page
    assert "deformable_sample, torch.compile, bfloat16, B = 64: out of time" in page
    for picture in ("roofline", "time"):
        path = tmp_path / "docs" / "images" / f"performance_made-up-1_{picture}.png"
        assert path.read_bytes().startswith(b"\x89PNG") and f"images/{path.name}" in page


def test_the_latest_record_of_a_device_counts(write, made_up: dict) -> None:
    later = json.loads(json.dumps(made_up)) | {"date": "2030-01-02", "commit": "def"}
    later["sampler"]["records"][1]["microseconds"]["median"] = 500.0
    page = write(made_up, later)
    assert row(page, "sampler forward, B = 64, bf16 | eager chain")[3] == "5 x as fast (bfloat16, B = 64)"
    assert "commit def" in page and "commit abc" not in page


def test_a_record_without_the_figures_for_a_plot_says_so(write, made_up: dict, tmp_path: Path) -> None:
    made_up["sampler"]["records"], made_up["attention"]["records"] = [], []
    page = write(made_up)
    assert "No plot (roofline): the record has no figure for it." in page
    assert not (tmp_path / "docs" / "images" / "performance_made-up-1_roofline.png").exists()


def test_every_cpu_record_stands_with_its_commit_and_machine(write, results: Path) -> None:
    page = write()
    for path in (results / "cpu").glob("*.json"):
        record = json.loads(path.read_text())
        assert f"`bench/results/cpu/{path.name}`: commit {record['commit']}, {record['cpu']}" in page
        assert sum(path.name in line for line in page.splitlines()) >= 1
