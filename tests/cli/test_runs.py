"""Opening a run: whose code is run by it, and files of two runs that were mixed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from dynrank_fx import files
from dynrank_fx.cli.main import cli

READERS = {
    "inspect": ("inspect", "first"),
    "export": ("export", "first", "-o", "new.onnx"),
    "compress": ("compress", "first", "--budget", "params=0.6", "--no-timing", "-o", "new.pt"),
    "verify": ("verify", "a.onnx", "first"),
    "report": ("report", "first", "-o", "new.html"),
    "train --resume": ("train", "model.py", "--out", "first", "--resume"),
}
RUNNING = [name for name in READERS if name not in ("report", "train --resume")]  # the model file that the run names


@pytest.fixture
def runs(write: Callable[..., str], run: Callable[..., Result], once: Callable[..., None]) -> None:
    """Two runs of one model, of two epochs each, and an ONNX file of the first."""

    def make() -> None:
        write()
        for name, seed in (("first", "1"), ("second", "2")):
            options = ("--schedule", "interleave", "--no-compile", "--rank", "0.25", "--epochs", "2", "--seed", seed)
            run("train", "model.py", *options, "--out", name)
        run("export", "first", "-o", "a.onnx", "--no-timing")

    once("two runs", make)


def refusal(reader: str) -> str:
    """The sentence of a command that fails with 1 and leaves nothing behind."""
    result = CliRunner().invoke(cli, READERS[reader])
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.output
    assert not list(Path().glob("new.*"))
    return result.stderr.strip().splitlines()[-1].removeprefix("Error: ")


def name_model_file(path: str) -> None:
    """Have the first run name another model file; without a digest, as runs of earlier versions are."""
    noted = json.loads(Path("first/run.json").read_text())
    noted["model_file"] = path
    noted.pop("sha256", None)
    Path("first/run.json").write_text(json.dumps(noted))


@pytest.mark.usefixtures("runs")
def test_a_model_file_that_came_with_the_run_is_not_run(run: Callable[..., Result]) -> None:
    for name in ("first/sent.py", "sent.py"):
        text = Path("model.py").read_text()
        Path(name).write_text(f"from pathlib import Path\nPath({os.path.abspath('ran')!r}).touch()\n{text}")
    os.symlink("first/sent.py", "link.py")
    for named in ("first/sent.py", "sent.py", "../sent.py", *map(os.path.abspath, ("first/sent.py", "link.py"))):
        name_model_file(named)
        for reader in RUNNING:
            assert refusal(reader) == (
                f"first/run.json names the model file {named}, which would run code that came along with the run: look "
                "at it, and give it by --model if you trust it"
            )
    assert not Path("ran").exists()
    run("inspect", "first", "--model", "model.py")
    run("report", "first", "-o", "page.html")  # which runs nothing
    name_model_file(os.path.abspath("sent.py"))
    told = run("inspect", "first").stderr
    assert told == f"running {os.path.abspath('sent.py')}, the model file that first/run.json names\n"
    assert Path("ran").exists()


@pytest.mark.usefixtures("runs")
@pytest.mark.parametrize(
    ("swapped", "sentence"),
    [
        (("checkpoint.safetensors",), "first/history.jsonl is damaged or of another run: it does not begin with the 2"),
        (("history.jsonl",), "first/history.jsonl is damaged or of another run: it does not begin with the 2 records"),
        (
            ("checkpoint.safetensors", "history.jsonl"),
            "first/checkpoint.safetensors is of another run than first/run.json: put back the file that belongs to",
        ),
        (("run.json",), "first/checkpoint.safetensors is of another run than first/run.json: put back the file that"),
    ],
    ids=lambda value: " and ".join(value) if isinstance(value, tuple) else "",
)
def test_files_of_another_run_are_told(swapped: tuple[str, ...], sentence: str) -> None:
    for name in swapped:
        shutil.copy(f"second/{name}", f"first/{name}")
    for reader in READERS:
        assert refusal(reader).startswith(sentence)


@pytest.mark.usefixtures("runs")
def test_a_run_is_read_while_another_process_trains_in_it(run: Callable[..., Result]) -> None:
    with files.only_one(Path("first")):
        for name in (*RUNNING, "report"):
            run(*READERS[name])
        assert sorted(Path("first").glob(".*")) == [Path("first/.lock")]


@pytest.mark.usefixtures("runs")
def test_a_run_file_of_earlier_versions_with_a_malformed_value_is_a_sentence(run: Callable[..., Result]) -> None:
    """Those have no digest that would tell."""
    sound = json.loads(Path("first/run.json").read_text())
    del sound["sha256"]
    spoilt = [
        *(("report", name, {**sound, name: [1]}) for name in sound),
        *(("report", name, {key: sound[key] for key in sound if key != name}) for name in ("model_file", "options")),
        *(
            ("train --resume", name, {**sound, "options": {**sound["options"], name: {"a": 1}}})
            for name in sound["options"]
        ),
    ]
    wrong = []
    for reader, name, data in spoilt:
        Path("first/run.json").write_text(json.dumps(data))
        result = CliRunner().invoke(cli, READERS[reader])
        if result.exit_code == 0 or not isinstance(result.exception, SystemExit):
            wrong.append((reader, name, repr(result.exception)))
    assert not wrong
    Path("first/run.json").write_text(json.dumps({**sound, "options": {**sound["options"], "epochs": "many"}}))
    assert refusal("train --resume") == ("first/run.json is damaged: its epochs is 'many'; put an earlier copy back")
