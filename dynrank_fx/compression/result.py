"""What ``compress`` made of a model, and what is told of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from torch import nn

from ..aliases import JsonObject
from ..plan import Plan
from ..text import change, counted, text_table
from ..timing import Pair
from .covariance import Calibration
from .truncation import Cut, cut_plainly

NOISE = 0.02
"""A ratio of times so near to 1 is not slower."""


@dataclass(frozen=True)
class Compressed:
    """What ``compress`` made of a model; printed, it is a table.

    Attributes:
        module: The compressed model: ordinary torch, in evaluation mode.
        plan: The sites as they may be factored, with the ranks of those that are.
        cuts: What became of each site.
        params: Parameters of the dense and of the compressed model.
        flops: FLOPs of both on the example inputs, two a multiply-add; None where they are not known.
        times: Seconds of both in onnxruntime, measured in turn, the dense one first, their ratio and its spread; None
            where they were not measured.
        metrics: The metric of both; None without one.
        notes: What the user should know, a sentence each.
    """

    module: nn.Module
    plan: Plan
    cuts: tuple[Cut, ...]
    params: tuple[int, int]
    flops: tuple[int, int] | None
    times: Pair | None
    metrics: tuple[float, float] | None
    notes: tuple[str, ...]

    @property
    def metadata(self) -> dict[str, str]:
        """What its file tells: the plan, and the metric it reaches, where that was measured."""
        told = {"dynrank_plan": self.plan.to_json()}
        if self.metrics is not None:
            told["dynrank_metric"] = f"{self.metrics[1]:.6g} (dense: {self.metrics[0]:.6g})"
        return told

    def to_json(self) -> JsonObject:
        """What is told of it as JSON values.

        Returns:
            A dict: pairs are of the dense and of the compressed model; the rank of a site is None where it is dense.
        """
        layouts = {row.site.name: row.layout.name for row in self.plan.sites}
        return {
            "sites": [
                {"site": cut.site, "rank": cut.rank, "layout": layouts[cut.site], "error": cut.error}
                for cut in self.cuts
            ],
            "params": self.params,
            "flops": self.flops,
            "times": None if self.times is None else asdict(self.times),
            "metric": self.metrics,
            "notes": self.notes,
        }

    def __str__(self) -> str:
        rows = []
        by_name = {row.site.name: row for row in self.plan.sites}
        for cut in self.cuts:
            row = by_name[cut.site]
            shape = "x".join(map(str, row.site.shape))
            params = row.site.params if cut.rank is None else replace(row, rank=cut.rank).params
            low = ("dense", "", "") if cut.rank is None else (str(cut.rank), row.layout.name, f"{cut.error:.3f}")
            rank, layout, error = low
            rows.append((cut.site, shape, rank, layout, f"{row.site.params:,} -> {params:,}", error))
        head = ("weight", "shape", "rank", "layout", "parameters", "change of the weight")
        lines = [text_table(head, rows, right=(2,)), ""]
        lines.append(f"parameters  {change(*self.params)}")
        if self.flops is not None:
            lines.append(f"FLOPs       {change(*self.flops)} on the example inputs")
        if self.times is not None:
            dense = f"{1e3 * self.times.first:.3f} ms"
            spread = self.times.spread
            between = "" if spread is None else f"{spread[0]:.2f} to {spread[1]:.2f} in several rounds; "
            said = f"{self.times.ratio:.2f} of dense ({between}{dense} on the example inputs)"
            lines.append(f"time        {said} in onnxruntime")
        if self.metrics is not None:
            lines.append(f"metric      {self.metrics[0]:.4f} -> {self.metrics[1]:.4f}")
        return "\n".join((*lines, *self.notes))


def compressed(
    plan: Plan,
    module: nn.Module,
    cuts: Sequence[Cut],
    known: Calibration | None,
    times: Pair | None,
    untimed: str,
) -> Compressed:
    """The result by its parts. plan: with every site as it may be factored. known: what the cuts were calibrated on.
    untimed: why there are no times, or "".
    """
    ranks = {cut.site: cut.rank for cut in cuts}
    low = [replace(row, rank=rank) for row in plan.sites if (rank := ranks[row.site.name]) is not None]
    flops = None
    if plan.total_flops is not None:
        flops = plan.total_flops, plan.total_flops + sum((row.flops or 0) - (row.site.flops or 0) for row in low)
    made = plan.with_ranks({name: rank for name, rank in ranks.items() if rank is not None})
    params = plan.total_params, sum(p.numel() for p in module.parameters())
    return Compressed(module, made, tuple(cuts), params, flops, times, None, _notes(cuts, known, times, untimed))


def _notes(cuts: Sequence[Cut], known: Calibration | None, times: Pair | None, untimed: str) -> tuple[str, ...]:
    notes = [f"{sentence}." for sentence in cut_plainly(cuts)]
    weights = counted(len(cuts), "weight")
    lossy = {cut.site for cut in cuts if cut.loses}
    scarce = [] if known is None else [name for name in known.scarce if name in lossy]
    if scarce:
        fewest = min(known.covariances[name].count for name in scarce) if known else 0
        notes.append(
            f"The calibration data are few for {len(scarce)} of {weights} ({scarce[0]} was seen on "
            f"{counted(fewest, 'input')}): give more batches."
        )
    dense = [cut for cut in cuts if cut.rank is None]
    kept = [cut for cut in cuts if cut.rank is not None and not cut.loses]
    if kept and len(kept) + len(dense) == len(cuts):
        notes.append(
            f"Nothing is lost: {counted(len(kept), f'of {weights} is', f'of {weights} are')} of low rank already, "
            "and kept so, whatever more the budget leaves room for."
        )
    elif times is not None and len(dense) == len(cuts):
        notes.append(
            "Nothing was cut: of the layers that the budget lets be cut, none is faster with factors here. Measure no "
            "times (`--no-timing`, in Python times=None) for a smaller model that may be no faster."
        )
    elif dense and times is not None:
        notes.append(
            f"{counted(len(dense), f'of {weights} is', f'of {weights} are')} dense, where factors save nothing or "
            "the budget leaves room."
        )
    if times is not None and times.ratio > 1 + NOISE and len(dense) < len(cuts):
        notes.append(
            f"It is slower than the dense model ({times.ratio:.2f} of its time): a budget of parameters asks for size "
            "alone; latency=1 asks for speed."
        )
    if untimed:
        notes.append(f"Nothing was timed, since the dense model does not become an ONNX file: {untimed}")
    return tuple(notes)
