"""``dynrank-fx transform``: the plan it prints, the folder it writes, and its refusals."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

import dynrank_fx as dr
from dynrank_fx.cli.main import cli
from dynrank_fx.cli.modelfile import load_model_file

Run = Callable[..., Result]
SITES = ["0.weight", "4.weight", "6.weight"]


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if "__pycache__" not in str(path))


def plan(result: Result) -> dict[str, Any]:
    return json.loads(result.stdout)


def ranks(result: Result) -> dict[str, int]:
    return {row["site"]["name"]: row["rank"] for row in plan(result)["sites"]}


def test_the_plan_names_every_matrix_with_rank_cost_and_reason(write: Run, run: Run, folder: Path) -> None:
    output = run("transform", write(), "--rank", "6", "--dry-run").stdout.splitlines()
    assert output[0].split() == ["weight", "shape", "layout", "rank", "params", "MFLOPs"]
    _, _, *rows = output[: output.index("")]
    assert [row.split()[0] for row in rows] == SITES
    by_name = {row.split()[0]: row for row in rows}
    # FLOPs of two examples: a linear m x n costs 4mn, in two factors 4r(m+n); the convolution has 4 x 4 places.
    assert by_name["4.weight"].split() == [
        "4.weight",
        "32x256",
        "linear",
        "6",
        *["8,192", "->", "1,728", "0.03277", "->", "0.006912"],
    ]
    assert by_name["6.weight"].split() == [
        "6.weight",
        "8x32",
        "linear",
        "6",
        *["256", "->", "240", "0.001024", "->", "0.00096"],
    ]
    dense, low = 16 * 3 * 9, 6 * 3 * 9 + 16 * 6
    flops = f"{4 * 16 * dense / 1e6:.4g} -> {4 * 16 * low / 1e6:.4g}"
    assert by_name["0.weight"].split() == ["0.weight", "16x3x3x3", "channel", "6", *f"{dense} -> {low} {flops}".split()]
    others = 16 + 32 + 32 + 8  # biases and batch norm
    before = dense + 8192 + 256 + others
    after = low + 1728 + 240 + others
    assert output[len(rows) + 3 :][0] == "3 sites factored, 0 matrices left dense"
    assert f"parameters  {before:,} -> {after:,} ({after / before:.1%} of dense)" in output
    assert any(line.startswith("FLOPs ") and line.endswith("of dense) on the example inputs") for line in output)


def test_what_stays_dense_says_why(write: Run, run: Run) -> None:
    output = run("transform", write(), "--rank", "7", "--exclude", "0", "--dry-run").stdout
    assert "excluded by name" in next(line for line in output.splitlines() if line.startswith("0.weight"))
    assert "rank 7 of 8x32 would cost no fewer parameters than dense (280 for 256)" in output
    assert ", 2 matrices left dense" in output


@pytest.mark.parametrize(
    ("options", "sites"),
    [
        (["--leave", "stem", "--leave", "head"], ["4.weight"]),
        (["--leave", "shortcut"], SITES),
        (["--leave", "none"], SITES),
        (["--leave", "head", "--override", "6=0.5"], SITES),
    ],
)
def test_what_weights_are_for_decides_which_are_left(
    options: list[str], sites: list[str], write: Run, run: Run
) -> None:
    assert list(ranks(run("transform", write(), "--json", *options))) == sites


def test_by_default_stem_shortcuts_and_classifier_are_left(write: Run) -> None:
    result = CliRunner().invoke(cli, ["transform", write(), "--json"])
    assert list(ranks(result)) == ["4.weight"]


def test_dry_run_writes_nothing(write: Run, run: Run, folder: Path) -> None:
    write()
    for options in ([], ["--json"], ["--out", "there"]):
        run("transform", "model.py", "--dry-run", *options)
        assert files(folder) == ["model.py"]


def test_json_is_the_plan_and_nothing_else(write: Run, run: Run, folder: Path) -> None:
    result = run("transform", write(), "--json")
    assert plan(result)["format"] == "dynrank-fx plan"
    assert dr.Plan.from_json(result.stdout).to_json() == (folder / "model-dynrank" / "plan.json").read_text()
    assert "wrote model-dynrank/" in result.stderr


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], (4, 8, 2)),
        (["--rank", "0.25"], (4, 8, 2)),
        (["--rank", "0.5"], (8, 16, 4)),
        (["--rank", "3"], (3, 3, 3)),
        (["--multiple-of", "3"], (6, 9, 3)),
        (["--rank", "8", "--multiple-of", "8"], (8, 8, None)),
        (["--include", "4.*", "--include", "6"], (None, 8, 2)),
        (["--exclude", "*.weight", "--exclude", "0.weight", "--include", "*"], (None, None, None)),
        (["--layout", "spatial"], (2, 8, 2)),
        (["--layout", "spatial", "--rank", "3"], (3, 3, 3)),
    ],
    ids=lambda value: " ".join(map(str, value)),
)
def test_options_decide_the_ranks(options: list[str], expected: tuple[int | None, ...], write: Run, run: Run) -> None:
    chosen = {name: rank for name, rank in zip(SITES, expected, strict=True) if rank is not None}
    result = run("transform", write(), "--json", "--dry-run", *options)
    assert ranks(result) == chosen
    layouts = {row["site"]["name"]: row["layout"] for row in plan(result)["sites"]}
    assert layouts.get("0.weight", "channel") == ("spatial" if "spatial" in options else "channel")


def test_energy_measures_the_weights(write: Run, run: Run, folder: Path) -> None:
    """Against singular values computed here, of weights that the file gives a known spectrum."""
    write(
        """
        def model():
            torch.manual_seed(0)
            made = nn.Sequential(nn.Linear(40, 40))
            u, _, v = torch.linalg.svd(torch.randn(40, 40))
            with torch.no_grad():
                made[0].weight.copy_(u @ torch.diag(0.5 ** torch.arange(40.0)) @ v)
            return made
        def example_inputs():
            return (torch.zeros(2, 40),)
        """
    )
    for share in (0.5, 0.9, 0.95, 0.999):
        energy = torch.cumsum(0.25 ** torch.arange(40.0, dtype=torch.float64), 0)
        expected = int((energy < share * energy[-1]).sum()) + 1
        assert ranks(run("transform", "model.py", "--dry-run", "--json", "--energy", str(share))) == {
            "0.weight": expected
        }


def test_the_folder_is_what_load_reads(write: Run, run: Run, folder: Path) -> None:
    result = run("transform", write(), "--out", "deep/here")
    assert files(folder / "deep") == ["here", "here/graph.txt", "here/plan.json", "here/weights.safetensors"]
    assert result.stderr == "\nwrote deep/here/ (plan.json, weights.safetensors, graph.txt)\n"
    file = load_model_file(Path("model.py"))
    net = dr.load("deep/here", file.model(), file.example_inputs())
    assert set(dr.phases_of(net).values()) == {dr.Phase.FULL}
    assert "# One call per site" in (folder / "deep" / "here" / "graph.txt").read_text()


def test_running_again_replaces_the_folder(write: Run, run: Run, folder: Path) -> None:
    run("transform", write(), "--rank", "2")
    run("transform", "model.py", "--rank", "3")
    assert {row.rank for row in dr.Plan.from_json(Path("model-dynrank/plan.json").read_text()).sites} == {3}
    assert files(folder)[0] == "model-dynrank"
    assert len(files(folder)) == 5


def test_a_plan_goes_around_and_may_be_edited(write: Run, run: Run, folder: Path) -> None:
    run("transform", write(), "--rank", "5", "--out", "first")
    run("transform", "model.py", "--plan", "first/plan.json", "--out", "second")
    assert Path("second/plan.json").read_text() == Path("first/plan.json").read_text()
    data = json.loads(Path("first/plan.json").read_text())
    data["sites"] = [row | {"rank": 2} for row in data["sites"] if row["site"]["name"] != "0.weight"]
    Path("edited.json").write_text(json.dumps(data))
    result = run("transform", "model.py", "--plan", "edited.json", "--json")
    assert ranks(result) == {"4.weight": 2, "6.weight": 2}
    assert {row["name"]: row["reason"] for row in plan(result)["skipped"]} == {
        "0.weight": "left dense by the given plan"
    }


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--rank", "0"], "Invalid value for --rank: a rank of 0 cannot be; give a whole number of 1 or more"),
        (["--rank", "-3"], "Invalid value for --rank: a rank of -3 cannot be; give a whole number of 1 or more"),
        (
            ["--rank", "0.0"],
            "Invalid value for --rank: a rank ratio of 0.0 is not a fraction; give one above 0 and at most 1",
        ),
        (
            ["--rank", "1.5"],
            "Invalid value for --rank: a rank ratio of 1.5 is not a fraction; give one above 0 and at most 1",
        ),
        (["--rank", "abc"], "Invalid value for --rank: 'abc' is neither a fraction (0.25) nor a rank (16)"),
        (["--rank", "1.2.3"], "Invalid value for --rank: '1.2.3' is neither a fraction (0.25) nor a rank (16)"),
        (["--rank", "33"], "rank 33 is over the limit of every site (the largest is 32); give 32 or less"),
        (["--energy", "0"], "Invalid value for '--energy': 0.0 is not in the range 0<x<=1."),
        (["--energy", "nan"], "Invalid value for '--energy': nan is no number"),
        (["--energy", "much"], "Invalid value for '--energy': 'much' is not a valid float range."),
        (["--rank", "3", "--energy", "0.5"], "give --rank or --energy, not both"),
        (["--multiple-of", "0"], "Invalid value for '--multiple-of': 0 is not in the range x>=1."),
        (
            ["--include", "nothing*"],
            "the pattern 'nothing*' matches no weight of the model; its weights are named like ",
        ),
        (
            ["--exclude", "0", "--exclude", "none"],
            "the pattern 'none' matches no weight of the model; its weights are ",
        ),
        (["--exclude", "*"], "nothing would be factored: 0.weight (excluded by name), 4.weight (excluded by name), "),
        (["--rank", "32"], "nothing would be factored: "),
        (
            ["--plan", "gone.json"],
            "there is no plan gone.json: give a plan.json that save or `dynrank-fx transform` wrote",
        ),
        (["--plan", "model.py"], "model.py: the plan is not JSON: "),
        (["--plan", "p.json", "--rank", "3"], "--plan brings its plan along: leave out --rank"),
        (["--plan", "p.json", "--exclude", "0"], "--plan brings its plan along: leave out --exclude"),
        (["--out", "model.py"], "model.py is a file: give the name of a folder"),
        (["--out", "model.py/below"], "model.py/below could not be written ("),
        (["--out", "."], ". holds model.py, which is not ours to replace; choose an empty or a new folder"),
        (
            ["--layout", "train"],
            "Invalid value for '--layout': 'train' is not one of 'channel', 'input', 'spatial', 'tucker', 'cp'.",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refusals(options: list[str], sentence: str, write: Run, refused: Callable[..., str], folder: Path) -> None:
    write()
    assert refused("transform", "model.py", *options).startswith(sentence)
    assert files(folder) == ["model.py"]


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (lambda plan: plan.update(version=2), "p.json: the plan has version 2 and this dynrank-fx reads version 1; "),
        (
            lambda plan: plan["sites"][0].update(rank=99),
            "p.json: 0.weight cannot have rank 99: give a whole number from 1 ",
        ),
        (
            lambda plan: plan["sites"][0]["site"].update(name="gone"),
            "the plan factors gone, which this model does not have: ",
        ),
        (
            lambda plan: plan["sites"][0]["site"].update(shape=[16, 3, 5, 5]),
            "the plan has 0.weight as (16, 3, 5, 5) and the ",
        ),
        (lambda plan: plan.pop("sites"), "p.json: the plan is incomplete or has a value of the wrong kind: "),
        (lambda plan: plan.update(sites=[]), "nothing would be factored: "),
    ],
    ids=["newer", "rank", "name", "shape", "incomplete", "empty"],
)
def test_plans_that_do_not_fit(
    edit: Callable[[dict[str, Any]], Any], sentence: str, write: Run, run: Run, refused: Callable[..., str]
) -> None:
    data = plan(run("transform", write(), "--dry-run", "--json"))
    edit(data)
    Path("p.json").write_text(json.dumps(data))
    assert refused("transform", "model.py", "--plan", "p.json").startswith(sentence)


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ("x = 1/0", "model.py, line {line}: x = 1/0 raised ZeroDivisionError: division by zero"),
        ("def model(): return 3", "model.py: model() returned int, not a torch.nn.Module: mend its return"),
        (
            "def example_inputs(): return (torch.zeros(2, 7),)",
            "Sequential does not accept the example inputs (float32[2, 7]): RuntimeError: ",
        ),
        ("del example_inputs", "model.py has no example_inputs(), which this command needs: add it"),
        (
            "def model():\n    made = nn.Sequential(nn.Linear(9, 9))\n    made[0].weight.data[1, 1] = float('nan')\n"
            "    return made\ndef example_inputs(): return (torch.zeros(2, 9),)",
            "0.weight has non-finite weights, ",
        ),
        (
            "class Odd(nn.Module):\n    def forward(self, x):\n        return x.tolist()[0] and x\n"
            "def model(): return Odd()\ndef example_inputs(): return (torch.zeros(2),)",
            "the model (Odd, model.py:{line}: `return x.tolist()[0] and x`) cannot be ",
        ),
    ],
    ids=["exception", "no module", "inputs", "no inputs", "non-finite", "untraceable"],
)
def test_model_files_that_do_not_do(
    more: str, sentence: str, write: Run, refused: Callable[..., str], folder: Path
) -> None:
    write(more)
    lines = Path("model.py").read_text().splitlines()
    wrong = next((i + 1 for i, line in enumerate(lines) if "1/0" in line or "tolist" in line), None)
    # torch.export prints the graph so far.
    assert refused("transform", "model.py", noisy="Odd" in more).startswith(sentence.format(line=wrong))
    assert files(folder) == ["model.py"]


def test_measured_sites_that_are_no_faster_stay_dense_and_the_folder_keeps_the_times(
    write: Run, run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dynrank_fx.plan import StepTimes
    from dynrank_fx.timing import Pair

    asked = []

    def said(self: StepTimes, rows: Any) -> Pair:
        asked.append((self.amp, self.compile, rows[0].site.uses[0].input_shape))
        ratio = 0.5 if rows[0].site.name == "4.weight" else 2.0
        return Pair(1e-3, ratio * 1e-3, ratio)

    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    monkeypatch.setattr(StepTimes, "_measured", said)
    monkeypatch.setattr(StepTimes, "_measured_whole", lambda *_: Pair(4e-3, 3e-3, 0.75))
    write()
    result = run("transform", "model.py", "--rank", "6", "--measure", "--amp", "bf16", "--json", "--out", "kept")
    data = plan(result)
    assert [row["site"]["name"] for row in data["sites"]] == ["4.weight"]
    assert data["sites"][0]["seconds"] == [1e-3, 5e-4]
    assert data["timed"].endswith("bfloat16, compiled")
    assert "measured: a training step takes 2 ms" in data["skipped"][0]["reason"]
    assert {shape[0] for _, _, shape in asked} == {8}, "of a batch of training"
    assert {(amp, compiled) for amp, compiled, _ in asked} == {(torch.bfloat16, True)}
    count = len(asked)
    run("transform", "model.py", "--rank", "6", "--measure", "--amp", "bf16", "--out", "again")
    assert len(asked) == count, "the cache knows them"
    trained = ("--epochs", "1", "--no-compile", "--cost", "0", "--out", "run")
    with warnings.catch_warnings(action="always"):
        result = run("train", "model.py", "--from", "kept", *trained, "--cost-by", "time")
    assert "Warning: LOW alone costs 0.75 of dense training, and the schedule's budget is 0: it is" in result.stderr
    assert re.search(r"it cost 0\.\d\d of the FLOPs of dense training, 0\.75 of its time\n", result.stderr)
    run("transform", "model.py", "--rank", "6", "--out", "untimed")
    refused = CliRunner().invoke(cli, ["train", "model.py", "--from", "untimed", "--cost-by", "time", "--out", "other"])
    assert "the plan has no measured times to count costs by" in refused.output
    assert not Path("other").exists()
    refused = CliRunner().invoke(cli, ["train", "model.py", "--from", "kept", "--measure", "--out", "other"])
    assert "--from brings its plan along: leave out --measure" in refused.output
    refused = CliRunner().invoke(cli, ["train", "model.py", "--schedule", "low", "--cost-by", "time"])
    assert "--cost-by is of the budget of auto, and says nothing to low" in refused.output
    refused = CliRunner().invoke(cli, ["transform", "model.py", "--amp", "bf16"])
    assert "--amp says where --measure measures" in refused.output
