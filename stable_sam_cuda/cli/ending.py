"""The ways in which a program is told to end: as exceptions, and not in the middle of a step that must be whole."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

# A terminal that closes sends SIGHUP; Windows has none.
TERMINATING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


def _end(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def end_by_exception() -> Callable[[], None]:
    """SIGTERM and SIGHUP raise SystemExit from now on, so that staged files go; returns what restores the old ways.

    Under ``torchrun`` they end the process at once as ever: it may be waiting, in C++, for one that has died.
    """
    if not _in_main_thread() or "LOCAL_RANK" in os.environ:
        return lambda: None
    # Who ignores a signal, as nohup does, goes on ignoring it.
    changed = [number for number in TERMINATING if signal.getsignal(number) is signal.SIG_DFL]
    for number in changed:
        signal.signal(number, _end)

    def restore() -> None:
        for number in changed:
            if signal.getsignal(number) is _end:
                signal.signal(number, signal.SIG_DFL)

    return restore


@contextmanager
def signals_deferred() -> Iterator[None]:
    """Signals that arrive in the block take effect at its end."""
    if not _in_main_thread():
        yield
        return
    arrived: list[tuple[int, FrameType | None]] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, *TERMINATING)}
    handlers = {number: handler for number, handler in before.items() if callable(handler)}
    for number in handlers:
        signal.signal(number, lambda *signalled: arrived.append(signalled))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    for number, frame in arrived[:1]:
        handlers[signal.Signals(number)](number, frame)
