"""What the user's code raises while a command runs: the file, its line and the error, and never exit code 0."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from dynrank_fx.cli.failures import blamed, of_the_machine
from dynrank_fx.cli.main import cli

BATCH = "torch.zeros(4, 3, 4, 4), torch.arange(4)"
TRAIN = ("train", "model.py", "--epochs", "4", "--no-compile", "--schedule", "low", "--leave", "none", "--out", "run")
MISTAKES = {
    "data end the program": (
        f"class D:\n  def __iter__(s):\n    yield {BATCH}\n    exit(0)\ndef train_data(): return D()",
        "model.py, line {line}: exit(0) raised SystemExit: 0",
    ),
    "data raise": (
        f"class D:\n  def __iter__(s):\n    yield {BATCH}\n    {{}}['label']\ndef train_data(): return D()",
        "model.py, line {line}: {{}}['label'] raised KeyError: 'label'",
    ),
    "held-out data raise": (
        f"class D:\n  def __iter__(s):\n    yield {BATCH}\n    1 / 0\ndef eval_data(): return D()",
        "model.py, line {line}: 1 / 0 raised ZeroDivisionError: division by zero",
    ),
    "the data's processes raise": (
        "class D(Noisy):\n  def __getitem__(self, i):\n    return {}['label']\n"
        "def train_data(): return DataLoader(D(), 8, num_workers=1)",
        "model.py, line {line}: return {{}}['label'] raised KeyError: 'label'",
    ),
    "forward ends the program": (
        "class M(nn.Module):\n  def forward(s, x):\n    exit(0)\ndef model(): return M()",
        "model.py, line {line}: exit(0) raised SystemExit: 0",
    ),
    "data have no values": (
        "def train_data(): return [(torch.zeros(4, 3, 4, 4, device='meta'), torch.arange(4))]",
        "model.py: moving a batch to cpu raised NotImplementedError: Cannot copy out of meta tensor",
    ),
    "a loss of complex numbers": (
        "def loss(output, batch): return output.sum() * 1j",
        "the loss must be one number that depends on the model's output: loss() gave a tensor of complex64",
    ),
    "a loss that went backward": (
        "def loss(output, batch):\n  l = F.cross_entropy(output, batch[1]); l.backward(); return l",
        "model.py: the backward pass of loss() raised RuntimeError: Trying to backward through the graph a second time",
    ),
    "a metric of each row": (
        "def metric(output, batch): return output.sum(1)",
        "the metric must be one number, the mean over a batch: metric() gave a tensor of float32 and shape (8,)",
    ),
    "a metric without a value": (
        "def metric(output, batch): return torch.zeros((), device='meta')",
        "the metric must be one number, the mean over a batch: metric() gave a tensor of float32 and shape (), without",
    ),
    "an optimizer of sparse gradients": (
        "def optimizer(parameters): return torch.optim.SparseAdam(list(parameters))",
        "model.py: the step of SparseAdam raised RuntimeError: SparseAdam does not support dense gradients",
    ),
    "a scheduler that ends early": (
        "def lr_scheduler(optimizer): return torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=2)",
        "model.py: the step of OneCycleLR raised ValueError: Tried to step 3 times",
    ),
}


@pytest.mark.filterwarnings("ignore::dynrank_fx.DynrankWarning")
@pytest.mark.parametrize(("more", "sentence"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_sentence(
    more: str, sentence: str, write: Callable[..., str], refused: Callable[..., str], folder: Path
) -> None:
    write()
    with open("model.py", "a") as file:
        file.write(more + "\n")
    fault = [part.split(" raised")[0] for part in sentence.format(line=0).split(": ")[1:2]]
    lines = Path("model.py").read_text().splitlines()
    at = next((i for i, line in enumerate(lines, 1) if line.strip() == fault[0]), 0)
    assert refused(*TRAIN, noisy=True).startswith(sentence.format(line=at))


def test_the_calls_before_an_error_can_be_had(write: Callable[..., str], folder: Path) -> None:
    write("def loss(output, batch): return {}['label']")
    plain = CliRunner().invoke(cli, TRAIN)
    assert "Try 'dynrank-fx --traceback COMMAND ...' for all the calls before the error." in plain.stderr
    assert "Traceback" not in plain.stderr
    whole = CliRunner().invoke(cli, ("--traceback", *TRAIN[:-1], "again"))
    assert "Traceback (most recent call last)" in whole.stderr
    assert whole.stderr.strip().splitlines()[-1] == plain.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OSError(28, "No space left on device", "a.pt"), "a.pt could not be used (No space left on device)"),
        (MemoryError("no 119 GiB"), "there is not enough memory (MemoryError: no 119 GiB): give smaller batches"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "there is not enough memory (RuntimeError: Def"),
    ],
    ids=["disk", "memory", "torch's memory"],
)
def test_the_machine_at_its_limit_is_one_sentence(error: Exception, sentence: str) -> None:
    assert str(of_the_machine(error)).startswith(sentence)


@pytest.mark.parametrize(
    "error", [KeyError("ours"), RuntimeError("ours"), OSError("ours")], ids=lambda e: type(e).__name__
)
def test_an_error_of_ours_is_nobody_elses(error: Any) -> None:
    assert blamed(error) is None
    assert of_the_machine(error) is None


@pytest.mark.parametrize(
    "behind", ["", "try:\n    {}\nexcept RuntimeError as error:\n    raise ImportError('no') from error"]
)
def test_a_torchvision_of_another_build_is_told_with_the_line_that_mends_it(folder: Path, behind: str) -> None:
    raises = "raise RuntimeError('operator torchvision::nms does not exist')"
    (folder / "model.py").write_text(behind.format(raises) or raises)  # transformers hides it behind one of its own
    done = CliRunner().invoke(cli, ["transform", "model.py"])
    assert done.exit_code == 1
    assert "pip install torch torchvision --index-url" in done.output
