"""Malformed model files, in every command that reads what is wrong with them: one sentence, an exit code that says so,
and nothing half-written. A few every day, all with ``make fuzz``.

The files are made of a sound one, of which one definition is replaced.
"""

from __future__ import annotations

import re
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from dynrank_fx.cli.main import cli

SOUND = """
import collections, functools, itertools, math, types
import numpy as np
import torch
from torch import nn

X, Y = torch.linspace(-1, 1, 96).view(12, 8), torch.arange(12) % 4

def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))

def example_inputs():
    return (X[:3],)

def batches():
    return [(X[:6], Y[:6]), (X[6:], Y[6:])]

train_data = eval_data = calibration_data = batches

def inputs(batch):
    return (batch[0],)

def loss(output, batch):
    return nn.functional.cross_entropy(output, batch[1])

def metric(output, batch):
    return (output.argmax(1) == batch[1]).float().mean()

def optimizer(parameters):
    return torch.optim.SGD(parameters, lr=0.1)

def lr_scheduler(optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, 1)

epochs = 2
sharded = False
"""

COMMANDS = {
    "transform": ("model.py", "--out", "new", "--leave", "none"),
    "train": ("model.py", "--out", "new", "--leave", "none", "--no-compile", "--epochs", "1"),
    "train by its epochs": ("model.py", "--out", "new", "--leave", "none", "--no-compile"),
    "compress": ("model.py", "--budget", "params=0.7", "--no-timing", "--out", "new.pt"),
    "inspect": ("model.py",),
    "export": ("model.py", "--out", "new.onnx"),
}
READ_BY = {  # which commands read a name
    "model": ("transform", "train", "compress", "inspect"),
    "example_inputs": ("transform", "train", "compress"),
    "train_data": ("train",),
    "eval_data": ("train", "compress"),
    "calibration_data": ("compress",),
    "inputs": ("train", "compress"),
    "loss": ("train",),
    "metric": ("train", "compress"),
    "optimizer": ("train",),
    "lr_scheduler": ("train",),
    "epochs": ("train by its epochs",),
    "sharded": ("train",),
}
PARAMETERS = dict.fromkeys(READ_BY, 0) | {
    "inputs": 1,
    "loss": 2,
    "metric": 2,
    "optimizer": 1,
    "lr_scheduler": 1,
}

VALUES = {  # what nothing of a model file can be, but where ``MAY_BE`` says so
    **{text: text for text in ("None", "3", "-1", "0", "1.5", "10**30", "True", "'junk'", "b'junk'", "[]", "{}", "()")},
    **{text: text for text in ("math.nan", "math.inf", "object()", "int", "...", "nn", "X", "(X, Y)", "[None]")},
    **{text: text for text in ("{'x': 3}", "nn.Linear", "nn.Linear(2, 2)", "lambda: None", "np.ones(3)", "set()")},
    "a simple namespace": "types.SimpleNamespace(x=X)",
    "an iterator": "iter([])",
    "a tensor on meta": "torch.ones(3, device='meta')",
    "a complex tensor": "torch.ones((), dtype=torch.complex64)",
    "nan in a tensor": "torch.tensor(math.nan)",
    "a user's dict": "collections.UserDict(x=3)",
    "an optimizer of others": "torch.optim.SGD([nn.Parameter(X)], lr=0.1)",
    "a scheduler of others": "torch.optim.lr_scheduler.StepLR(torch.optim.SGD([nn.Parameter(X)], lr=0.1), 1)",
}
MAY_BE = {
    "model": {"nn.Linear(2, 2)"},
    "epochs": {"3", "None"},
    "sharded": {"True"},
    "metric": {"3", "-1", "0", "1.5", "10**30", "math.inf", "math.nan", "nan in a tensor"},
}
RAISED = (
    *("KeyError('x')", "SystemExit(0)", "SystemExit('stop')", "MemoryError()", "RecursionError()", "StopIteration()"),
    *("AssertionError()", "Exception('one\\nand two')", "OSError(2, 'gone', 'x')", "RuntimeError('\\x1b[31m')"),
    *("ImportError('no module x')", "NotImplementedError", "UnicodeDecodeError('utf-8', b'x', 0, 1, 'bad')"),
)
FILES = {
    "empty": "",
    "no Python": "this is no Python",
    "an open bracket": "def model(:",
    "bad indentation": "def model():\nreturn 1",
    "null bytes": "def model(): return 1\0",
    "not UTF-8": None,
    "raises": "raise ValueError('no')",
    "exits": "raise SystemExit(0)",
    "imports what is not there": "import not_there_at_all",
    "imports a name that is not there": "from torch import not_there",
    "very deep": "x = " + "(" * 5000 + ")" * 5000,
    "only a class": "class model: pass",
    "another coding": "# -*- coding: not-a-coding -*-\n",
    "recursive": "def f(): return f()\nf()",
    "removes its folder from the path": SOUND + "\nimport sys\nsys.path.clear()\nraise ValueError('no')",
    "takes the names away": SOUND + "\ndel model, example_inputs",
    "without example inputs": SOUND + "\ndel example_inputs",
    "without data": SOUND + "\ndel train_data, eval_data, calibration_data",
    "without a loss": SOUND + "\ndel loss",
}
MODELS = {  # the body of a class of a model
    "no forward": "pass",
    "forward raises": "def forward(self, x): raise KeyError('x')",
    "forward exits": "def forward(self, x): raise SystemExit(0)",
    "forward takes nothing": "def forward(self): return self.a.weight",
    "forward takes two": "def forward(self, x, y): return self.a(x) + y",
    "forward gives nothing": "def forward(self, x): self.a(x)",
    "forward gives text": "def forward(self, x): return 'junk'",
    "forward gives a number": "def forward(self, x): return 3",
    "forward gives an object": "def forward(self, x): self.a(x); return object()",
    "forward is a generator": "def forward(self, x): yield self.a(x)",
    "forward is async": "async def forward(self, x): return self.a(x)",
    "forward is no function": "forward = 3",
    "another width": "def forward(self, x): return self.b(self.b(x))",
    "forward is detached": "def forward(self, x): return self.b(self.a(x)).detach()",
    "forward is random": "def forward(self, x): return self.b(self.a(x)) + torch.randn(4)",
    "forward counts itself": "n = 0\n  def forward(self, x): M.n += 1; return self.b(self.a(x)) + M.n",
    "weights on meta": "def __init__(self): super().__init__(); self.a = nn.Linear(8, 4, device='meta')\n"
    "  def forward(self, x): return self.a(x)",
    "weights of nan": "def __init__(self): super().__init__(); self.a = nn.Linear(8, 4); "
    "nn.init.constant_(self.a.weight, math.nan)\n  def forward(self, x): return self.a(x)",
    "weights are lazy": "def __init__(self): super().__init__(); self.a = nn.LazyLinear(4)\n"
    "  def forward(self, x): return self.a(x)",
    "weights are complex": "def __init__(self): super().__init__(); self.a = nn.Linear(8, 4, dtype=torch.complex64)\n"
    "  def forward(self, x): return self.a(x.to(torch.complex64)).real",
    "no weights": "def __init__(self): super().__init__()\n  def forward(self, x): return x[:, :4]",
    "no matrices": "def __init__(self): super().__init__(); self.a = nn.Parameter(torch.ones(4))\n"
    "  def forward(self, x): return x[:, :4] * self.a",
    "weights of no size": "def __init__(self): super().__init__(); self.a = nn.Linear(8, 0); self.b = nn.Linear(0, 4)",
    "an init that raises": "def __init__(self): raise KeyError('x')",
    "an init without super": "def __init__(self): self.a = nn.Linear(8, 4)",
    "train raises": "def train(self, mode=True): raise KeyError('x')",
    "state_dict raises": "def state_dict(self, *a, **k): raise KeyError('x')",
    "parameters raise": "def named_parameters(self, *a, **k): raise KeyError('x')",
    "a copy raises": "def __deepcopy__(self, memo): raise KeyError('x')",
    "a text raises": "def __repr__(self): raise KeyError('x')",
    "an attribute raises": "def __getattr__(self, name): raise KeyError(name)",
    "escapes in names": "def __init__(self): super().__init__(); self.add_module('\\x1b[31m', nn.Linear(8, 8)); "
    "self.add_module('a\\nb', nn.Linear(8, 4))\n"
    "  def forward(self, x): return self._modules['a\\nb'](self._modules['\\x1b[31m'](x))",
    "a long name": "def __init__(self): super().__init__(); self.add_module('n' * 5000, nn.Linear(8, 4))\n"
    "  def forward(self, x): return self._modules['n' * 5000](x)",
    "odd names": "def __init__(self): super().__init__(); self.add_module('a/../b c', nn.Linear(8, 4))\n"
    "  def forward(self, x): return self._modules['a/../b c'](x)",
    "a hook raises": "def __init__(self): super().__init__(); self.a = nn.Linear(8, 4); "
    "self.register_forward_hook(lambda *a: 1 / 0)\n  def forward(self, x): return self.a(x)",
    "a branch on data": "def forward(self, x): return self.b(self.a(x)) if x.sum() > 0 else x[:, :4]",
    "changes its input": "def forward(self, x): return self.b(self.a(x.add_(1)))",
    "grows": "def forward(self, x): self.add_module(str(len(self._modules)), nn.Linear(2, 2)); return self.a(x)",
    "scripted": "def forward(self, x): return self.b(self.a(x))\nM = lambda M=M: torch.jit.script(M())",
}
INPUTS = {
    "of another width": "(X[:3, :5],)",
    "of no row": "(X[:0],)",
    "of whole numbers": "(X[:3].long(),)",
    "of complex numbers": "(X[:3].to(torch.complex64),)",
    "on meta": "(X[:3].to('meta'),)",
    "too many": "(X[:3], X[:3])",
    "none": "()",
    "a list": "[X[:3]]",
    "under another name": "{'gone': X[:3]}",
    "under no text": "{3: X[:3]}",
    "of numbers": "(3.0,)",
    "of texts": "('junk',)",
    "of arrays": "(np.ones((3, 8), np.float32),)",
    "of None": "(None,)",
    "a pair of odd things": "((X[:3],), {'input': X[:3]})",
    "a pair with a list": "([X[:3]], {})",
    "sparse": "(X[:3].to_sparse(),)",
    "of no dimension": "(X[0, 0],)",
    "of one dimension": "(X[0],)",
    "within a list": "([X[:3]],)",
    "of text keys of text": "{'input': 'junk'}",
}
BATCHES = {
    "none": "[]",
    "of None": "[None]",
    "of texts": "['junk']",
    "of numbers": "[3]",
    "of empty tuples": "[()]",
    "of dicts": "[{}]",
    "of one": "[(X,)]",
    "of another width": "[(X[:, :5], Y)]",
    "of no row": "[(X[:0], Y[:0])]",
    "of whole numbers": "[(X.long(), Y)]",
    "of other labels": "[(X, Y[:3])]",
    "of labels that are none": "[(X, Y + 9)]",
    "of labels as text": "[(X, 'junk')]",
    "on meta": "[(X.to('meta'), Y)]",
    "of nan": "[(X * math.nan, Y)]",
    "of inf": "[(X * math.inf, Y)]",
    "of arrays": "[(np.ones((3, 8)), np.ones(3))]",
    "of two kinds": "[(X, Y), None]",
    "that raise": "type('D', (), {'__iter__': lambda s: 1 / 0})()",
    "that raise late": "type('D', (), {'__iter__': lambda s: (b if b else 1 / 0 for b in [(X, Y), 0])})()",
    "that exit": "type('D', (), {'__iter__': lambda s: iter((_ for _ in ()).throw(SystemExit(0)))})()",
    "whose iterator is none": "type('D', (), {'__iter__': lambda s: 3})()",
    "of a length below zero": "type('D', (), {'__iter__': lambda s: iter([(X, Y)]), '__len__': lambda s: -1})()",
    "of a length that is none": "type('D', (), {'__iter__': lambda s: iter([(X, Y)]), '__len__': lambda s: 'x'})()",
    "of a length that raises": "type('D', (), {'__iter__': lambda s: iter([(X, Y)]), '__len__': lambda s: 1 / 0})()",
    "shorter than they say": "type('D', (), {'__iter__': lambda s: iter([(X, Y)]), '__len__': lambda s: 5})()",
    "longer than they say": "type('D', (), {'__iter__': lambda s: iter([(X, Y)] * 5), '__len__': lambda s: 2})()",
    "given once": "iter([(X, Y)])",
    "a generator": "(b for b in [(X, Y)])",
    "text": "'junk'",
    "a tensor": "X",
    "a loader that raises": "torch.utils.data.DataLoader(type('D', (), {'__len__': lambda s: 4, "
    "'__getitem__': lambda s, i: 1 / 0})(), 2)",
    "a loader of nothing": "torch.utils.data.DataLoader([], 2)",
    "a loader of odd things": "torch.utils.data.DataLoader([object(), object()], 2)",
    "a loader of other shapes": "torch.utils.data.DataLoader([(torch.ones(8), 1), (torch.ones(5), 1)], 2)",
}
RESULTS = {  # what loss, metric, optimizer and lr_scheduler may give beside ``VALUES``
    "loss": (
        *("output", "output.sum().detach()", "output.sum() * 1j", "output.sum() * math.nan", "output.sum().long()"),
        *("output.argmax()", "output[:0].sum()", "float(output.sum())", "[output.sum()]", "output.sum().to('meta')"),
        *("output.sum().backward() or output.sum()", "nn.functional.cross_entropy(output)", "output.undefined"),
        *("output.sum() + torch.zeros(())[None]", "torch.ones((), requires_grad=True)", "batch"),
    ),
    "metric": (
        *("output", "output[0]", "output.sum() * 1j", "output.sum().to('meta')", "output[:0]", "1 / 0", "batch"),
        *("output.undefined", "[0.5]", "(0.5, 1)", "torch.ones(2, 2)", "np.ones(3)", "1j", "'0.5'"),
    ),
    "optimizer": (
        *("torch.optim.SGD(parameters, lr=-1)", "torch.optim.SGD([], lr=1)", "torch.optim.SGD(list(parameters)[:1])"),
        *("torch.optim.SparseAdam(list(parameters))", "torch.optim.SGD(parameters, lr=math.nan)", "torch.optim.SGD"),
        *("torch.optim.LBFGS(parameters)", "torch.optim.Optimizer(parameters, {})", "parameters", "list(parameters)"),
        *("torch.optim.SGD(parameters, lr='x')", "torch.optim.SGD(parameters, lr=1e38)", "nn.Module()"),
        "torch.optim.SGD([nn.Parameter(X), *parameters], lr=0.1)",
    ),
    "lr_scheduler": (
        *("optimizer", "(torch.optim.lr_scheduler.StepLR(optimizer, 1),)", "(None, 'step')"),
        *("(torch.optim.lr_scheduler.StepLR(optimizer, 1), 'batch')", "{'scheduler': None}", "{'interval': 'step'}"),
        *("(torch.optim.lr_scheduler.StepLR(optimizer, 1), 3)", "torch.optim.lr_scheduler.StepLR(optimizer, 0)"),
        *("torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=1), 'step'",),
        *("torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1 / (1 - epoch))",),
        *("torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: math.nan)",),
        *("torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 'x')",),
        *("(torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer), 'step')", "torch.optim.lr_scheduler.StepLR"),
    ),
    "inputs": ("batch", "batch[1]", "(batch,)", "batch.gone", "{'gone': batch[0]}", "(batch[0], batch[1])", "batch[9]"),
}

NO_MISTAKE = {  # what a command may do its work with, where it does not refuse it
    "model": {
        *("forward gives nothing", "forward gives text", "forward gives a number", "forward is detached"),
        *("forward is random", "weights are lazy", "weights are complex", "no weights", "no matrices"),
        *("escapes in names", "a long name", "a branch on data", "changes its input", "grows"),
    },
    "example_inputs": {"returns X", "of no row", "a list", "sparse", "of one dimension"},
    "loss": {"returns output[:0].sum()"},
    "metric": {"returns True"},
    "optimizer": {"returns torch.optim.SGD([nn.Parameter(X), *parameters], lr=0.1)"},
    "train_data": {
        "of a length below zero",
        "of a length that is none",
        "shorter than they say",
        "longer than they say",
    },
    "eval_data": {
        *("of no row", "of labels that are none", "of nan", "of inf", "of a length below zero"),
        *("of a length that is none", "shorter than they say", "longer than they say"),
    },
    "calibration_data": {
        *("of one", "of other labels", "of labels that are none", "of labels as text", "of a length below zero"),
        *("of a length that is none", "of a length that raises", "shorter than they say", "longer than they say"),
        *("given once", "a generator"),
    },
}


def definitions() -> Iterator[tuple[str, str, str]]:
    """(name, what is wrong, the lines that define it so)."""
    for name in READ_BY:
        allowed = MAY_BE.get(name, set())
        for what, value in VALUES.items():
            if name in ("epochs", "sharded"):
                if what not in allowed:
                    yield name, f"is {what}", f"{name} = {value}"
                continue
            yield name, f"is {what}", f"{name} = {value}"
            if what not in allowed:
                yield name, f"returns {what}", f"def {name}(*given): return {value}"
        if name in ("epochs", "sharded"):
            continue
        for error in RAISED:
            yield name, f"raises {error}", f"def {name}(*given): raise {error}"
        yield name, "is a generator", f"def {name}(*given): yield None"
        yield name, "is a generator of nothing", f"def {name}(*given):\n  return\n  yield"
        yield name, "is a generator that raises", f"def {name}(*given):\n  yield (X, Y)\n  1 / 0"
        yield name, "is async", f"async def {name}(*given): pass"
        yield name, "calls itself", f"def {name}(*given): return {name}(*given)"
        yield name, "takes another number", f"def {name}(a, b, c, d): pass"
        yield name, "takes a name", f"def {name}(*, needed): pass"
        yield name, "is a class", f"class {name}: pass"
        yield name, "is a class that raises", f"class {name}:\n  def __init__(self, *given): 1 / 0"
        if PARAMETERS[name]:
            yield name, "takes nothing", f"def {name}(): return 3"
        for result in RESULTS.get(name, ()):
            given = {"inputs": "batch", "optimizer": "parameters", "lr_scheduler": "optimizer"}.get(
                name, "output, batch"
            )
            yield name, f"returns {result}", f"def {name}({given}): return {result}"
    for what, body in MODELS.items():
        usual = (
            ""
            if "__init__" in body
            else ("  def __init__(self): super().__init__(); self.a = nn.Linear(8, 8); self.b = nn.Linear(8, 4)\n")
        )
        yield "model", what, f"class M(nn.Module):\n{usual}  {body}\ndef model(): return M()"
    for what, value in INPUTS.items():
        yield "example_inputs", what, f"def example_inputs(): return {value}"
    for name in ("train_data", "eval_data", "calibration_data"):
        for what, value in BATCHES.items():
            yield name, what, f"def {name}(): return {value}"


Case = tuple[str, str, str, str | None]
"""The command, the name and what is wrong with it, and the file; None for bytes that are no text."""

CASES: list[Case] = [
    *((command, name, what, f"{SOUND}\n{lines}\n") for name, what, lines in definitions() for command in READ_BY[name]),
    *((command, "the file", what, text) for what, text in FILES.items() for command in COMMANDS),
]
HARMLESS = {  # files that lack what these commands do without
    *((command, "without data") for command in ("transform", "inspect", "export")),
    *((command, "without a loss") for command in ("transform", "inspect", "export", "compress")),
    *(("inspect", what) for what in ("without example inputs",)),
}


@pytest.fixture(autouse=True)
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():  # the command's own way of telling them stays within
        warnings.simplefilter("ignore")
        yield


def wrong_with(case: Case) -> str:
    """What is wrong with what a command says of a file, or "" for a sentence that leaves nothing half-written."""
    command, name, what, text = case
    for path in Path().glob("*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    Path("model.py").write_bytes(b"\xff\xfe\x00" if text is None else text.encode())
    before = list(sys.path)
    result = CliRunner().invoke(cli, (command.split()[0], *COMMANDS[command]))
    sys.path[:] = before  # as another process has its own
    lines = result.stderr.strip().splitlines()
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        return f"raised {result.exception!r}"
    if "Traceback" in result.output or "\x1b" in result.output:
        return "a traceback, or what a terminal obeys"
    if result.exit_code == 0:
        return "" if what in NO_MISTAKE.get(name, ()) or (command, what) in HARMLESS else "accepted"
    if result.exit_code not in (1, 2):
        return f"ended with {result.exit_code}"
    if not lines or not re.match(r"Error: \S", lines[-1]):
        return f"said {lines[-1:]}"
    return left()


def left() -> str:
    """What is half-written: a training that fails at work leaves its run, and all else nothing."""
    names = {str(path) for path in Path().rglob("*") if "__pycache__" not in path.parts} - {"model.py"}
    of_a_run = {"new", "new/run.json", "new/checkpoint.safetensors"}
    names -= {"new/history.jsonl", "new/.lock"} if of_a_run <= names else set()
    return "" if names in (set(), of_a_run) else f"left {sorted(names)}"


def test_some_malformed_files_are_one_sentence() -> None:
    assert {case[:3]: said for case in CASES[::103] if (said := wrong_with(case))} == {}


@pytest.mark.fuzz
@pytest.mark.parametrize("command", COMMANDS)
def test_every_malformed_file_is_one_sentence(command: str) -> None:
    wrong = {case[1:3]: said for case in CASES if case[0] == command and (said := wrong_with(case))}
    assert not wrong
