"""A saved net comes back bit by bit, an edited plan is honoured, and what does not fit is told in a sentence."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dynrank_fx as dr
from dynrank_fx import store
from dynrank_fx.rewrite import switched_modules
from dynrank_fx.tracing import Net

FULL, LOW, ADAPTOR = dr.Phase


class Mixture(nn.Module):
    """Two linears that share a weight, a bare parameter, a convolution, batch norm, and an embedding tied to a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        self.conv, self.norm = nn.Conv1d(16, 16, 3, padding=1), nn.BatchNorm1d(16)
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.second.weight = self.first.weight
        self.w, self.b = nn.Parameter(torch.randn(16, 16)), nn.Parameter(torch.randn(16))
        self.head = nn.Linear(16, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.conv(self.embed(tokens).mT)).mT
        x = self.second(torch.tanh(self.first(x)))
        return self.head(F.linear(torch.relu(x), self.w, self.b))


SITES = ["w", "conv.weight", "first.weight"]
INPUTS = (torch.randint(11, (3, 7), generator=torch.Generator().manual_seed(0)),)
PHASES: dict[str, Any] = {
    "full": FULL,
    "low": LOW,
    "mixed": {"first.weight": LOW, "w": LOW, "conv.weight": FULL},
    "adaptors": {"first.weight": ADAPTOR, "w": ADAPTOR, "conv.weight": LOW},
    "mixed the other way": {"first.weight": FULL, "w": FULL, "conv.weight": LOW},
}


def made(seed: int = 0, **options: Any) -> Net:
    torch.manual_seed(seed)
    net = dr.transform(Mixture(), INPUTS, rank=dr.Fixed(5), **options)
    assert [row.site.name for row in dr.plan_of(net).sites] == SITES
    net.train()
    net(*INPUTS)  # the batch norm has statistics of its own now
    return net


def fresh() -> Mixture:
    torch.manual_seed(99)
    return Mixture()


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "plan.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def outputs(net: nn.Module) -> dict[str, Tensor]:
    """In evaluation and in training mode, with the gradients by the names of the original."""
    twin = copy.deepcopy(net)
    with torch.no_grad():
        evaluated = twin.eval()(*INPUTS)
    trained = twin.train()(*INPUTS)
    trained.square().mean().backward()
    named = {name.removesuffix(".weight"): p.grad for name, p in twin.named_parameters() if p.grad is not None}
    return {"evaluated": evaluated, "trained": trained.detach(), **named}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def refusal(kind: type[Exception], run: Callable[[], Any]) -> str:
    with pytest.raises(kind) as caught:
        run()
    assert type(caught.value) is kind
    return str(caught.value)


# Round trips


@pytest.mark.parametrize("phases", PHASES)
def test_a_net_comes_back_bit_by_bit_in_every_phase(phases: str, tmp_path: Path) -> None:
    net = made()
    dr.enter_(net, PHASES[phases])
    dr.save(net, tmp_path / "net")
    for inputs in (INPUTS, None):
        again = dr.load(tmp_path / "net", fresh(), inputs)
        state, expected = again.state_dict(), net.state_dict()
        assert list(state) == list(expected)
        assert all(torch.equal(state[name], expected[name]) for name in expected)
        assert dr.phases_of(again) == dr.phases_of(net)
        assert again.setting == net.setting
        assert again.embed.weight is again.head.weight
        (first, second) = switched_modules(again)["first.weight"]
        assert all(first._parameters[name] is second._parameters[name] for name in first.parameter_names)
        assert equal(outputs(again), outputs(net))


@pytest.mark.parametrize("phases", PHASES)
def test_what_was_loaded_goes_on_as_the_saved_one(phases: str, tmp_path: Path) -> None:
    net = made()
    dr.enter_(net, PHASES[phases])
    dr.save(net, tmp_path / "net")
    again = dr.load(tmp_path / "net", fresh(), INPUTS)
    for setting in (LOW, FULL, {"first.weight": LOW}, {"conv.weight": ADAPTOR}):
        for one in (net, again):
            torch.manual_seed(5)  # a branch starts with random numbers
            dr.enter_(one, setting)
        assert equal(outputs(again), outputs(net))


def test_a_full_net_loads_with_the_names_of_the_original(tmp_path: Path) -> None:
    dr.save(made(), tmp_path / "net")
    model = fresh()
    model.load_state_dict(dr.load(tmp_path / "net", fresh(), INPUTS).state_dict())
    assert equal(outputs(model), outputs(dr.load(tmp_path / "net", fresh(), INPUTS)))


def test_the_memory_format_and_frozen_weights_come_back(tmp_path: Path) -> None:
    def model() -> nn.Module:
        torch.manual_seed(0)
        made = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)).to(memory_format=torch.channels_last)
        made[1].weight.requires_grad_(False)
        return made

    inputs = (torch.randn(2, 8, 6, 6),)
    net = dr.transform(model(), inputs, rank=dr.Fixed(3))
    for setting in (FULL, LOW):
        dr.enter_(net, setting)
        dr.save(net, tmp_path / "net")
        again = dr.load(tmp_path / "net", model(), inputs)
        for name, parameter in again.named_parameters():
            original = net.get_parameter(name)
            assert parameter.requires_grad == original.requires_grad
            assert parameter.stride() == original.stride()
        assert torch.equal(again(*inputs), net(*inputs))


def test_the_callers_net_and_model_stay_as_they_are(tmp_path: Path) -> None:
    net, model = made(), fresh()
    dr.enter_(net, LOW)
    parameters, before = list(net.parameters()), outputs(model)
    dr.save(torch.compile(net), tmp_path / "net")
    dr.load(tmp_path / "net", model, INPUTS)
    assert all(a is b for a, b in zip(net.parameters(), parameters, strict=True))
    assert equal(outputs(model), before)


def test_saving_again_replaces_the_folder(tmp_path: Path) -> None:
    dr.save(made(0), tmp_path / "net")
    net = made(1)
    dr.save(net, tmp_path / "net")
    assert equal(outputs(dr.load(tmp_path / "net", fresh(), INPUTS)), outputs(net))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net"]


def test_the_graph_is_readable(tmp_path: Path) -> None:
    net = made()
    dr.enter_(net, {"first.weight": LOW})
    dr.save(net, tmp_path / "net")
    text = (tmp_path / "net" / "graph.txt").read_text()
    once, inlined = text.split("# The same with the operations of the sites' present phases inlined:")
    assert once.startswith("# One call per site, as it trains:\ndef forward(self, tokens")
    assert "self.first(" in once
    assert "self.conv(" in once
    for read in ("self.first.left", "self.first.right", "self.conv.weight"):
        assert read not in once
        assert read in inlined
    assert inlined.count("_nn.linear(") == 5  # two of each shared linear, one of the bare weight
    assert text.isascii()


# Edited plans


def test_an_edited_rank_is_honoured_where_the_site_was_full(tmp_path: Path) -> None:
    net = made()
    dr.save(net, tmp_path / "net")
    edit(tmp_path / "net", lambda data: data["sites"][1].update(rank=2))
    with pytest.warns(dr.DynrankWarning, match=r"plan.json is not as dynrank-fx wrote it: it counts as it stands"):
        again = dr.load(tmp_path / "net", fresh(), INPUTS)
    assert [row.rank for row in dr.plan_of(again).sites] == [5, 2, 5]
    assert equal(outputs(again), outputs(net))
    dr.enter_(again, LOW)
    assert again.get_parameter("conv.left").shape == (16, 2, 1)


@pytest.mark.filterwarnings("ignore:.*plan.json is not as dynrank-fx wrote it")
@pytest.mark.parametrize("row", [0, 1, 2])
def test_a_row_taken_out_of_the_plan_stays_dense(tmp_path: Path, row: int) -> None:
    net = made()
    dr.save(net, tmp_path / "net")
    edit(tmp_path / "net", lambda data: data["sites"].pop(row))
    again = dr.load(tmp_path / "net", fresh(), INPUTS)
    assert set(dr.phases_of(again)) == set(SITES) - {SITES[row]}
    assert (SITES[row], "left dense by the given plan") in [(s.name, s.reason) for s in dr.plan_of(again).skipped]
    assert equal(outputs(again), outputs(net))


@pytest.mark.filterwarnings("ignore:.*plan.json is not as dynrank-fx wrote it")
def test_a_layout_edited_in_the_plan_is_honoured(tmp_path: Path) -> None:
    net = made()
    dr.save(net, tmp_path / "net")
    edit(tmp_path / "net", lambda data: data["sites"][1].update(layout="spatial"))
    again = dr.load(tmp_path / "net", fresh(), INPUTS)
    dr.enter_(again, LOW)
    assert again.get_parameter("conv.right").shape == (5, 16, 3)


@pytest.mark.filterwarnings("ignore:.*plan.json is not as dynrank-fx wrote it")
@pytest.mark.parametrize("setting", [LOW, {"conv.weight": LOW}], ids=["all", "one"])
def test_a_low_site_cannot_change_its_rank_or_its_row(tmp_path: Path, setting: Any) -> None:
    net = made()
    dr.enter_(net, setting)
    dr.save(net, tmp_path / "net")
    good = (tmp_path / "net" / "plan.json").read_text()

    def message(change: Callable[[dict[str, Any]], None]) -> str:
        (tmp_path / "net" / "plan.json").write_text(good)
        edit(tmp_path / "net", change)
        return refusal(dr.PlanError, lambda: dr.load(tmp_path / "net", fresh(), INPUTS))

    assert message(lambda data: data["sites"][1].update(rank=2)) == (
        "conv.weight was saved as factors of rank 5, but the plan says 2: put the rank back, load, and change it by "
        "replan_"
    )
    assert message(lambda data: data["sites"].pop(1)) == (
        "conv.weight was saved as factors, but the plan leaves it dense: put its row back into the plan"
    )


# What does not fit


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    dr.save(made(), tmp_path / "net")
    return tmp_path / "net"


def test_a_plan_of_a_newer_version(saved: Path) -> None:
    edit(saved, lambda data: data.update(version=2))
    message = refusal(dr.PlanError, lambda: dr.load(saved, fresh(), INPUTS))
    assert message.startswith(f"{saved / 'plan.json'}: the plan has version 2 and this dynrank-fx reads version 1; ")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"format": "dynrank-fx plan", "version": 1}'], ids=["empty", "cut", "list", "incomplete"]
)
def test_a_plan_that_is_none(saved: Path, text: str) -> None:
    (saved / "plan.json").write_text(text)
    assert refusal(dr.PlanError, lambda: dr.load(saved, fresh(), INPUTS)).startswith(f"{saved / 'plan.json'}: ")


def test_a_plan_that_cannot_be_read(saved: Path) -> None:
    (saved / "plan.json").write_bytes(b"\xff\xfe\x00")
    assert refusal(dr.StoreError, lambda: dr.load(saved, fresh(), INPUTS)).startswith(
        f"the plan {saved / 'plan.json'} could not be read ("
    )
    (saved / "plan.json").unlink()
    assert refusal(dr.StoreError, lambda: dr.load(saved, fresh(), INPUTS)) == (
        f"there is no plan {saved / 'plan.json'}: give a plan.json that save or `dynrank-fx transform` wrote"
    )
    (saved / "plan.json").mkdir()
    assert refusal(dr.StoreError, lambda: dr.load(saved, fresh(), INPUTS)) == (
        f"the plan {saved / 'plan.json'} could not be read (Is a directory): make it again"
    )


def test_missing_weights(saved: Path, tmp_path: Path) -> None:
    (saved / "weights.safetensors").unlink()
    assert refusal(dr.StoreError, lambda: dr.load(saved, fresh(), INPUTS)) == (
        f"{saved} has no weights.safetensors: give a folder that save or `dynrank-fx transform` wrote"
    )
    assert refusal(dr.StoreError, lambda: dr.load(tmp_path / "gone", fresh(), INPUTS)) == (
        f"there is no folder {tmp_path / 'gone'}: give one that save or `dynrank-fx transform` wrote"
    )


def test_corrupted_weights(saved: Path) -> None:
    path = saved / "weights.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    message = refusal(dr.StoreError, lambda: dr.load(saved, fresh(), INPUTS))
    assert message == f"{path} is damaged: its checksum does not match its content; use an earlier copy"
    path.write_bytes(data[: len(data) // 2])
    assert "damaged" in refusal(dr.StoreError, lambda: dr.load(saved, fresh(), INPUTS))


@pytest.mark.filterwarnings("ignore:.*plan.json is not as dynrank-fx wrote it")
def test_weights_of_another_model_with_the_plan_of_this_one(saved: Path) -> None:
    store.write(saved / "weights.safetensors", {"weight": torch.zeros(2)}, {"phases": {}, "ranks": {}})
    message = refusal(dr.StoreError, lambda: dr.load(saved, fresh(), INPUTS))
    assert message.startswith("the saved weights are of another model or plan: ")
    assert "\n" not in message


def test_another_model(saved: Path) -> None:
    class Wider(Mixture):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(20, 16))
            self.b = nn.Parameter(torch.randn(20))
            self.more = nn.Linear(20, 16)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.more(F.linear(self.second(self.first(self.embed(tokens))), self.w, self.b)))

    assert refusal(dr.PlanError, lambda: dr.load(saved, Wider(), INPUTS)) == (
        "the plan has w as (16, 16) and the model as (20, 16): the plan is of another model"
    )
    assert "the plan is of another model" in refusal(
        dr.PlanError, lambda: dr.load(saved, nn.Linear(3, 3), (torch.zeros(2, 3),))
    )


def test_a_folder_with_other_files_is_not_replaced(saved: Path) -> None:
    (saved / "notes.txt").write_text("mine")
    assert "holds notes.txt" in refusal(dr.StoreError, lambda: dr.save(made(), saved))
    assert (saved / "notes.txt").read_text() == "mine"


def test_a_module_without_a_plan_cannot_be_saved(tmp_path: Path) -> None:
    assert refusal(dr.PlanError, lambda: dr.save(nn.Linear(2, 2), tmp_path / "net")) == (
        "Linear was not made by transform or factorize: it has no plan to save"
    )
    net = dr.capture(nn.Linear(2, 2), (torch.zeros(1, 2),))
    assert "has no plan" in refusal(dr.PlanError, lambda: dr.save(net, tmp_path / "net"))
    assert not (tmp_path / "net").exists()
