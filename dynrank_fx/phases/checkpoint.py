"""A net on disk: its plan, weights and readable graph as a folder, and its state as part of a training checkpoint."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, fx, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from .. import files, store
from ..aliases import JsonObject
from ..checks import checked_path
from ..errors import DynrankWarning, PlanError, StoreError
from ..phase import Phase
from ..plan import Plan, fit_plan
from ..processes import Processes, is_sharded, processes_training, whole
from ..rewrite import factorize_, in_format_of, inline_, plan_of, specialize_, switched_modules
from ..tracing import Capture, ExampleInputs, capture, is_captured, load_as_its_class_, meta_of, shell, unwrap
from .finite import not_finite, warn_of
from .groups import in_slots, optimizers_in
from .replace import parameters_of, replace_parameters

_PLAN, _WEIGHTS, _GRAPH = "plan.json", "weights.safetensors", "graph.txt"
_FILES = frozenset({_PLAN, _WEIGHTS, _GRAPH})


def save(net: nn.Module, folder: str | Path) -> None:
    """Write the net as a folder, which appears whole or not at all.

    It holds ``plan.json``, which may be edited, ``weights.safetensors``, and ``graph.txt``, to be read by people.

    Of a net that ``fully_shard`` has sharded all processes call this: weights are gathered one after the other, and the
    first process writes them.

    Args:
        net: What ``transform`` made, in any phase.
        folder: Where to write; a folder that ``save`` wrote before is replaced.

    Raises:
        PlanError: For a module without a plan.
        StoreError: Where the disk refuses, or the folder holds other files.

    Warns:
        DynrankWarning: Where weights, or the statistics of batch norms, are not finite.
    """
    root, folder = _root(net), checked_path(folder)
    warn_of(not_finite(root, ()))
    if not any(is_sharded(module) for module in root.modules()):
        _write(root, folder, state_of(root))
        return
    processes = processes_training(root)
    state = _gathered(root, processes)
    processes.from_one(0, lambda: _write(root, folder, state), StoreError, "saving")


def _write(root: nn.Module, folder: Path, state: Mapping[str, Tensor]) -> None:
    check_place(folder)
    with files.replacing_folder(folder, _FILES) as new:
        files.write_text(new / _PLAN, plan_of(root).to_json(), final=folder / _PLAN)
        store.write(new / _WEIGHTS, state, info_of(root), final=folder / _WEIGHTS)
        files.write_text(new / _GRAPH, graph_text(root), final=folder / _GRAPH)


def _gathered(root: nn.Module, processes: Processes) -> dict[str, Tensor]:
    """The state of a net in parts, whole and on the CPU in the first process; tied weights stay one tensor."""
    state, known = dict[str, Tensor](), dict[int, Tensor]()
    for name, value in state_of(root).items():
        if id(value) not in known:
            full = whole(value.detach())
            known[id(value)] = full.cpu() if processes.first else full.new_empty(0)
        state[name] = known[id(value)]
    return state


def check_place(folder: Path) -> None:
    """Raises StoreError where ``save`` would not write."""
    files.check_folder(folder, _FILES)


def load(folder: str | Path, model: nn.Module, example_inputs: ExampleInputs | None = None) -> nn.Module:
    """The net that ``save`` wrote, in the phases that it was in.

    Args:
        folder: What ``save`` wrote. An edited ``plan.json`` is honoured for sites that were FULL.
        model: The model that was transformed; the net is made over a copy of it, and its weights do not matter.
        example_inputs: As ``transform`` had them.

    Returns:
        The net.

    Raises:
        StoreError: For a folder that is none of ``save``, a damaged file, or weights of another model.
        PlanError: For a plan of another model or of a newer version, or one that contradicts the factors of a LOW site.

    Warns:
        DynrankWarning: Where ``plan.json`` is not as it was written, by an edit or by damage.
    """
    folder = checked_path(folder)
    files.finish(folder)
    if not folder.is_dir():
        raise StoreError(f"there is no folder {folder}: give one that save or `dynrank-fx transform` wrote")
    if not (folder / _WEIGHTS).is_file():
        raise StoreError(f"{folder} has no {_WEIGHTS}: give a folder that save or `dynrank-fx transform` wrote")
    tensors, info = store.read(folder / _WEIGHTS)
    plan = read_plan(folder / _PLAN)
    if "plan" in info and plan.to_json() != Plan.from_json(info["plan"]).to_json():
        warnings.warn(
            f"{folder / _PLAN} is not as dynrank-fx wrote it: it counts as it stands, as an edited plan does",
            DynrankWarning,
            stacklevel=2,
        )
    net = rebuilt(model, plan, example_inputs, how_in(info))
    restore_(net, tensors, info)
    return net


def read_plan(path: Path) -> Plan:
    """The plan in a JSON file. Raises StoreError where it cannot be read, PlanError where it is no plan."""
    try:
        return Plan.from_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise StoreError(
            f"there is no plan {path}: give a plan.json that save or `dynrank-fx transform` wrote"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise StoreError(f"the plan {path} could not be read ({files.why(error)}): make it again") from error
    except PlanError as error:
        raise PlanError(f"{path}: {error}") from error


def how_in(info: JsonObject) -> Capture | None:
    """The capture that was asked for when the net was made, if one was."""
    return Capture[info["how"]] if info.get("how") else None


def rebuilt(
    model: nn.Module, plan: Plan, example_inputs: ExampleInputs | None = None, how: Capture | None = None
) -> nn.Module:
    """The model captured and factored by a plan that was made before; every site FULL."""
    net = capture(model, example_inputs, how=how)
    factorize_(net, fit_plan(net, plan, example_inputs))
    return net


def state_of(net: nn.Module) -> dict[str, Tensor]:
    """Everything a net's weights file holds: its ``state_dict``."""
    return {name: value for name, value in net.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}


def info_of(net: nn.Module) -> JsonObject:
    """What the tensors need to be understood: the phase and rank of every site, and the plan."""
    sites = switched_modules(net)
    return {
        "phases": {name: modules[0].phase for name, modules in sites.items()},
        "ranks": {name: modules[0].rank for name, modules in sites.items()},
        "plan": plan_of(net).to_json(),
        "how": meta_of(net).get("how", ""),
    }


def restore_(
    net: nn.Module, tensors: Mapping[str, Tensor], info: JsonObject, optimizer: Optimizer | None = None
) -> None:
    """Bring a freshly factored net (all sites FULL) into the saved phases and weights, and an optimizer over it along.

    The optimizer gets the saved parameters in its groups, without state. Raises PlanError where a LOW site has other
    factors than the plan says, StoreError where the weights are of another model.
    """
    with in_slots(optimizers_in(optimizer)):
        _enter_saved(net, info, optimizer)
    specialize_(net)
    try:
        load_as_its_class_(net, dict(tensors))
    except (RuntimeError, StoreError) as error:
        detail = " ".join(str(error).split())[:300]
        raise StoreError(f"the saved weights are of another model or plan: {detail}") from error


def _enter_saved(net: nn.Module, info: JsonObject, optimizer: Optimizer | None) -> None:
    """The saved phases with parameters that hold no values yet."""
    sites = switched_modules(net)
    for name, phase in info["phases"].items():
        if phase == int(Phase.FULL):
            continue
        if name not in sites:
            raise PlanError(
                f"{name} was saved as factors, but the plan leaves it dense: put its row back into the plan"
            )
        module, rank = sites[name][0], info["ranks"][name]
        if module.rank != rank:
            raise PlanError(
                f"{name} was saved as factors of rank {rank}, but the plan says {module.rank}: "
                f"put the rank back, load, and change it by replan_"
            )
        (old,) = parameters_of(module)
        shapes = module.layout.factor_shapes(module.shape, rank)
        new = {
            factor: Parameter(
                in_format_of(torch.empty(shape, dtype=old.dtype, device=old.device), [old]), old.requires_grad
            )
            for factor, shape in zip(module.names_in(Phase(phase)), shapes, strict=False)
        }
        base = torch.empty_like(old).requires_grad_(False) if phase == int(Phase.ADAPTOR) else None
        replace_parameters(sites[name], Phase(phase), new, optimizer, [{} for _ in new], base)


def graph_text(net: nn.Module) -> str:
    """The rewritten graph as readable text: the net's own code, and the same with every site's operations inlined.

    The second takes a copy of the net, and there is none where it is sharded.
    """
    root = _root(net)
    if any(is_sharded(module) for module in root.modules()):
        return "\n".join(("# One call per site, as it trains:", *_code(root), ""))
    return "\n".join(
        (
            "# One call per site, as it trains:",
            *_code(root),
            "",
            "# The same with the operations of the sites' present phases inlined:",
            *_code(inline_(shell(root))),
            "",
        )
    )


def _code(root: nn.Module) -> list[str]:
    """The code of every captured part, with the name of the part where there are several."""
    graphs = [(name, module) for name, module in root.named_modules() if isinstance(module, fx.GraphModule)]
    return [f"# {name}\n{module.code.strip()}" if name else module.code.strip() for name, module in graphs]


def _root(net: nn.Module) -> nn.Module:
    root = unwrap(net)
    if not is_captured(root):
        raise PlanError(f"{type(net).__name__} was not made by transform or factorize: it has no plan to save")
    return root
