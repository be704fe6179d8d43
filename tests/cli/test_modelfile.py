"""Model files: what a good one gives, and the one sentence for each way in which one is bad."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent

import pytest
import torch
from torch import nn

from dynrank_fx.cli.modelfile import ModelFile, load_model_file
from dynrank_fx.errors import ModelFileError

MODEL = """
from torch import nn
def model():
    return nn.Linear(4, 2)
"""

FULL = """
import torch
from torch import nn
epochs = 3
def model():
    return nn.Linear(4, 2)
def example_inputs():
    return (torch.zeros(2, 4),)
def train_data():
    return [(torch.ones(8, 4), torch.zeros(8, 2))]
def eval_data():
    return [(torch.ones(4, 4), torch.zeros(4, 2))]
def loss(output, batch):
    return (output - batch[-1]).square().mean()
def metric(output, batch):
    return 0.5
def optimizer(parameters):
    return torch.optim.SGD(parameters, lr=0.1)
def lr_scheduler(optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, 1)
"""

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(source: str, name: str = "model.py") -> Path:
        path = tmp_path / name
        path.write_text(dedent(source))
        return path

    return write


@pytest.fixture(autouse=True)
def _interpreter_as_it_was() -> Iterator[None]:
    """Loading leaves the search path alone; the modules it loads are taken out again, for the next test."""
    path, modules = list(sys.path), set(sys.modules)
    yield
    assert sys.path == path
    for name in set(sys.modules) - modules:
        if name.startswith(("dynrank_model_", "helper")):
            del sys.modules[name]


def message(run: Callable[[], object]) -> str:
    with pytest.raises(ModelFileError) as caught:
        run()
    return str(caught.value)


def test_a_full_file_gives_all_it_has(write: Write) -> None:
    file = load_model_file(write(FULL))
    file.require("model", "example_inputs", "train_data", "loss")
    model = file.model()
    (batch,) = file.train_data()
    args, kwargs = file.inputs(batch)
    output = model(*args, **kwargs)
    assert output.shape == (8, 2)
    assert file.loss(output, batch).ndim == 0
    assert file.metric is not None
    assert file.metric(output, batch) == 0.5
    assert file.example_inputs()[0].shape == (2, 4)
    assert len(list(file.eval_data() or ())) == 1
    optimizer = file.optimizer(model.parameters())
    assert isinstance(optimizer, torch.optim.SGD)
    scheduler, every_step = file.lr_scheduler(optimizer)
    assert isinstance(scheduler, torch.optim.lr_scheduler.StepLR)
    assert not every_step
    assert file.epochs == 3


PLATEAU = "torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)"
DECAY = "torch.optim.lr_scheduler.StepLR(optimizer, 2)"


def scheduled(returned: str) -> str:
    return f"{MODEL}\nimport torch\ndef lr_scheduler(optimizer):\n    return {returned}\n"


@pytest.mark.parametrize(
    ("returned", "every_step"),
    [
        (DECAY, False),
        (f"{DECAY}, 'epoch'", False),
        (f"{DECAY}, 'step'", True),
        (f"{{'scheduler': {DECAY}}}", False),
        (f"{{'scheduler': {DECAY}, 'interval': 'step'}}", True),
        (f"{PLATEAU}, 'epoch'", False),
    ],
)
def test_a_file_says_how_often_its_scheduler_is_stepped(write: Write, returned: str, every_step: bool) -> None:
    file = load_model_file(write(scheduled(returned)))
    scheduler, found = file.lr_scheduler(file.optimizer(file.model().parameters()))
    assert isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler)
    assert found is every_step


@pytest.mark.parametrize(
    ("returned", "sentence"),
    [
        (f"{DECAY}, 'batch'", 'make it a scheduler, or a pair of one and "step" or "epoch"'),
        ("optimizer, 'step'", 'make it a scheduler, or a pair of one and "step" or "epoch"'),
        (f"({DECAY},)", 'make it a scheduler, or a pair of one and "step" or "epoch"'),
        ("{'interval': 'step'}", 'make it a scheduler, or a pair of one and "step" or "epoch"'),
        (f"{PLATEAU}, 'step'", 'ReduceLROnPlateau is told the loss after an epoch: return it without "step"'),
    ],
)
def test_a_scheduler_that_is_none_is_refused(write: Write, returned: str, sentence: str) -> None:
    file = load_model_file(write(scheduled(returned)))
    assert sentence in message(lambda: file.lr_scheduler(file.optimizer(file.model().parameters())))


def test_defaults_of_a_file_with_only_a_model(write: Write) -> None:
    file = load_model_file(write(MODEL))
    optimizer = file.optimizer(file.model().parameters())
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.param_groups[0]["lr"] == 1e-3
    assert file.eval_data() is file.metric is file.lr_scheduler(optimizer)[0] is file.epochs is None


def test_default_inputs_are_all_but_the_last_element(write: Write) -> None:
    file = load_model_file(write(MODEL))
    x, mask, y = torch.zeros(2), torch.ones(2), torch.ones(2)
    assert file.inputs((x, y)) == ((x,), {})
    assert file.inputs([x, mask, y]) == ((x, mask), {})
    assert file.inputs([x]) == ((x,), {})
    assert file.inputs(x) == ((x,), {})
    assert message(lambda: file.inputs({"x": x})) == (
        "model.py has batches of type dict, which do not say what the model is called with: add inputs(batch), "
        "which returns a tuple of arguments, a dict of keyword arguments, or the pair (args, kwargs)"
    )


def test_inputs_of_the_file_are_asked(write: Write) -> None:
    file = load_model_file(write(MODEL + "def inputs(batch):\n    return {'input': batch['x']}\n"))
    x = torch.zeros(1)
    assert file.inputs({"x": x, "y": x}) == ((), {"input": x})


def test_siblings_can_be_imported_at_load_and_later(write: Write) -> None:
    write("WIDTH = 5", "helper_early.py")
    write("WIDTH = 6", "helper_late.py")
    source = """
        from torch import nn
        from helper_early import WIDTH
        def model():
            import helper_late
            return nn.Linear(WIDTH, helper_late.WIDTH)
    """
    model = load_model_file(write(source)).model()
    assert isinstance(model, nn.Linear)
    assert (model.in_features, model.out_features) == (5, 6)


def test_dataclasses_and_pickle_work_in_a_file(write: Write) -> None:
    source = """
        from __future__ import annotations
        from dataclasses import dataclass
        @dataclass
        class Config:
            width: int = 3
        config = Config()
    """
    file = load_model_file(write(dedent(source) + MODEL, "my.model.py"))
    assert pickle.loads(pickle.dumps(file.module.config)) == file.module.config


def test_the_future_imports_of_the_loader_are_not_those_of_the_file(write: Write) -> None:
    file = load_model_file(write(MODEL + "def f(x: int): ...\n"))
    assert file.module.f.__annotations__ == {"x": int}


def test_a_rewritten_file_is_read_anew(write: Write) -> None:
    assert load_model_file(write(MODEL + "epochs = 1")).epochs == 1
    assert load_model_file(write(MODEL + "epochs = 2")).epochs == 2


def test_its_functions_see_the_epochs_that_the_command_gives(write: Write) -> None:
    file = load_model_file(write(MODEL + "epochs = 2\ndef loss(output, batch): return output * epochs\n"))
    file.set_epochs_(None)
    assert (file.epochs, file.loss(torch.ones(1), None).item()) == (2, 2)
    file.set_epochs_(7)
    assert (file.epochs, file.loss(torch.ones(1), None).item()) == (7, 7)
    for none in ("", "epochs = None"):
        without = load_model_file(write(MODEL + none))
        without.set_epochs_(7)
        assert without.epochs is None


def test_functions_from_another_module_see_them_there(write: Write, tmp_path: Path) -> None:
    (tmp_path / "shared_recipe.py").write_text("epochs = 2\ndef loss(output, batch): return output * epochs\n")
    file = load_model_file(write(MODEL + "from shared_recipe import *\n"))
    file.set_epochs_(5)
    assert (file.epochs, file.loss(torch.ones(1), None).item()) == (5, 5)


def test_two_files_of_one_name_are_two_modules(write: Write, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    first = load_model_file(write(MODEL + "epochs = 1"))
    second = load_model_file(write(MODEL + "epochs = 2", "other/model.py"))
    assert (first.epochs, second.epochs) == (1, 2)
    assert first.module.__name__ != second.module.__name__


def test_a_path_that_is_no_python_file(write: Write, tmp_path: Path) -> None:
    gone = tmp_path / "gone.py"
    text = write("", "model.txt")
    hint = "give the Python file that has model()"
    assert message(lambda: load_model_file(gone)) == f"{gone} does not exist: {hint}"
    assert message(lambda: load_model_file(tmp_path)) == f"{tmp_path} is a folder: {hint}"
    assert message(lambda: load_model_file(text)) == f"{text} is not a .py file: {hint}"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("x = 1\ny = 1/0\n", "model.py, line 2: y = 1/0 raised ZeroDivisionError: division by zero"),
        ("x = 1\ndef model(:\n", "model.py, line 2: def model(: raised SyntaxError: invalid syntax"),
        ("import sys\nsys.exit(2)\n", "model.py, line 2: sys.exit(2) raised SystemExit: 2"),
        ("assert False\n", "model.py, line 1: assert False raised AssertionError"),
        (
            "import helper_gone\n",
            "model.py, line 1: import helper_gone raised ModuleNotFoundError: No module named 'helper_gone'",
        ),
        (
            "raise ValueError('two\\n  lines')\n",
            "model.py, line 1: raise ValueError('two\\n  lines') raised ValueError: two lines",
        ),
        ("", "model.py has no model(), which every command needs: add it"),
    ],
    ids=["exception", "syntax", "exit", "no message", "import", "lines", "no model"],
)
def test_a_file_that_cannot_be_loaded(write: Write, source: str, expected: str) -> None:
    path = write(source)
    modules = set(sys.modules)
    assert message(lambda: load_model_file(path)) == expected
    if source:
        assert set(sys.modules) == modules


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "model.py"
    path.write_bytes(b"x = '\xff'\n")
    assert message(lambda: load_model_file(path)).startswith("model.py")
    path.write_bytes(b"x = 1\0\n")
    assert "null bytes" in message(lambda: load_model_file(path))


def test_a_syntax_error_in_a_sibling_names_both(write: Write) -> None:
    write("def f(:\n", "helper_bad.py")
    assert message(lambda: load_model_file(write("import helper_bad\n"))) == (
        "model.py, line 1: import helper_bad raised SyntaxError: invalid syntax (helper_bad.py, line 1)"
    )


def test_a_failing_function_is_told_by_the_innermost_line_of_the_file(write: Write) -> None:
    source = """
        import torch
        from torch import nn
        def build():
            return nn.Linear("wide", 2)
        def model():
            return build()
    """
    told = message(load_model_file(write(source)).model)
    assert told.startswith('model.py, line 5: return nn.Linear("wide", 2) raised TypeError: ')
    assert "\n" not in told


def test_a_failure_outside_the_file_names_the_function(write: Write) -> None:
    source = "from functools import partial\nmodel = partial(int, 'x')\n"
    assert message(load_model_file(write(source)).model) == (
        "model.py: model() raised ValueError: invalid literal for int() with base 10: 'x'"
    )


@pytest.mark.parametrize("name", ["loss", "metric"])
def test_failures_in_the_training_functions_are_told_too(write: Write, name: str) -> None:
    file = load_model_file(write(MODEL + f"def {name}(output, batch):\n    return output + None\n"))
    function = getattr(file, name)
    assert message(lambda: function(torch.zeros(1), ())).startswith(
        "model.py, line 6: return output + None raised TypeError: "
    )


def test_an_interrupt_passes(write: Write) -> None:
    modules = set(sys.modules)
    with pytest.raises(KeyboardInterrupt):
        load_model_file(write("raise KeyboardInterrupt\n"))
    assert set(sys.modules) == modules
    with pytest.raises(KeyboardInterrupt):
        load_model_file(write("def model():\n    raise KeyboardInterrupt\n")).model()


def test_require_names_what_is_missing(write: Write) -> None:
    file = load_model_file(write(MODEL))
    file.require("model")
    assert message(lambda: file.require("model", "loss")) == (
        "model.py has no loss(output, batch), which train needs: add it"
    )
    assert message(lambda: file.require("train_data", "loss", command="bench")) == (
        "model.py has no train_data() and no loss(output, batch), which bench needs: add them"
    )
    assert message(file.example_inputs) == "model.py has no example_inputs(), which this command needs: add it"


@pytest.mark.parametrize(
    ("source", "call", "expected"),
    [
        (
            "def model():\n    return 3\n",
            lambda file: file.model(),
            "model.py: model() returned int, not a torch.nn.Module: mend its return",
        ),
        (
            "from torch import nn\nmodel = nn.Linear(2, 2)\n",
            lambda file: file.model(),
            "model.py has model of type Linear: make it a function model()",
        ),
        (
            MODEL + "loss = 3\n",
            lambda file: file.loss(None, None),
            "model.py has loss of type int: make it a function loss(output, batch)",
        ),
        (
            MODEL + "def train_data():\n    [1, 2]\n",
            lambda file: file.train_data(),
            "model.py: train_data() returned NoneType, not an iterable of batches, such as a DataLoader: "
            "mend its return",
        ),
        (
            MODEL + "def optimizer(parameters):\n    return parameters\n",
            lambda file: file.optimizer([]),
            "model.py: optimizer(parameters) returned list, not a torch.optim.Optimizer: mend its return",
        ),
        (
            MODEL + "epochs = 'ten'\n",
            lambda file: file.epochs,
            "model.py has epochs = 'ten': make it a whole number of 1 or more",
        ),
    ],
    ids=["model returns", "model is a module", "loss is a number", "no return", "optimizer", "epochs"],
)
def test_wrong_types(write: Write, source: str, call: Callable[[ModelFile], object], expected: str) -> None:
    file = load_model_file(write(source))
    assert message(lambda: call(file)) == expected
