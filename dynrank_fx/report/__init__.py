"""Show a model and a run: tables, pictures and one HTML page."""

from .matrices import inspect_net, inspect_onnx, matrices_json, matrices_table
from .page import write_page
from .plots import plot_run, plot_spectra

__all__ = [
    "inspect_net",
    "inspect_onnx",
    "matrices_json",
    "matrices_table",
    "plot_run",
    "plot_spectra",
    "write_page",
]
