"""Printing to a reader that went away, a full disk, or nowhere: the work is done all the same."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dynrank_fx.cli.streams import Lasting

COMMAND = f"{Path(sys.executable).with_name('dynrank-fx')} transform model.py --leave none -o made"
CASES = {
    "a reader that went away": ("| true", 0, ""),
    "a full disk": ("> /dev/full", 1, "Error: a part of what was printed is lost (OSError: No space left on device)"),
    "closed streams": (">&- 2>&-", 0, ""),
}


@pytest.mark.parametrize(("shell", "code", "sentence"), CASES.values(), ids=CASES)
def test_the_files_are_there_whatever_becomes_of_what_is_printed(
    shell: str, code: int, sentence: str, write: Callable[..., str], folder: Path
) -> None:
    write()
    script = f"{COMMAND} {shell}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=folder)
    assert done.returncode == code, done.stderr
    assert (folder / "made" / "weights.safetensors").is_file()
    assert "Traceback" not in done.stderr
    assert sentence in done.stderr


def test_a_stream_lasts() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    stream = Lasting(os.fdopen(writer, "w", buffering=1))
    assert stream.lost is None
    for _ in range(3):
        assert stream.write("a line\n") == 7
        stream.flush()
    assert isinstance(stream.lost, BrokenPipeError)
    assert not stream.failed  # nobody reads it
    assert stream.encoding.lower() == "utf-8"
    stream.close()
