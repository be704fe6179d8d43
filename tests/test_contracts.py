"""The contracts of the design, over op × layout × capture: every one against the original model or an exact
computation.
"""

from __future__ import annotations

import copy
import io

import pytest
import torch
from models import CASES, Case, Modal, Tied, gradients, randomized
from torch import nn

import dynrank_fx as dr
from dynrank_fx.rewrite import switched_modules

CAPTURES = (dr.Capture.SYMBOLIC, dr.Capture.EXPORT)
LAYOUTS = (dr.ChannelLayout, dr.SpatialLayout)
GRID = [
    pytest.param(case, layout, how, id=f"{case.name}-{layout.name}-{how.name}")
    for case in CASES
    for how in CAPTURES
    for layout in (LAYOUTS if case.conv else LAYOUTS[:1])
]
DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))


def full_rank(model: nn.Module, x: torch.Tensor, layout: type, how: dr.Capture, **more: object) -> nn.Module:
    return dr.transform(model, (x,), rank=dr.Ratio(1.0), conv_layout=layout, how=how, allow_unprofitable=True, **more)


def seeded(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(7)
    return model(x)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("case", "layout", "how"), GRID)
class TestEveryOp:
    def build(self, case: Case, device: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, torch.Tensor]:
        torch.manual_seed(1)
        model = randomized(case.model()).to(device, dtype)
        x = case.inputs().to(device)
        return model, x.to(dtype) if x.is_floating_point() else x

    def test_full_is_bit_equal_to_the_original_in_output_and_gradients(self, case, layout, how, device):
        model, x = self.build(case, device)
        net = full_rank(model, x, layout, how)
        assert tuple(row.site.name for row in dr.plan_of(net).sites) == case.sites
        for mode in (False, True):
            model.train(mode)
            net.train(mode)
            assert torch.equal(seeded(model, x), seeded(net, x))
        torch.manual_seed(7)
        expected = gradients(model, x)
        torch.manual_seed(7)
        got = gradients(net, x)
        by_site = {name: modules[0] for name, modules in switched_modules(net).items()}
        for name, gradient in expected.items():
            found = got.get(name, got.get(name + ".weight"))
            if found is None and name in by_site:
                found = by_site[name]._parameters["weight"].grad
            assert found is not None, name
            assert torch.equal(found, gradient), name

    def test_phases_preserve_the_function_at_full_rank_in_both_directions(self, case, layout, how, device):
        model, x = self.build(case, device, torch.float64)
        net = full_rank(model, x, layout, how).eval()
        expected = model.eval()(x)
        dr.enter_(net, dr.Phase.LOW)
        torch.testing.assert_close(net(x), expected, rtol=1e-9, atol=1e-9)
        low = net(x)
        dr.enter_(net, dr.Phase.FULL)
        torch.testing.assert_close(net(x), low, rtol=1e-9, atol=1e-9)

    def test_inflate_preserves_a_truncated_function_and_truncate_equals_low(self, case, layout, how, device):
        model, x = self.build(case, device, torch.float64)
        net = dr.transform(model, (x,), rank=dr.Ratio(0.5), conv_layout=layout, how=how, allow_unprofitable=True).eval()
        dr.enter_(net, dr.Phase.LOW)
        low = net(x)
        small = dr.truncate(net)
        torch.testing.assert_close(small(x), low, rtol=1e-12, atol=1e-12)
        assert not any(type(module).__module__.startswith("dynrank_fx") for module in small.modules())
        dr.enter_(net, dr.Phase.FULL)
        torch.testing.assert_close(net(x), low, rtol=1e-9, atol=1e-9)

    def test_an_adaptor_starts_at_the_function_and_is_its_base_plus_the_scaled_branch(self, case, layout, how, device):
        model, x = self.build(case, device, torch.float64)
        net = dr.transform(model, (x,), rank=dr.Ratio(0.5), conv_layout=layout, how=how, allow_unprofitable=True).eval()
        expected = net(x)
        dr.enter_(net, dr.Phase.ADAPTOR)
        torch.testing.assert_close(net(x), expected, rtol=1e-12, atol=1e-12)
        by_site = {name: modules[0] for name, modules in switched_modules(net).items()}
        bases = {name: site._buffers["base"].clone() for name, site in by_site.items()}
        assert all(not site._buffers["base"].requires_grad for site in by_site.values())
        for site in by_site.values():
            with torch.no_grad():
                for factor in site.factors:
                    factor.copy_(torch.randn_like(factor) * 0.1)
        adapted = net(x)
        assert not torch.allclose(adapted, expected)
        torch.testing.assert_close(dr.inline(net)(x), adapted, rtol=1e-12, atol=1e-12)
        weights = {}
        for name, site in by_site.items():
            weights[name] = bases[name] + 16 / site.rank * site.layout.join(tuple(f.detach() for f in site.factors))
        dr.enter_(net, dr.Phase.FULL)
        for name, site in by_site.items():
            torch.testing.assert_close(site.weight.detach(), weights[name], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(net(x), adapted, rtol=1e-9, atol=1e-9)

    def test_what_does_not_train_is_not_there(self, case, layout, how, device):
        model, x = self.build(case, device)
        net = dr.transform(model, (x,), rank=dr.Ratio(0.5), conv_layout=layout, how=how, allow_unprofitable=True)
        optimizer = torch.optim.AdamW(net.parameters())
        for phase in (dr.Phase.LOW, dr.Phase.FULL, dr.Phase.ADAPTOR, dr.Phase.LOW, dr.Phase.ADAPTOR):
            dr.enter_(net, phase, optimizer)
            held = {id(p) for group in optimizer.param_groups for p in group["params"]}
            assert held == {id(p) for p in net.parameters()}
            assert all(id(p) in held for p in optimizer.state)
            for modules in switched_modules(net).values():
                names = {name for module in modules for name, p in module._parameters.items() if p is not None}
                wanted = {"weight"} if phase is dr.Phase.FULL else {"left", "right"}
                assert names - {"bias"} == wanted
                assert all((m._buffers["base"] is not None) == (phase is dr.Phase.ADAPTOR) for m in modules)
            net(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            assert set(net.state_dict()) >= {name for name, _ in net.named_parameters() if ".bias" in name}

    def test_weights_load_by_name_in_both_directions(self, case, layout, how, device):
        model, x = self.build(case, device)
        net = full_rank(model, x, layout, how).eval()
        assert sorted(net.state_dict()) == sorted(model.state_dict())
        other = randomized(case.model(), seed=5).to(device).eval()
        net.load_state_dict(other.state_dict())
        assert torch.equal(net(x), other(x))
        model.load_state_dict(net.state_dict())
        assert torch.equal(model.eval()(x), other(x))

    def test_the_callers_model_is_untouched(self, case, layout, how, device):
        model, x = self.build(case, device)
        before = {name: t.clone() for name, t in model.state_dict().items()}
        flags = torch.is_grad_enabled(), torch.backends.mha.get_fastpath_enabled(), torch.get_rng_state()
        keep = x.clone()
        net = full_rank(model, x, layout, how)
        dr.enter_(net, dr.Phase.LOW)
        net.train()(x)
        assert {n: t.tolist() for n, t in model.state_dict().items()} == {n: t.tolist() for n, t in before.items()}
        assert model.training
        assert torch.equal(x, keep)
        torch.set_rng_state(flags[2])
        assert (torch.is_grad_enabled(), torch.backends.mha.get_fastpath_enabled()) == flags[:2]

    def test_truncate_serves_another_batch_size(self, case, layout, how, device):
        model, x = self.build(case, device, torch.float64)
        net = dr.transform(model, (x,), rank=dr.Ratio(0.5), conv_layout=layout, how=how, allow_unprofitable=True).eval()
        dr.enter_(net, dr.Phase.LOW)
        more = torch.cat([x, x.flip(0), x])
        torch.testing.assert_close(dr.truncate(net)(more), net(more), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("how", CAPTURES, ids=lambda how: how.name)
def test_an_embedding_and_its_head_factor_together_and_stay_tied(how):
    torch.manual_seed(0)
    model, x = randomized(Tied()), torch.randint(20, (3, 7))
    net = dr.transform(model, (x,), rank=dr.Ratio(0.5), how=how, allow_unprofitable=True)
    plan = dr.plan_of(net)
    assert not plan.skipped
    assert plan.sites[0].site.aliases == ("head.weight",)
    dr.enter_(net, dr.Phase.LOW)
    for factor in ("left", "right"):
        assert net.get_parameter(f"embed.{factor}") is net.get_parameter(f"head.{factor}")
    weight = net.get_submodule("embed").weight
    table = torch.nn.functional.embedding(x, weight)
    torch.testing.assert_close(net.get_submodule("embed")(x), table)
    torch.testing.assert_close(net.get_submodule("head")(table), table @ weight.T)
    small = dr.truncate(net)
    names = {name: id(p) for name, p in small.named_parameters(remove_duplicate=False)}
    assert names["embed.left"] == names["head.left"]
    torch.testing.assert_close(small(x), net.eval()(x))


@pytest.mark.parametrize("how", CAPTURES, ids=lambda how: how.name)
def test_train_and_eval_behave_as_in_the_original_after_deepcopy_too(how):
    torch.manual_seed(0)
    model, x = randomized(Modal()), torch.randn(4, 4, 6, 6)
    net = copy.deepcopy(dr.transform(model, (x,), rank=dr.Ratio(0.5), how=how, allow_unprofitable=True))
    for mode in (True, False, True, False):
        assert torch.equal(seeded(model.train(mode), x), seeded(net.train(mode), x))
    for (name, mine), theirs in zip(model.named_buffers(), net.buffers(), strict=False):
        assert torch.equal(mine, theirs), name
    twin = copy.deepcopy(net)
    dr.enter_(twin, dr.Phase.LOW)
    assert dr.phases_of(net)["head.weight"] is dr.Phase.FULL, "a copy has switches of its own"
    assert torch.equal(net.eval()(x), model.eval()(x))


def test_the_weight_is_readable_in_every_phase_and_writable_in_full_only():
    torch.manual_seed(0)
    net = dr.transform(
        nn.Sequential(nn.Linear(12, 9)), (torch.randn(2, 12),), rank=dr.Ratio(0.5), allow_unprofitable=True
    )
    layer = net.get_submodule("0")
    assert torch.equal(layer.weight, layer._parameters["weight"])
    assert layer.bias.shape == (9,)
    assert (layer.in_features, layer.out_features) == (12, 9)
    layer.weight = nn.Parameter(torch.randn(9, 12))
    dr.enter_(net, dr.Phase.LOW)
    left, right = layer.factors
    torch.testing.assert_close(layer.weight, left @ right)
    layer.weight.sum().backward()
    assert left.grad is not None
    with pytest.raises(dr.TransitionError, match="no weight to write in LOW"):
        layer.weight = nn.Parameter(torch.randn(9, 12))


def test_a_truncated_model_saves_and_loads_like_any_torch_module():
    torch.manual_seed(0)
    x = torch.randn(4, 4, 6, 6)
    small = dr.truncate(dr.transform(randomized(Modal()), (x,), rank=dr.Ratio(0.5), allow_unprofitable=True))
    file = io.BytesIO()
    torch.save(small, file)
    assert b"dynrank" not in file.getvalue()
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert torch.equal(again(x), small(x))
    assert torch.equal(copy.deepcopy(small)(x), small(x))
    exported = torch.export.export(small, (x,)).module()
    torch.testing.assert_close(exported(x), small(x))
