"""From what the user has (a module, a GraphModule, an ExportedProgram) to a trainable net."""

from __future__ import annotations

import contextlib
import copy as copying
import enum
import inspect

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.lazy import LazyModuleMixin

from ..checks import check_flags
from ..errors import CaptureError, first_line
from ..ops import module_op
from ..text import counted
from .blame import describe
from .equivalence import ROUNDING, Original, difference
from .export import export_both_modes, fixed_sizes, mode_of, settle_inputs, shortcoming
from .inputs import DynamicShapes, ExampleInputs, check_shapes, split_inputs
from .isolation import refuse_inference
from .modules import capture_layers, capture_parts, modules_read
from .net import Net, copy_graph, copy_tree, finished, is_captured, meta_of, note, untraced, unwrap
from .shell import own_, same_parameters, sharing, shell
from .symbolic import closed_functions, closed_layers, trace_symbolically

_RESERVED = frozenset(dir(Net)) | {"meta", "graphs", "fixed_mode", "setting", "_codes", "_graph"}


class Capture(enum.Enum):
    """How a model becomes a graph.

    Attributes:
        SYMBOLIC: By ``torch.fx.symbolic_trace``: the model's own code is run on stand-ins for its inputs.
        EXPORT: By ``torch.export``, once for training and once for evaluation.
        MODULES: Module by module: code that cannot be traced stays as it is, and the parts in it are captured.
        LAYERS: Layer by layer: a copy of the model, all of its own code, in which single layers are replaced; what
            ``Form.LAYERS`` asks for.
    """

    SYMBOLIC = "torch.fx.symbolic_trace"
    EXPORT = "torch.export"
    MODULES = "module by module"
    LAYERS = "layer by layer"


class Form(enum.Enum):
    """What ``transform`` makes of a model.

    Attributes:
        GRAPH: A graph module, whose sites are all products with a weight, wherever they stand in the code.
        LAYERS: A copy of the model, of its own class, with its methods and its code; the sites are its layers.
    """

    GRAPH = "graph"
    LAYERS = "layers"


_WRAPPERS = (nn.parallel.DistributedDataParallel, nn.DataParallel)


def capture(
    model: nn.Module | torch.export.ExportedProgram,
    example_inputs: ExampleInputs | None = None,
    *,
    dynamic_shapes: DynamicShapes | None = None,
    how: Capture | None = None,
    copy: bool = True,
) -> nn.Module:
    """A trainable net that computes what ``model`` computes.

    A Net where the model was captured whole; where only parts of it could be, the model's own module tree whose parts
    are Nets. The plan says which and why. The model, its arguments and the random generators stay as they are: it is
    run once in evaluation and once in training mode, as a shell that shares its weights.

    Args:
        model: An ``nn.Module``, a GraphModule or an ExportedProgram. What is a graph already stays the graph that it
            is, whatever ``how`` says.
        example_inputs: A tuple of positional arguments, a dict of keyword arguments, or ``(args, kwargs)``. Needed for
            torch.export, and to check the graph against the model; a GraphModule needs none.
        dynamic_shapes: As in torch.export; by default every dimension is free that the model leaves free.
        how: By default symbolic tracing where it works, opens every layer with weights, and reproduces the model on
            the example; torch.export otherwise; and module by module where that fails too.
        copy: Whether the net has weights of its own. If False it shares the model's parameters and buffers, as the
            same objects, and takes next to no memory. Training the net then trains the model too, as long as a weight
            is dense: what enters LOW leaves the net for its factors, and the model's own weight is no longer trained.

    Returns:
        The net.

    Raises:
        CaptureError: Naming the module and the line that cannot be traced, or what the example inputs do not fit.
    """
    if isinstance(model, torch.export.ExportedProgram):
        model = model.module(check_guards=False)
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise CaptureError(
            f"a {type(model).__name__} is no model that can be traced: give an nn.Module, a GraphModule or an "
            f"ExportedProgram"
        )
    if how is not None and not isinstance(how, Capture):
        ways = ", ".join(f"Capture.{way.name}" for way in Capture)
        raise CaptureError(f"{how!r} is no way to capture a model: give one of {ways}")
    check_flags(CaptureError, copy=copy)
    check_shapes(dynamic_shapes)
    refuse_inference(CaptureError, "capture the model")
    wrapped = next((part for part in model.modules() if isinstance(part, _WRAPPERS)), None)
    if wrapped is not None:
        raise CaptureError(
            f"the model is in a {type(wrapped).__name__}: transform it first, and wrap what transform made"
        )
    model = unwrap(model)
    if is_captured(model):
        net = shell(model)
    elif isinstance(model, fx.GraphModule):
        adopted = _adopted(model)
        _check_inputs(adopted, Original(adopted, example_inputs))
        net = _noted(adopted, f"as the given graph{fixed_sizes(adopted)}")
    else:
        _refuse(model)
        original = Original(model, example_inputs)
        net = _captured(model, original, dynamic_shapes, how)
        if original.untrained:
            why = f"Training was not compared, since the model does not train on the example: {original.untrained}"
            _noted(net, f"{meta_of(net)['capture']} {why.removesuffix('.')}.")
        with contextlib.suppress(ValueError):  # a forward that Python cannot look into
            note(net, arguments=tuple(inspect.signature(model.forward).parameters))
    return own_(net, model) if copy else sharing(net, model)


def _captured(
    model: nn.Module, original: Original, dynamic_shapes: DynamicShapes | None, how: Capture | None
) -> nn.Module:
    """The net over a shell of the model: what is compared on is gone before it gets values of its own."""
    _check_inputs(model, original)
    if how is None:
        return _best(model, original, dynamic_shapes)
    lost = original.lost if how not in (Capture.MODULES, Capture.LAYERS) else ""
    if lost:
        raise CaptureError(f"{type(model).__name__} cannot be captured whole: {lost}.")
    if how is Capture.SYMBOLIC:
        traced = trace_symbolically(shell(model), model, original.example_inputs)
        net: nn.Module = _noted(traced, "by symbolic tracing, as asked")
    elif how is Capture.EXPORT:
        exported, words = _exported(model, original, dynamic_shapes)
        net = _noted(exported, f"by torch.export, as asked{words}")
    elif how is Capture.MODULES:
        net = _parts(model, original, "as asked")
    else:
        net = _layers(model, original)
    note(net, how=how.name)
    return net


def _best(model: nn.Module, original: Original, dynamic_shapes: DynamicShapes | None) -> nn.Module:
    """Symbolic tracing if it is faithful and opens everything, else torch.export, else what can be had in parts."""
    example_inputs = original.example_inputs
    if original.lost:
        return _parts(model, original, f"{type(model).__name__} cannot be captured whole: {original.lost}.")
    net: Net | None = None
    closed: list[str] = []
    try:
        net = trace_symbolically(shell(model), model, example_inputs)
        why = difference(net, original).words
        faithful = not why
        closed = closed_layers(net) if faithful and example_inputs is not None else []
        stays = [*closed, *closed_functions(net)] if faithful and example_inputs is not None else []
        if stays:
            why = f"{stays[0]} stays closed to symbolic tracing."
    except CaptureError as error:
        why, faithful = str(error), False
        if example_inputs is None:
            raise
    if net is not None and not why:
        return _noted(net, "by symbolic tracing")
    assert example_inputs is not None  # without them the trace has been returned, or its error raised
    try:
        exported, words = _exported(model, original, dynamic_shapes)
    except CaptureError as error:
        reasons = f"{error} Symbolic tracing before it: {why}"
    else:
        short = shortcoming(exported, example_inputs) if dynamic_shapes is None else ""
        freer = _freer(model, original, f"torch.export alone {short}.") if short else None
        return freer or _noted(exported, f"by torch.export{words}: {f'It {short}. ' if short else ''}{why}")
    if net is not None and faithful:  # sound, with closed layers: those that can be are opened by themselves
        opened = capture_parts(net, example_inputs, only=closed)
        parts = f"{len(opened)} of {len(closed)} closed layers by torch.export"
        return _noted(net, f"by symbolic tracing, {parts}: {reasons}")
    try:
        return _parts(model, original, reasons)
    except CaptureError as error:
        raise CaptureError(f"{reasons} Module by module after it: {error}") from error


def _freer(model: nn.Module, original: Original, why: str) -> nn.Module | None:
    """The model captured module by module, where no part has the shortcomings of the exported whole."""
    try:
        net = _parts(model, original, why)
    except CaptureError:  # the exported whole is sound, and stays
        return None
    assert original.example_inputs is not None
    nets = [module for module in net.modules() if isinstance(module, Net)]
    return None if any(shortcoming(part, original.example_inputs) for part in nets) else net


def _exported(model: nn.Module, original: Original, dynamic_shapes: DynamicShapes | None) -> tuple[Net, str]:
    """The net; and in words how it differs by rounding, if it does, and the sizes that it serves no other than.

    Raises CaptureError where the graph would differ by more, or train with other gradients.
    """
    net = export_both_modes(shell(model), model, original.example_inputs, dynamic_shapes)
    deviation = difference(net, original)
    if deviation.size > ROUNDING:
        raise CaptureError(f"{type(model).__name__} as torch.export has it is not the same: {deviation.words}")
    rounding = f" (off by rounding: {deviation.size:.0e} of the largest output)" if deviation.size else ""
    return net, rounding + fixed_sizes(net)


def _parts(model: nn.Module, original: Original, why: str) -> nn.Module:
    """A shell of the model with its parts captured one by one, its own code running around them."""
    twin, example_inputs = shell(model), original.example_inputs
    if example_inputs is None:
        raise CaptureError(f"the parts of {type(model).__name__} need example inputs to be traced; pass example_inputs")
    parts = capture_parts(twin, example_inputs)
    layers = [module for _, module in untraced(twin) if module_op(module) is not None]
    if not parts and not layers:
        raise CaptureError(f"no part of {type(model).__name__} with a matrix in it can be traced by itself.")
    deviation = difference(twin, original)
    if deviation.size > ROUNDING:
        raise CaptureError(f"with its parts captured, {type(model).__name__} is not the same: {deviation.words}")
    read, asked = modules_read(twin, example_inputs)
    note(twin, read=read, asked=asked)
    return _noted(
        twin, f"module by module ({counted(len(parts), 'part')} and {counted(len(layers), 'single layer')}): {why}"
    )


def _layers(model: nn.Module, original: Original) -> nn.Module:
    """A shell of the model, in which only layers of its own making are captured; torch's own are layers already."""
    twin, example_inputs = shell(model), original.example_inputs
    if example_inputs is None:
        raise CaptureError(f"the layers of {type(model).__name__} need example inputs to be looked at; pass them")
    own = capture_layers(twin, example_inputs)
    if own and difference(twin, original).size:
        twin, own = shell(model), []  # its code wants more of them than their forward
    layers = [module for _, module in untraced(twin) if module_op(module) is not None]
    if not own and not layers:
        raise CaptureError(
            f"{type(model).__name__} has no layer that holds a weight by itself: leave form=Form.LAYERS out"
        )
    read, asked = modules_read(twin, example_inputs)
    note(twin, read=read, asked=asked)
    words = f", {len(own)} of them of the model's own making" if own else ""
    return _noted(
        twin, f"layer by layer: {counted(len(own) + len(layers), 'layer')}{words}, in a copy of the model itself"
    )


def _noted(net: nn.Module, words: str) -> nn.Module:
    """The net, with how it was captured in its meta."""
    note(net, capture=words)
    return net


def _adopted(model: fx.GraphModule) -> Net:
    """The caller's own graph as a Net. One that torch.export made in one mode stays in it."""
    root = copy_tree(model, same_parameters(model))
    for node in model.graph.nodes:
        if node.op == "get_attr" and node.target in vars(model):
            vars(root)[node.target] = copying.deepcopy(vars(model)[node.target])
    graph = copy_graph(model.graph)
    mode = None
    if "train" in vars(model):  # torch.export puts functions that raise in place of train() and eval()
        settle_inputs(graph)
        mode = mode_of(graph)
    if mode is not None:
        root.train(mode)
    return finished(root, graph, None, model, fixed_mode=mode is not None)


def _check_inputs(model: nn.Module, original: Original) -> None:
    """What does not fit should be said in the model's own terms, before anything is traced."""
    if original.example_inputs is None:
        return
    try:
        _ = original.evaluated
    except Exception as error:  # whatever the model's own forward raises
        given = describe(*split_inputs(original.example_inputs))
        raise CaptureError(
            f"{type(model).__name__} does not accept the example inputs ({given}): {first_line(error)}."
        ) from error


def _refuse(model: nn.Module) -> None:
    """What is wrong with a model whatever way it is traced."""
    tensors = [name for name, value in vars(model).items() if isinstance(value, Tensor)]
    for name in (*model._modules, *model._parameters, *model._buffers, *tensors):
        if name in _RESERVED:
            raise CaptureError(
                f"the model calls a part of it {name!r}, which a graph module needs for itself: rename it"
            )
    for name, module in model.named_modules():
        if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():  # type: ignore[misc]
            raise CaptureError(
                f"{name or 'the model'} ({type(module).__name__}) has no weights yet: call the model once, on the "
                f"example inputs, before it is transformed"
            )
