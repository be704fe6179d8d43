"""Sites that read the same input share one right factor: their phases, their optimizer state and their files."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from models import gradients, randomized
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import dynrank_fx as dr
from dynrank_fx.rewrite import switched_modules


class Attention(nn.Module):
    """Query, key and value of one input, gate and up of another; key and value narrower, one without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(12, 12), nn.Linear(12, 6), nn.Linear(12, 6, bias=False)
        self.o = nn.Linear(12, 12)
        self.gate, self.up, self.down = nn.Linear(12, 16), nn.Linear(12, 16), nn.Linear(16, 12)

    def forward(self, x: Tensor) -> Tensor:
        k, v = torch.cat([self.k(x)] * 2, -1), torch.cat([self.v(x)] * 2, -1)
        x = x + self.o(torch.softmax(self.q(x) @ k.mT, -1) @ v)
        return x + self.down(torch.sigmoid(self.gate(x)) * self.up(x))


QKV, GLU = ("q.weight", "k.weight", "v.weight"), ("gate.weight", "up.weight")
CAPTURES = pytest.mark.parametrize("how", [dr.Capture.SYMBOLIC, dr.Capture.EXPORT], ids=lambda how: how.name)


def made(ratio: float = 0.5, dtype: torch.dtype = torch.float64, **more: object) -> tuple[nn.Module, Attention, Tensor]:
    torch.manual_seed(0)
    model, x = randomized(Attention()).to(dtype), torch.randn(3, 5, 12, dtype=dtype)
    net = dr.transform(model, (x,), rank=dr.Ratio(ratio), share_inputs=True, allow_unprofitable=True, **more)
    return net, model, x


def factors(net: nn.Module, names: tuple[str, ...]) -> tuple[list[Tensor], Tensor]:
    modules = switched_modules(net)
    return [modules[name][0].factors[0] for name in names], modules[names[0]][0].factors[1]


@CAPTURES
def test_packs_are_found_and_full_is_the_original_and_low_at_full_rank_too(how):
    net, model, x = made(1.0, how=how)
    plan = dr.plan_of(net)
    assert {row.site.name: row.sharing for row in plan.sites} == {
        **dict.fromkeys(QKV, QKV),
        **dict.fromkeys(GLU, GLU),
        "o.weight": (),
        "down.weight": (),
    }
    assert torch.equal(net(x), model(x))
    expected = gradients(model, x)
    for name, gradient in gradients(net, x).items():
        assert torch.equal(gradient, expected[name]), name
    net.zero_grad()
    dr.enter_(net, dr.Phase.LOW)
    torch.testing.assert_close(net(x), model(x))
    assert torch.compile(net, fullgraph=True, backend="eager")(x).equal(net(x))
    dr.enter_(net, dr.Phase.FULL)
    torch.testing.assert_close(net(x), model(x))
    assert sorted(net.state_dict()) == sorted(model.state_dict())


@CAPTURES
def test_the_shared_factor_is_the_best_for_all_weights_together_and_computed_once(how):
    net, model, x = made(how=how)
    dr.enter_(net, dr.Phase.LOW)
    for names in (QKV, GLU):
        stacked = torch.cat([model.get_parameter(name).detach() for name in names])
        lefts, right = factors(net, names)
        error = torch.linalg.vector_norm(stacked - torch.cat(lefts) @ right).detach()
        best = torch.linalg.vector_norm(torch.linalg.svdvals(stacked)[right.shape[0] :])
        assert float(error) <= 1.001 * float(best)
    plan = dr.plan_of(net)
    assert sum(p.numel() for p in net.parameters()) == plan.low_params
    small = dr.truncate(net)
    torch.testing.assert_close(small(x), net.eval()(x))
    assert small.code.count("q.right") == 1
    assert "k.right" not in small.code
    low = net(x)
    dr.enter_(net, dr.Phase.FULL)
    torch.testing.assert_close(net(x), low)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_optimizer_state_moves_as_that_of_the_stacked_weight(kind):
    net, _, x = made()
    torch.manual_seed(1)
    params = [{"params": [p for n, p in net.named_parameters() if n != "k.weight"]}]
    params.append({"params": [net.get_parameter("k.weight")], "lr": 0.003})
    make = {"sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9), "adamw": torch.optim.AdamW}[kind]
    optimizer, key = make(params), "momentum_buffer" if kind == "sgd" else "exp_avg"

    def step() -> None:
        net(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    moment = torch.cat([optimizer.state[net.get_parameter(name)][key] for name in QKV])
    dr.enter_(net, dr.Phase.LOW, optimizer)
    lefts, right = factors(net, QKV)
    torch.testing.assert_close(torch.cat([optimizer.state[left][key] for left in lefts]), moment @ right.T)
    torch.testing.assert_close(optimizer.state[right][key], torch.cat(lefts).T @ moment)
    assert [p is lefts[1] for p in optimizer.param_groups[1]["params"]] == [True], "in the group of what it replaced"
    assert any(p is right for p in optimizer.param_groups[0]["params"])
    step()
    dr.enter_(net, dr.Phase.FULL, optimizer)
    assert [p is net.get_parameter("k.weight") for p in optimizer.param_groups[1]["params"]] == [True]
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in net.parameters()} == {id(p) for p in optimizer.state}
    step()


def test_a_pack_changes_its_phase_and_rank_together_or_not_at_all():
    net, _, x = made()
    with pytest.raises(
        dr.TransitionError, match=r"q\.weight, k\.weight, v\.weight share a factor: give them one phase"
    ):
        dr.enter_(net, {"q*": dr.Phase.LOW})
    assert set(dr.phases_of(net).values()) == {dr.Phase.FULL}
    dr.enter_(net, {"[qkv].weight": dr.Phase.LOW})
    before = net(x)
    plan = dr.plan_of(net)
    with pytest.raises(dr.PlanError, match="share a factor: give them one rank"):
        plan.with_ranks({"q.weight": 3})
    dr.replan_(net, plan.with_ranks(dict.fromkeys(QKV, 12)))
    torch.testing.assert_close(net(x), before)
    dr.replan_(net, plan.with_ranks(dict.fromkeys(QKV, 2)))
    assert factors(net, QKV)[1].shape == (2, 12)
    with torch.no_grad():
        net.get_submodule("v").left.fill_(float("nan"))
    with pytest.raises(dr.TransitionError, match=r"v\.weight has non-finite weights"):
        dr.enter_(net, dr.Phase.FULL)
    assert dr.phases_of(net)["q.weight"] is dr.Phase.LOW


def test_a_failed_switch_in_the_middle_of_a_pack_is_undone(monkeypatch):
    net, _, x = made()
    optimizer = torch.optim.AdamW(net.parameters())
    net(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    before, output = copy.deepcopy(optimizer.state_dict()), net(x)
    from dynrank_fx.phases import switch

    def failing(modules, *args):
        if modules[0].site == "v.weight":
            raise RuntimeError("no more")
        return replace(modules, *args)

    replace = switch.replace_parameters
    monkeypatch.setattr(switch, "replace_parameters", failing)
    with pytest.raises(RuntimeError, match="no more"):
        dr.enter_(net, dr.Phase.LOW, optimizer)
    assert torch.equal(net(x), output)
    after = optimizer.state_dict()
    assert str(sorted(after["state"].items())) == str(sorted(before["state"].items()))
    assert after["param_groups"] == before["param_groups"]


def test_packs_survive_copies_files_and_plans(tmp_path):
    net, model, x = made(dtype=torch.float32)
    dr.enter_(net, dr.Phase.LOW)
    twin = copy.deepcopy(net)
    assert torch.equal(twin(x), net(x))
    assert factors(twin, QKV)[1] is twin.get_submodule("q").right
    dr.save(net, tmp_path / "net")
    again = dr.load(tmp_path / "net", model, (x,))
    assert torch.equal(again(x), net(x))
    plan = dr.plan_of(net)
    assert dr.Plan.from_json(plan.to_json()) == plan
    assert "right of q.weight" in str(plan)
    report = dr.export_onnx(net, (x,), tmp_path / "net.onnx")
    assert report.params == sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (lambda rows: rows.pop(1), r"lacks a row of q\.weight, k\.weight, v\.weight"),
        (lambda rows: rows[1].update(rank=3), "share a factor: give them one rank"),
        (lambda rows: rows[1].update(sharing=["q.weight"]), "lacks a row of q.weight"),
        (
            lambda rows: [row.update(rank=13) for row in rows[:3]],
            "cannot have rank 13: give a whole number from 1 to 12",
        ),
    ],
)
def test_an_edited_pack_that_cannot_be_is_refused(edit, sentence):
    data = json.loads(dr.plan_of(made()[0]).to_json())
    edit(data["sites"])
    with pytest.raises(dr.PlanError, match=sentence):
        dr.Plan.from_json(json.dumps(data))


def test_a_plan_cannot_pack_what_reads_another_input():
    net, model, x = made()
    data = json.loads(dr.plan_of(net).to_json())
    for row in data["sites"]:
        row["sharing"] = ["q.weight", "o.weight"] if row["site"]["name"] in ("q.weight", "o.weight") else []
    with pytest.raises(dr.PlanError, match=r"o\.weight does not read the input of q\.weight"):
        dr.transform(model, (x,), plan=dr.Plan.from_json(json.dumps(data)))


def test_a_plan_cannot_pack_what_is_used_more_than_once():
    """A graph has no one place where their factor could stand."""

    class Twice(Attention):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(super().forward(x))

    torch.manual_seed(0)
    example = (torch.randn(3, 5, 12, dtype=torch.float64),)
    with pytest.raises(dr.PlanError, match=r"k\.weight does not read the input of q\.weight|q\.weight does not read"):
        dr.transform(Twice().double(), example, plan=dr.plan_of(made()[0]))


def test_what_differs_in_override_dtype_or_training_is_not_packed():
    torch.manual_seed(0)
    model = Attention()
    model.k.weight.requires_grad_(False)
    model.up.weight.data = model.up.weight.data.clone()
    net = dr.transform(
        model,
        (torch.randn(2, 5, 12),),
        rank=dr.Ratio(0.5),
        share_inputs=True,
        allow_unprofitable=True,
        overrides={"up": dr.Override(rank=dr.Fixed(2))},
    )
    assert {row.sharing for row in dr.plan_of(net).sites} == {(), ("q.weight", "v.weight")}


# In the form of layers nothing stands before several: each applies the one factor for itself


def in_layers(ratio: float = 0.5, **more: object) -> tuple[nn.Module, Attention, Tensor]:
    return made(ratio, form=dr.Form.LAYERS, **more)


def test_in_layers_the_graph_tells_who_shares_and_it_computes_what_the_graph_does():
    net, model, x = in_layers()
    graph = made()[0]
    assert type(net) is Attention
    assert {row.site.name: row.sharing for row in dr.plan_of(net).sites} == {
        row.site.name: row.sharing for row in dr.plan_of(graph).sites
    }
    assert torch.equal(net(x), model(x))
    for each in (net, graph):
        dr.enter_(each, dr.Phase.LOW)
    torch.testing.assert_close(net(x), graph(x))
    assert net.state_dict().keys() == graph.state_dict().keys()
    expected = gradients(graph, x)
    for name, gradient in gradients(net, x).items():
        torch.testing.assert_close(gradient, expected[name], msg=name)
    net.zero_grad()
    assert torch.compile(net, fullgraph=True, backend="eager")(x).equal(net(x))
    low = net(x)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(twin(x), low)
        assert factors(twin, QKV)[1] is twin.q.right
        twin.q.right.data.zero_()
        assert not torch.equal(twin.k(x), net.k(x)), "it is the owner's"
    given = torch.func.functional_call(net, {"q.right": torch.zeros_like(net.q.right)}, x)
    assert not torch.allclose(given, low)
    dr.enter_(net, dr.Phase.FULL)
    torch.testing.assert_close(net(x), low)


def test_in_layers_the_plan_counts_the_factor_once_and_each_product_with_it():
    net, _, x = in_layers()
    graph = made()[0]
    plan, of_graph = dr.plan_of(net), dr.plan_of(graph)
    assert plan.low_params == of_graph.low_params
    rank = {row.site.name: row.rank for row in plan.sites}
    again = 2 * x.shape[0] * x.shape[1] * 12 * (2 * rank["k.weight"] + rank["up.weight"])  # for k, v and up
    assert plan.low_flops == of_graph.low_flops + again
    dr.enter_(net, dr.Phase.LOW)
    assert sum(p.numel() for p in net.parameters()) == plan.low_params
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(x)
    assert counter.get_total_flops() == plan.low_flops
    assert dr.Plan.from_json(plan.to_json()) == plan


def test_in_layers_what_is_truncated_has_the_factor_once():
    net, _, x = in_layers()
    small = dr.truncate(net, [(x,)])
    assert type(small) is Attention
    assert [type(layer) for layer in small.k] == [nn.Linear, nn.Linear]
    assert small.q.right.weight is small.k.right.weight is small.v.right.weight
    assert sum(p.numel() for p in small.parameters()) == dr.plan_of(net).low_params
    of_graph = dr.truncate(made()[0], [(x,)])
    torch.testing.assert_close(small(x), of_graph(x), msg="calibrated on the same inputs")
    plain = dr.inline(net)
    assert torch.equal(plain(x), net(x))


def test_in_layers_it_is_saved_loaded_exported_and_trained_as_the_graph_is(tmp_path):
    net, model, x = in_layers(dtype=torch.float32)
    graph = made(dtype=torch.float32)[0]
    for each in (net, graph):
        optimizer = torch.optim.AdamW(each.parameters(), lr=0.01)
        for phase in (dr.Phase.FULL, dr.Phase.LOW, dr.Phase.FULL, dr.Phase.LOW):
            dr.enter_(each, phase, optimizer)
            for _ in range(2):
                each(x).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
    torch.testing.assert_close(net(x), graph(x))
    dr.save(net, tmp_path / "net")
    again = dr.load(tmp_path / "net", model, (x,))
    assert type(again) is Attention
    assert torch.equal(again(x), net(x))
    report = dr.export_onnx(dr.truncate(net), (x,), tmp_path / "small.onnx")
    assert report.params == sum(p.numel() for p in net.parameters())
    fresh = in_layers(dtype=torch.float32)[0]
    fresh.load_state_dict(net.state_dict())
    assert torch.equal(fresh(x), net(x))


def test_in_layers_a_plan_of_a_graph_is_taken_and_counted_anew():
    _, model, x = made()
    plan = dr.plan_of(made()[0])
    net = dr.transform(model, (x,), plan=plan, form=dr.Form.LAYERS)
    assert dr.plan_of(net) == dr.plan_of(in_layers()[0])
    assert dr.plan_of(dr.transform(model, (x,), plan=dr.plan_of(net))) == plan


def test_in_layers_who_reads_one_input_is_not_known_without_a_graph():
    class Branching(Attention):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if float(x.sum()) < 1e9 else x

    torch.manual_seed(0)
    with pytest.warns(dr.DynrankWarning, match="which weights read one input is not known, and none share a factor: "):
        net = dr.transform(
            Branching(), (torch.randn(2, 5, 12),), rank=dr.Fixed(2), share_inputs=True, form=dr.Form.LAYERS
        )
    assert {row.sharing for row in dr.plan_of(net).sites} == {()}
