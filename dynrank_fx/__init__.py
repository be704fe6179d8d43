"""Dynamic-rank training as a torch.fx compiler pass: factor, train in phases, truncate, export (arXiv 2508.08625).

The names are imported when first used, so that ``import dynrank_fx`` costs nothing before torch is needed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from . import schedules as schedules
    from .budget import Budget as Budget
    from .calibration import calibrate as calibrate
    from .checkpoint import load as load
    from .checkpoint import save as save
    from .compressed import Compressed as Compressed
    from .compression import MaxDrop as MaxDrop
    from .compression import compress as compress
    from .decay import Decay as Decay
    from .decay import factor_decay_ as factor_decay_
    from .errors import CalibrationError as CalibrationError
    from .errors import CaptureError as CaptureError
    from .errors import DynrankError as DynrankError
    from .errors import DynrankWarning as DynrankWarning
    from .errors import ExportError as ExportError
    from .errors import ModelFileError as ModelFileError
    from .errors import PlanError as PlanError
    from .errors import ScheduleError as ScheduleError
    from .errors import StoreError as StoreError
    from .errors import TransitionError as TransitionError
    from .export import ExportReport as ExportReport
    from .export import export_onnx as export_onnx
    from .export import verify_onnx as verify_onnx
    from .inlining import inline as inline
    from .layout import ChannelLayout as ChannelLayout
    from .layout import CPLayout as CPLayout
    from .layout import SpatialLayout as SpatialLayout
    from .layout import TuckerLayout as TuckerLayout
    from .lowrank import effective_rank as effective_rank
    from .lowrank import stable_rank as stable_rank
    from .moments import Calibration as Calibration
    from .optim import Carry as Carry
    from .overrides import Override as Override
    from .phase import Phase as Phase
    from .phase import TrainState as TrainState
    from .phases import Phases as Phases
    from .phases import resume_phases_ as resume_phases_
    from .pipeline import transform as transform
    from .plan import Plan as Plan
    from .planning import make_plan as make_plan
    from .ranks import Energy as Energy
    from .ranks import Fixed as Fixed
    from .ranks import Ratio as Ratio
    from .ranks import StableRank as StableRank
    from .recovery import recalibrate_ as recalibrate_
    from .recovery import recover_ as recover_
    from .reranking import reranked as reranked
    from .rewarm import rewarm_ as rewarm_
    from .rewrite import factorize as factorize
    from .rewrite import plan_of as plan_of
    from .roles import Role as Role
    from .sitetimes import SiteTimes as SiteTimes
    from .state import train_state as train_state
    from .tracing import Capture as Capture
    from .tracing import capture as capture
    from .transition import Transition as Transition
    from .transition import enter_ as enter_
    from .transition import phases_of as phases_of
    from .transition import replan_ as replan_
    from .truncation import truncate as truncate
    from .values import randomize_ as randomize_

_HOME = {
    "tracing": ("Capture", "capture"),
    "budget": ("Budget",),
    "calibration": ("calibrate",),
    "checkpoint": ("load", "save"),
    "compressed": ("Compressed",),
    "compression": ("MaxDrop", "compress"),
    "decay": ("Decay", "factor_decay_"),
    "errors": (
        "CalibrationError",
        "CaptureError",
        "DynrankError",
        "DynrankWarning",
        "ExportError",
        "ModelFileError",
        "PlanError",
        "ScheduleError",
        "StoreError",
        "TransitionError",
    ),
    "export": ("ExportReport", "export_onnx", "verify_onnx"),
    "inlining": ("inline",),
    "layout": ("CPLayout", "ChannelLayout", "SpatialLayout", "TuckerLayout"),
    "lowrank": ("effective_rank", "stable_rank"),
    "moments": ("Calibration",),
    "optim": ("Carry",),
    "overrides": ("Override",),
    "phase": ("Phase", "TrainState"),
    "phases": ("Phases", "resume_phases_"),
    "pipeline": ("transform",),
    "plan": ("Plan",),
    "planning": ("make_plan",),
    "ranks": ("Energy", "Fixed", "Ratio", "StableRank"),
    "recovery": ("recalibrate_", "recover_"),
    "reranking": ("reranked",),
    "roles": ("Role",),
    "rewarm": ("rewarm_",),
    "rewrite": ("factorize", "plan_of"),
    "sitetimes": ("SiteTimes",),
    "state": ("train_state",),
    "transition": ("Transition", "enter_", "phases_of", "replan_"),
    "truncation": ("truncate",),
    "values": ("randomize_",),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = ["__version__", "schedules", *sorted(_MODULE_OF)]


def __getattr__(name: str) -> Any:
    if name == "schedules":
        return importlib.import_module(".schedules", __name__)
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # Not `from . import`: a submodule of the same name (capture) must not hide the function.
    value = getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
