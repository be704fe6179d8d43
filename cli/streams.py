"""Printing that never ends the work: to a reader that went away, a full disk, or nowhere at all."""

from __future__ import annotations

import errno
import os
import sys
from typing import Any, TextIO

import click

from dynrank_fx.text import printable


class Lasting:
    """A stream that goes on without a word when it can no longer be written to. lost: the error that it met first."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.lost: OSError | None = None

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._lose(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._lose(error)

    def _lose(self, error: OSError) -> None:
        """From here on to nowhere, also what the stream still holds and Python writes as it ends."""
        self.lost = self.lost or error
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)

    @property
    def failed(self) -> bool:
        """Whether something is lost that somebody may still want: a reader that went away does not."""
        return self.lost is not None and self.lost.errno != errno.EPIPE

    def __getattr__(self, name: str) -> Any:  # Any: whatever a stream has
        return getattr(self._stream, name)


def echo(text: str, err: bool = False) -> None:
    """Print a line; what is no letter in it (a terminal would obey it, and names come from files) is spelt out."""
    click.echo(printable(text), err=err)


def lasting_streams() -> Lasting:
    """Make stdout and stderr last, and give the first of them."""
    # A file that is opened where a stream was closed would get its number, and all that is printed.
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)
    lasting = {}
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (to the end)
        stream.reconfigure(errors="backslashreplace")  # a terminal that lacks a letter
        lasting[name] = Lasting(stream)
        setattr(sys, name, lasting[name])
    return lasting["stdout"]
