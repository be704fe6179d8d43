"""Write ONNX files that onnxruntime agrees with, compare them, and time them."""

from .agreement import onnx_inputs
from .beforehand import check_names, check_precision, check_room
from .bench import bench_onnx, onnx_machine, table
from .beside import Beside, time_beside
from .convert import converted
from .diff import compare_onnx
from .export import ExportReport, check_opset, export_onnx, verify_onnx
from .file import check_place
from .precision import Precision, cast
from .random_inputs import loaded, random_inputs, table_rows
from .score import Scores, score_onnx
from .session import Feeds, Provider, best_provider, bound, check_provider, runtime, session, session_of, threads

__all__ = [
    "Beside",
    "ExportReport",
    "Feeds",
    "Precision",
    "Provider",
    "Scores",
    "bench_onnx",
    "best_provider",
    "bound",
    "cast",
    "check_names",
    "check_opset",
    "check_place",
    "check_precision",
    "check_provider",
    "check_room",
    "compare_onnx",
    "converted",
    "export_onnx",
    "loaded",
    "onnx_inputs",
    "onnx_machine",
    "random_inputs",
    "runtime",
    "score_onnx",
    "session",
    "session_of",
    "table",
    "table_rows",
    "threads",
    "time_beside",
    "verify_onnx",
]
