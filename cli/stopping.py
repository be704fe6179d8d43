"""Ctrl-C and termination as a wish to stop, which the training loop looks at between two steps."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import click


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that Ctrl-C or a termination puts its signal number in; a second Ctrl-C interrupts at once."""
    stopped: list[int] = []
    process = os.getpid()

    def note(number: int, frame: object) -> None:
        if os.getpid() != process:  # a data loader's worker: the last step may wait for it, so only the second counts
            if stopped:
                os._exit(128 + number)
            stopped.append(number)
            return
        if stopped:
            raise KeyboardInterrupt
        stopped.append(number)
        click.echo("\nstopping after this step ...", err=True)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
