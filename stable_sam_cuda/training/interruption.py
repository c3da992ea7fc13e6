"""Ctrl-C, SIGTERM and SIGHUP in a training loop: the step ends, a checkpoint is written, the program leaves."""

import signal
import threading
import time
from types import FrameType, TracebackType

import torch
from torch import distributed

# A terminal that closes sends SIGHUP, which Windows has not.
SIGNALS = (signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else []))
# torchrun passes on a signal that its processes have had from the terminal already: that is the same request.
SAME_REQUEST_SECONDS = 5.0


class Interrupted(KeyboardInterrupt):
    """SIGINT ended a run; its checkpoint is that of ``step``."""

    def __init__(self, step: int) -> None:
        super().__init__(f"interrupted at step {step}")
        self.step = step


class Terminated(SystemExit):
    """SIGTERM or SIGHUP ended a run, exit status 143 or 129; its checkpoint is that of ``step``."""

    def __init__(self, step: int, number: int = signal.SIGTERM) -> None:
        super().__init__(128 + number)
        self.step = step


class Interruption:
    """As long as the block runs, a first SIGINT, SIGTERM or SIGHUP is remembered, and a second one leaves at once.

    Only in the main thread, where Python hears of signals; and a signal that is ignored stays ignored.
    """

    def __init__(self) -> None:
        self.number = 0  # of the signal that came; 0: none
        self._since = 0.0
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._hear)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self.number:
            if distributed.is_initialized() and time.monotonic() - self._since < SAME_REQUEST_SECONDS:
                return
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
        self.number, self._since = number, time.monotonic()

    def wanted(self) -> bool:
        """Whether to leave now; all processes of ``torch.distributed`` ask together and hear the same."""
        if not distributed.is_initialized():
            return self.number != 0
        shared = torch.tensor(self.number)
        distributed.all_reduce(shared, distributed.ReduceOp.MAX)
        # A signal that came while the processes met is told at the next meeting: the others do not know of it.
        if agreed := int(shared):
            self.number = agreed
        return agreed != 0

    def leave(self, step: int) -> None:
        """Leave behind ``step``, whose checkpoint is written; all processes together.

        Raises:
            Interrupted: after SIGINT.
            Terminated: after SIGTERM or SIGHUP.
        """
        if distributed.is_initialized():
            # Who leaves earlier makes torchrun end the one that still writes.
            distributed.barrier()
        raise Interrupted(step) if self.number == signal.SIGINT else Terminated(step, self.number)
