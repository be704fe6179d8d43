"""``transform``, the one-call form: capture, plan, factorize."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import Unpack

import torch
from torch import Tensor, nn

from ..aliases import Output
from ..checks import check_flags, names_of
from ..errors import CaptureError, DynrankWarning, PlanError
from ..plan import Located, Plan, PlanChoices, PlanOptions, StepTimes, chosen, fit_plan, locate, plan_by, with_whole
from ..tracing import Capture, DynamicShapes, ExampleInputs, Form, capture, tensors_in
from .factorize import factorize_
from .inline import holds_captured
from .meta import in_low, set_plan
from .switched import switched_modules


def transform(
    model: nn.Module | torch.export.ExportedProgram,
    example_inputs: ExampleInputs | None = None,
    options: PlanOptions | None = None,
    *,
    plan: Plan | None = None,
    form: Form = Form.GRAPH,
    how: Capture | None = None,
    dynamic_shapes: DynamicShapes | None = None,
    times: StepTimes | None = None,
    allow_empty: bool = False,
    copy: bool = True,
    **choices: Unpack[PlanChoices],
) -> nn.Module:
    """The model as a net with a switchable site, in phase FULL, wherever factoring pays; see ``plan_of(net)``.

    The forward of a copy of the model is called a few times with the example inputs, in training and in evaluation
    mode, and gone back through. The model, its buffers, its inputs and the random generators stay as they are.

    Args:
        model: An ``nn.Module``, a GraphModule (then example_inputs may be left out, and FLOPs are not counted), or an
            ExportedProgram.
        example_inputs: A tuple of positional arguments, a dict of keyword arguments, or the pair ``(args, kwargs)``.
        options: Every choice of planning in one value.
        plan: A given plan, in place of the choices of planning.
        form: What the net is: a graph, which reaches every weight, or a copy of the model with its own class, methods
            and code (``generate``, ``save_pretrained``), in which single layers are replaced.
        how: The way to capture the model, see ``capture``; where the net is of layers, the graph that tells the roles
            of its weights, and those that a graph alone reaches.
        dynamic_shapes: As in ``torch.export``; by default every dimension is free that the model leaves free.
        times: Measures training steps of single sites. A site that is not faster factored then gets a rank near its own
            with which it is, or stays dense; with ``allow_unprofitable`` and for a given plan it says nothing. Then the
            whole model is timed, dense and with every site factored, of which copies are made for that time. None to
            measure nothing.
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
    if not isinstance(form, Form):
        raise PlanError(f"{form!r} is no form: give one of {names_of(Form)}")
    check_flags(PlanError, allow_empty=allow_empty)
    if times is not None and not isinstance(times, StepTimes):
        raise PlanError(f"times is {times!r}: give StepTimes(), or None to measure nothing")
    layers = form is Form.LAYERS or how is Capture.LAYERS
    way = Capture.LAYERS if layers else how
    net = capture(model, example_inputs, dynamic_shapes=dynamic_shapes, how=way, copy=copy)
    located = locate(net)
    timed = plan is None and not settled.allow_unprofitable
    if plan is None:
        unreached = any(not matrix.uses for matrix in located.values())
        graph = None
        if layers and (settled.leave or settled.share_inputs or unreached):
            graph = _graph_of(model, example_inputs, dynamic_shapes, how, settled)
        plan = plan_by(net, settled, example_inputs, located, graph, times)
    else:
        plan = fit_plan(net, plan, example_inputs, located)
    if not plan.sites and not allow_empty:
        raise PlanError(
            f"nothing would be factored: {_reasons(plan)}; choose other weights or another rank (`transform --dry-run` "
            "shows the plan, in Python allow_empty=True)"
        )
    factorize_(net, plan, located)
    if times is not None and timed and example_inputs is not None:
        whole = times.whole(net, in_low(net), example_inputs)
        times.save()
        set_plan(net, plan if whole is None else with_whole(plan, whole))
    return net


def _graph_of(
    model: nn.Module | torch.export.ExportedProgram,
    example_inputs: ExampleInputs | None,
    dynamic_shapes: DynamicShapes | None,
    how: Capture | None,
    options: PlanOptions,
) -> Mapping[str, Located] | None:
    """The matrices of the model as a graph of it has them; None where there is no such graph."""
    if not isinstance(model, nn.Module):
        return locate(capture(model, example_inputs, copy=False))
    way = Capture.EXPORT if how in (None, Capture.LAYERS) else how
    try:
        graph = capture(_tensors_only(model), example_inputs, dynamic_shapes=dynamic_shapes, how=way, copy=False)
    except CaptureError as error:
        unknown = {
            "the roles of the weights are not known, and none is left dense by its role (name those by exclude)": (
                options.leave
            ),
            "which weights read one input is not known, and none share a factor": options.share_inputs,
        }
        for sentence in (each for each, asked in unknown.items() if asked):
            warnings.warn(f"{sentence}: {error}", DynrankWarning, stacklevel=3)
        return None
    return {name.removeprefix("model."): matrix for name, matrix in locate(graph).items()}


def _tensors_only(model: nn.Module) -> nn.Module:
    """A model that gives the tensors of what it gives: torch.export takes no cache of keys and values for an output. It
    is called as the model is, and has the arguments of its forward, which torch.export goes by.
    """

    def forward(self: nn.Module, *args: Output, **kwargs: Output) -> list[Tensor]:
        return list(tensors_in(self.get_submodule("model")(*args, **kwargs)))

    first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    parameters = inspect.signature(model.forward).parameters.values()
    plain = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in parameters]
    forward.__signature__ = inspect.Signature([first, *plain])  # type: ignore[attr-defined]
    kind: type[nn.Module] = type(type(model).__name__, (nn.Module,), {"forward": forward})
    wrapper = kind()
    wrapper.add_module("model", model)
    wrapper.training = model.training
    return wrapper


def _reasons(plan: Plan) -> str:
    if not plan.skipped:
        return "the model has no matrix"
    shown = [f"{skipped.name} ({skipped.reason})" for skipped in plan.skipped[:3]]
    more = len(plan.skipped) - len(shown)
    return ", ".join(shown) + (f", and {more} more" if more else "")
