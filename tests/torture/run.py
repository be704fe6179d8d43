"""Torture the tool: kills, flipped bits; RESULTS.md says what became of each. An hour with the defaults; goes on where
it stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import flips
import kills
import torch
from work import warm_up

HERE = Path(__file__).parent
RESULTS = HERE / "RESULTS.md"
T = TypeVar("T", kills.Kill, flips.Flip)


class Done:
    """What was done before, by the same code with the same seed, and is not done again; a line for each in a file."""

    def __init__(self, path: Path, seed: int) -> None:
        head = json.dumps({"code": _code(), "seed": seed})
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        if not lines or lines[0] != head:
            path.write_text(head + "\n", encoding="utf-8")
            lines = [head]
        self.path = path
        self.known = {each["what"]: each for each in map(json.loads, lines[1:])}
        self.seconds = sum(each["seconds"] for each in self.known.values())

    def once(self, what: str, kind: type[T], work: Callable[[], T]) -> T:
        """What came of a piece of work, which is done only where it was not."""
        if what in self.known:
            return kind(**self.known[what]["outcome"])
        started = time.monotonic()
        outcome = work()
        seconds = time.monotonic() - started
        self.seconds += seconds
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"what": what, "outcome": asdict(outcome), "seconds": seconds}) + "\n")
        return outcome


def _code() -> str:
    """Of all that is tortured, and of the torture."""
    root = HERE.parents[1]
    files = sorted(path for folder in (root / "dynrank_fx", root / "cli", HERE) for path in folder.rglob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def main() -> int:
    """Run both campaigns, write the table, and say what was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--flips", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--light", action="store_true", help="without what exports to ONNX, which takes seconds each")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the table goes")
    chosen = parser.parse_args()
    warm_up(chosen.light)
    done = Done(chosen.out.with_suffix(".jsonl"), chosen.seed)
    killed = kills.campaign(chosen.kills, chosen.seed, done.once, chosen.light)
    flipped = flips.campaign(chosen.flips, chosen.seed, done.once, chosen.light)
    minutes = done.seconds / 60
    wrong = [f"{each.job}, killed at {each.moment}: {each.wrong}" for each in killed if each.wrong]
    wrong += [
        f"{each.file}, {each.harm}, {each.reader}: {each.outcome} {each.said}"
        for each in flipped
        if each.outcome not in ("refused", "told", "same")
    ]
    chosen.out.write_text(_page(killed, flipped, minutes, chosen.seed), encoding="utf-8")
    print("\n".join([*wrong, f"{len(wrong)} of {len(killed) + len(flipped)} went wrong; wrote {chosen.out}"]))
    return 1 if wrong else 0


def _page(killed: list[kills.Kill], flipped: list[flips.Flip], minutes: float, seed: int) -> str:
    lines = [
        "# Torture",
        "",
        f"Written by `make torture` (seed {seed}); torch {torch.__version__}, Python {platform.python_version()}, "
        f"{minutes:.0f} minutes.",
        "",
        "Kills: a command is killed before or after a call that changes files (`rename`, `unlink`, `fsync` and the "
        "like) or at a random moment; what a user does next is done, and the result is compared, bit by bit, with an "
        "undisturbed one. Nothing may be left behind.",
        "",
        "| command | kills | at a side of a call | wrong |",
        "| --- | --- | --- | --- |",
    ]
    for job in kills.JOBS:
        of_job = [each for each in killed if each.job == job.name]
        at_sides = sum(each.moment.startswith("side") for each in of_job)
        lines.append(f"| {job.name} | {len(of_job)} | {at_sides} | {sum(bool(each.wrong) for each in of_job)} |")
    lines += [
        "",
        "Flips: one bit of a file is flipped (or, one time in eight, the file is cut short or zeroed), and it is read. "
        "Refused: in a sentence and a non-zero exit. Told: by a warning, as other tools change files too. Same: the "
        "result is that of the whole file, since the bit says nothing.",
        "",
        "| file | reader | flips | refused | told | same | silent | traceback, crash or no end |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for reader in flips.READERS:
        for file in reader.files:
            count = Counter(each.outcome for each in flipped if (each.reader, each.file) == (reader.name, file))
            if count:
                good = [count["refused"], count["told"], count["same"], count["silent"]]
                row = [file, reader.name, count.total(), *good, count.total() - sum(good)]
                lines.append(f"| {' | '.join(map(str, row))} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
