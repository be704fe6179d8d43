"""Put the models of the zoo through the library, each in a process of its own, and write RESULTS.md.

Rows are kept in build/zoo/rows.jsonl: a case that passed everything is not run again.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import multiprocessing
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from cases import SOURCES, ZooCase, cases_of
from check import STEPS, Row, run_case
from results import write_results
from torch import nn

import dynrank_fx as dr

HERE = Path(__file__).parent
ROWS = HERE.parents[1] / "build" / "zoo" / "rows.jsonl"
TIMEOUT = 300.0


@dataclass
class Child:
    """A case that is running. file: where its process keeps the row up to date."""

    case: ZooCase
    process: multiprocessing.process.BaseProcess
    file: Path
    started: float

    def finished(self, timeout: float) -> Row | None:
        """The row, once there will be no more of it. A process that is too slow is killed."""
        late = time.monotonic() - self.started > timeout
        if self.process.is_alive() and not late:
            return None
        if self.process.is_alive():
            self.process.kill()
        self.process.join()
        row: Row = json.loads(self.file.read_text())
        if row["stage"] != "done":
            why = f"no end after {timeout:.0f} s" if late else f"the process died (exit code {self.process.exitcode})"
            row["failures"].append({"stage": row["stage"], "error": why})
            row["seconds"] = round(time.monotonic() - self.started, 1)
        return row


def _child(case: ZooCase, steps: tuple[str, ...], file: Path) -> None:
    warnings.simplefilter("ignore")
    os.close(1), os.close(2)  # libraries print; what counts is in the row
    os.open(file.with_suffix(".log"), os.O_CREAT | os.O_WRONLY)
    os.dup(1)

    def note(row: Row) -> None:
        beside = file.with_suffix(".part")
        beside.write_text(json.dumps(row))
        beside.replace(file)

    run_case(case, steps, note)


def run_all(cases: list[ZooCase], steps: tuple[str, ...], jobs: int, timeout: float) -> Iterator[Row]:
    """A row per case as they finish. Processes are forked: importing torch anew would take longer than most cases."""
    fork = multiprocessing.get_context("fork")
    waiting, running = list(reversed(cases)), []
    with tempfile.TemporaryDirectory() as folder:
        while waiting or running:
            while waiting and len(running) < jobs:
                case = waiting.pop()
                file = Path(folder, f"{len(waiting)}.json")
                file.write_text(json.dumps(_empty(case)))
                process = fork.Process(target=_child, args=(case, steps, file))
                process.start()
                running.append(Child(case, process, file, time.monotonic()))
            time.sleep(0.05)
            for child in list(running):
                row = child.finished(timeout)
                if row is not None:
                    running.remove(child)
                    yield row


def _load() -> None:
    """Have every process that is forked later find what torch.export and torch.onnx import and register when used."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dr.capture(nn.Linear(2, 2), (torch.ones(2, 2),), how=dr.Capture.EXPORT)
        dr.export_onnx(nn.Linear(2, 2), (torch.ones(2, 2),), Path(folder, "linear.onnx"))


def _empty(case: ZooCase) -> Row:
    return {
        "name": case.name,
        "source": case.source,
        "family": case.family,
        "stage": "start",
        "steps": [],
        "failures": [],
        "times": {},
    }


def kept_rows() -> dict[tuple[str, str], Row]:
    """The last row of every case."""
    if not ROWS.exists():
        return {}
    rows = map(json.loads, ROWS.read_text().splitlines())
    return {(row["source"], row["name"]): row for row in rows}


def merged(old: Row | None, new: Row) -> Row:
    """A row of some of the steps, with what an older row says of the others."""
    if old is None or set(old["steps"]) <= set(new["steps"]) or new.get("sites") == 0:
        return new
    kept = [failure for failure in old["failures"] if failure["stage"] in set(old["steps"]) - set(new["steps"])]
    row = {**old, **new, "failures": [*kept, *new["failures"]], "times": {**old["times"], **new["times"]}}
    row["steps"] = sorted({*old["steps"], *new["steps"]})
    row["seconds"] = round(sum(row["times"].values()), 1)
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=["*"], metavar="PATTERN", help="shell patterns of names")
    parser.add_argument("--source", choices=SOURCES)
    parser.add_argument("--fresh", action="store_true", help="run what has passed too")
    parser.add_argument("--new", action="store_true", help="leave out what has failed too")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=TIMEOUT, help="seconds for one case")
    parser.add_argument("--steps", default=",".join(STEPS), help="some of them; rows keep the others")
    options = parser.parse_args()
    steps = tuple(options.steps.split(","))
    if unknown := set(steps) - set(STEPS):
        parser.error(f"no such step: {', '.join(unknown)}")

    rows = kept_rows()
    every = [case for source in SOURCES if options.source in (None, source) for case in cases_of(source)]
    cases = []
    for case in every:
        row = None if options.fresh else rows.get((case.source, case.name))
        done = row is not None and set(steps) <= set(row["steps"]) and (options.new or not row["failures"])
        if any(fnmatch.fnmatchcase(case.name, pattern) for pattern in options.only) and not done:
            cases.append(case)
    ROWS.parent.mkdir(parents=True, exist_ok=True)
    failed = 0
    if cases:
        _load()
    for i, row in enumerate(run_all(cases, steps, options.jobs, options.timeout)):
        failed += bool(row["failures"])
        causes = "; ".join(f"{f['stage']}: {f['error']}" for f in row["failures"])
        print(f"{i + 1}/{len(cases)} {row['source']} {row['name']} {row['seconds']:.0f} s  {causes[:300]}", flush=True)
        row = rows[row["source"], row["name"]] = merged(rows.get((row["source"], row["name"])), row)
        with ROWS.open("a") as file:
            file.write(json.dumps(row) + "\n")
    if options.source is None:
        known = {(case.source, case.name) for case in every}
        rows = {key: row for key, row in rows.items() if key in known}
    write_results(list(rows.values()), HERE / "RESULTS.md")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
