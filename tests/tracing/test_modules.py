"""Capture module by module: what cannot be traced keeps its own code, and its parts train in phases inside it."""

from __future__ import annotations

import copy

import pytest
import torch
from models import gradients, randomized
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import dynrank_fx as dr
from dynrank_fx.rewrite import switched_modules
from dynrank_fx.tracing import Net


class Block(nn.Module):
    """A part that can be traced: with products by name, and matrices of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.w, self.scale = nn.Linear(8, 8), nn.Parameter(torch.randn(8, 8)), 2.0
        self.norm, self.drop = nn.BatchNorm1d(8), nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.norm(torch.tanh(self.a(x)) @ self.w))


class Stepping(nn.Module):
    """Code that neither tracer takes: it branches on data, counts in Python, and looks into its parts."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Linear(6, 8), nn.ModuleList(Block() for _ in range(2))
        self.looked_at, self.head = Block(), nn.Linear(8, 5)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.raw = nn.Parameter(torch.randn(5, 5))

    def forward(self, x: Tensor, *, twice: bool = False) -> dict[str, Tensor]:
        x = self.stem(x.to(self.stem.weight.dtype))
        for block in self.blocks:
            x = block(x)
        if float(x.detach().sum()) > 1e9:
            return {"out": x}
        x = self.looked_at(x) * self.looked_at.scale
        x = self.attention(x[None], x[None], x[None], need_weights=False)[0][0]
        return {"out": self.head(x) @ self.raw if twice else self.head(x)}


def made() -> tuple[Stepping, Tensor]:
    torch.manual_seed(0)
    return randomized(Stepping()), torch.randn(7, 6)


def transformed(ratio: float = 1.0, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Stepping, Tensor]:
    model, x = made()
    model, x = model.to(dtype), x.to(dtype)
    return dr.transform(model, (x,), rank=dr.Ratio(ratio), allow_unprofitable=True), model, x


def seeded(model: nn.Module, x: Tensor) -> Tensor:
    torch.manual_seed(5)
    return model(x)["out"]


SITES = {
    "stem.weight",  # of which the code around it asks for the dtype
    "head.weight",
    *(f"{block}.{name}" for block in ("blocks.0", "blocks.1") for name in ("a.weight", "w")),
    "looked_at.a.weight",
    "attention.in_proj_weight",
    "attention.out_proj.weight",
}


def test_the_parts_are_captured_and_the_plan_says_how_and_why():
    net, _, _ = transformed()
    plan = dr.plan_of(net)
    assert {row.site.name for row in plan.sites} == SITES
    reasons = {s.name: s.reason for s in plan.skipped}
    assert reasons.keys() == {"raw", "looked_at.w"}
    assert reasons["raw"] == "inside the Stepping itself: its code could not be traced"
    assert plan.capture.startswith("module by module (3 parts and 3 single layers): the model (Stepping, ")
    assert "cannot be exported" in plan.capture
    assert "captured    module by module" in str(plan)
    assert dr.Plan.from_json(plan.to_json()) == plan
    assert isinstance(net.blocks[0], Net)
    assert isinstance(net.attention, Net)
    assert type(net.looked_at).__name__ == "Block", "its attribute `scale` is read from outside"


def test_it_trains_and_evaluates_as_the_original():
    net, model, x = transformed()
    for _ in range(2):
        for mode in (True, False):
            assert torch.equal(seeded(model.train(mode), x), seeded(net.train(mode), x))
        net = copy.deepcopy(net)
    for (name, mine), theirs in zip(model.named_buffers(), net.buffers(), strict=True):
        assert torch.equal(mine, theirs), name
    model.eval(), net.eval()
    seeded(model, x).square().mean().backward()
    seeded(net, x).square().mean().backward()
    originals = dict(model.named_parameters())
    for name, mine in net.named_parameters():
        theirs = originals[name if name in originals else name.removesuffix(".weight")]  # a bare w is now w.weight
        assert (mine.grad is None) == (theirs.grad is None), name
        assert mine.grad is None or torch.equal(mine.grad, theirs.grad), name
    assert sorted(net.state_dict()) == sorted(model.state_dict())
    assert torch.equal(net(x, twice=True)["out"], model(x, twice=True)["out"]), "its own code runs"


def test_phases_optimizer_and_truncation_go_through_the_parts():
    net, model, x = transformed(dtype=torch.float64)
    net.eval()
    optimizer = torch.optim.AdamW(net.parameters())
    dr.enter_(net, dr.Phase.LOW, optimizer)
    torch.testing.assert_close(seeded(net, x), seeded(model.eval(), x))
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in net.parameters()}
    seeded(net, x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    low = seeded(net, x)
    small = dr.truncate(net)
    torch.testing.assert_close(seeded(small, x), low)
    assert not any(type(module).__module__.startswith("dynrank_fx") for module in small.modules())
    assert "dynrank_meta" not in vars(small)
    dr.enter_(net, dr.Phase.FULL, optimizer)
    torch.testing.assert_close(seeded(net, x), low)
    assert all(modules[0].weight.requires_grad for modules in switched_modules(net).values())


def test_costs_are_counted_inside_and_around_the_parts():
    net, model, x = transformed(0.5)
    plan = dr.plan_of(net)
    shapes = {row.site.name: row.site.uses[0].input_shape for row in plan.sites}
    assert shapes["blocks.1.w"] == shapes["looked_at.a.weight"] == (7, 8)
    whole = dr.transform(model, (x,), allow_empty=True, how=dr.Capture.MODULES)
    assert dr.plan_of(whole).total_flops == plan.total_flops > 0


def test_it_is_saved_and_loaded_like_any_net(tmp_path):
    net, _, x = transformed(0.5)
    dr.enter_(net, {"blocks.*": dr.Phase.LOW})
    dr.save(net, tmp_path / "folder")
    again = dr.load(tmp_path / "folder", made()[0], (x,))
    assert torch.equal(seeded(again.eval(), x), seeded(net.eval(), x))
    assert "# blocks.0" in (tmp_path / "folder" / "graph.txt").read_text()


def test_it_can_be_asked_for_and_says_what_it_needs():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.Tanh()), nn.Linear(8, 4)), torch.randn(3, 8)
    net = dr.transform(model, (x,), how=dr.Capture.MODULES, rank=dr.Fixed(2), allow_unprofitable=True)
    assert dr.plan_of(net).capture == "module by module (1 part and 1 single layer): as asked"
    assert torch.equal(net(x), model(x))
    assert gradients(net, x).keys() == gradients(model, x).keys()
    with pytest.raises(dr.CaptureError, match="the parts of Sequential need example inputs to be traced"):
        dr.capture(model, how=dr.Capture.MODULES)
    with pytest.raises(dr.CaptureError, match="no part of Bilinear with a matrix in it can be traced by itself"):
        dr.capture(nn.Bilinear(3, 3, 3), (torch.ones(2, 3), torch.ones(2, 3)), how=dr.Capture.MODULES)


class Noisy(Block):
    """A part whose own code asks for its mode, so that it has a graph for each."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(x), 0.5, self.training)


@pytest.mark.parametrize("apart", ["0.norm", "0.drop", "1"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_a_part_in_a_mode_of_its_own_such_as_a_frozen_batch_norm_stays_in_it(apart, training):
    torch.manual_seed(0)
    model, x = randomized(nn.Sequential(Block(), Noisy(), nn.BatchNorm1d(8), nn.Linear(8, 5))), torch.randn(7, 8)
    model.train(training).get_submodule(apart).train(not training)
    net = dr.capture(model, (x,), how=dr.Capture.MODULES)
    assert isinstance(net[0], Net)
    assert isinstance(net[1], Net)
    for name, module in model.named_modules():
        assert net.get_submodule(name).training == module.training, name
    twin = copy.deepcopy(net)
    for tell in (lambda module: module, nn.Module.train, nn.Module.eval):
        outputs, buffers = [], []
        for each in (model, net, twin):
            torch.manual_seed(5)
            outputs.append(tell(each)(x))
            buffers.append(list(each.buffers()))
        for i in (1, 2):
            assert torch.equal(outputs[i], outputs[0])
            assert all(map(torch.equal, buffers[i], buffers[0]))


class Doubling(nn.Linear):
    """A layer with one weight and a forward of its own."""

    def forward(self, rows: int, x: Tensor) -> Tensor:
        return 2 * super().forward(x[:rows])


class Table(nn.Module):
    """A part that multiplies by what it is given, and whose parameters others read."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8, 8))
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        return self.inner(x @ w @ self.two)


class Prying(nn.Module):
    """Code that cannot be traced, and that reads the parameters of the parts that can."""

    def __init__(self) -> None:
        super().__init__()
        self.doubling, self.table = Doubling(8, 8), Table()
        self.fc = nn.Sequential(nn.Linear(8, 8), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        if float(x.sum()) > 1e6:
            return x
        x = self.doubling(len(x), x) + 0 * self.fc[0].weight.sum()
        return self.table(x, self.table.one) + self.fc(x)


def test_parts_that_untraced_code_reads_from_stay_whole():
    torch.manual_seed(0)
    model, x = Prying(), torch.randn(4, 8)
    net = dr.transform(model, (x,), rank=dr.Fixed(2))
    plan = dr.plan_of(net)
    assert "module by module" in plan.capture
    assert {row.site.name for row in plan.sites} == {"doubling.weight", "table.inner.weight"}
    read = "read by code that could not be traced, which its factors alone could not serve once truncated"
    assert {row.name: row.reason for row in plan.skipped}["fc.0.weight"] == read
    assert torch.equal(net(x), model(x))
    dr.enter_(net, dr.Phase.LOW)
    small = dr.truncate(net.eval())
    torch.testing.assert_close(small(x), net(x))
    assert {"table.one", "table.two", "fc.0.weight"} <= set(small.state_dict())


class Checkpointed(nn.Module):
    """Computes its block again in backward, which updates the statistics twice."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.stem, self.block, self.reentrant = nn.Linear(8, 8), Block(), reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return checkpoint(self.block, x, use_reentrant=self.reentrant) if self.training else self.block(x)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_stay(reentrant):
    torch.manual_seed(0)
    model, x = randomized(Checkpointed(reentrant)), torch.randn(4, 8)
    for how in (dr.Capture.SYMBOLIC, dr.Capture.EXPORT):
        with pytest.raises(dr.CaptureError, match=r"cannot be captured whole: torch.utils.checkpoint computes parts"):
            dr.capture(model, (x,), how=how)
    net = dr.transform(model, (x,), rank=dr.Fixed(2))
    assert {row.site.name for row in dr.plan_of(net).sites} == {"stem.weight", "block.a.weight", "block.w"}
    torch.manual_seed(1)
    expected = gradients(model.train(), x)
    torch.manual_seed(1)
    found = gradients(net.train(), x)
    found["block.w"] = found.pop("block.w.weight")
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())
    assert int(net.get_buffer("block.norm.num_batches_tracked")) == int(model.block.norm.num_batches_tracked) == 2


class Featured(nn.Module):
    """A backbone that never trains, under no_grad, and a branch on the number of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.backbone(x)
        return self.head(x)


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(8, 8), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) / (1.0 if len(x) > 100 else 2.0)


@pytest.mark.parametrize("kind", [Featured, Counting])
def test_parts_are_preferred_to_a_graph_that_is_closed_or_serves_one_batch(kind):
    torch.manual_seed(0)
    model, x = kind(), torch.randn(4, 8)
    net = dr.transform(model, (x,), rank=dr.Fixed(2))
    plan = dr.plan_of(net)
    assert "torch.export alone" in plan.capture
    assert not plan.skipped
    for x in (torch.randn(4, 8), torch.randn(7, 8)):
        assert torch.equal(net(x), model(x))
