"""The plan: which sites are factored, by what layout, to which rank, and why the rest is not."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import index

from ..aliases import Json, JsonObject
from ..checks import is_number
from ..errors import PlanError
from ..layouts import Layout, layout_named
from ..text import change, text_table
from .site import Site, Skipped

VERSION = 1
_BORDER = 128  # the rank up to which a narrower dense model has been measured


@dataclass(frozen=True)
class PlannedSite:
    """One row of a plan: a site, how it is factored, and to which rank.

    Attributes:
        site: The weight and its uses.
        layout: How the weight becomes factors.
        rank: The rank of the factors.
        sharing: The names of the sites that read the same input and share one ``right`` factor, the owner of it first;
            empty for a site with factors of its own.
        seconds: Measured times of a training step of this site alone, forward and backward, dense and factored, where
            it was timed; those of sites that share a factor are all in the first one's.
        step: What it takes of a training step of the whole model, dense and factored, as shares of the time of the
            dense one, where that was timed (see ``with_whole``).
        asked: The rank that the policy gave, where another one was faster.
    """

    site: Site
    layout: Layout
    rank: int
    sharing: tuple[str, ...] = ()
    seconds: tuple[float, float] | None = field(default=None, compare=False)
    step: tuple[float, float] | None = field(default=None, compare=False)
    asked: int | None = field(default=None, compare=False)

    @property
    def shares_right(self) -> bool:
        """Whether another site of those that share it owns the ``right`` factor."""
        return self.sharing[:1] not in ((), (self.site.name,))

    @property
    def takes_product(self) -> bool:
        """Whether it takes what the owner of the shared ``right`` factor made of the input, in place of the input."""
        return self.shares_right and not self.site.by_code

    @property
    def factor_names(self) -> tuple[str, ...]:
        """The factors that are this site's own."""
        return self.layout.factor_names[:1] if self.shares_right else self.layout.factor_names

    @property
    def params(self) -> int:
        """Parameters of the site's own factors."""
        shapes = self.layout.factor_shapes(self.site.shape, self.rank)
        return sum(math.prod(shape) for shape in shapes[: len(self.factor_names)])

    @property
    def flops(self) -> int | None:
        """FLOPs of the factors on the example inputs, two a multiply-add; None without an example.

        They are counted over all uses, and over all reads of the dense matrix, which is then computed from the factors.
        """
        if self.site.flops is None:
            return None
        joins = self.site.reads * self.layout.join_flops(self.site.shape, self.rank)
        return joins + sum(
            self.layout.flops(use.op, use.input_shape, self.site.shape, self.rank, last_only=self.takes_product)
            for use in self.site.uses
            if use.input_shape is not None
        )

    def to_json(self) -> JsonObject:
        """The row as JSON values.

        Returns:
            A dict; its costs are there to be read, and are counted anew when a plan is read.
        """
        # The costs are there to be read; reading a plan counts them anew.
        cost = {"params": [self.site.params, self.params], "flops": [self.site.flops, self.flops]}
        sharing = {"sharing": self.sharing} if self.sharing else {}
        times = {name: value for name in ("seconds", "step", "asked") if (value := getattr(self, name))}
        what = {"site": self.site.to_json(), "layout": self.layout.name, "rank": self.rank}
        return {**what, **sharing, **cost, **times}


@dataclass(frozen=True)
class Plan:
    """Which weights are factored, how and to which rank, and of every other matrix the reason why it stays dense.

    It is frozen and comparable, and holds names only. ``print(plan)`` shows it as a table, ``to_json`` makes the file.

    Attributes:
        sites: A row for each weight that is factored, in the order of the model's parameters.
        skipped: The matrices that stay dense, each with its reason.
        total_params: Parameters of the whole dense model.
        total_flops: FLOPs of the whole dense model on the example inputs, two a multiply-add; None without an example.
        capture: How the model became a graph, and why not otherwise.
        timed: On what the sites were timed; empty where they were not.
        seconds: Measured times of a training step of the whole model, forward and backward, dense and with every site
            factored; None where they were not measured.
    """

    sites: tuple[PlannedSite, ...]
    skipped: tuple[Skipped, ...]
    total_params: int
    total_flops: int | None = None
    capture: str = field(default="", compare=False)
    timed: str = field(default="", compare=False)
    seconds: tuple[float, float] | None = field(default=None, compare=False)

    @property
    def low_params(self) -> int:
        """Parameters of the whole model with every planned site factored."""
        return self.total_params + sum(row.params - row.site.params for row in self.sites)

    @property
    def low_flops(self) -> int | None:
        """FLOPs of the whole model with every planned site factored, two a multiply-add; None without an example."""
        if self.total_flops is None:
            return None
        return self.total_flops + sum((row.flops or 0) - (row.site.flops or 0) for row in self.sites)

    @property
    def low_time(self) -> float | None:
        """A training step with every planned site factored, as a share of the measured time of the dense one.

        None where that was not measured.
        """
        steps = [row.step for row in self.sites if row.step is not None]
        return 1 + sum(low - dense for dense, low in steps) if steps and len(steps) == len(self.sites) else None

    @property
    def narrower(self) -> float | None:
        """The width of the dense model that takes as many FLOPs as this one with every planned site factored.

        It is a share of the width of this one, all of whose layers cost their inputs times their outputs, roughly: the
        root of the share of FLOPs. None without an example, and where nothing is factored.
        """
        if not self.sites or not self.total_flops or self.low_flops is None or self.low_flops < 0:
            return None
        return math.sqrt(self.low_flops / self.total_flops)

    def with_ranks(self, ranks: dict[str, int]) -> Plan:
        """The same plan with other ranks for some sites.

        Args:
            ranks: The new ranks by site name; sites that are not named keep theirs.

        Returns:
            The new plan; this one stays as it is.

        Raises:
            PlanError: For a name that the plan does not have, or a rank that does not fit.
        """
        unknown = set(ranks) - {row.site.name for row in self.sites}
        if unknown:
            raise PlanError(f"the plan has no site {sorted(unknown)[0]!r} to give a rank to")
        rows = [_at(row, ranks.get(row.site.name, row.rank)) for row in self.sites]
        return replace(self, sites=checked_rows(rows))

    def with_layouts(self, layouts: Mapping[str, Layout]) -> Plan:
        """The same plan with other layouts for some sites, which keep their rank as far as the layout has it.

        Args:
            layouts: The new layouts by site name.

        Returns:
            The new plan; this one stays as it is.

        Raises:
            PlanError: For a layout that does not serve its site.
        """
        rows = [
            replace(_at(row, min(row.rank, layout.max_rank(row.site.shape))), layout=layout)
            if (layout := layouts.get(row.site.name, row.layout)) != row.layout
            else row
            for row in self.sites
        ]
        return replace(self, sites=checked_rows(rows))

    def to_json(self) -> str:
        """The plan as text, to be stored, edited and read again.

        Returns:
            Versioned JSON.
        """
        data = {
            "format": "dynrank-fx plan",
            "version": VERSION,
            "capture": self.capture,
            **({"timed": self.timed} if self.timed else {}),
            **({"seconds": self.seconds} if self.seconds else {}),
            "total_params": self.total_params,
            "total_flops": self.total_flops,
            "low_params": self.low_params,
            "low_flops": self.low_flops,
            "sites": [row.to_json() for row in self.sites],
            "skipped": [row.to_json() for row in self.skipped],
        }
        return json.dumps(data, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read a plan that ``to_json`` made, edited or not.

        Args:
            text: The JSON.

        Returns:
            The plan, with its costs counted anew.

        Raises:
            PlanError: For anything that is not a plan of this version, or that has an impossible rank or layout.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError, TypeError) as error:
            raise PlanError(f"the plan is not JSON: {error}") from error
        if not isinstance(data, dict) or data.get("format") != "dynrank-fx plan":
            raise PlanError('this is not a plan: it lacks the line "format": "dynrank-fx plan"')
        if data.get("version") != VERSION:
            raise PlanError(
                f"the plan has version {data.get('version')} and this dynrank-fx reads version {VERSION}; "
                "upgrade dynrank-fx, or make the plan again"
            )
        try:
            sites = checked_rows([_row_from_json(row) for row in data["sites"]])
            skipped = tuple(Skipped.from_json(row) for row in data["skipped"])
            flops = data["total_flops"]
            total = None if flops is None else index(flops)
            said = str(data.get("capture", "")), str(data.get("timed", ""))
            seconds = _times(data["seconds"]) if "seconds" in data else None
            plan = cls(sites, skipped, index(data["total_params"]), total, *said, seconds)
            str(plan)  # counts every cost: what cannot be counted is no plan
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise PlanError(f"the plan is incomplete or has a value of the wrong kind: {error!r}") from error
        return plan

    def __str__(self) -> str:
        rows = [_table_row(row) for row in self.sites]
        rows += [_skipped_row(skipped) for skipped in self.skipped]
        head = ("weight", "shape", "layout", "rank", "params", "MFLOPs", "ms a step", "shared", "why dense")
        lines = [text_table(head, rows, right=(3,)), ""]
        sites, matrices = _amount(len(self.sites), "site", "sites"), _amount(len(self.skipped), "matrix", "matrices")
        lines.append(f"{sites} factored, {matrices} left dense")
        if self.capture:
            lines.append(f"captured    {_for_people(self.capture)}")
        lines.append(f"parameters  {change(self.total_params, self.low_params)}")
        if self.total_flops is not None and self.low_flops is not None:
            lines.append(f"FLOPs       {change(self.total_flops, self.low_flops)} on the example inputs")
        if self.narrower is not None:
            width = f"a dense model {self.narrower:.2f} times as wide has as many: train it too, and compare"
            lines.append(f"narrower    {width}{_known(self.sites)}")
        timed = [row.seconds for row in self.sites if row.seconds]
        if timed:
            dense, low = (1e3 * sum(times) for times in zip(*timed, strict=True))
            which = "sites" if len(timed) == len(self.sites) else f"sites that were timed ({len(timed)})"
            lines.append(f"step        {dense:.4g} -> {low:.4g} ms in the {which}, forward and backward ({self.timed})")
        if self.seconds is not None:
            dense, low = (1e3 * each for each in self.seconds)
            slower = "; nothing is gained: train dense" if low >= dense else ""
            share = f"{low / dense:.1%} of dense"
            lines.append(f"whole step  {dense:.4g} -> {low:.4g} ms of the model ({share}), in turn{slower}")
        if self.sites and (found := [row for row in self.sites if row.asked is not None]):
            many = _amount(len(found), "site has", "sites have")
            lines.append(f"ranks       {many} another than was asked for, with which a step is faster (*)")
        return "\n".join(lines)


def _known(sites: Sequence[PlannedSite]) -> str:
    """What docs/measured.md knows of which of the two is better: of text, by the rank of most matrices."""
    ranks = [row.rank for row in sites if row.site.kind == "linear"]
    measured = len(ranks) > len(sites) / 2 and statistics.median_low(ranks) <= _BORDER
    return "; on text it was better at ranks 16 to 128" if measured else ""


def _for_people(capture: str) -> str:
    """How the model became a graph, without why not otherwise, which names classes and lines of code."""
    capture, apart, untrained = capture.partition(" Training was not compared")
    how, *why = re.split(r": (?!\d)", capture, maxsplit=1)  # before a number it is a rounding, and no reason
    how = (
        how.replace(", as asked", "")
        .replace("by symbolic tracing", "as one graph")
        .replace("by torch.export", "as one graph, by torch.export")
    )
    asked = not why or why[0].strip() == "as asked"
    how = how if asked else f"{how} (`capture` of the plan says why not otherwise)"
    return f"{how}.{apart}{untrained}" if apart else how


def _table_row(row: PlannedSite) -> tuple[str, ...]:
    site = row.site
    params = f"{_count(site.params)} -> {_count(row.params)}"
    flops = "" if row.flops is None or site.flops is None else f"{site.flops / 1e6:.4g} -> {row.flops / 1e6:.4g}"
    times = "" if row.seconds is None else " -> ".join(f"{1e3 * each:.3g}" for each in row.seconds)
    name = " = ".join((site.name, *site.aliases))
    calls = f"{len(site.uses)} uses" if len(site.uses) > 1 else ""
    if row.shares_right:
        calls = f"right of {row.sharing[0]}"
    rank = str(row.rank) if row.asked is None else f"*{row.rank}"
    return (name, "x".join(map(str, site.shape)), row.layout.name, rank, params, flops, times, calls, "")


def _skipped_row(skipped: Skipped) -> tuple[str, ...]:
    name = " = ".join((skipped.name, *skipped.aliases))
    return (name, "x".join(map(str, skipped.shape)), "dense", "", _count(skipped.params), "", "", "", skipped.reason)


def _amount(n: int, one: str, more: str) -> str:
    return f"{n} {one if n == 1 else more}"


def _count(n: int) -> str:
    return f"{n:,}"


def _row_from_json(data: JsonObject) -> PlannedSite:
    site = Site.from_json(data["site"])
    sharing: Json = data.get("sharing", data.get("pack", ()))  # its name in older plans
    seconds, step = (None if (each := data.get(name)) is None else _times(each) for name in ("seconds", "step"))
    asked = None if data.get("asked") is None else index(data["asked"])
    layout = layout_of(site, data["layout"])
    return PlannedSite(site, layout, data["rank"], tuple(map(str, sharing)), seconds, step, asked)


def _times(values: Json) -> tuple[float, float]:
    dense, low = values
    if not is_number(dense, 0) or not is_number(low, 0):
        raise TypeError(f"{values!r} are no times")
    return float(dense), float(low)


def _at(row: PlannedSite, rank: int) -> PlannedSite:
    """The row at a rank. What it takes at another one was not measured: of a step of the whole as its FLOPs say."""
    if rank == row.rank:
        return row
    other = replace(row, rank=rank, seconds=None, asked=None)
    if row.step is None:
        return other
    dense, low = row.step
    before, after = (each.flops or each.params for each in (row, other))
    return replace(other, step=(dense, low * after / before))


def layout_of(site: Site, name: str) -> Layout:
    """The layout of this name for the site. Raises PlanError where there is none."""
    try:
        return layout_named(name, site.uses[0].op)
    except PlanError as error:
        raise PlanError(f"{site.name} cannot be factored as planned: {error}") from error


def checked_plan(plan: Plan) -> Plan:
    """The plan itself. Raises PlanError for what is none."""
    if not isinstance(plan, Plan):
        raise PlanError(f"{plan!r} is no Plan: give what make_plan makes, or Plan.from_json of a file's text")
    return plan


def checked_rows(rows: Iterable[PlannedSite]) -> tuple[PlannedSite, ...]:
    """The rows themselves. Raises PlanError for a layout that does not serve its op, or a rank it cannot have; in a
    group that shares a factor, for ranks that differ and for sites that cannot.
    """
    by_name = {row.site.name: row for row in rows}
    for row in rows:
        members = [each for name in row.sharing if (each := by_name.get(name)) and each.sharing == row.sharing]
        _check_layout(row)
        if not row.sharing:
            _check_rank(row, row.layout.max_rank(row.site.shape))
            continue
        names = ", ".join(row.sharing)
        if row.site.name not in row.sharing or len(members) < max(2, len(row.sharing)):
            raise PlanError(
                f"the plan lacks a row of {names}, which share a factor: put it back, or empty their sharing"
            )
        if len({(member.rank, member.site.shape[1:], member.site.kind) for member in members}) > 1:
            raise PlanError(f"{names} share a factor: give them one rank, and only linear sites of the same input")
        _check_rank(row, min(sum(member.site.shape[0] for member in members), row.site.shape[1]))
    return tuple(rows)


def _check_layout(row: PlannedSite) -> None:
    if not all(row.layout.serves(use.op) for use in row.site.uses):
        raise PlanError(f"{row.site.name} is a {row.site.kind}, which the layout {row.layout.name!r} does not serve")


def _check_rank(row: PlannedSite, limit: int) -> None:
    if isinstance(row.rank, bool) or not isinstance(row.rank, int) or not 1 <= row.rank <= limit:
        raise PlanError(f"{row.site.name} cannot have rank {row.rank}: give a whole number from 1 to {limit}")
