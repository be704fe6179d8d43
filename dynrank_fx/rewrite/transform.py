"""``transform``, the one-call form: capture, plan, factorize."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..errors import PlanError
from ..layouts import ChannelLayout, ConvLayout
from ..plan import Override, Plan, RankPolicy, Ratio, Role, fit_plan, make_plan
from ..tracing import Capture, capture
from .factorize import factorize_
from .inline import holds_captured
from .switched import switched_modules

_QUARTER = Ratio(0.25)
_NONE: Mapping[str, Override] = {}


def transform(
    model: nn.Module | torch.export.ExportedProgram,
    example_inputs: Any = None,
    *,
    rank: RankPolicy = _QUARTER,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    overrides: Mapping[str, Override] = _NONE,
    multiple_of: int = 1,
    conv_layout: ConvLayout = ChannelLayout,
    share_inputs: bool = False,
    leave: Collection[Role] = (),
    allow_unprofitable: bool = False,
    allow_empty: bool = False,
    plan: Plan | None = None,
    how: Capture | None = None,
    dynamic_shapes: Any = None,
) -> nn.Module:
    """A copy of the model with a switchable site, in phase FULL, wherever factoring pays; see ``plan_of(net)``.

    model: an ``nn.Module``, a GraphModule (then example_inputs may be left out, and FLOPs are not counted), or an
    ExportedProgram. plan: a given plan in place of rank, include, exclude, overrides, multiple_of, conv_layout,
    share_inputs, leave and allow_unprofitable, which ``make_plan`` explains; how and dynamic_shapes: see ``capture``.

    Raises CaptureError, PlanError; a plan without any site is a PlanError unless allow_empty.
    """
    if isinstance(model, nn.Module) and holds_captured(model) and switched_modules(model):
        raise PlanError(
            f"{type(model).__name__} has been transformed already: change its ranks by replan_, or transform the "
            f"original model, or what truncate makes of it"
        )
    net = capture(model, example_inputs, dynamic_shapes=dynamic_shapes, how=how)
    if plan is None:
        plan = make_plan(
            net,
            rank,
            example_inputs,
            include=include,
            exclude=exclude,
            overrides=overrides,
            multiple_of=multiple_of,
            conv_layout=conv_layout,
            share_inputs=share_inputs,
            leave=leave,
            allow_unprofitable=allow_unprofitable,
        )
    else:
        plan = fit_plan(net, plan, example_inputs)
    if not plan.sites and not allow_empty:
        raise PlanError(
            f"nothing would be factored: {_reasons(plan)}; choose other weights or another rank (`transform --dry-run` "
            "shows the plan, in Python allow_empty=True)"
        )
    factorize_(net, plan)
    return net


def _reasons(plan: Plan) -> str:
    if not plan.skipped:
        return "the model has no matrix"
    shown = [f"{skipped.name} ({skipped.reason})" for skipped in plan.skipped[:3]]
    more = len(plan.skipped) - len(shown)
    return ", ".join(shown) + (f", and {more} more" if more else "")
