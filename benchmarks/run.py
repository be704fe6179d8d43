"""Run benchmarks by name: `python benchmarks/run.py steps switch`; `--list` tells the names.

Each prints a Markdown table. Both sides of a ratio are timed in turn in one run; ratios are medians.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # a script finds its own folder; the benchmarks are a package

from benchmarks.beside import beside
from benchmarks.captures import captures
from benchmarks.factor_steps import factor_steps
from benchmarks.finetune import finetune
from benchmarks.held import held
from benchmarks.large import large
from benchmarks.layers import layers, shares
from benchmarks.memory import memory
from benchmarks.neighbours import neighbours
from benchmarks.onnx_files import onnx
from benchmarks.peak import peak
from benchmarks.pitch_tracker import pitch
from benchmarks.result import Result, Table, load_all, measured_here, save
from benchmarks.scale import scale
from benchmarks.several import several
from benchmarks.shared import shared
from benchmarks.sites import sites
from benchmarks.stacked import stacked, stacked_steps
from benchmarks.startup import startup
from benchmarks.steps import steps
from benchmarks.study.cells import study
from benchmarks.study.cutting import cutting
from benchmarks.study.narrower import narrower
from benchmarks.study.phases import phases
from benchmarks.study.rivals import rivals
from benchmarks.switch import switch
from benchmarks.truncation import truncation

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Benchmark:
    """run: takes whether to be quick, that is to do less of everything, to see that it runs."""

    name: str
    description: str
    run: Callable[[bool], Table]


BENCHMARKS = (
    Benchmark("steps", "A training step: FULL and LOW against the original model, beside the ratio of FLOPs.", steps),
    Benchmark("switch", "The time of a switch of all sites with their optimizer state, against an epoch.", switch),
    Benchmark(
        "layers", "A step of layers of real widths: LOW over FULL beside the ratio of FLOPs and a floor.", layers
    ),
    Benchmark("shares", "Where the time of such a step goes, by kinds of operations.", shares),
    Benchmark("factor-steps", "A training step in LOW with factor_steps_ over one without.", factor_steps),
    Benchmark("beside", "A training step beside CoLA, SLTrain, LoRA, GaLore and a narrower dense model.", beside),
    Benchmark("held", "Bytes of parameters, gradients and optimizer state in each phase, over the original's.", held),
    Benchmark("memory", "Peak memory and time of the verbs over the size of a Llama-shaped model.", memory),
    Benchmark("several", "Two processes: a step, a switch, DDP made anew, and what each process holds.", several),
    Benchmark("peak", "Peak memory of a switch beside the memory before and after it.", peak),
    Benchmark("truncation", "Truncated SVD to a quarter of the rank, against torch.linalg.svd.", truncation),
    Benchmark("captures", "Graphs of torch.compile by setting, and how many more over a hundred switches.", captures),
    Benchmark("startup", "The time in which the command answers `--help`.", startup),
    Benchmark("scale", "The time of capture and of transform over the number of nodes of the graph.", scale),
    Benchmark("shared", "Query, key and value with one right factor against three, at equal parameters.", shared),
    Benchmark("sites", "Each site dense and factored in onnxruntime: in the whole model, and by itself.", sites),
    Benchmark("onnx", "ONNX files, dense against truncated to rank 1/4, beside FLOPs and bytes moved.", onnx),
    Benchmark(
        "stacked", "ONNX files whose right factors of one input are one product, over the same without.", stacked
    ),
    Benchmark(
        "stack-steps", "The same in a training step, by a prototype: one product over separate ones.", stacked_steps
    ),
    Benchmark("large", "A training step of a GPT with torch.compile and bfloat16, and its peak of memory.", large),
    Benchmark("phases", "A training step of the study's networks in each phase, over one in FULL.", phases),
    Benchmark(
        "study", "Which way to train: accuracy of many methods at equal compute, time or epochs (takes hours).", study
    ),
    Benchmark(
        "cutting", "How to cut a trained model, and which training leaves one that is cut best (takes hours).", cutting
    ),
    Benchmark(
        "narrower", "A factored model beside a narrower dense one, at equal FLOPs of training and inference.", narrower
    ),
    Benchmark(
        "finetune",
        "A dense-trained net fine-tuned in LOW, beside full fine-tuning and LoRA, which is peft's.",
        finetune,
    ),
    Benchmark("rivals", "The same trained network given to other compression tools, which must be installed.", rivals),
    Benchmark("pitch", "A published pitch tracker cut by the command, beside its authors' narrower one.", pitch),
    Benchmark("neighbours", "Training, the change of shapes and the result beside LoRA and pruning.", neighbours),
)


def main(arguments: Sequence[str] | None = None) -> None:
    by_name = {benchmark.name: benchmark for benchmark in BENCHMARKS}
    parser = argparse.ArgumentParser(prog="benchmarks/run.py", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="a benchmark, or several")
    parser.add_argument("--list", action="store_true", help="name the benchmarks")
    parser.add_argument("--tables", action="store_true", help="print the results that were saved")
    parser.add_argument("--quick", action="store_true", help="do less of everything, to see that it runs")
    parser.add_argument("--save", action="store_true", help="keep each result as NAME.json")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER", help="of the results that are kept")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.names if name not in by_name]:
        parser.error(f"there is no benchmark {unknown[0]!r}: choose from {', '.join(by_name)}")
    if options.quick and options.save and options.out.resolve() == RESULTS:
        parser.error("what --quick measures is no result: give --out another folder")
    if not (options.names or options.list or options.tables):
        parser.error("name a benchmark, or give --list or --tables")
    if options.list:
        print("\n".join(f"{benchmark.name:14}{benchmark.description}" for benchmark in BENCHMARKS))
    if options.tables:
        print("\n\n".join(result.markdown() for result in load_all(options.out, list(by_name))))
    for name in options.names:
        result = run(by_name[name], quick=options.quick)
        print(result.markdown(), end="\n\n", flush=True)
        if options.save:
            print(f"wrote {save(result, options.out)}", file=sys.stderr)


def run(benchmark: Benchmark, *, quick: bool = False) -> Result:
    """Measure, here and now."""
    command = f"python benchmarks/run.py {benchmark.name}{' --quick' if quick else ''}"
    threads = torch.get_num_threads()
    try:
        return measured_here(benchmark.name, benchmark.description, benchmark.run(quick), command)
    finally:
        torch.set_num_threads(threads)  # some ask for one


if __name__ == "__main__":
    main()
