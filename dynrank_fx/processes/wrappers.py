"""DistributedDataParallel around a net: which objects hold it, and how they go on when its parameters are others.

DDP says of itself that parameters are never to be changed once it is made: its reducer has hooks on those that were
there, and buckets that fit them. So a reducer is made anew, by the way that DDP goes when it is unpickled, in the same
object, over the parameters that are there now. Whatever else the object holds (hooks, ``no_sync``, the joining of
uneven inputs, the buffers' choices) stays as it is. Nothing is sent: parameters are equal already, and are compared by
whoever changed them.
"""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parallel.distributed import _setup_mixed_precision_params

from ..errors import TransitionError
from .shards import Shards, is_sharded
from .together import ALONE, Processes


def wrappers_of(net: nn.Module) -> list[DistributedDataParallel]:
    """The DDP objects that hold this net, whatever is given of them: the wrapper, or what is inside.

    From inside, Python's garbage collector tells which objects there are. A net that none holds acts alone.
    """
    if not (dist.is_available() and dist.is_initialized() and isinstance(net, nn.Module)):
        return []
    if any(is_sharded(module) for module in net.modules()):
        return []  # fully_shard averages their gradients itself
    given = [module for module in net.modules() if isinstance(module, DistributedDataParallel)]
    if given:
        return given
    alive = _alive(DistributedDataParallel)
    return [wrapper for wrapper in alive if any(module is net for module in wrapper.modules())]


def in_pipeline(net: object) -> bool:
    """Whether this is a pipeline of torch.distributed.pipelining, a stage of one, or a net that such a stage holds,
    whatever is given of it.
    """
    pipelining = sys.modules.get("torch.distributed.pipelining.stage")
    if pipelining is None or not dist.is_initialized():
        return False
    names = {kind.__name__ for kind in type(net).__mro__ if kind.__module__.startswith("torch.distributed.pipelining")}
    if names:
        return True
    ours = {id(module) for module in net.modules()} if isinstance(net, nn.Module) else set()
    return any(
        id(module) in ours for stage in _alive(pipelining._PipelineStageBase) for module in stage.submod.modules()
    )


def _alive(kind: type) -> list[Any]:  # Any: the collector knows no types
    """All objects of a class and of what is made of it."""
    kinds = _kinds(kind)
    return [each for each in gc.get_objects() if type(each) in kinds]


def _kinds(kind: type) -> set[type]:
    """A class and what is made of it. To ask each of a million objects by ``issubclass`` takes seconds, of an ABC."""
    return {kind}.union(*map(_kinds, kind.__subclasses__()))


def processes_training(net: nn.Module) -> Processes:
    """The processes that train this net together, as DistributedDataParallel or fully_shard has it; one alone where
    neither does. Raises TransitionError where they are several groups.
    """
    if not isinstance(net, nn.Module):
        return ALONE  # whoever is given it says what is wrong with it
    shards = Shards([net])
    return shards.processes if shards else processes_of(wrappers_of(net))


def processes_of(wrappers: Sequence[DistributedDataParallel]) -> Processes:
    """The processes that train what these wrap. Raises TransitionError where they are several groups."""
    groups = [wrapper.process_group for wrapper in wrappers]
    if any(group is not groups[0] for group in groups):
        raise TransitionError(
            "the net is in several DistributedDataParallel of different groups of processes: wrap it in one"
        )
    return Processes(groups[0]) if groups else ALONE


def check_wrapper(wrapper: DistributedDataParallel) -> None:
    """Raises TransitionError for a wrapper that cannot be made again, or not by all processes."""
    if wrapper._join_config.enable and not wrapper._join_config.throw_on_early_termination:
        raise TransitionError(
            "the net is within join(), which goes on without the processes that have no more batches, and these do not "
            "come to a switch: give all as many batches (DistributedSampler with drop_last=True) and leave join() out, "
            "or end all with the first by join(throw_on_early_termination=True)"
        )
    delayed = getattr(wrapper, "_delay_all_reduce_params", ())
    overlapped = [hook for hook, _ in _hooks_of(wrapper) if "hook_then_optimizer" in getattr(hook, "__qualname__", "")]
    inside = any(hasattr(p, "_in_backward_optimizers") for p in wrapper.module.parameters())
    if delayed or overlapped or inside:
        what = "delay_all_reduce_named_params" if delayed else "an optimizer that steps within backward"
        raise TransitionError(
            f"the DistributedDataParallel has {what}, which goes by parameters that a switch replaces: make it without"
        )


@contextmanager
def let_go(wrappers: Sequence[DistributedDataParallel]) -> Iterator[Callable[[], None]]:
    """Within it the wrappers hold no parameters, which then are freed as soon as others take their places.

    What it gives makes them again, over the parameters that are there when it is called; after an error that is done
    in any case.
    """
    builtin = [_builtin_hook(wrapper) for wrapper in wrappers]
    for wrapper in wrappers:
        _drop_reducer(wrapper)

    def again() -> None:
        for wrapper, hook in zip(wrappers, builtin, strict=True):
            _make_again(wrapper, hook)

    try:
        yield again
    except BaseException:
        again()
        raise


def _drop_reducer(wrapper: DistributedDataParallel) -> None:
    """Take the reducer's hooks off, and leave nobody who holds it, nor the parameters and buckets that it holds.

    torch.compile copies all attributes of the module that it is given to a function, the reducer among them.
    """
    reducer = weakref.ref(wrapper.reducer)
    wrapper._remove_autograd_hooks()
    wrapper.reducer = wrapper.logger = None  # type: ignore[assignment]
    for held in (wrapper._module_parameters, wrapper.modules_buffers, wrapper.named_module_buffers):
        held.clear()
    if reducer() is not None:
        for holder in gc.get_referrers(reducer()):
            if isinstance(holder, dict) and holder.get("reducer") is reducer():
                holder |= {"reducer": None, "logger": None}


def _make_again(wrapper: DistributedDataParallel, builtin: object) -> None:
    """The same object, with another reducer: what ``__setstate__`` does, and what that leaves out.

    builtin: the hook of DDP's own that it had, if any.
    """
    from torch._C._distributed_c10d import _register_comm_hook

    ignored, mixed = wrapper.parameters_to_ignore, wrapper.mixed_precision
    wrapper._module_parameters[:] = [p for name, p in wrapper.module.named_parameters() if name not in ignored]
    parameters, sparse = wrapper._build_params_for_reducer()
    if mixed is not None:
        _setup_mixed_precision_params(mixed, wrapper.module)
    names = wrapper._build_debug_param_to_name_mapping(parameters)
    wrapper._ddp_init_helper(parameters, sparse, names, wrapper.static_graph)
    wrapper._has_rebuilt_buckets = False
    reducer, logger = wrapper.reducer, wrapper.logger
    assert logger is not None
    if mixed is not None:
        reducer._set_mixed_precision_param_dtype(mixed.param_dtype)  # type: ignore[attr-defined]
    if wrapper.static_graph:
        wrapper._static_graph_delay_allreduce_enqueued = False
        reducer._set_static_graph()
        logger._set_static_graph()
    for hook, state in _hooks_of(wrapper):
        logger._set_comm_hook_name(hook.__qualname__)
        _register_comm_hook(reducer, state, hook)
    if builtin is not None:
        wrapper._register_builtin_comm_hook(builtin)
    if getattr(wrapper, "_accum_grad_hooks", None):
        _make_python_hooks_again(wrapper)


def ignored_by(wrappers: Iterable[DistributedDataParallel]) -> set[int]:
    """The ids of the parameters that wrappers were told to leave alone, which every process may have its own of."""
    return {
        id(p)
        for wrapper in wrappers
        for name, p in wrapper.module.named_parameters()
        if name in wrapper.parameters_to_ignore
    }


def _hooks_of(
    wrapper: DistributedDataParallel,
) -> list[tuple[Any, Any]]:  # Any: a function of the user's, and what it wants
    return list(getattr(wrapper, "_comm_hooks", ()))


def _builtin_hook(wrapper: DistributedDataParallel) -> object:
    """The hook that DDP has built in, which only its log tells; None without one."""
    from torch._C._distributed_c10d import BuiltinCommHookType

    name = wrapper._get_ddp_logging_data().get("comm_hook", "").rpartition(".")[2]
    return None if _hooks_of(wrapper) else getattr(BuiltinCommHookType, name, None)


def _make_python_hooks_again(wrapper: DistributedDataParallel) -> None:
    """The hooks of the reducer in Python, which compiled autograd sees."""
    for handle in wrapper._accum_grad_hooks:
        handle.remove()
    wrapper._accum_grad_hooks.clear()
    wrapper._register_accum_grad_hook()
