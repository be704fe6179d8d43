"""Printing to a reader that went away, a full disk, or nowhere: the work is done all the same."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from dynrank_fx.cli.main import cli
from dynrank_fx.cli.streams import Lasting

COMMAND = f"{Path(sys.executable).with_name('dynrank-fx')} transform model.py --leave none -o made"
CASES = {
    "a reader that went away": ("| true", 0, ""),
    "a full disk": ("> /dev/full", 1, "Error: a part of what was printed is lost (OSError: No space left on device)"),
    "closed streams": (">&- 2>&-", 0, ""),
}
EVERY_DAY = "a full disk"  # a process takes seconds


@pytest.mark.parametrize(
    ("shell", "code", "sentence"),
    [pytest.param(*case, id=name, marks=pytest.mark.fuzz if name != EVERY_DAY else ()) for name, case in CASES.items()],
)
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


def test_names_do_not_reach_into_the_terminal(folder: Path) -> None:
    """They come from files, and a terminal would obey what stands in them."""
    (folder / "model.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def model():\n"
        "    net = nn.Sequential()\n"
        "    net.add_module('a\\x1b[2Jb', nn.Linear(64, 64))\n"
        "    return net\n"
        "def example_inputs(): return (torch.zeros(2, 64),)\n"
    )
    for arguments in (["transform", "model.py"], ["inspect", "model.py"]):
        done = CliRunner().invoke(cli, arguments)
        assert "a\\x1b[2Jb" in done.output
        assert "\x1b" not in done.output
