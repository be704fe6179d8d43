"""``transform``, the one-call form: capture, plan, factorize."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import nn

from ..errors import PlanError
from ..plan import Plan, PlanChoices, PlanOptions, chosen, fit_plan, locate, plan_by
from ..tracing import Capture, DynamicShapes, ExampleInputs, capture
from .factorize import factorize_
from .inline import holds_captured
from .switched import switched_modules


def transform(
    model: nn.Module | torch.export.ExportedProgram,
    example_inputs: ExampleInputs | None = None,
    options: PlanOptions | None = None,
    *,
    plan: Plan | None = None,
    how: Capture | None = None,
    dynamic_shapes: DynamicShapes | None = None,
    allow_empty: bool = False,
    copy: bool = True,
    **choices: Unpack[PlanChoices],
) -> nn.Module:
    """The model as a net with a switchable site, in phase FULL, wherever factoring pays; see ``plan_of(net)``.

    Args:
        model: An ``nn.Module``, a GraphModule (then example_inputs may be left out, and FLOPs are not counted), or an
            ExportedProgram.
        example_inputs: A tuple of positional arguments, a dict of keyword arguments, or the pair ``(args, kwargs)``.
        options: Every choice of planning in one value.
        plan: A given plan, in place of the choices of planning.
        how: The way to capture the model, see ``capture``.
        dynamic_shapes: As in ``torch.export``; by default every dimension is free that the model leaves free.
        allow_empty: Whether a plan without any site is taken.
        copy: Whether the net has weights of its own. If False it shares the model's parameters and buffers, as the
            same objects, and takes next to no memory (as PEFT's adapters do). Training the net in FULL then trains the
            model too. What enters LOW leaves the net for its factors: the model's own weight is from then on no longer
            trained, and the model no longer computes what the net does.
        **choices: Fields of ``PlanOptions``, a shorthand for options: ``transform(model, inputs, rank=Ratio(0.5))``.

    Returns:
        The net: in FULL it computes what the model computes, bit by bit.

    Raises:
        CaptureError: Where the model cannot be captured, or the example inputs do not fit it.
        PlanError: Where the plan or the options do not fit the model, where nothing would be factored, and for a net
            that was transformed before.
    """
    if isinstance(model, nn.Module) and holds_captured(model) and switched_modules(model):
        raise PlanError(
            f"{type(model).__name__} has been transformed already: change its ranks by replan_, or transform the "
            f"original model, or what truncate makes of it"
        )
    if plan is not None and (options is not None or choices):
        raise PlanError("a given plan says what is factored: leave out the options of planning beside it")
    settled = chosen(options, choices)
    net = capture(model, example_inputs, dynamic_shapes=dynamic_shapes, how=how, copy=copy)
    located = locate(net)
    if plan is None:
        plan = plan_by(net, settled, example_inputs, located)
    else:
        plan = fit_plan(net, plan, example_inputs, located)
    if not plan.sites and not allow_empty:
        raise PlanError(
            f"nothing would be factored: {_reasons(plan)}; choose other weights or another rank (`transform --dry-run` "
            "shows the plan, in Python allow_empty=True)"
        )
    factorize_(net, plan, located)
    return net


def _reasons(plan: Plan) -> str:
    if not plan.skipped:
        return "the model has no matrix"
    shown = [f"{skipped.name} ({skipped.reason})" for skipped in plan.skipped[:3]]
    more = len(plan.skipped) - len(shown)
    return ", ".join(shown) + (f", and {more} more" if more else "")
