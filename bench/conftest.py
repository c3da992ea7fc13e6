"""Options, cases and facts of `pytest bench`, which is how this project measures throughput.

    pytest bench --benchmark-only                         everything that this machine can measure
    pytest bench -k "forward-bf16-B64" --benchmark-json FILE
    pytest bench --quick --benchmark-disable              a rehearsal: every contestant verified and called once

The contestants of one group are timed in turns; a contestant that is wrong fails, and gets no time.
"""

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # the modules beside this one, whatever pytest's import mode

from cases import Case, Run
from timing import machine
from turns import CLOCK, Turns

_CASES = pytest.StashKey[dict[str, Case]]()
_TURNS = pytest.StashKey[Turns]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("throughput")
    group.addoption("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    group.addoption("--quick", action="store_true", help="tiny sizes, two rounds: the figures mean nothing")
    group.addoption("--compile", action="store_true", help="torch.compile at every size, and on a CPU")
    group.addoption("--peak-memory", action="store_true", help="of attention on a CPU, too: a fresh process a case")
    group.addoption("--seconds", type=float, default=float("inf"), help="no group begins later than this")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cases(make): the cases of a benchmark, from what the command line asks for")
    config.stash[_CASES] = {}
    deadline = time.monotonic() + config.getoption("seconds")
    config.stash[_TURNS] = Turns(_run(config).device, config.getoption("quick"), deadline)


def _run(config: pytest.Config) -> Run:
    there = "cuda" if torch.cuda.is_available() else "cpu"
    options = (config.getoption(name) for name in ("quick", "compile", "peak_memory"))
    return Run(torch.device(config.getoption("device") or there), *options)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marker = metafunc.definition.get_closest_marker("cases")
    if marker is None:
        return
    cases = {case.key: case for case in marker.kwargs["make"](_run(metafunc.config))}
    metafunc.config.stash[_CASES].update(cases)
    parameters = [
        pytest.param(key, id=case.id, marks=pytest.mark.benchmark(group=case.group, timer=CLOCK.now))
        for key, case in cases.items()
    ]
    metafunc.parametrize("case", parameters, indirect=True)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Groups are of what -k and the like have left."""
    config = session.config
    selected: dict[str, list[Case]] = {}
    for item in session.items:
        case = config.stash[_CASES].get(item.callspec.params.get("case")) if hasattr(item, "callspec") else None
        if case is not None:
            selected.setdefault(case.group, []).append(case)
    config.stash[_TURNS].selected = selected


@pytest.fixture
def case(request: pytest.FixtureRequest) -> Case:
    return request.config.stash[_CASES][request.param]


@pytest.fixture(scope="session")
def turns(request: pytest.FixtureRequest) -> Iterator[Turns]:
    """Measures a group at its first benchmark."""
    yield request.config.stash[_TURNS]


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, object]) -> None:
    device = _run(config).device
    machine_info |= machine(device)
    if not config.getoption("benchmark_disable"):
        machine_info |= config.stash[_TURNS].ceilings
