"""Weights as people save them: tied names, wrappers' prefixes, checkpoints; and what is said of those of others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import nn

from dynrank_fx import store
from dynrank_fx.cli.weights import load_weights_
from dynrank_fx.errors import StoreError


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb, self.mid, self.head = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 20, bias=False)
        self.norm = nn.BatchNorm1d(8)
        self.head.weight = self.emb.weight


@pytest.fixture
def trained() -> Tied:
    torch.manual_seed(3)
    return Tied()


def loaded(path: str) -> Tied:
    torch.manual_seed(4)
    model = Tied()
    load_weights_(model, Path(path))
    return model


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def prefixed(model: nn.Module, prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + name: value for name, value in model.state_dict().items()}


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "module._orig_mod.", "model.", "module.model."])
@pytest.mark.parametrize("around", [None, "state_dict", "model", "model_state_dict", "ema"])
def test_prefixes_and_checkpoints(trained: Tied, prefix: str, around: str | None) -> None:
    state = prefixed(trained, prefix)
    torch.save(state if around is None else {"epoch": 3, around: state, "optimizer": {}}, "w.pt")
    assert same(loaded("w.pt"), trained)


def test_what_was_passed_over_is_said(trained: Tied) -> None:
    torch.save({"epoch": 3, "ema": prefixed(trained, "module._orig_mod.")}, "w.pt")
    assert load_weights_(Tied(), Path("w.pt")) == (
        "w.pt: it is the ema of a checkpoint that has epoch, ema; its names were read without module. and _orig_mod."
    )
    torch.save(trained.state_dict(), "plain.pt")
    assert load_weights_(Tied(), Path("plain.pt")) == ""


def test_an_average_and_a_compiled_part(trained: Tied) -> None:
    torch.save(torch.optim.swa_utils.AveragedModel(trained).state_dict(), "average.pt")
    assert same(loaded("average.pt"), trained)
    trained.mid = torch.compile(trained.mid)  # type: ignore[assignment]
    torch.save(trained.state_dict(), "part.pt")
    assert same(loaded("part.pt"), trained)


def test_the_other_name_of_a_tied_tensor_may_be_missing(trained: Tied) -> None:
    save_model(trained, "w.safetensors")
    model = loaded("w.safetensors")
    assert same(model, trained)
    assert model.head.weight is model.emb.weight


def test_tied_names_with_two_values_are_refused(trained: Tied) -> None:
    state = trained.state_dict()
    save_file({**state, "head.weight": state["head.weight"] + 1}, "w.safetensors")
    with pytest.raises(
        StoreError, match=r"head\.weight differs from emb\.weight, which is the same tensor in the model"
    ):
        loaded("w.safetensors")


def test_what_is_missing_foreign_or_of_another_shape_is_named(trained: Tied) -> None:
    state = trained.state_dict()
    del state["mid.bias"]
    torch.save({"state_dict": {**state, "extra": torch.zeros(1)}, "optimizer": {}}, "w.pt")
    with pytest.raises(StoreError) as caught:
        loaded("w.pt")
    assert str(caught.value) == (
        "w.pt is no state_dict of model(): 1 of 9 names is missing (mid.bias); 1 is not the model's (extra); "
        "it is the state_dict of a checkpoint that has state_dict, optimizer"
    )
    torch.save({**trained.state_dict(), "mid.bias": torch.zeros(9)}, "w.pt")
    with pytest.raises(StoreError, match=r"mid\.bias is 9 and not 8$"):
        loaded("w.pt")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"epoch": 3}, "holds no tensors by name, but epoch"),
        ([1], "holds a list: give a state_dict"),
        (nn.Linear(2, 2), "it holds more than tensors.*save the model's state_dict alone"),
    ],
)
def test_what_is_no_state_dict(content: object, sentence: str) -> None:
    torch.save(content, "w.pt")
    with pytest.raises(StoreError, match=sentence):
        loaded("w.pt")


def test_a_flipped_bit_is_told_of_what_torch_save_and_transform_wrote(trained: Tied, tmp_path: Path) -> None:
    store.write(tmp_path / "weights.safetensors", trained.state_dict(), {})
    torch.save(trained.state_dict(), tmp_path / "w.pt")
    for path in tmp_path.iterdir():
        assert same(loaded(str(path)), trained)
        data = path.read_bytes()
        place = data.index(trained.mid.weight.detach().numpy().tobytes()) + 9
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(StoreError, match=r"is damaged"):
            loaded(str(path))


@pytest.mark.parametrize("command", [["transform", "--dry-run"], ["inspect"], ["train", "--epochs", "1"]])
def test_every_command_of_a_model_takes_weights(write: Callable, run: Callable, refused: Callable, command: list[str]):
    write("def model():\n    return nn.Sequential(nn.Flatten(), nn.Linear(48, 32), nn.Linear(32, 8))")
    torch.save({"1.weight": torch.zeros(32, 48)}, "w.pt")
    name, *more = command
    assert "3 of 4 names are missing" in refused(name, "model.py", "--weights", "w.pt", *more)


def test_inspect_shows_the_weights_of_the_file(write: Callable, run: Callable) -> None:
    write("def model():\n    return nn.Sequential(nn.Flatten(), nn.Linear(48, 8, bias=False))")
    low = torch.ones(8, 48)
    torch.save({"1.weight": low}, "w.pt")
    assert " 1.0 " in run("inspect", "model.py", "--weights", "w.pt", "--capture", "symbolic").stdout
