"""Show a model and a run: tables, pictures and one HTML page."""

from .matrices import inspect_net, inspect_onnx, matrices_json, matrices_table
from .page import About, verdict, write_page
from .plots import plot_run, plot_spectra

__all__ = [
    "About",
    "inspect_net",
    "inspect_onnx",
    "matrices_json",
    "matrices_table",
    "plot_run",
    "plot_spectra",
    "verdict",
    "write_page",
]
