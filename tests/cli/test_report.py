"""``dynrank-fx report``: the page of a run, and refusals."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

from click.testing import Result

Run = Callable[..., Result]


def test_the_page_is_in_the_runs_folder_or_where_it_is_asked_for(write: Run, run: Run, folder: Path) -> None:
    run("train", write(), "--no-compile", "--epochs", "2", "--out", "r")
    assert run("report", "r").stderr == "wrote r/report.html; open it in a browser\n"
    run("report", "r", "-o", "page.html")
    assert (folder / "page.html").read_text() == (folder / "r" / "report.html").read_text()
    run("train", "model.py", "--out", "r", "--resume", "--no-compile")


def test_what_is_no_run_is_told(write: Run, run: Run, refused: Callable[..., str], folder: Path) -> None:
    assert refused("report", "gone") == "there is no folder gone: give a run of `dynrank-fx train`"
    run("transform", write(), "--out", "t")
    assert refused("report", "t").startswith("t has no checkpoint.safetensors: it is not a run")
    run("train", "model.py", "--no-compile", "--epochs", "1", "--out", "r")
    assert "could not be written" in refused("report", "r", "-o", "nowhere/page.html")


def test_the_verdict_the_next_command_and_how_it_was_made(write: Run, run: Run, refused: Run, folder: Path) -> None:
    write("""
    def accuracy(output, batch):
        return (output.argmax(1) == batch[1]).float().mean()
    metric = accuracy
    """)
    trained = json.loads(run("train", "model.py", "--no-compile", "--epochs", "2", "--out", "r", "--json").stdout)
    assert (trained["run"], trained["epoch"], trained["epochs"], trained["last"]["epoch"]) == ("r", 6, 6, 5)
    run("train", "model.py", "--no-compile", "--epochs", "1", "--schedule", "full", "--seed", "3", "--out", "d")
    result = run("report", "r", "--against", "d")
    assert result.stdout.startswith("6 ticks cost ")
    assert "The dense run (d) reached " in result.stdout
    data = json.loads(run("report", "r", "--json").stdout)
    assert data["next"] == "dynrank-fx export r -o model.onnx"
    assert data["verdict"][1].startswith("The held-out accuracy is ")
    assert data["last"]["eval_metric"] == trained["last"]["eval_metric"]
    page = (folder / "r" / "report.html").read_text()
    for fact in ("Auto(", "SGD", "<td>seed</td>", "<td>torch</td>", "model.py"):
        assert fact in page
    assert "there is no folder gone" in refused("report", "r", "--against", "gone")
    run("train", "model.py", "--no-compile", "--epochs", "2", "--schedule", "interleave", "--low", "1", "--out", "low")
    assert "low did not train dense all the time: give a run" in refused("report", "r", "--against", "low")
    wider = (folder / "model.py").read_text().replace("nn.Linear(256, 32)", "nn.Linear(256, 40)")
    (folder / "other.py").write_text(wider.replace("nn.Linear(32, 8)", "nn.Linear(40, 8)"))
    run("train", "other.py", "--no-compile", "--epochs", "1", "--schedule", "full", "--leave", "none", "--out", "o")
    assert re.search(
        r"o is a run of another model, of [\d,]+ parameters where", refused("report", "r", "--against", "o")
    )


def test_a_run_in_steps_is_told_in_ticks(write: Run, run: Run, folder: Path) -> None:
    run("train", write(), "--no-compile", "--steps", "6", "--out", "s")
    assert run("report", "s").stdout.startswith("6 ticks cost ")
    page = (folder / "s" / "report.html").read_text()
    assert "<td>ticks</td>" in page
    assert "by ticks and by compute" in page
