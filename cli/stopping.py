"""Ctrl-C, termination or a closed terminal as a wish to stop, which training looks at between two steps."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from .several import say


@contextmanager
def stop_signals(*, passed_on: bool = False) -> Iterator[list[int]]:
    """A list that each of these puts its signal number in; a second one interrupts at once, unless torchrun passes on
    what a terminal sends, which may come twice: it kills what does not end within half a minute.
    """
    stopped: list[int] = []
    process = os.getpid()

    def note(number: int, frame: object) -> None:
        if os.getpid() != process:  # a data loader's worker: the last step may wait for it, so only the second counts
            if stopped:
                os._exit(128 + number)
            stopped.append(number)
            return
        if stopped:
            if passed_on:
                return
            raise KeyboardInterrupt
        stopped.append(number)
        say("\nstopping after this step ...")

    ending = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    heard = [number for number in ending if signal.getsignal(number) is not signal.SIG_IGN]  # as nohup has it
    before = {number: signal.signal(number, note) for number in heard}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
