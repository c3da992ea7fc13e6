"""Several rows at once: order, waiting for shared files, failures, the deadline."""

import subprocess
import sys
import time


def started(code, log=None):
    def start(turn):
        if log is not None:
            log.append((turn.name, time.monotonic()))
        words = [sys.executable, "-c", code.format(row=turn.row)]
        return subprocess.Popen(words, start_new_session=True)

    return start


def test_turns_run_in_order_and_failures_are_told():
    from rounds import Turn, run_turns

    log = []
    turns = [Turn("one", 0), Turn("two", 0), Turn("three", 1)]
    outcomes = run_turns(turns, 1, 60, started("import sys; sys.exit(3 if '{row}' == 'two' else 0)", log))
    assert outcomes == {"one-0": "passed", "two-0": "failed with exit code 3", "three-1": "passed"}
    assert [name for name, _ in log] == ["one-0", "two-0", "three-1"]


def test_those_who_need_a_file_wait_for_the_first_to_make_it():
    from rounds import Turn, run_turns

    log = []
    cache = frozenset({"cache"})
    turns = [Turn("maker", 0, cache), Turn("user", 0, cache), Turn("other", 0), Turn("user", 1, cache)]
    outcomes = run_turns(turns, 3, 60, started("import time; time.sleep(1)", log))
    assert set(outcomes.values()) == {"passed"}
    times = dict(log)
    assert [name for name, _ in log][:2] == ["maker-0", "other-0"]
    assert times["user-0"] - times["maker-0"] > 1
    assert times["user-1"] - times["user-0"] < 1  # now both at once


def test_a_maker_that_failed_is_followed_by_one_other_at_a_time():
    from rounds import Turn, run_turns

    log = []
    cache = frozenset({"cache"})
    turns = [Turn(name, 0, cache) for name in ("broken", "second", "third")]
    code = "import sys, time; time.sleep(0.5); sys.exit('{row}' == 'broken')"
    outcomes = run_turns(turns, 3, 60, started(code, log))
    assert list(outcomes.values()) == ["failed with exit code 1", "passed", "passed"]
    times = dict(log)
    assert times["third-0"] - times["second-0"] > 0.5


def test_the_deadline_ends_what_runs_and_begins_nothing_more():
    from rounds import Turn, run_turns

    begun = time.monotonic()
    turns = [Turn("endless", 0), Turn("never", 0)]
    outcomes = run_turns(turns, 1, 1.5, started("import time; time.sleep(100)"))
    assert outcomes == {"endless-0": "out of time", "never-0": "not begun"}
    assert time.monotonic() - begun < 10
