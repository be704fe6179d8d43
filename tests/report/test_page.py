"""The page of a run: whole, self-contained, escaped, and true to the history, whatever the history holds."""

from __future__ import annotations

import base64
import itertools
import re
import xml.etree.ElementTree
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import MultiStepLR

import dynrank_fx as dr
from dynrank_fx.report import About, plots, verdict, write_page
from dynrank_fx.report.page import grouped, judged, score, time_share
from dynrank_fx.schedules import EpochRecord
from dynrank_fx.training import Run, Settings, Task, fit

FULL, LOW = dr.Phase.FULL, dr.Phase.LOW


class Text(HTMLParser):
    """The cells of all tables, the pictures, and whether tags are closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.cells: list[str] = []
        self.pictures: list[tuple[str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("td", "th"):
            self.cells.append("")
        if tag == "img":
            self.pictures.append((dict(attrs)["alt"] or "", dict(attrs)["src"] or ""))
        elif tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1] += data


def trained(schedule: Any, epochs: int = 4, **settings: Any) -> Run:
    torch.manual_seed(0)
    net = dr.transform(nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 32)), (torch.randn(4, 16),))
    optimizer = SGD(net.parameters(), lr=0.1)
    batches = [(torch.randn(8, 16), torch.randint(32, (8,))) for _ in range(3)]
    task = Task(
        batches,
        lambda output, batch: nn.functional.cross_entropy(output, batch[1]),
        lambda batch: ((batch[0],), {}),
        batches,
        lambda output, batch: (output.argmax(1) == batch[1]).float().mean(),
    )
    run = Run(net, optimizer, schedule, MultiStepLR(optimizer, [2]))
    fit(run, task, Settings(epochs, compile=False, **settings))
    return run


def page(run: Run, path: Path, title: str = "a run", about: About | None = None) -> Text:
    write_page(run.history, dr.plan_of(run.net), path, title=title, about=about or About(metric="accuracy"))
    text = Text()
    text.feed(path.read_text())
    assert text.open == []
    assert not re.search(r"(src|href)=\"(?!data:)", path.read_text()), "nothing is fetched"
    return text


def test_the_page_of_a_run_says_what_its_history_says(tmp_path):
    run = trained(dr.schedules.auto(0.8), epochs=6)
    text = page(run, tmp_path / "r.html")
    last, plan = run.history[-1], dr.plan_of(run.net)
    for cell in (
        f"{last.spent / 6:.1%}",
        f"{plan.total_params:,}",
        f"{last.eval_metric:.2%}",
        f"{last.eval_loss:.4f}",
        f"{last.effective_rank['2.weight']:.1f}",
        *[r for each in run.history if each.switch_error for r in grouped(each.reasons, each.phases)],
    ):
        assert any(cell in each for each in text.cells), cell
    assert [alt for alt, _ in text.pictures] == [
        "Effective rank of every site",
        "Effective rank over the epochs",
        "Spectra before and after the last cut",
        "Loss and metric, by epochs and by compute",
    ]
    for _, source in text.pictures:
        assert source.startswith("data:image/svg+xml;base64,")
        xml.etree.ElementTree.fromstring(base64.b64decode(source.partition(",")[2]))


def test_time_stands_beside_the_flops_where_it_was_measured(tmp_path):
    run = trained(dr.schedules.always(LOW), epochs=2)
    plan = dr.plan_of(run.net)
    assert "% of what dense training costs in as many." in verdict(run.history, plan, About())[0]
    run.history = [record.with_figures(spent_time=0.55 * (record.epoch + 1)) for record in run.history]
    said = verdict(run.history, plan, About())[0]
    share = f"{run.history[-1].spent / 2:.1%}"
    assert (
        said == f"2 epochs cost {share} of the FLOPs of dense training in as many, and 55.0% of its time, as measured."
    )
    shown = page(run, tmp_path / "r.html")
    assert "55.0%" in shown.cells
    assert "Loss and metric, by epochs, compute and measured time" in (tmp_path / "r.html").read_text()


def test_spectra_before_and_after_a_cut_are_those_of_the_weight():
    run = trained(dr.schedules.warm_up(2), epochs=3)
    before, after = run.history[2].switch_spectra["2.weight"]
    assert len(before) == 32
    rank = next(row.rank for row in dr.plan_of(run.net).sites if row.site.name == "2.weight")
    assert after == pytest.approx(before[:rank] + (0.0,) * (32 - rank), rel=2e-3)
    assert run.history[1].switch_spectra == {}
    error = run.history[2].switch_error["2.weight"]
    assert error**2 == pytest.approx(sum(v * v for v in before[rank:]) / sum(v * v for v in before), rel=5e-3)


def test_spectra_are_recorded_where_a_schedule_names_sites_by_pattern():
    run = trained(lambda state: {"*": dr.Phase.LOW} if state.epoch == 1 else {}, epochs=2)
    assert set(run.history[1].switch_spectra) == set(run.history[1].switch_error) == {"0.weight", "2.weight"}


def test_the_map_of_a_site_in_groups_is_over_all_its_singular_values():
    from dynrank_fx.report.page import _most

    for layer, most in ((nn.Conv2d(8, 12, 3, groups=2), 12), (nn.Conv2d(8, 12, 3), 12), (nn.Linear(8, 12), 8)):
        x = torch.randn(2, 8, 5, 5) if isinstance(layer, nn.Conv2d) else torch.randn(2, 8)
        for layout in (dr.ChannelLayout, dr.TuckerLayout):
            net = dr.transform(
                nn.Sequential(layer), (x,), rank=dr.Fixed(2), conv_layout=layout, allow_unprofitable=True
            )
            (row,) = dr.plan_of(net).sites
            assert _most(row) == net.get_submodule("0").spectrum().numel() == most


def test_the_metric_after_truncation_is_that_of_the_truncated_model(tmp_path):
    run = trained(dr.schedules.always(dr.Phase.FULL), epochs=2)
    said = run.history[-1].truncated
    assert not run.history[0].truncated
    assert said["eval_loss"] != run.history[-1].eval_loss
    assert any(f"{said['eval_metric']:.2%}" in cell for cell in page(run, tmp_path / "r.html").cells)
    low = trained(dr.schedules.always(dr.Phase.LOW), epochs=2).history[-1]
    assert low.truncated == {"eval_loss": low.eval_loss, "eval_metric": low.eval_metric}


@pytest.mark.parametrize("last", [dr.Phase.LOW, dr.Phase.ADAPTOR])
def test_every_phase_and_a_name_that_is_no_html(last, tmp_path):
    run = trained(dr.schedules.FullBetween(1, 2, last), epochs=3)
    text = page(run, tmp_path / "r.html", title="<script>&")
    assert "<script>" not in (tmp_path / "r.html").read_text()
    assert last.name in text.cells


def test_without_spectra_there_are_no_ranks_to_draw(tmp_path):
    run = trained(dr.schedules.warm_up(1), epochs=2, spectra=False)
    assert [alt for alt, _ in page(run, tmp_path / "r.html").pictures] == ["Loss and metric, by epochs and by compute"]


def test_a_run_without_an_epoch_is_told(tmp_path):
    with pytest.raises(dr.StoreError, match="a run has no finished epoch yet"):
        write_page([], dr.plan_of(trained(dr.schedules.warm_up(1), epochs=1).net), tmp_path / "r.html", title="a run")
    assert not (tmp_path / "r.html").exists()


# The verdict


def test_the_page_opens_with_a_verdict_and_the_next_command(tmp_path):
    run, dense = trained(dr.schedules.warm_up(2)), trained(dr.schedules.always(dr.Phase.FULL))
    about = About(6, "accuracy", {"seed": "7"}, ("dense-run", dense.history), "dynrank-fx export r -o <m>.onnx")
    text = page(run, tmp_path / "r.html", about=about)
    cost, reached, beside = verdict(run.history, dr.plan_of(run.net), about)
    last, plan = run.history[-1], dr.plan_of(run.net)
    assert cost == f"4 of 6 epochs cost {last.spent / 4:.1%} of what dense training costs in as many."
    small = f"{plan.low_params / plan.total_params:.1%} of the dense model's parameters"
    assert reached.startswith(f"The held-out accuracy is {last.eval_metric:.2%}")
    assert reached.endswith(f"{small}.")
    gap = last.eval_metric - dense.history[-1].eval_metric
    assert beside.startswith(
        f"The dense run (dense-run) reached {dense.history[-1].eval_metric:.2%} in 4 epochs: this one "
    )
    assert (f"{100 * abs(gap):.2f} points {'more' if gap > 0 else 'less'}" if round(gap, 4) else "as much") in beside
    opening = (tmp_path / "r.html").read_text().partition("<h2>")[0]
    for part in (cost, reached.replace("'", "&#x27;"), beside, "dynrank-fx export r -o &lt;m&gt;.onnx"):
        assert part in opening
    assert text.cells[-2:] == ["seed", "7"]


def test_what_is_not_known_is_not_said_to_be(tmp_path):
    run = trained(dr.schedules.warm_up(1), epochs=2)
    plan = dr.plan_of(run.net)
    assert verdict(run.history, plan, About())[-1].startswith("How dense training does is not known here")
    history = [record.with_figures(eval_metric=None, truncated={}) for record in run.history]
    about = About(dense=("d", history))
    assert verdict(history, plan, about)[1].startswith("The held-out loss is ")
    assert verdict(history, plan, about)[2] == "d has no held-out metric to compare with."
    assert [score(value) for value in (0.5, 1.5, -2.0)] == ["50.00%", "1.5", "-2"]


def test_sites_that_share_a_reason_are_told_together():
    sites = ["a.weight", "b.weight", "b.weight.c", "d"]
    reasons = [
        "cut a.weight: beyond rank 8 is 0.5% of its energy",
        "cut b.weight: beyond rank 16 is 0.9% of its energy",
        "cut b.weight.c: beyond rank 8 is 0.7% of its energy",
        "inflate d: its effective rank is 4 of 8",
        "FULL for 2 of 4 sites: 1.25 dense epochs are left",
    ]
    assert grouped(reasons, sites) == [
        "cut each of 3 sites: beyond rank 8 to 16 is 0.5% to 0.9% of its energy (a.weight, b.weight, b.weight.c)",
        "inflate d: its effective rank is 4 of 8",
        "FULL for 2 of 4 sites: 1.25 dense epochs are left",
    ]
    many = grouped([f"cut s{i}: rank {i}" for i in range(9)], [f"s{i}" for i in range(9)])
    assert many == ["cut each of 9 sites: rank 0 to 8 (s0, s1, s2, s3 and 5 more)"]
    assert grouped(["as planned"], []) == ["as planned"]


def test_an_effective_rank_is_judged_by_the_rank_that_is_planned():
    assert judged(45.7, dr.Phase.FULL, 32) == "needs more than rank 32"
    assert judged(20.0, dr.Phase.FULL, 32) == "fits into rank 32"
    assert judged(10.0, dr.Phase.LOW, 32) == "rank 32 is more than enough"
    assert judged(20.0, dr.Phase.LOW, 32) == "rank 32 is used"
    assert judged(31.0, dr.Phase.LOW, 32) == "rank 32 is used up"


def test_the_axes_have_whole_epochs():
    from dynrank_fx.report.run_plots import losses, rank_curves

    run = trained(dr.schedules.warm_up(1), epochs=3)
    for axes in (rank_curves(run.history).axes[0], losses(run.history, "accuracy").axes[0]):
        assert all(mark == round(mark) for mark in axes.get_xticks())


def test_the_page_of_a_long_run_is_bounded_and_says_what_it_leaves_out(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "MOST_EPOCHS", 20)
    run = trained(dr.schedules.interleave(low=1, full=1), epochs=2, spectra=False)
    history = [replace(run.history[i % 2], epoch=i, spent=0.8 * (i + 1)) for i in range(3000)]
    write_page(history, dr.plan_of(run.net), tmp_path / "p.html", title="long")
    page = (tmp_path / "p.html").read_text()
    assert len(page) < 200_000
    assert "The pictures show 20 of the 3,000 epochs, evenly spread." in page
    assert "The first and the last 100; 2,800 between them are in history.jsonl." in page
    rows = re.findall(r'<tr><td class="number">(\d+)</td><td>(?:LOW|FULL)</td><td>', page)
    assert (len(rows), rows[0], rows[-1]) == (200, "1", "3000")


def test_thinned_epochs_are_evenly_spread_from_the_first_to_the_last():
    record = EpochRecord(epoch=0, phases={}, lr=0.1, spent=1.0)
    epochs = [each.epoch for each in plots.thinned([replace(record, epoch=i) for i in range(2000)])]
    assert (len(epochs), epochs[0], epochs[-1]) == (300, 0, 1999)
    assert {b - a for a, b in itertools.pairwise(epochs)} == {6, 7}


def test_the_time_of_the_steps_is_told_beside_what_as_many_in_full_would_take() -> None:
    full, low, both = ({"a": a, "b": b} for a, b in ((FULL, FULL), (LOW, LOW), (FULL, LOW)))
    timed = ((full, 0.2, 10), (full, 0.4, 10), (low, 0.15, 20), (both, 0.3, 10), (full, 0.3, 10))
    history = [
        EpochRecord(epoch=i, phases=phases, lr=0.1, spent=0.0, step_seconds=seconds, steps=steps)
        for i, (phases, seconds, steps) in enumerate(timed)
    ]
    assert time_share(history) == pytest.approx((2 + 4 + 3 + 3 + 3) / (0.3 * 60))
    assert time_share([record for record in history if record.phases != full]) is None
    assert time_share([*history, replace(history[0], step_seconds=None)]) is None
