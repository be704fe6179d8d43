"""The module that runs a captured model: its whole module tree, a graph per mode, and code per setting."""

from __future__ import annotations

import contextlib
import copy
import inspect
import operator
from collections.abc import Callable, Container, Hashable, Iterator, Mapping
from dataclasses import dataclass
from types import FunctionType
from typing import Any, Never, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.module import _IncompatibleKeys

from ..aliases import Args, Kwargs, Output, StateDict
from ..errors import CaptureError, DynrankError
from .pickling import GraphData, graph_from_data, graph_to_data
from .state import load_state_

Forward: TypeAlias = Callable[..., Output]

Meta: TypeAlias = dict[str, Any]
"""As torch types ``GraphModule.meta``: each entry is known to whoever wrote it."""


class Net(fx.GraphModule):
    """A GraphModule over the whole module tree of the model, with one graph for training and one for evaluation.

    A plain GraphModule keeps only what its graph names and loses aliases, unused parameters and the order of names;
    here ``state_dict()`` has the keys of the original. The two graphs are the same object where the mode changes
    nothing.

    Each setting (mode, phases, ranks) runs a code object of its own: Dynamo counts its recompilations per code
    object, so that no number of settings reaches its limit, and a setting seen before finds its compiled graph again.

    fixed_mode: the graph was exported in one mode by the caller and cannot be switched; ``train`` and ``eval`` then
    raise.
    """

    graphs: dict[bool, fx.Graph]

    def __init__(
        self,
        root: nn.Module,
        train_graph: fx.Graph,
        eval_graph: fx.Graph | None = None,
        *,
        fixed_mode: bool = False,
    ) -> None:
        super().__init__(root, train_graph, class_name=type(root).__name__)
        self._adopt(root)
        self.graphs = {True: train_graph, False: eval_graph or train_graph}
        self.fixed_mode = fixed_mode
        self.setting: Hashable = ()
        self._codes: dict[Hashable, Forward] = {}
        self.refresh()

    def _adopt(self, root: nn.Module) -> None:
        constants = {name: t for name, t in (vars(self) | vars(root)).items() if isinstance(t, Tensor)}
        buffers = dict(self._buffers)
        self._parameters, self._modules, self._buffers = root._parameters, root._modules, root._buffers
        self._non_persistent_buffers_set = root._non_persistent_buffers_set
        self.training = root.training
        # Constants of the graph are no part of the model's state.
        for name, tensor in (constants | buffers).items():
            if name not in self._buffers and tensor is not None:
                vars(self).pop(name, None)
                self.register_buffer(name, tensor, persistent=False)

    def refresh(self) -> None:
        """Forget all generated code: after the graphs were rewritten."""
        for graph in self.graphs.values():
            graph.owning_module = self
            graph.lint()
        self._codes.clear()
        self.specialize(self.setting)

    def specialize(self, setting: Hashable) -> None:
        """Run the code object of this setting in the present mode, generating it the first time."""
        self.setting = setting
        key = (self.training, setting)
        if key not in self._codes:
            self._graph = self.graphs[self.training]
            self.recompile()
            self._codes[key] = self._generated.forward
        self._generated.forward = self._codes[key]
        self._graph = self.graphs[self.training]
        codegen = self._graph._codegen
        if isinstance(codegen, fx.graph._PyTreeCodeGen):  # the code reads these; the other graph's may differ
            self._in_spec, self._out_spec = codegen.pytree_info.in_spec, codegen.pytree_info.out_spec

    @property
    def _generated(self) -> type[Net]:
        """The class of this object alone, which fx makes to hold its code; fully_shard puts another before it."""
        kinds = type(self).__mro__
        return kinds[kinds.index(Net) - 1]

    def recompile(self) -> fx.graph.PythonCode:
        """As in fx, whose code goes to the generated class and not to what stands before it: called there it would call
        itself without end.
        """
        kind = type(self)
        self.__class__ = self._generated
        try:
            return super().recompile()
        finally:
            self.__class__ = kind

    def train(self, mode: bool = True) -> Net:
        """As in torch, and the graph of that mode runs. Raises CaptureError for a graph exported in one mode."""
        if self.fixed_mode and mode != self.training:
            raise CaptureError(
                f"this graph was exported in {'training' if self.training else 'evaluation'} mode and cannot leave it: "
                "give the nn.Module itself, which is captured in both modes"
            )
        super().train(mode)
        self.specialize(self.setting)
        return self

    # Dynamo counts by code objects: it is to begin at that of the setting.
    @torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator]
    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # Any: as nn.Module's own
        try:
            return super().__call__(*args, **kwargs)
        except TypeError as error:
            sentence = self._why_not_called(args, kwargs)
            if sentence is None:  # it came from within
                raise
            raise TypeError(sentence) from error

    def __getattr__(self, name: str) -> Any:  # Any: as nn.Module's own
        return _attribute(self, name, vars(self).get("meta", {}).get("own", ()))

    def __getitem__(self, key: object) -> Never:
        raise _no_container(self, vars(self).get("meta", {}).get("own", ()))

    def load_state_dict(
        self, state_dict: Mapping[str, object], strict: bool = True, assign: bool = False
    ) -> _IncompatibleKeys:
        """As in torch, whose own takes a time that grows with the square of the number of layers."""
        return load_state_(self, state_dict, strict, assign)

    def _load_from_state_dict(self, state_dict: StateDict, prefix: str, *args: Any) -> None:  # Any: torch's own
        # A site that replaced a bare parameter keeps that parameter's name.
        for name, module in self.named_modules(remove_duplicate=False):
            if getattr(module, "bare", False) and prefix + name in state_dict:
                state_dict[f"{prefix}{name}.weight"] = state_dict.pop(prefix + name)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __deepcopy__(self, memo: dict[int, object]) -> Net:
        root = copy_tree(self, memo)
        train = copy_graph(self.graphs[True])
        same = self.graphs[False] is self.graphs[True]
        other = None if same else copy_graph(self.graphs[False])
        twin = Net(root, train, other, fixed_mode=self.fixed_mode)
        memo[id(self)] = twin
        twin.__class__.__name__ = type(self).__name__
        twin.meta = copy.deepcopy(self.meta, memo)
        vars(twin).update(copy.deepcopy(self._hooks(), memo))
        twin.specialize(self.setting)
        return twin

    def __reduce__(self) -> tuple[object, ...]:
        """For pickle: the module tree, the graphs, and then what may hold the net itself."""
        root, data = nn.Module(), {id(graph): graph_to_data(graph) for graph in self.graphs.values()}
        for name in _TREE:
            vars(root)[name] = vars(self)[name]
        graphs = tuple(data[id(self.graphs[mode])] for mode in (True, False))
        values = (root, graphs, self.fixed_mode, self.setting, type(self).__name__)
        return _unpickled, values, {"meta": self.meta, **self._hooks()}

    def _why_not_called(self, args: Args, kwargs: Kwargs) -> str | None:
        """What is wrong with these arguments; None where the graph takes them."""
        code, defaults = type(self).forward.__code__, type(self).forward.__defaults__
        signature = inspect.signature(FunctionType(code, {}, None, defaults))  # the Trainer is shown another one
        try:
            signature.bind(self, *args, **kwargs)
        except TypeError as error:
            names = list(signature.parameters)[1:]
            unknown = [f"`{name}`" for name in kwargs if name not in names]
            wrong = f"has no argument {', '.join(unknown)}" if unknown else f"cannot be called so ({error})"
            return (
                f"the graph of {type(self).__name__} {wrong}; its arguments are {', '.join(names) or 'none'}: to give "
                "others, transform with those in example_inputs, or with form=dr.Form.LAYERS"
            )
        return None

    def _hooks(self) -> StateDict:
        """The hooks that were registered, as in every module of torch."""
        return {name: value for name, value in vars(self).items() if name in _HOOKS and value}

    def _replicate_for_data_parallel(self) -> Never:
        raise CaptureError(
            "DataParallel copies a module for every batch, which a captured net does not allow: use "
            "DistributedDataParallel, or one device"
        )

    def __copy__(self) -> Net:
        raise CaptureError("a shallow copy would share its switches with the original; use copy.deepcopy")


def names_the_form_(plain: fx.GraphModule, net: Net) -> None:
    """Have a graph that was made of the net say, as the net does, where the methods of the model's class are kept.

    That goes into the class that torch has made for this one graph: what is copied or saved is torch's own again.
    """
    own = net.meta.get("own", frozenset())

    def missing(self: fx.GraphModule, name: str) -> Any:  # Any: as nn.Module's own
        return _attribute(self, name, own)

    def no_item(self: fx.GraphModule, key: object) -> Never:
        raise _no_container(self, own)

    type(plain).__getattr__ = missing  # type: ignore[method-assign, assignment]
    if "__getitem__" in own:
        type(plain).__getitem__ = no_item  # type: ignore[index]  # no __len__: the truth of a module asks for it


def _attribute(graph: fx.GraphModule, name: str, own: Container[str]) -> Any:  # Any: as nn.Module's own
    """nn.Module's attribute. Raises AttributeError, with the form that has it for a name of the model's class."""
    try:
        return nn.Module.__getattr__(graph, name)
    except AttributeError:
        if name not in own:
            raise
        raise AttributeError(_has_not(graph, repr(name))) from None


def _no_container(graph: fx.GraphModule, own: Container[str]) -> TypeError:
    """What ``graph[0]`` and a loop over it raise."""
    if "__getitem__" in own:  # loops ask for it too
        return TypeError(_has_not(graph, "layers to be counted off"))
    return TypeError(f"{type(graph).__name__!r} object is not subscriptable")


def _has_not(graph: fx.GraphModule, what: str) -> str:
    return (
        f"a graph of {type(graph).__name__} has no {what}: transform(..., form=dr.Form.LAYERS) makes a net that keeps "
        "the model's own methods and attributes, and so does what is cut from it"
    )


_TREE = ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules", "training")
_HOOKS = frozenset(name for name in vars(nn.Module()) if "_hooks" in name)


def _unpickled(
    root: nn.Module, graphs: tuple[GraphData, GraphData], fixed_mode: bool, setting: Hashable, name: str
) -> Net:
    train = graph_from_data(graphs[0])
    other = None if graphs[1] is graphs[0] else graph_from_data(graphs[1])
    net = Net(root, train, other, fixed_mode=fixed_mode)
    type(net).__name__ = name
    net.specialize(setting)
    return net


def finished(
    root: nn.Module, train: fx.Graph, other: fx.Graph | None, model: nn.Module, *, fixed_mode: bool = False
) -> Net:
    """The Net over ``root`` with these graphs, in the modes of ``model``. other: for evaluation, if it differs."""
    for graph in (train, other or train):
        graph._tracer_cls = fx.Tracer  # it is called when a saved module is loaded: not by our class, or export's own
    net = Net(root, train, other, fixed_mode=fixed_mode)
    type(net).__name__ = type(model).__name__
    net.meta["own"] = (frozenset(dir(type(model))) | vars(model).keys()) - frozenset(dir(fx.GraphModule))
    if not fixed_mode:
        modes = {name: module.training for name, module in model.named_modules()}  # a part shares its submodules
        net.train(model.training)
        for name, training in modes.items():
            net.get_submodule(name).training = training
    return net


def copy_tree(module: nn.Module, memo: dict[int, object] | None = None) -> nn.Module:
    """A bare module with a copy of the parameters, buffers and submodules, ties kept."""
    root, memo = nn.Module(), {} if memo is None else memo
    for name in _TREE:
        vars(root)[name] = copy.deepcopy(vars(module)[name], memo)
    return root


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A copy of the nodes. The calling convention is shared: nobody changes it, and copying a TreeSpec warns."""
    twin = fx.Graph(tracer_cls=graph._tracer_cls)
    value = twin.graph_copy(graph, val_map={})
    twin.output(value, type_expr=graph.output_node().type).meta = copy.copy(graph.output_node().meta)
    twin._codegen = graph._codegen
    return twin


def set_submodule(net: nn.Module, path: str, module: nn.Module) -> None:
    """The module under the path. Unlike torch's own it takes names that are no identifiers."""
    parent, _, name = path.rpartition(".")
    net.get_submodule(parent)._modules[name] = module


def drop_dead_reads(graph: fx.Graph, views: set[fx.Node]) -> None:
    """Reads of weights, and of parts of them, that no node uses any more. Not eliminate_dead_code: it would drop
    in-place updates.
    """
    for node in reversed(list(graph.nodes)):
        if (node.op == "get_attr" or node in views) and not node.users:
            graph.erase_node(node)


@contextlib.contextmanager
def same_modes(model: nn.Module) -> Iterator[None]:
    """Afterwards every module is in the mode it had, and every Net runs the code of its own."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        for module in modes:
            if isinstance(module, Net):
                module.specialize(module.setting)


def set_mode(model: nn.Module, mode: bool) -> None:
    """The model in this mode; where it is in it already, with the parts that were set apart, such as a batch norm. A
    graph exported in one mode stays in it.
    """
    if getattr(unwrap(model), "fixed_mode", False):
        return
    apart = [module for module in model.modules() if module.training != mode] if mode == model.training else []
    model.train(mode)
    for module in apart:
        module.training = not mode
        if isinstance(module, Net):
            module.specialize(module.setting)


@contextlib.contextmanager
def evaluating(net: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards every module is in the mode it had. A graph exported in one mode stays in it."""
    with same_modes(net):
        if not getattr(unwrap(net), "fixed_mode", False):
            net.eval()
        yield


def unwrap(net: nn.Module) -> nn.Module:
    """The module behind the wrappers of torch.compile and DistributedDataParallel, or the module itself. Raises
    DynrankError for what is no module.
    """
    if not isinstance(net, nn.Module):
        raise DynrankError(f"{net!r} is no module: give an nn.Module, such as the net that transform made")
    while isinstance(net, torch._dynamo.OptimizedModule | nn.parallel.DistributedDataParallel):
        net = net._orig_mod if isinstance(net, torch._dynamo.OptimizedModule) else net.module
    return net


_META = "dynrank_meta"  # the attribute that stands in for GraphModule.meta where the model keeps its own class


@dataclass(frozen=True)
class Region:
    """A captured part of the model: a Net, and where it stands ("" or a path that ends in a dot)."""

    net: Net
    prefix: str

    def full(self, name: object) -> str:
        """The name in the whole model of what the region's graphs call ``name``."""
        return f"{self.prefix}{name}"


def regions(root: nn.Module) -> list[Region]:
    """Every captured part of the model; the model itself where it was captured whole."""
    return [
        Region(module, f"{name}." if name else "") for name, module in root.named_modules() if isinstance(module, Net)
    ]


def is_captured(module: nn.Module) -> bool:
    """Whether the module was made by ``capture``: a Net, or a copy of a model whose parts were captured."""
    return isinstance(module, Net) or _META in vars(module)


def meta_of(root: nn.Module) -> Meta:
    """What is known of a captured model (its plan, how it was captured); it survives ``deepcopy``."""
    meta: Meta = root.meta if isinstance(root, Net) else vars(root).get(_META, {})
    return meta


def note(root: nn.Module, **facts: object) -> None:
    """Add to what is known of a model, which makes it a captured one."""
    meta: Meta = root.meta if isinstance(root, Net) else vars(root).setdefault(_META, {})
    meta.update(facts)


def forget_meta(root: nn.Module) -> None:
    """Leave nothing of this package in a model whose parts were captured."""
    vars(root).pop(_META, None)


def untraced(root: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The modules outside of every Net, whose own code runs, with their paths."""
    if isinstance(root, Net):
        return
    yield path, root
    for name, child in root.named_children():
        yield from untraced(child, f"{path}.{name}".lstrip("."))


def attribute(net: nn.Module, path: str) -> object:
    """What ``path`` names in the module tree."""
    return operator.attrgetter(path)(net)
