"""Contracts 1 to 4: what the net computes, in every phase and after the cut, against the original model."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from grid import ADAPTOR, FULL, LAYOUTS, LOW, PAIRS, Cell, cells, seeded
from models import Modal, gradients, randomized
from torch import Tensor, nn

import dynrank_fx as dr
from dynrank_fx.rewrite import Switched, switched_modules

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")


def exact(cell: Cell) -> bool:
    """CP of a rank that is of any use does not reproduce a weight."""
    return cell.layout is not dr.CPLayout


def first_modules(net: nn.Module) -> dict[str, Switched]:
    return {name: modules[0] for name, modules in switched_modules(net).items()}


def assert_near(got: Tensor, expected: Tensor, rounding: float = 1e-9) -> None:
    torch.testing.assert_close(got, expected, rtol=rounding, atol=rounding)


@cells()
def test_full_is_bit_equal_to_the_original_in_output_and_gradients(cell: Cell, device: str) -> None:
    # In float64 where capturing it again in float32 would take long.
    dtype = torch.float64 if cell.how is dr.Capture.EXPORT else torch.float32
    model, net, x = cell.model(dtype, device), cell.net(1.0, dtype, device), cell.inputs(dtype, device)
    assert tuple(row.site.name for row in dr.plan_of(net).sites) == cell.sites
    for mode in (False, True):
        assert torch.equal(seeded(model.train(mode), x), seeded(net.train(mode), x))
    torch.manual_seed(7)
    expected = gradients(model, x)
    torch.manual_seed(7)
    got, sites = gradients(net, x), first_modules(net)
    for name, gradient in expected.items():
        found = got.get(name, got.get(name + ".weight"))  # a bare parameter has become a module
        if found is None and name in sites:
            found = sites[name]._parameters["weight"].grad
        assert found is not None, name
        assert torch.equal(found, gradient), name


@cells(exact, every_day=LAYOUTS)
def test_phases_preserve_the_function_at_full_rank_in_both_directions(cell: Cell, device: str) -> None:
    net, x = cell.net(1.0, device=device).eval(), cell.inputs(device=device)
    expected = cell.model(device=device).eval()(x)
    dr.enter_(net, LOW)
    assert_near(net(x), expected)
    dr.enter_(net, FULL)
    assert_near(net(x), expected)


@cells(every_day=PAIRS)
def test_inflate_preserves_what_low_computes(cell: Cell, device: str) -> None:
    net, x = cell.net(device=device).eval(), cell.inputs(device=device)
    dense = net(x)
    dr.enter_(net, LOW)
    low = net(x)
    assert not torch.allclose(low, dense), "half of the rank is not the whole function"
    dr.enter_(net, FULL)
    assert_near(net(x), low)


@cells()
def test_truncate_is_plain_torch_and_equals_low_on_other_shapes_too(cell: Cell, device: str) -> None:
    net = cell.net(device=device).eval()
    dr.enter_(net, LOW)
    small = dr.truncate(net)
    assert not any(type(module).__module__.startswith("dynrank_fx") for module in small.modules())
    for x in (cell.inputs(device=device), cell.other_inputs(device=device)):
        assert_near(small(x), net(x), rounding=1e-12)


@cells(every_day=PAIRS)
def test_truncate_of_full_is_truncate_of_low(cell: Cell) -> None:
    net, x = cell.net().eval(), cell.inputs()
    small = dr.truncate(net)
    dr.enter_(net, LOW)
    assert_near(small(x), net(x), rounding=1e-12)


@cells(every_day=PAIRS)
def test_an_adaptor_starts_at_the_function_and_is_its_base_plus_the_scaled_branch(cell: Cell, device: str) -> None:
    net, x = cell.net(device=device).eval(), cell.inputs(device=device)
    expected = net(x)
    dr.enter_(net, ADAPTOR)
    assert_near(net(x), expected, rounding=1e-12)
    weights = {}
    for name, site in first_modules(net).items():
        base = site._buffers["base"]
        assert not base.requires_grad
        with torch.no_grad():
            for factor in site.factors:
                factor.normal_(std=0.3)
            weights[name] = base + 16 / site.rank * site.layout.join(site.factors)
    adapted = net(x)
    assert not torch.allclose(adapted, expected)
    assert_near(dr.inline(net)(x), adapted, rounding=1e-12)
    dr.enter_(net, FULL)
    for name, site in first_modules(net).items():
        assert_near(site.weight.detach(), weights[name], rounding=1e-12)
    assert_near(net(x), adapted)


def test_a_truncated_model_saves_and_loads_like_any_torch_module() -> None:
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


def test_a_replaced_layer_keeps_what_code_reads_of_a_layer() -> None:
    net = dr.transform(nn.Sequential(nn.Linear(12, 9)), (torch.randn(2, 12),), rank=dr.Fixed(2))
    for phase in (FULL, LOW, ADAPTOR):
        dr.enter_(net, phase)
        layer = net.get_submodule("0")
        assert (layer.in_features, layer.out_features, layer.weight.shape) == (12, 9, (9, 12))
