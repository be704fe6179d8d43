"""The user's model file: an ordinary Python file whose functions give the model, its data and how it is trained."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from dynrank_fx.aliases import Batch, Output
from dynrank_fx.errors import ModelFileError
from dynrank_fx.randomness import random_state, set_random_state
from dynrank_fx.tracing import ExampleInputs, Inputs, in_words, split_inputs

from .failures import MODULE, users_code
from .streams import echo
from .weights import load_weights_


@dataclass(frozen=True)
class Function:
    """A function that a model file may have: its parameters, and what it returns, as types and in words."""

    parameters: str
    returns: type | tuple[type, ...]
    meaning: str


_INPUTS = (
    (Tensor, tuple, list, Mapping),
    "a tuple of arguments, a dict of keyword arguments, or the pair (args, kwargs)",
)
_DATA = Iterable, "an iterable of batches, such as a DataLoader"

FUNCTIONS = {
    "model": Function("", nn.Module, "a torch.nn.Module"),
    "narrower": Function("share", nn.Module, "a torch.nn.Module"),
    "example_inputs": Function("", *_INPUTS),
    "train_data": Function("", *_DATA),
    "eval_data": Function("", *_DATA),
    "calibration_data": Function("", *_DATA),
    "inputs": Function("batch", *_INPUTS),
    "loss": Function("output, batch", Tensor, "a tensor"),
    "metric": Function("output, batch", (Tensor, Real), "a number or a tensor"),
    "optimizer": Function("parameters", Optimizer, "a torch.optim.Optimizer"),
    "lr_scheduler": Function(
        "optimizer",
        (LRScheduler, tuple, dict),
        'a torch.optim.lr_scheduler.LRScheduler, or one with how often it is stepped: scheduler, "step" or "epoch"',
    ),
}


@dataclass(frozen=True)
class ModelFile:
    """A loaded model file. Every method raises ModelFileError, in one sentence, for what the file lacks or does
    wrong.
    """

    path: Path
    module: ModuleType
    weights: Path | None = None
    """A file of weights that every ``model()`` gets."""

    def has(self, name: str) -> bool:
        return hasattr(self.module, name)

    def require(self, *names: str, command: str = "train") -> None:
        """Refuse a file that lacks one of these functions; the message names ``command`` as what needs them."""
        missing = [_signature(name) for name in names if not self.has(name)]
        if missing:
            them = "them" if len(missing) > 1 else "it"
            raise ModelFileError(
                f"{self.path.name} has no {' and no '.join(missing)}, which {command} needs: add {them}"
            )

    def model(self) -> nn.Module:
        made: nn.Module = self._call("model")
        if self.weights is not None:
            said = load_weights_(made, self.weights)
            if said:
                echo(said, err=True)
        return made

    def narrower(self, share: float) -> nn.Module | None:
        """The same model, so many times as wide, where the file has such."""
        return self._call("narrower", share) if self.has("narrower") else None

    def example_inputs(self) -> ExampleInputs:
        made: ExampleInputs = self._call("example_inputs")
        return made

    def train_data(self) -> Iterable[Batch]:
        made: Iterable[Batch] = self._call("train_data")
        return made

    def eval_data(self) -> Iterable[Batch] | None:
        return self._call("eval_data") if self.has("eval_data") else None

    @property
    def has_calibration(self) -> bool:
        """Whether the file has batches that tell what the layers give."""
        return self.has("calibration_data") or self.has("train_data")

    def calibration_batches(self, count: int) -> list[Batch]:
        """The first batches that tell what the layers give: of ``calibration_data``, or those of training."""
        if count == 0:
            return []
        name = "calibration_data" if self.has("calibration_data") else "train_data"
        if not self.has_calibration:
            raise ModelFileError(
                f"{self.path.name} has neither calibration_data() nor train_data(), whose batches tell what the layers "
                "give: add one, or ask for a plain SVD by --calibrate 0"
            )
        batches = self.first_batches(name, count)
        if not batches:
            raise ModelFileError(
                f"{name}() of {self.path.name} gave no batch: give one or more, or ask for a plain SVD by --calibrate 0"
            )
        return batches

    def first_batches(self, name: str, count: int) -> list[Batch]:
        """So many batches of the data of this name, or all that there are."""
        data = self._call(name)
        with _users_code(self.path, f"{name}()"):  # a generator runs only now
            return list(islice(data, count))

    def inputs(self, batch: Batch) -> Inputs:
        """The model's arguments in a batch: what the file's ``inputs(batch)`` says, or all elements but the last (the
        labels); a batch of one element or one tensor is the argument itself.
        """
        if self.has("inputs"):
            return split_inputs(self._call("inputs", batch))
        if isinstance(batch, tuple | list):
            return tuple(batch[:-1] or batch), {}
        if isinstance(batch, Tensor):
            return (batch,), {}
        raise ModelFileError(
            f"{self.path.name} has batches of type {type(batch).__name__}, which do not say what the model is called "
            f"with: add inputs(batch), which returns {_INPUTS[1]}"
        )

    def training_inputs(self) -> Inputs | None:
        """The model's arguments in a batch of training, where the file has training data; the global random generators
        are left as they were.
        """
        if not self.has("train_data"):
            return None
        now = random_state()
        data = self._call("train_data")
        with _users_code(self.path, "train_data()"):
            batch = next(iter(data), None)
        set_random_state(now)
        return None if batch is None else self.inputs(batch)

    def loss(self, output: Output, batch: Batch) -> Tensor:
        made: Tensor = self._call("loss", output, batch)
        return made

    @property
    def metric(self) -> Callable[[Output, Batch], float | Tensor] | None:
        """A mean over the batch, larger is better."""
        return self._score if self.has("metric") else None

    def _score(self, output: Output, batch: Batch) -> float | Tensor:
        value: float | Tensor = self._call("metric", output, batch)
        if isinstance(value, Tensor) and (value.numel() != 1 or value.is_complex() or value.is_meta):
            raise ModelFileError(
                f"the metric must be one number, the mean over a batch: metric() gave {in_words(value)}"
            )
        return value

    @property
    def metric_name(self) -> str:
        """What the metric is called: the name of its function, where that is one of its own."""
        name = getattr(getattr(self.module, "metric", None), "__name__", "metric")
        return "metric" if name == "<lambda>" else str(name).replace("_", " ")

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> Optimizer:
        return self._call("optimizer", parameters) if self.has("optimizer") else AdamW(parameters, lr=1e-3)

    def lr_scheduler(self, optimizer: Optimizer) -> tuple[LRScheduler | None, bool]:
        """The scheduler, and whether it is stepped after every optimizer step and not after every epoch: the file
        returns the scheduler alone (every epoch), ``scheduler, "step"``, or ``{"scheduler": ..., "interval": "step"}``.
        """
        made = self._call("lr_scheduler", optimizer) if self.has("lr_scheduler") else None
        if isinstance(made, dict):
            made = made.get("scheduler"), made.get("interval", "epoch")
        if not isinstance(made, tuple):
            return made, False
        scheduler, interval = made if len(made) == 2 else (None, None)
        if not isinstance(scheduler, LRScheduler) or interval not in ("step", "epoch"):
            raise ModelFileError(
                f"{self.path.name}: lr_scheduler(optimizer) returned {made!r}: make it a scheduler, or a pair of one "
                'and "step" or "epoch"'
            )
        if interval == "step" and isinstance(scheduler, ReduceLROnPlateau):
            raise ModelFileError(
                f'{self.path.name}: ReduceLROnPlateau is told the loss after an epoch: return it without "step"'
            )
        return scheduler, interval == "step"

    @property
    def epochs(self) -> int | None:
        """The length of training that the file recommends, if it does."""
        epochs = getattr(self.module, "epochs", None)
        if epochs is None or (type(epochs) is int and epochs > 0):
            return epochs
        raise ModelFileError(f"{self.path.name} has epochs = {epochs!r}: make it a whole number of 1 or more")

    def set_epochs_(self, epochs: int | None) -> None:
        """Let the file's functions see the length that the run really has, where the file has one and the command
        gives another: what is made from `epochs`, such as a learning rate, follows. Functions that the file takes from
        another module, with its `epochs`, see it there.
        """
        if epochs is None or self.epochs is None:
            return
        functions = (getattr(self.module, name, None) for name in FUNCTIONS)
        for names in (vars(self.module), *(getattr(each, "__globals__", {}) for each in functions)):
            if "epochs" in names:
                names["epochs"] = epochs

    @property
    def sharded(self) -> bool:
        """Whether its data give each of several processes a share of its own."""
        sharded = getattr(self.module, "sharded", False)
        if isinstance(sharded, bool):
            return sharded
        raise ModelFileError(f"{self.path.name} has sharded = {sharded!r}: make it True or False")

    def guard(self, what: str) -> AbstractContextManager[None]:
        """Around every other use of what the file gave: a failure is told as one of the file."""
        return _users_code(self.path, what)

    def _call(self, name: str, *args: object) -> Any:  # Any: what ``FUNCTIONS`` says of the name
        self.require(name, command="this command")
        function = getattr(self.module, name)
        # A module is callable too, but as the model it would be called with no input.
        if not callable(function) or (name == "model" and isinstance(function, nn.Module)):
            raise ModelFileError(
                f"{self.path.name} has {name} of type {type(function).__name__}: make it a function {_signature(name)}"
            )
        with _users_code(self.path, f"{name}()"):
            value = function(*args)
        if not isinstance(value, FUNCTIONS[name].returns):
            raise ModelFileError(
                f"{self.path.name}: {_signature(name)} returned {type(value).__name__}, "
                f"not {FUNCTIONS[name].meaning}: mend its return"
            )
        return value


def load_model_file(path: Path, weights: Path | None = None) -> ModelFile:
    """Execute a model file. Raises ModelFileError where there is none, it fails, or it has no ``model()``.

    weights: a file of weights for the model.
    """
    if not path.exists():
        raise ModelFileError(f"{path} does not exist: give the Python file that has model()")
    if not path.is_file() or path.suffix != ".py":
        kind = "a folder" if path.is_dir() else "not a .py file"
        raise ModelFileError(f"{path} is {kind}: give the Python file that has model()")
    path = path.resolve()
    # The name is the same in every run, so that what was pickled in one can be read in the next.
    name = f"{MODULE}{path.stem.replace('.', '_')}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look a class's module up there
    try:
        with _users_code(path, "the file"):
            # Compiled here, since the import system may take a file just rewritten for the one in its cache.
            exec(compile(path.read_bytes(), str(path), "exec", dont_inherit=True), vars(module))
    except BaseException:
        sys.modules.pop(name, None)
        raise
    file = ModelFile(path, module, weights)
    file.require("model", command="every command")
    return file


@contextmanager
def _users_code(path: Path, what: str) -> Iterator[None]:
    """The file's folder on ``sys.path``, as ``python model.py`` has it, and a failure told as ModelFileError."""
    folder = str(path.parent)
    sys.path.insert(0, folder)
    try:
        with users_code(path, what):
            yield
    finally:
        with suppress(ValueError):  # the file may have taken it off itself
            sys.path.remove(folder)


def _signature(name: str) -> str:
    return f"{name}({FUNCTIONS[name].parameters})"
