"""Weights of a file for ``model()``: a ``state_dict``, as people save it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from dynrank_fx.errors import StoreError, first_line
from dynrank_fx.seals import check_zip
from dynrank_fx.text import counted

if TYPE_CHECKING:
    from torch import Tensor, nn

_INSIDE = ("state_dict", "model_state_dict", "model", "module", "net", "weights", "ema", "model_ema", "state_dict_ema")
"""Under which of these a checkpoint of a training script holds its ``state_dict``; the first that it has counts."""
_PREFIXES = ("module.", "model.", "net.")
"""What DataParallel, DistributedDataParallel, averages, and trainers put before every name."""
_COMPILED = "_orig_mod."
_NOT_WEIGHTS = ("n_averaged",)  # the counter of torch's AveragedModel


def load_weights_(model: nn.Module, path: Path) -> str:
    """Put the weights of a file into a model, and say in words what was passed over, if anything was. Raises StoreError
    where they are not its own, and says what the file has.

    A name that the file lacks is no loss where another name of the same, tied tensor is there. ``_orig_mod.`` of a
    compiled module, ``module.`` and the like before every name, and a checkpoint around the ``state_dict`` are passed
    over.
    """
    from dynrank_fx.tracing import load_as_its_class_

    state, around = _state_in(path)
    own = model.state_dict(keep_vars=True)
    state, wrapper = _renamed(state, own)
    first: dict[int, str] = {}
    for name in own:
        if name in state:
            first.setdefault(id(own[name]), name)
    tied = {name: first[id(tensor)] for name, tensor in own.items() if id(tensor) in first}
    state |= {name: state[other] for name, other in tied.items() if name not in state}
    wrong = _misfits(state, own) or _untied(state, tied)
    if wrong:
        raise StoreError(f"{path} is no state_dict of model(): {'; '.join((*wrong, *around))}")
    try:
        load_as_its_class_(model, state)
    except (RuntimeError, KeyError, TypeError, AttributeError) as error:  # of a load_state_dict of the model's own
        raise StoreError(
            f"{path} could not be loaded into model() ({first_line(error)}): give a state_dict of that model"
        ) from error
    passed = [*around, *([f"its names were read without {wrapper}"] if wrapper else [])]
    return f"{path}: {'; '.join(passed)}" if passed else ""


def _state_in(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of a file by name, and in words what else a checkpoint has. Raises StoreError."""
    import torch

    from dynrank_fx.store import read_tensors

    if path.suffix == ".safetensors":
        return read_tensors(path), []
    check_zip(path)
    try:
        content = torch.load(path, weights_only=True, map_location="cpu")
    except FileNotFoundError as error:
        raise StoreError(f"there is no file {path}: give a state_dict of the model") from error
    except Exception as error:  # of torch.load or of safetensors, which raise many kinds
        why = "it holds more than tensors" if "weights_only" in str(error) else first_line(error)[:200]
        if path.is_file() and not _by_torch(path):
            why = "torch.save did not write it"
        raise StoreError(
            f"{path} could not be loaded into model() ({why}): save the model's state_dict alone"
        ) from error
    if not isinstance(content, Mapping):
        raise StoreError(f"{path} holds a {type(content).__name__}: give a state_dict of the model")
    inside = next((key for key in _INSIDE if _has_tensors(content.get(key))), None)
    around = [] if inside is None else [f"it is the {inside} of a checkpoint that has {_few(content)}"]
    state = content if inside is None else content[inside]
    if not _has_tensors(state):
        raise StoreError(f"{path} holds no tensors by name, but {_few(content)}: give a state_dict of the model")
    return dict(state), around


def _by_torch(path: Path) -> bool:
    """Whether it begins as files of ``torch.save`` do: as an archive or, by its old format, as a pickle."""
    with open(path, "rb") as file:
        return file.read(2) in (b"PK", b"\x80\x02")


def _has_tensors(value: object) -> bool:
    from torch import Tensor

    return isinstance(value, Mapping) and any(isinstance(each, Tensor) for each in value.values())


def _renamed(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """The weights under the model's names, without what wrappers put before them, if that fits more of them; and what
    was left out of the names, in words.
    """
    bare = {name.replace(_COMPILED, ""): name for name in own}  # model() may be compiled too
    plain = {name.replace(_COMPILED, ""): tensor for name, tensor in state.items()}
    before = ("", *_PREFIXES, *(one + other for one in _PREFIXES for other in _PREFIXES))
    wrapper = max(before, key=lambda prefix: sum(name.removeprefix(prefix) in bare for name in plain))
    renamed = {name.removeprefix(wrapper): tensor for name, tensor in plain.items()}
    compiled = any(_COMPILED in name and name not in own for name in state)
    left_out = " and ".join(filter(None, (wrapper, _COMPILED if compiled else "")))
    found = {bare.get(name, name): t for name, t in renamed.items() if name in bare or name not in _NOT_WEIGHTS}
    return found, left_out


def _misfits(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    """In words, which names and shapes differ."""
    missing, foreign = [name for name in own if name not in state], [name for name in state if name not in own]
    shapes = [
        f"{name} is {_shape(state[name])} and not {_shape(own[name])}"
        for name in own
        if name in state and hasattr(own[name], "shape") and own[name].shape != state[name].shape
    ]
    said, of_all = [], counted(len(own), "name")
    if missing:
        said.append(f"{counted(len(missing), f'of {of_all} is', f'of {of_all} are')} missing ({_few(missing)})")
    if foreign:
        said.append(f"{counted(len(foreign), 'is', 'are')} not the model's ({_few(foreign)})")
    return [*said, *([f"{shapes[0]} (and {len(shapes) - 1} more)" if len(shapes) > 1 else shapes[0]] if shapes else [])]


def _untied(state: Mapping[str, Tensor], tied: Mapping[str, str]) -> list[str]:
    """In words, which names have values of their own though the model has one tensor for both."""
    apart = [name for name, other in tied.items() if not state[name].equal(state[other])]
    return [f"{name} differs from {tied[name]}, which is the same tensor in the model" for name in apart[:1]]


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "one number"


def _few(names: Iterable[object]) -> str:
    some = [str(name) for name in names]
    return ", ".join(some[:4]) + (", ..." if len(some) > 4 else "")
