"""``train --pilot``: the run is the one that the pilot's findings, given by hand, would make; resuming; refusals."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from run_folders import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import dynrank_fx as dr
import dynrank_fx.training as training
from dynrank_fx.cli.main import cli
from dynrank_fx.plan import StepTimes
from dynrank_fx.timing import Pair
from dynrank_fx.training import Pilot

Run = Callable[..., Result]
LINEAR = """
    def model():
        return nn.Sequential(nn.Flatten(), nn.Linear(48, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8))

    def train_data():
        return DataLoader(Noisy(), 8, shuffle=True, drop_last=True)

    def lr_scheduler(optimizer):
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs)

    del eval_data
"""
NARROWER = """
    def narrower(share):
        width = round(64 * share)
        return nn.Sequential(
            nn.Flatten(), nn.Linear(48, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 8)
        )
"""
# A norm before the first layer, whose backward pass is then as large as that of the others.
LARGE_BATCHES = """
    whole = model

    def model():
        return nn.Sequential(nn.BatchNorm2d(3), *whole())

    def train_data():
        return [(torch.linspace(-1, 1, 12288).view(256, 3, 4, 4), torch.arange(256) % 8)] * 2

"""
# Products of the three layers in a step, dense and of rank 12, 16 and 2.
COST = (12 * (48 + 64) + 16 * (64 + 64) + 2 * (64 + 8)) / (48 * 64 + 64 * 64 + 64 * 8)
PILOT = ("train", "model.py", "--no-compile", "--pilot", "20")


@pytest.fixture
def best(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let a way be the best of the pilot, whatever the losses that it finds; and a stop come so many batches later."""
    run_pilot = training.pilot

    def best(way: str, stop_after: int | None = None) -> None:
        def found(*args: Any, **options: Any) -> Pilot:
            trials = run_pilot(*args, **options).trials
            if stop_after is not None:
                monkeypatch.setenv("STOP_AT", str(args[1].loss.__self__.module.steps + stop_after))
            return Pilot(tuple(replace(each, loss=0.5 if each.way == way else 0.625) for each in trials))

        monkeypatch.setattr(training, "pilot", found)

    return best


def noted(folder: str) -> Any:
    return json.loads(Path(folder, "run.json").read_text())


def rates(folder: str) -> list[float]:
    return [json.loads(line)["lr"] for line in Path(folder, "history.jsonl").read_text().splitlines()]


# The run


@pytest.mark.parametrize(
    ("way", "given", "decided"),
    [
        # 0.75 of 4 epochs at 0.46, and 6 epochs at 0.46 + 0.12 * 0.54.
        ("LOW alone", (), ("--schedule", "low", "--epochs", "7")),
        (
            "auto, 12% FULL",
            ("--epochs", "6", "--cost", "1"),
            ("--schedule", "auto", "--cost", "0.525", "--epochs", "11"),
        ),
    ],
)
def test_it_ends_as_the_same_options_by_hand_do_and_so_does_one_that_was_stopped(
    way: str,
    given: tuple[str, ...],
    decided: tuple[str, ...],
    best: Callable[..., None],
    write: Run,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write(LINEAR)
    run("train", "model.py", "--no-compile", *decided, "--out", "by hand")
    best(way, stop_after=5)
    stopped = CliRunner().invoke(cli, [*PILOT, *given, "--leave", "none", "--out", "p"])
    monkeypatch.delenv("STOP_AT")
    assert "after 1 step, and saved; go on with: dynrank-fx train model.py --out p --resume" in stopped.stderr
    assert f"now training: {way} for {decided[-1]} epochs, which cost as much as " in stopped.stdout
    data = noted("p")
    words = dict(zip(decided[::2], decided[1::2], strict=True))
    assert {f"--{name}": str(value) for name, value in data["pilot"]["decided"].items() if value is not None} == words
    assert [each["way"] for each in data["pilot"]["trials"]][1:] == ["LOW alone", "auto, 12% FULL", "auto, 40% FULL"]
    assert (data["options"]["pilot"], data["options"]["schedule"]) == (20, None)
    assert data["options"]["epochs"] == (6 if given else None)
    again = PILOT if given else ("train", "model.py")
    assert "Error" not in run(*again, "--resume", "--out", "p").output
    assert checkpoint("p") == checkpoint("by hand")
    assert run("report", "p").exit_code == 0
    assert data["pilot"]["said"] in Path("p/report.html").read_text()


@pytest.mark.parametrize(("way", "length"), [("LOW alone", ("--epochs", "20")), ("auto, 40% FULL", ("--steps", "40"))])
def test_the_flops_that_are_spent_are_the_budget(
    way: str,
    length: tuple[str, str],
    best: Callable[..., None],
    write: Run,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As torch counts them, forward and backward, with landings, beside a dense run of the whole length."""
    write(LINEAR + LARGE_BATCHES + ("    del lr_scheduler\n" if length[0] == "--steps" else ""))
    spent, fit = [], training.fit

    def counted(*args: Any, **rest: Any) -> bool:
        with FlopCounterMode(display=False) as counter:
            finished = fit(*args, **rest)
        spent.append(counter.get_total_flops())
        return finished

    monkeypatch.setattr(training, "fit", counted)
    best(way)
    told = run(*PILOT, *length, "--out", "p").stderr.splitlines()[-2]
    run("train", "model.py", "--no-compile", "--schedule", "full", *length, "--out", "dense")
    whole = int(length[1])
    within = {"rel": 0.02, "abs": 1.0}  # an epoch; landings and spectra are no matter of the budget
    assert spent[0] / spent[1] * whole == pytest.approx(0.75 * whole, **within)
    assert float(told.split("as many as ")[1].split()[0]) == pytest.approx(0.75 * whole, abs=1.0)
    cost = noted("p")["pilot"]["decided"]["cost"]
    assert cost == (None if way == "LOW alone" else pytest.approx(COST + 0.4 * (1 - COST), abs=1e-3))


def test_a_narrower_dense_model_that_wins_is_warned_of(best: Callable[..., None], write: Run, run: Run) -> None:
    write(LINEAR + NARROWER)
    best("narrower dense")
    with warnings.catch_warnings(action="always"):
        result = run(*PILOT, "--epochs", "1", "--json", "--out", "p")
    told = "Warning: the narrower dense model had a loss of 0.5000 in the pilot, and LOW alone one of 0.6250, at equal"
    assert json.loads(result.stdout)["run"] == "p"
    for text in (
        told,
        "narrower dense  ",
        "a narrower dense model is the better choice",
        "now training: LOW alone for 2 epochs",
    ):
        assert text in result.stderr
    assert "in the pilot its loss was that of auto, 12% FULL" in result.stderr


def test_it_goes_with_a_folder_of_transform_and_with_a_plan(best: Callable[..., None], write: Run, run: Run) -> None:
    """The net of a folder begins with weights that a narrower one has not, and may be in LOW."""
    write(LINEAR + NARROWER)
    best("LOW alone")
    from dynrank_fx.cli.modelfile import load_model_file

    file = load_model_file(Path("model.py"))
    net = dr.transform(file.model(), file.example_inputs())
    dr.enter_(net, dr.Phase.LOW)
    dr.save(net, "kept")
    result = run(*PILOT, "--epochs", "1", "--from", "kept", "--out", "p")
    assert "narrower" not in result.output
    assert noted("p")["pilot"]["trials"][0]["compute"] == 20
    run("transform", "model.py", "--out", "planned")
    assert "narrower dense  " in run(*PILOT, "--epochs", "1", "--plan", "planned/plan.json", "--out", "q").stdout


def test_in_measured_time_the_narrower_model_is_timed_too(
    best: Callable[..., None], write: Run, run: Run, refused: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    monkeypatch.setattr(StepTimes, "_measured", lambda *_: Pair(1e-3, 5e-4, 0.5))
    monkeypatch.setattr(StepTimes, "_measured_whole", lambda *_: Pair(4e-3, 3e-3, 0.75))
    write(LINEAR + NARROWER)
    best("LOW alone")
    result = run(*PILOT, "--measure", "--cost-by", "time", "--out", "p")
    trials = {each["way"]: each for each in noted("p")["pilot"]["trials"]}
    assert [trials[way]["cost"] for way in ("LOW alone", "auto, 40% FULL", "narrower dense")] == [0.75, 0.85, 0.75]
    assert all(each["compute"] == pytest.approx(20, rel=0.1) for each in trials.values())
    assert "now training: LOW alone for 4 epochs, which take as long as 3 dense ones" in result.stdout
    assert noted("p")["pilot"]["decided"] == {"schedule": "low", "cost": None, "cost_by": None, "epochs": 4}
    assert (
        "narrower dense  "
        in run("pilot", "model.py", "--steps", "20", "--no-compile", "--measure", "--cost-by", "time").stdout
    )
    sentence = "the plan has no measured times to count costs by"
    assert refused(*PILOT, "--cost-by", "time", "--out", "q", noisy=True).startswith(sentence)
    assert not Path("q").exists()


# Refusals


@pytest.mark.parametrize(
    ("options", "more", "sentence"),
    [
        (("--pilot", "5"), "", "Invalid value for '--pilot': 5 is not in the range x>=20."),
        (
            ("--schedule", "low"),
            "",
            "--pilot decides between LOW alone and auto, and --schedule asks for low: leave one",
        ),
        (
            ("--lr-milestones", "3"),
            "",
            "--pilot decides between LOW alone and auto, and --lr-milestones asks for aligned",
        ),
        (("--deflate", "adaptor"), "", "--deflate goes with aligned and paper-*, not with --pilot: leave one of them"),
        ((), "del epochs", "model.py has lr_scheduler() and no `epochs`, by which that could follow the length that"),
        (
            ("--steps", "40"),
            "",
            "model.py has lr_scheduler(), which is not told how many steps --pilot finds: give the",
        ),
    ],
    ids=["few steps", "schedule", "milestones", "deflate", "no epochs", "steps"],
)
def test_what_a_pilot_could_not_decide_is_refused_before_any_work(
    options: tuple[str, ...], more: str, sentence: str, write: Run, refused: Run
) -> None:
    write(more)
    assert refused(*PILOT, *options, "--out", "p").startswith(sentence)
    assert not Path("p").exists()


def test_a_pilot_is_the_work_of_one_process(write: Run, refused: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    write()
    for name, value in (("RANK", 0), ("WORLD_SIZE", 4), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 4)):
        monkeypatch.setenv(name, str(value))
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "none")
    assert refused(*PILOT).startswith("--pilot is the work of one process, whose decision the others would not have")


def test_a_run_has_the_pilot_that_it_began_with(best: Callable[..., None], write: Run, run: Run, refused: Run) -> None:
    write(LINEAR)
    run("train", "model.py", "--no-compile", "--epochs", "1", "--out", "without")
    assert refused(*PILOT, "--resume", "--out", "without") == (
        "the run in without was started without --pilot: leave --pilot out, or start another run"
    )
    best("LOW alone")
    run(*PILOT, "--epochs", "1", "--out", "p")
    assert "has its 2 epochs already" in run("train", "model.py", "--resume", "--out", "p").stdout
    data = noted("p")
    del data["sha256"]
    for spoilt, said in (
        ([1], "pilot decided [1]"),
        ({"schedule": 7}, "schedule is 7"),
        ({"epochs": -1}, "epochs is -1"),
    ):
        data["pilot"]["decided"] = spoilt
        Path("p/run.json").write_text(json.dumps(data))
        assert said in refused("train", "model.py", "--resume", "--out", "p")
