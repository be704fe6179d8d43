"""Contracts 9 and 10: what is left dense is listed, and what is the caller's is left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from grid import KINDS, LOW, PAIRS, Cell, cells, fast_path, layouts_of
from models import CASES, Case

import dynrank_fx as dr
from dynrank_fx.layouts import CONV_LAYOUTS

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")


@cells(every_day=PAIRS)
def test_every_matrix_is_a_site_or_listed_with_the_reason(cell: Cell) -> None:
    def planned(**filters: Any) -> dr.Plan:
        more = {"conv_layout": cell.layout, "allow_unprofitable": True, **filters}
        return dr.make_plan(cell.captured(), dr.Ratio(0.5), (cell.inputs(),), **more)

    model, (first, *others) = cell.model(), cell.sites
    matrices = sorted(name for name, p in model.named_parameters(remove_duplicate=False) if p.ndim >= 2)
    for filters, reason in (
        ({}, None),
        ({"exclude": (first,)}, "excluded by name"),
        ({"include": ("*",), "overrides": {first: dr.Override(dense=True)}}, "left alone by name"),
        ({"include": tuple(others)} if others else {"exclude": ("*",)}, None),
    ):
        plan = planned(**filters)
        rows = [*(row.site for row in plan.sites), *plan.skipped]
        assert sorted(name for row in rows for name in (row.name, *row.aliases)) == matrices
        why = {skipped.name: skipped.reason for skipped in plan.skipped}
        assert all(len(sentence.split()) > 2 and "unsupported" not in sentence for sentence in why.values())
        assert (first in why) == bool(filters)
        assert reason is None or why[first] == reason
        assert all(sentence in str(plan) for sentence in why.values())
    for filters in ({"include": ("nothing.*",)}, {"exclude": ("nothing.*",)}, {"overrides": {"x": dr.Override()}}):
        with pytest.raises(dr.PlanError, match="matches no weight"):
            planned(**filters)


@pytest.mark.parametrize("case", [case for case in CASES if case.conv], ids=lambda case: case.name)
def test_what_a_layout_does_not_serve_takes_the_channel_layout(case: Case) -> None:
    cell = Cell(case, dr.ChannelLayout, dr.Capture.SYMBOLIC)
    for layout in CONV_LAYOUTS:
        plan = dr.make_plan(
            cell.captured(), dr.Ratio(0.5), (cell.inputs(),), conv_layout=layout, allow_unprofitable=True
        )
        names = {row.layout.name for row in plan.sites if row.site.kind.startswith("conv")}
        assert names == {layout.name if layout in layouts_of(case) else "channel"}


def flags() -> dict[str, Any]:
    """What is the process's."""
    return {
        "gradients": torch.is_grad_enabled(),
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "precision": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cudnn": (torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32),
        "compiler": torch._dynamo.config.get_config_copy(),
        "random numbers": torch.get_rng_state().tolist(),
    }


@cells(lambda cell: cell.layout is CONV_LAYOUTS[0], every_day=KINDS)
def test_the_callers_model_inputs_and_flags_are_untouched(cell: Cell) -> None:
    """Once for each capture of each case: layouts work on a copy."""
    model, x = cell.model(), cell.inputs()
    model.requires_grad_(True).zero_grad()
    tensors = dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers()])
    before = {name: t.detach().clone() for name, t in tensors.items()}
    modules, kept = [(name, vars(module).copy(), type(module)) for name, module in model.named_modules()], x.clone()
    with fast_path(enabled=True):
        then = flags()
        net = dr.transform(model, (x,), rank=dr.Ratio(0.5), how=cell.how, allow_unprofitable=True)
        dr.enter_(net, LOW)
        dr.truncate(net)
        assert flags() == then
        net.train()(x).square().mean().backward()
    now = dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers()])
    assert list(now) == list(tensors)
    assert all(now[name] is tensors[name] for name in now)
    assert all(torch.equal(now[name], before[name]) and now[name].grad is None for name in now)
    assert modules == [(name, vars(module), type(module)) for name, module in model.named_modules()]
    assert torch.equal(x, kept)
