"""A few of the kills and flipped bits of ``make torture``, every day."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def test_kills_and_flipped_bits_lose_nothing_and_nothing_is_silent(tmp_path: Path) -> None:
    command = [sys.executable, str(HERE / "torture" / "run.py"), "--kills", "2", "--flips", "4", "--light"]
    done = subprocess.run([*command, "--out", str(tmp_path / "table.md")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 of 6 went wrong" in done.stdout
    assert (tmp_path / "table.md").read_text(encoding="utf-8").startswith("# Torture")
