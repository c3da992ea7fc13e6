"""Options, cases and facts of `pytest bench`, which is how this project measures throughput.

    pytest bench --benchmark-only                         everything that this machine can measure
    pytest bench -k "forward-bf16-B64" --benchmark-json FILE
    pytest bench --quick --benchmark-disable              a rehearsal: every contestant verified and called once
    ncu pytest bench/test_deformable_sample.py -k "forward-bf16-B64-cuda" --benchmark-disable

The contestants of one group are timed in turns; a contestant that is wrong fails, and gets no time.
"""

import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # the modules beside this one, whatever pytest's import mode

from cases import Contestant, Group, Run
from timing import machine
from turns import Turns

Case = tuple[Group, Contestant]
_CASES = pytest.StashKey[dict[str, Case]]()
_TURNS = pytest.StashKey[Turns]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("throughput")
    group.addoption("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    group.addoption("--quick", action="store_true", help="tiny sizes, one round: the figures mean nothing")
    group.addoption("--compile", action="store_true", help="torch.compile at every size, and on a CPU")
    group.addoption("--peak-memory", action="store_true", help="of attention on a CPU, too: a fresh process each")
    group.addoption("--seconds", type=float, default=float("inf"), help="no group begins later than this")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "groups(make): what a benchmark compares, from what the command line asks for")
    if config.getoption("quick"):
        torch.set_num_threads(1)  # a rehearsal shares its machine, and threads that wait for one another spin
    deadline = time.monotonic() + config.getoption("seconds")
    config.stash[_CASES] = {}
    config.stash[_TURNS] = Turns(_run(config).device, config.getoption("quick"), deadline)


def _run(config: pytest.Config) -> Run:
    device = config.getoption("device") or ("cuda" if torch.cuda.is_available() else "cpu")
    return Run(torch.device(device), *[config.getoption(name) for name in ("quick", "compile", "peak_memory")])


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One benchmark a contestant, ``forward-bf16-B64-cuda``."""
    marker = metafunc.definition.get_closest_marker("groups")
    parameters = []
    for group in marker.kwargs["make"](_run(metafunc.config)) if marker else ():
        mark = pytest.mark.benchmark(group=group.name, timer=metafunc.config.stash[_TURNS].clock.now)
        for contestant in group.contestants:
            name = f"{group.size}-{contestant.name.replace(', ', '_').replace(' ', '_')}"
            parameters.append(pytest.param(f"{group.operation} {name}", id=name, marks=mark))
            metafunc.config.stash[_CASES][f"{group.operation} {name}"] = group, contestant
    if marker:
        metafunc.parametrize("case", parameters, indirect=True)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Who takes turns is who is left by -k and the like."""
    cases, selected = session.config.stash[_CASES], session.config.stash[_TURNS].selected
    for item in session.items:
        key = item.callspec.params.get("case") if hasattr(item, "callspec") else None
        if key in cases:
            group, contestant = cases[key]
            selected.setdefault(group.name, []).append(contestant)


@pytest.fixture
def case(request: pytest.FixtureRequest) -> Case:
    return request.config.stash[_CASES][request.param]


@pytest.fixture
def turns(request: pytest.FixtureRequest) -> Turns:
    return request.config.stash[_TURNS]


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, object]) -> None:
    for name in ("node", "release", "python_build"):  # of somebody's computer
        machine_info.pop(name, None)
    machine_info |= machine(_run(config).device) | {"quick": config.getoption("quick")}
    if not config.getoption("benchmark_disable"):
        machine_info |= config.stash[_TURNS].ceilings
