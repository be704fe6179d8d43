"""``dynrank-fx train``: options that arrive, runs that go on after a stop, and refusals."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from run_folders import checkpoint

import dynrank_fx as dr
import dynrank_fx.training as training
from dynrank_fx import store
from dynrank_fx.cli.main import cli
from dynrank_fx.cli.modelfile import load_model_file
from dynrank_fx.training import Run as TrainingRun
from dynrank_fx.training import Settings, Task

Run = Callable[..., Result]
EPOCHS, STEPS = 4, 3
INSTALLED = str(Path(sys.executable).with_name("dynrank-fx"))

HANDLERS = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}


def history(folder: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(folder) / "history.jsonl").read_text().splitlines()]


@pytest.fixture
def whole(write: Run, run: Run, once: Callable[..., None]) -> str:
    """The folder of a run that was never stopped."""
    options = ("--no-compile", "--schedule", "interleave", "--low", "1")
    once("a whole run", lambda: run("train", write(), *options, "--out", "whole"))
    return "whole"


# What a run writes and prints


def test_a_run_is_a_folder_and_a_line_per_epoch(write: Run, run: Run, folder: Path) -> None:
    result = run("train", write(), "--no-compile", "--schedule", "aligned")
    assert sorted(path.name for path in (folder / "model-run").iterdir()) == [
        "checkpoint.safetensors",
        "history.jsonl",
        "run.json",
    ]
    # The decay is at epoch 3 of 4: aligned is FULL from 0.4 T to the decay + 0.1 T, rounded.
    assert [record["phase"] for record in history("model-run")] == ["LOW", "LOW", "FULL", "LOW"]
    lines = result.stderr.splitlines()
    shown = [line for line in lines if line.startswith("epoch")]
    assert len(shown) == EPOCHS
    for number, (line, record) in enumerate(zip(shown, history("model-run"), strict=True), 1):
        for part in (
            f"epoch {number}/4",
            record["phase"],
            f"loss {record['loss']:.4f}",
            f"metric {record['metric']:.2%}",
            f"held out {record['eval_metric']:.2%}",
            f"lr {record['lr']:.3g}",
        ):
            assert part in line
    assert lines[-1] == "wrote model-run/; next: dynrank-fx export model-run -o model.onnx"
    assert result.stdout == ""


def test_the_run_notes_what_it_was_started_with(write: Run, run: Run, folder: Path) -> None:
    run("train", write(), "--no-compile", "--epochs", "1", "--exclude", "0", "--out", "r")
    noted = json.loads(Path("r/run.json").read_text())
    assert noted["model_file"] == str(folder / "model.py")
    assert noted["options"]["exclude"] == ["0"]
    assert noted["options"]["epochs"] == 1
    assert not {"model_file", "out", "resume"} & set(noted["options"])


# Options


def settings(**given: Any) -> Settings:
    """Those of the practical default, but for what is given."""
    return Settings(**({"epochs": 4, "decay": dr.Decay.PRODUCT, "landing": True} | given))


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch, write: Run) -> list[tuple[TrainingRun, Settings]]:
    """What the command hands to ``fit``, which does nothing here."""
    handed: list[tuple[TrainingRun, Settings]] = []

    def fit(run: TrainingRun, task: Any, settings: Settings, **rest: Any) -> bool:
        handed.append((run, settings))
        return True

    monkeypatch.setattr(training, "fit", fit)
    write()
    return handed


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], settings()),
        (["--epochs", "7"], settings(epochs=7)),
        (["--amp", "bf16"], settings(amp=torch.bfloat16)),
        (["--no-compile"], settings(compile=False)),
        (["--compile", "max-autotune-no-cudagraphs"], settings(compile="max-autotune-no-cudagraphs")),
        (["--activation-memory", "0.5"], settings(activation_memory=0.5)),
        (["--carry", "reset"], settings(carry=dr.Carry.RESET)),
        (["--rewarm", "5"], settings(rewarm=5)),
        (["--decay", "each"], settings(decay=dr.Decay.EACH)),
        (["--abrupt"], settings(landing=False)),
        (["--init", "random"], settings(random_init=True)),
        (
            ["--schedule", "paper-cifar10"],
            settings(carry=dr.Carry.RESET, decay=dr.Decay.EACH, random_init=True, landing=False),
        ),
        (
            ["--schedule", "paper-cifar10", "--init", "spectral", "--carry", "move", "--decay", "halved"],
            settings(decay=dr.Decay.HALVED, landing=False),
        ),
        (["--checkpoint-steps", "9"], settings(checkpoint_steps=9)),
        (["--amp", "float16"], settings(amp=torch.float16)),
        (["--accumulate", "4", "--clip", "1.5"], settings(accumulate=4, clip=1.5)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_become_settings(options: list[str], expected: Settings, seen: list[Any], run: Run) -> None:
    run("train", "model.py", *options)
    assert seen[0][1] == expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--epochs", "20", "--lr-milestones", "10,15"], dr.schedules.aligned(20, (10, 15))),
        (["--steps", "600", "--lr-milestones", "300,450"], dr.schedules.aligned(20, (10, 15))),
        (["--steps", "12", "--schedule", "aligned"], dr.schedules.aligned(12, (9,))),  # three epochs of three batches
        (["--schedule", "aligned", "--epochs", "4"], dr.schedules.aligned(4, (3,))),
        (["--schedule", "interleave"], dr.schedules.interleave(low=2, full=1)),
        (["--schedule", "interleave", "--low", "3", "--full", "4"], dr.schedules.interleave(low=3, full=4)),
        (["--schedule", "low"], dr.schedules.always(dr.Phase.LOW)),
        (["--schedule", "full"], dr.schedules.always(dr.Phase.FULL)),
        ([], dr.schedules.auto(0.75)),
        (["--cost", "0.6"], dr.schedules.auto(0.6)),
        (["--schedule", "aligned", "--deflate", "adaptor"], dr.schedules.aligned(4, (3,), dr.Phase.ADAPTOR)),
        (["--schedule", "paper-cifar10"], dr.schedules.paper_cifar10()),
        (["--schedule", "paper-cifar10", "--deflate", "svd"], dr.schedules.paper_cifar10(dr.Phase.LOW)),
        (["--schedule", "paper-cifar100"], dr.schedules.paper_cifar100()),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_become_a_schedule(options: list[str], expected: Any, seen: list[Any], run: Run) -> None:
    run("train", "model.py", *options)
    assert seen[0][0].schedule == expected


def test_the_papers_presets_take_half_the_rank(seen: list[Any], run: Run) -> None:
    run("train", "model.py", "--schedule", "paper-cifar100")
    run("train", "model.py", "--schedule", "paper-cifar100", "--rank", "2", "--out", "other")
    half, two = (dr.plan_of(run.net).sites for run, _ in seen)
    assert [(row.site.name, row.rank) for row in half] == [("0.weight", 8), ("4.weight", 16), ("6.weight", 4)]
    assert {row.rank for row in two} == {2}


def test_without_epochs_there_are_ten(write: Run, seen: list[Any], run: Run) -> None:
    run("train", write("del epochs"), "--schedule", "low")
    assert seen[0][1].epochs == 10


def test_plan_options_decide_what_is_factored(seen: list[Any], run: Run) -> None:
    run("train", "model.py", "--rank", "3", "--exclude", "0")
    assert [(row.site.name, row.rank) for row in dr.plan_of(seen[0][0].net).sites] == [("4.weight", 3), ("6.weight", 3)]


def test_the_seed_decides_the_weights_and_the_data(write: Run, run: Run) -> None:
    write()
    for name, seed in (("a", "5"), ("b", "5"), ("c", "6")):
        run("train", "model.py", "--no-compile", "--epochs", "1", "--seed", seed, "--out", name)
    first, same, other = (checkpoint(name) for name in "abc")
    assert first == same
    assert first[0]["net.4.bias"] != other[0]["net.4.bias"]


# From a folder of transform


@pytest.mark.filterwarnings("ignore:.*plan.json is not as dynrank-fx wrote it")
def test_training_starts_from_a_folder_with_its_plan_and_weights(write: Run, run: Run) -> None:
    run("transform", write(), "--rank", "5", "--out", "planned")
    plan = json.loads(Path("planned/plan.json").read_text())
    plan["sites"] = [row | {"rank": 2} for row in plan["sites"][1:]]
    Path("planned/plan.json").write_text(json.dumps(plan))
    run("train", "model.py", "--from", "planned", "--no-compile", "--schedule", "low", "--epochs", "1", "--out", "r")
    assert history("r")[0]["phases"] == {"4.weight": "LOW", "6.weight": "LOW"}
    info = store.read(Path("r/checkpoint.safetensors"))[1]
    assert info["ranks"] == {"4.weight": 2, "6.weight": 2}


def test_a_run_from_a_low_net_goes_on_bit_by_bit_after_the_folder_is_gone(
    write: Run, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dynrank_fx.cli.modelfile import load_model_file

    file = load_model_file(Path(write()))
    net = dr.transform(file.model(), file.example_inputs())
    dr.enter_(net, dr.Phase.LOW)
    dr.save(net, "low")
    options = ["--from", "low", "--no-compile", "--schedule", "interleave", "--low", "1"]
    run("train", "model.py", *options, "--out", "whole")
    stopped(monkeypatch, 5, "train", "model.py", *options, "--out", "r")
    Path("low").rename("elsewhere")
    run("train", "model.py", "--out", "r", "--resume")
    assert checkpoint("r") == checkpoint("whole")


# Stopping and going on


def stopped(monkeypatch: pytest.MonkeyPatch, step: int, *args: str, by: int = signal.SIGINT) -> Result:
    """The command with a signal arriving in a step."""
    monkeypatch.setenv("STOP_AT", str(step))
    monkeypatch.setenv("STOP_BY", str(int(by)))
    result = CliRunner().invoke(cli, args)
    monkeypatch.delenv("STOP_AT")
    assert "Traceback" not in result.output
    assert result.exit_code == 128 + by
    return result


@pytest.mark.parametrize(
    ("step", "by"),
    [
        pytest.param(step, by, id=f"{place}-{by.name}", marks=() if by is by_day else pytest.mark.fuzz)
        for step, place, by_day in (
            (1, "first", signal.SIGTERM),
            (4, "after the epoch's last", signal.SIGINT),
            (7, "FULL", signal.SIGTERM),
            (13, "third epoch", signal.SIGINT),
        )
        for by in (signal.SIGINT, signal.SIGTERM)
    ],
)
def test_a_stopped_run_says_how_to_go_on_and_ends_as_if_never_stopped(
    whole: str, run: Run, monkeypatch: pytest.MonkeyPatch, step: int, by: signal.Signals
) -> None:
    # The evaluation after each epoch calls loss() as well: the fourth call is that of the first epoch's.
    options = ["--no-compile", "--schedule", "interleave", "--low", "1", "--leave", "none"]
    result = stopped(monkeypatch, step, "train", "model.py", *options, "--out", "a run", by=by)
    before, _, told = result.stderr.strip().splitlines()[-1].partition("; go on with: ")
    assert re.fullmatch(r"stopped in epoch \d of 4 after \d steps?, and saved", before)
    assert "stopping after this step" in result.stderr
    assert shlex.split(told) == ["dynrank-fx", "train", "model.py", "--out", "a run", "--resume"]
    run(*shlex.split(told)[1:])
    assert checkpoint("a run") == checkpoint(whole)
    assert len(history("a run")) == EPOCHS


@pytest.mark.parametrize(
    ("step", "interval"),
    [
        pytest.param(step, f'"{each}"', id=f"{place}-{each}", marks=() if each == by_day else pytest.mark.fuzz)
        for step, place, by_day in (
            (2, "within a tick", "epoch"),
            (4, "a tick's last", "step"),
            (9, "within a pass", "epoch"),
            (11, "later", "step"),
        )
        for each in ("epoch", "step")
    ],
)
def test_a_run_in_steps_that_is_stopped_ends_as_if_never_stopped(
    write: Run, run: Run, once: Callable[..., None], monkeypatch: pytest.MonkeyPatch, step: int, interval: str
) -> None:
    """40 steps are 20 ticks of 2, and 13 passes over 3 batches and one more; the evaluation calls loss() too."""
    write(f"""
        def lr_scheduler(optimizer):
            return torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.9), {interval}
    """)
    options = ["--no-compile", "--schedule", "interleave", "--leave", "none", "--steps", "40"]

    def undisturbed() -> None:
        told = run("train", "model.py", *options, "--out", "whole").stderr
        assert "interleave" in told.lower()
        assert "; 40 steps in 20 ticks" in told
        assert "tick 20/20  LOW" in told

    once(f"in steps, {interval}", undisturbed)
    records = history("whole")
    assert [record["step"] for record in records] == list(range(0, 40, 2))
    assert [record["steps"] for record in records] == [2] * 20
    assert [record["phase"] for record in records] == ["LOW", "LOW", "FULL"] * 6 + ["LOW", "LOW"]
    before = [2 * tick if interval == '"step"' else 2 * tick // STEPS for tick in range(20)]
    assert [record["lr"] for record in records] == pytest.approx([0.05 * 0.9 ** (count // 2) for count in before])

    first = stopped(monkeypatch, step, "train", "model.py", *options, "--out", "r")
    assert re.search(r"stopped in tick \d of 20 after \d steps?, and saved", first.stderr)
    run("train", "model.py", "--out", "r", "--resume")
    assert checkpoint("r") == checkpoint("whole")


@pytest.mark.parametrize("step", [1, 3, 4, 6, 9], ids=["first", "epoch's last", "evaluation", "within", "later"])
def test_few_epochs_of_auto_are_divided_and_one_that_is_stopped_ends_as_if_never_stopped(
    write: Run, run: Run, once: Callable[..., None], monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Four epochs of 3 steps are 12 ticks; the evaluation after each epoch calls loss() as well."""
    options = ["--no-compile", "--leave", "none"]

    def undisturbed() -> None:
        assert "; 4 epochs in 12 ticks" in run("train", write(), *options, "--out", "whole").stderr

    once("few epochs of auto", undisturbed)
    assert [record["step"] for record in history("whole")] == list(range(12))
    assert [tick for tick, record in enumerate(history("whole")) if "eval_loss" in record] == [2, 5, 8, 11]
    assert history("whole")[-1]["phase"] == "LOW"
    first = stopped(monkeypatch, step, "train", "model.py", *options, "--out", "r")
    assert re.search(r"stopped in tick \d+ of 12 after \d steps?, and saved", first.stderr)
    run("train", "model.py", "--out", "r", "--resume")
    assert checkpoint("r") == checkpoint("whole")


FOLLOWS = """
    class WithLength(nn.Module):
        def __init__(self):
            super().__init__()
            self.length = nn.Parameter(torch.zeros(epochs))
            self.layers = nn.Sequential(nn.Flatten(), nn.Linear(48, 32), nn.Linear(32, 8))
        def forward(self, x):
            return self.layers(x) + self.length.sum()

    def model():
        return WithLength()

    def train_data():
        return DataLoader(Noisy(), 24 // epochs, shuffle=True, drop_last=True)

    def lr_scheduler(optimizer):  # whose state has no number of epochs
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5 * (1 + np.cos(np.pi * epoch / epochs)))
"""


def rates(folder: str) -> list[float]:
    return [record["lr"] for record in history(folder)]


def test_what_the_file_makes_of_its_epochs_follows_the_length_that_is_given(
    write: Run, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(FOLLOWS)
    given = ("train", "model.py", "--no-compile", "--schedule", "low", "--leave", "none")
    options = (*given, "--epochs", "8")
    run(*options, "--out", "whole")
    half_a_cosine = [0.025 * (1 + math.cos(math.pi * epoch / 8)) for epoch in range(8)]
    assert rates("whole") == pytest.approx(half_a_cosine)
    assert {record["steps"] for record in history("whole")} == {7}, "21 examples in batches of 3"
    assert "layers.1.weight" in run("inspect", "whole").stdout
    stopped(monkeypatch, 12, *options, "--out", "r")
    run("train", "model.py", "--out", "r", "--resume")
    assert checkpoint("r") == checkpoint("whole")
    run(*given, "--steps", "6", "--out", "steps")
    run(*given, "--out", "own")
    assert rates("own") == pytest.approx([0.025 * (1 + math.cos(math.pi * epoch / 4)) for epoch in range(4)])


def test_a_run_that_began_before_files_were_told_the_length_goes_on_as_it_began(
    write: Run, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("""
    def lr_scheduler(optimizer):
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1 / epochs)
    """)
    options = ("train", "model.py", "--no-compile", "--schedule", "low", "--leave", "none", "--epochs", "3")
    stopped(monkeypatch, 2, *options, "--out", "r")
    data = json.loads(Path("r/run.json").read_text())
    del data["epochs_set"], data["pilot"], data["sha256"]
    Path("r/run.json").write_text(json.dumps(data))
    run("train", "model.py", "--out", "r", "--resume")
    assert rates("r") == pytest.approx([0.05 / 3, 0.05 / 4, 0.05 / 4]), "of the file, which says 4"


def test_accumulated_batches_are_one_of_the_steps(write: Run, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass over 3 batches is two steps, of two and of one."""
    write('def lr_scheduler(optimizer): return torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9), "step"')
    options = ["--no-compile", "--schedule", "interleave", "--leave", "none", "--steps", "10", "--accumulate", "2"]
    run("train", "model.py", *options, "--out", "whole")
    assert [record["steps"] for record in history("whole")] == [2, 1] * 5
    assert [record["lr"] for record in history("whole")] == pytest.approx([0.05 * 0.9**step for step in range(10)])
    stopped(monkeypatch, 8, "train", "model.py", *options, "--out", "r")
    run("train", "model.py", "--out", "r", "--resume")
    assert checkpoint("r") == checkpoint("whole")


def test_a_stream_is_trained_on_in_steps(write: Run, run: Run) -> None:
    write("""
        class Stream(torch.utils.data.IterableDataset):
            def __iter__(self):
                while True:
                    yield torch.randn(3, 4, 4), 1

        def train_data():
            return DataLoader(Stream(), 8)

        def lr_scheduler(optimizer):
            return {"scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20), "interval": "step"}
    """)
    run("train", "model.py", "--no-compile", "--steps", "20", "--out", "r")
    assert len(history("r")) == 20
    assert history("r")[0]["phase"] == "FULL"
    assert history("r")[-1]["phase"] == "LOW"


def test_one_epoch_leaves_the_schedule_room(write: Run, run: Run) -> None:
    run("train", write(), "--no-compile", "--epochs", "1", "--schedule", "interleave", "--low", "1", "--out", "r")
    assert [record["phase"] for record in history("r")] == ["LOW", "FULL", "LOW"]


def test_handlers_are_as_before_after_a_run(whole: str) -> None:
    assert {each: signal.getsignal(each) for each in HANDLERS} == HANDLERS


def test_a_second_ctrl_c_stops_at_once_and_keeps_the_last_checkpoint(
    write: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STOP_AT", "6")
    monkeypatch.setenv("STOPS", "2")
    result = CliRunner().invoke(cli, ["train", write(), "--no-compile", "--schedule", "low", "--out", "r"])
    assert result.exit_code == 1
    assert result.stderr.endswith("Aborted!\n")
    assert (checkpoint("r")[1]["epoch"], checkpoint("r")[1]["step"]) == (1, 0)


def test_a_finished_run_has_nothing_to_go_on_with(whole: str, run: Run) -> None:
    before = Path("whole/checkpoint.safetensors").read_bytes()
    assert run("train", "model.py", "--out", whole, "--resume").stdout == "whole has its 4 epochs already\n"
    assert Path("whole/checkpoint.safetensors").read_bytes() == before


@pytest.mark.fuzz  # tests/torture kills forked processes every day
@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGKILL], ids=lambda by: by.name)
def test_a_real_process_that_is_stopped_goes_on_bit_by_bit(by: signal.Signals, write: Run, folder: Path) -> None:
    """As a terminal does it: the signal goes to the workers of the data loader too."""
    options = ["--no-compile", "--schedule", "interleave", "--low", "1", "--checkpoint-steps", "1", "--leave", "none"]
    command = [INSTALLED, "train", write(), *options, "--out"]
    workers = os.environ | {"WORKERS": "1"}
    subprocess.run([*command, "whole"], check=True, capture_output=True, env=workers)
    stop = {"STOP_AT": "6", "STOP_BY": str(int(by)), "STOP_PROCESS": "0"}
    first = subprocess.run([*command, "r"], capture_output=True, text=True, env=workers | stop, start_new_session=True)
    seen = first.stderr
    assert "Traceback" not in seen
    assert (checkpoint("r")[1]["epoch"], checkpoint("r")[1]["step"]) == (1, 2 if by is signal.SIGINT else 1)
    told = ["dynrank-fx", "train", "model.py", "--out", "r", "--resume"]
    if by is signal.SIGINT:
        assert first.returncode == 130
        assert seen.count("stopping after this step") == 1
        assert shlex.split(seen.strip().splitlines()[-1].partition("go on with: ")[2]) == told
    else:
        assert first.returncode == -by
    done = subprocess.run([INSTALLED, *told[1:]], capture_output=True, text=True, env=workers)
    assert done.returncode == 0, done.stderr
    assert checkpoint("r") == checkpoint("whole")
    assert not [path for path in (folder / "r").iterdir() if path.name.startswith(".")]


def test_going_on_does_not_plan_again(write: Run, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan's file may have changed, and the first weights too, on which --energy depends."""
    run("transform", write(), "--out", "planned")
    options = ["--plan", "planned/plan.json", "--no-compile", "--schedule", "low"]
    run("train", "model.py", *options, "--out", "whole")
    stopped(monkeypatch, 2, "train", "model.py", *options, "--out", "r")
    Path("planned/plan.json").write_text("{}")
    run("train", "model.py", "--out", "r", "--resume")
    assert checkpoint("r") == checkpoint("whole")


# Refusals


def test_a_folder_that_holds_a_run_is_not_overwritten(whole: str, refused: Callable[..., str]) -> None:
    before = checkpoint(whole)
    assert refused("train", "model.py", "--out", whole) == (
        "whole holds a run already: add --resume to go on with it, or choose another --out"
    )
    assert checkpoint(whole) == before


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--epochs", "9"], "was started without --epochs: leave --epochs out, or start another run"),
        (["--low", "2"], "was started with --low 1: leave --low out, or start another run"),
        (["--schedule", "full"], "was started with --schedule interleave: leave --schedule out, or start another run"),
        (["--rank", "3"], "was started without --rank: "),
        (["--exclude", "0"], "was started without --exclude: "),
        (["--from", "folder"], "was started without --from: "),
        (["--plan", "p.json"], "was started without --plan: "),
        (["--amp", "bf16"], "was started without --amp: "),
        (["--seed", "1"], "was started with --seed 0: "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_run_goes_on_with_its_own_options(
    options: list[str], sentence: str, whole: str, refused: Callable[..., str]
) -> None:
    message = refused("train", "model.py", "--out", whole, "--resume", *options)
    assert message.startswith(f"the run in whole {sentence}")


def test_options_said_again_are_no_contradiction(whole: str, run: Run) -> None:
    run("train", "model.py", "--out", whole, "--resume", "--no-compile", "--schedule", "interleave", "--low", "1")


def test_resuming_what_is_no_run(write: Run, refused: Callable[..., str]) -> None:
    write()
    assert refused("train", "model.py", "--out", "gone", "--resume").startswith(
        "gone is no run of `dynrank-fx train`: gone/run.json could not be read ("
    )
    Path("r").mkdir()
    for text in ("", "[]", '{"format": "other"}'):
        Path("r/run.json").write_text(text)
        assert refused("train", "model.py", "--out", "r", "--resume") == (
            "r/run.json is damaged or was not written by `dynrank-fx train`"
        )
    Path("r/run.json").write_text('{"format": "dynrank-fx run", "version": 2}')
    assert refused("train", "model.py", "--out", "r", "--resume") == (
        "r/run.json has version 2, this dynrank-fx reads version 1; upgrade dynrank-fx"
    )


def test_a_damaged_or_missing_checkpoint(whole: str, refused: Callable[..., str]) -> None:
    path = Path("whole/checkpoint.safetensors")
    data = bytearray(path.read_bytes())
    data[-50] ^= 1
    path.write_bytes(data)
    expected = f"{path} is damaged: its checksum does not match its content; use an earlier copy"
    assert refused("train", "model.py", "--out", whole, "--resume") == expected
    assert refused("export", whole, "-o", "x.onnx") == expected
    assert refused("inspect", whole) == expected
    path.write_bytes(data[:1000])
    assert "is damaged or not a safetensors file" in refused("train", "model.py", "--out", whole, "--resume")
    path.unlink()
    assert "has no checkpoint.safetensors" in refused("train", "model.py", "--out", whole, "--resume")
    assert "is neither a run" in refused("export", whole, "-o", "x.onnx")


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (
            "def optimizer(parameters): return torch.optim.AdamW(parameters)",
            "the checkpoint was trained with the optimizer SGD, not AdamW: ",
        ),
        ("del lr_scheduler", "the checkpoint was trained with the learning-rate scheduler MultiStepLR, not none: "),
        (
            "def model(): return nn.Sequential(nn.Flatten(), nn.Linear(48, 30), nn.Linear(30, 8))",
            "the plan factors 0.weight, which this model does not have: the plan is of another model",
        ),
        (
            "whole = model\ndef model():\n    made = whole()\n    made[1] = nn.Identity()\n    return made",
            "the saved weights are of another model or plan: ",
        ),
    ],
    ids=["optimizer", "scheduler", "model", "part of the model"],
)
def test_a_model_file_that_has_become_another(
    more: str, sentence: str, whole: str, write: Run, refused: Callable[..., str]
) -> None:
    write(more)
    assert refused("train", "model.py", "--out", whole, "--resume").startswith(sentence)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--device", "cuda:77"], "Invalid value for --device: 'cuda:77' cannot be used here ("),
        (["--device", "toaster"], "Invalid value for --device: 'toaster' cannot be used here ("),
        (["--schedule", "low", "--cost", "0.5"], "--cost is the budget of auto, and says nothing to low"),
        (
            ["--no-compile", "--activation-memory", "0.5"],
            "--activation-memory is of torch.compile, which --no-compile leaves out: give one of them",
        ),
        (["--no-compile", "--compile", "default"], "--compile is of torch.compile, which --no-compile leaves out"),
        (["--deflate", "adaptor"], "--deflate goes with aligned and paper-*, not with auto"),
        (
            ["--schedule", "interleave", "--low", "0", "--full", "0"],
            "Invalid value for --schedule: interleave(low=0, full=0) has no epochs ",
        ),
        (["--steps", "9", "--epochs", "3"], "--steps is the length of a run in place of --epochs: give one of them"),
        (
            ["--steps", "9", "--schedule", "paper-cifar10"],
            "paper-cifar10 names the epochs of its phases: give --epochs",
        ),
        (["--lr-milestones", "soon"], "Invalid value for --lr-milestones: 'soon' is no list of epochs like 8,10"),
        (
            ["--epochs", "100", "--lr-milestones", "3"],
            "Invalid value for --schedule: aligned(epochs=100, lr_milestones=(3,)) leaves no FULL epoch: ",
        ),
        (["--from", "gone"], "there is no folder gone: give one that save or `dynrank-fx transform` wrote"),
        (["--from", "gone", "--rank", "3"], "--from brings its plan along: leave out --rank"),
        (["--out", "model.py/below"], "model.py/below could not be written (Not a directory); nothing was changed"),
        (["--out", "model.py"], "model.py is a file: give the name of a folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_that_do_not_do(
    options: list[str], sentence: str, write: Run, refused: Callable[..., str], folder: Path
) -> None:
    write()
    message = refused("train", "model.py", "--no-compile", *options)
    assert message.startswith(sentence)
    assert [path.name for path in folder.iterdir() if path.name != "__pycache__"] == ["model.py"]


def test_aligned_without_a_decay_to_align_with(write: Run, refused: Callable[..., str]) -> None:
    assert refused("train", write("del lr_scheduler"), "--schedule", "aligned").startswith(
        "aligned goes by the decays of the learning rate: give their epochs as --lr-milestones"
    )


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (
            "del train_data, loss",
            "model.py has no train_data() and no loss(output, batch), which train needs: add them",
        ),
        ("def train_data(): return []", "train_data() gave no batch in epoch 1: "),
        (
            "def train_data(): return [(torch.zeros(2, 3, 9, 9), torch.zeros(2).long())]",
            "the model does not accept a batch ",
        ),
        (
            "def train_data(): return ['text']",
            "model.py has batches of type str, which do not say what the model is called ",
        ),
        ("def loss(output, batch): return output + None", "model.py, line "),
        (
            "def loss(output, batch): return output.sum(1)",
            "the loss must be one number that depends on the model's output: ",
        ),
        (
            "def loss(output, batch): return output.sum() * float('nan')",
            "the training diverged in epoch 1, where the loss ",
        ),
        ("def metric(output, batch): return 1/0", "model.py, line "),
        ("def optimizer(parameters): return torch.optim.LBFGS(parameters)", "LBFGS"),
    ],
    ids=["missing", "empty", "shape", "type", "loss fails", "loss is no number", "diverged", "metric fails", "closure"],
)
def test_model_files_that_cannot_be_trained(more: str, sentence: str, write: Run, refused: Callable[..., str]) -> None:
    message = refused("train", write(more), "--no-compile", noisy=True)
    assert message.startswith(sentence)


@pytest.mark.parametrize("name", ["train_data", "eval_data"])
def test_a_generator_is_refused_before_training(name: str, write: Run, refused: Callable[..., str]) -> None:
    message = refused("train", write(f"def {name}(): yield 1"), "--no-compile")
    assert message.startswith(f"{name}() gave a generator, whose batches can be gone through only once: give a list, ")
    assert not Path("model-run").exists()


def test_workers_load_the_data_and_are_of_a_loader(seen: list, run: Run, refused: Run, write: Run) -> None:
    from torch.utils.data import DataLoader

    handed: list[DataLoader[Any]] = []
    real = Task.__post_init__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Task, "__post_init__", lambda self: (handed.append(self.train_data), real(self))[1])
        run("train", "model.py", "--workers", "2")
    assert (handed[0].num_workers, handed[0].prefetch_factor) == (2, 2)
    assert len(list(handed[0])) == 3
    write("def train_data():\n        return [(torch.zeros(2, 3, 4, 4), torch.zeros(2).long())]")
    said = refused("train", "model.py", "--workers", "2", "--out", "other")
    assert said.startswith("--workers is of a DataLoader, and train_data() gave a list")


def test_training_starts_from_weights_and_goes_on_without_their_file(write: Run, run: Run, refused: Run) -> None:
    model = load_model_file(Path(write())).model()
    torch.save({"state_dict": model.state_dict()}, "w.pt")
    run("train", "model.py", "--weights", "w.pt", "--no-compile", "--epochs", "1", "--schedule", "full", "--out", "r")
    Path("w.pt").unlink()
    run("train", "model.py", "--out", "r", "--resume")
    run("transform", "model.py", "-o", "folder")
    assert "leave out --weights" in refused("train", "model.py", "--from", "folder", "--weights", "w.pt", "--out", "s")
