"""Dynamic-rank training as a torch.fx compiler pass: factor, train in phases, truncate, export (arXiv 2508.08625).

The names are imported when first used, so that ``import dynrank_fx`` costs nothing before torch is needed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from . import schedules as schedules
    from .compression import Calibration as Calibration
    from .compression import Compressed as Compressed
    from .compression import MaxDrop as MaxDrop
    from .compression import SiteTimes as SiteTimes
    from .compression import calibrate as calibrate
    from .compression import compress as compress
    from .compression import recalibrate_ as recalibrate_
    from .compression import recover_ as recover_
    from .compression import truncate as truncate
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
    from .layouts import ChannelLayout as ChannelLayout
    from .layouts import CPLayout as CPLayout
    from .layouts import SpatialLayout as SpatialLayout
    from .layouts import TuckerLayout as TuckerLayout
    from .layouts import effective_rank as effective_rank
    from .layouts import stable_rank as stable_rank
    from .onnx import ExportReport as ExportReport
    from .onnx import export_onnx as export_onnx
    from .onnx import verify_onnx as verify_onnx
    from .phase import Phase as Phase
    from .phases import Carry as Carry
    from .phases import Transition as Transition
    from .phases import enter_ as enter_
    from .phases import load as load
    from .phases import phases_of as phases_of
    from .phases import randomize_ as randomize_
    from .phases import replan_ as replan_
    from .phases import reranked as reranked
    from .phases import save as save
    from .plan import Budget as Budget
    from .plan import Energy as Energy
    from .plan import Fixed as Fixed
    from .plan import Override as Override
    from .plan import Plan as Plan
    from .plan import PlanOptions as PlanOptions
    from .plan import Ratio as Ratio
    from .plan import Role as Role
    from .plan import StableRank as StableRank
    from .plan import make_plan as make_plan
    from .rewrite import factorize as factorize
    from .rewrite import inline as inline
    from .rewrite import plan_of as plan_of
    from .rewrite import transform as transform
    from .schedules import TrainState as TrainState
    from .tracing import Capture as Capture
    from .tracing import capture as capture
    from .training import Decay as Decay
    from .training import Phases as Phases
    from .training import factor_decay_ as factor_decay_
    from .training import resume_phases_ as resume_phases_
    from .training import rewarm_ as rewarm_
    from .training import train_state as train_state

_HOME = {
    "compression": (
        "Calibration",
        "Compressed",
        "MaxDrop",
        "SiteTimes",
        "calibrate",
        "compress",
        "recalibrate_",
        "recover_",
        "truncate",
    ),
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
    "layouts": (
        "CPLayout",
        "ChannelLayout",
        "SpatialLayout",
        "TuckerLayout",
        "effective_rank",
        "stable_rank",
    ),
    "onnx": (
        "ExportReport",
        "export_onnx",
        "verify_onnx",
    ),
    "phase": ("Phase",),
    "phases": (
        "Carry",
        "Transition",
        "enter_",
        "load",
        "phases_of",
        "randomize_",
        "replan_",
        "reranked",
        "save",
    ),
    "plan": (
        "Budget",
        "Energy",
        "Fixed",
        "Override",
        "Plan",
        "PlanOptions",
        "Ratio",
        "Role",
        "StableRank",
        "make_plan",
    ),
    "rewrite": (
        "factorize",
        "inline",
        "plan_of",
        "transform",
    ),
    "schedules": ("TrainState",),
    "tracing": (
        "Capture",
        "capture",
    ),
    "training": (
        "Decay",
        "Phases",
        "factor_decay_",
        "resume_phases_",
        "rewarm_",
        "train_state",
    ),
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
