"""What differs between processes, or fails in one, is an error in all of them, which leaves all as they were."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from several import in_processes
from switching import assert_same, chain, snapshot, trained
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import dynrank_fx as dr
from dynrank_fx.phases import replace, switch
from dynrank_fx.processes import digest_of
from dynrank_fx.rewrite import switched_modules

FULL, LOW = dr.Phase.FULL, dr.Phase.LOW


@contextmanager
def _replaced(owner: object, name: str, value: object) -> Iterator[None]:
    real = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, real)


def _flipped(key: str) -> Callable[..., Any]:
    """Installs values of which rank 1 has the second site's with other signs: factors, or what Adam has of them."""
    real = switch._install

    def install(move: Any, news: Any, *others: Any) -> Any:
        if torch.distributed.get_rank() == 1 and move.group.name == "1.weight":
            for value, state in news[0].values[0]:
                (value if key == "values" else state[key]).neg_()
        return real(move, news, *others)

    return install


def _failing(error: BaseException, site: str) -> Callable[..., Any]:
    """A journal that fails in rank 1 at this site."""
    real = replace.Journal.keep

    def keep(self: Any, modules: Any, *others: Any) -> None:
        if torch.distributed.get_rank() == 1 and modules[0].site == site:
            raise error
        real(self, modules, *others)

    return keep


def _no_svd(*_: object) -> None:
    raise torch.linalg.LinAlgError("the algorithm failed to converge")


def _said(do: Callable[[], object]) -> str:
    try:
        do()
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def _everything(rank: int) -> dict[str, str]:
    net = chain()
    wrapper = DistributedDataParallel(net)
    optimizer = trained(net)
    last = switched_modules(net)["2.weight"][0]
    said: dict[str, str] = {}

    def refused(name: str, do: Callable[[], object]) -> None:
        before = snapshot(net, optimizer)
        said[name] = _said(do)
        assert_same(net, optimizer, before)

    def low() -> object:
        return dr.enter_(wrapper, LOW, optimizer)

    for key in ("values", "exp_avg"):
        with _replaced(switch, "_install", _flipped(key)):
            refused(f"flipped {key}", low)
    for name, error in (("disk", OSError(errno.ENOSPC, "No space left")), ("interrupt", KeyboardInterrupt())):
        with _replaced(replace.Journal, "keep", _failing(error, "1.weight")):
            refused(name, low)
    if rank == 1:
        with _replaced(switch, "factors_of", _no_svd):
            refused("svd", low)
    else:
        refused("svd", low)

    only_there = torch.full((), float(rank))
    with _disturbed(last.weight, only_there * 1e-3):
        refused("weight", low)
    with _disturbed(last.weight, torch.full((), float("nan") if rank else 0.0)):
        said["nan"] = _said(low)
    with _disturbed(optimizer.state[last.weight]["exp_avg"], only_there * 1e-9):
        refused("moment", low)
    optimizer.param_groups[1]["lr"] *= 1 + rank
    refused("rate", low)
    optimizer.param_groups[1]["lr"] /= 1 + rank
    refused("targets", lambda: dr.enter_(wrapper, {"0.weight": LOW} | ({"2.weight": LOW} if rank else {}), optimizer))
    refused("nothing in one", lambda: dr.enter_(wrapper, LOW if rank else FULL, optimizer))
    refused("pattern", lambda: dr.enter_(wrapper, {"9.*" if rank else "1.*": LOW}, optimizer))
    plan = dr.plan_of(net).with_ranks({"1.weight": 2 + rank})
    refused("ranks", lambda: dr.replan_(wrapper, plan, optimizer))

    average = AveragedModel(net)
    torch.manual_seed(rank)
    for phase in (LOW, FULL, dr.Phase.ADAPTOR, FULL, LOW):
        assert dr.enter_(net, phase, optimizer, averages=average)
        _step(wrapper, optimizer, rank)
        average.update_parameters(net)
    dr.replan_(wrapper, dr.plan_of(wrapper).with_ranks({"1.weight": 2}), optimizer, averages=average)
    _step(wrapper, optimizer, rank)
    net(torch.randn(2, 16)).sum().backward() if rank else None
    refused("pending", lambda: dr.enter_(wrapper, FULL, optimizer, averages=average))
    dr.randomize_(wrapper)
    held = {**net.state_dict(), **{f"average {name}": value for name, value in average.state_dict().items()}}
    said["at the end"] = repr(digest_of(held))
    return said


@contextmanager
def _disturbed(tensor: torch.Tensor, by: torch.Tensor) -> Iterator[None]:
    with torch.no_grad():
        before = tensor.clone()
        tensor += by
        yield
        tensor.copy_(before)


def _step(wrapper: nn.Module, optimizer: torch.optim.Optimizer, rank: int) -> None:
    inputs = torch.randn(4, 16, generator=torch.Generator().manual_seed(rank))
    wrapper(inputs).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_what_differs_or_fails_in_one_process_is_an_error_in_both() -> None:
    first, second = in_processes(_everything)
    undone = "net and optimizers are as before"
    for name, what, then in (
        ("flipped values", "left of 1.weight", undone),
        ("flipped exp_avg", "exp_avg of left of 1.weight", undone),
        ("weight", "2.weight", "nothing was switched"),
        ("moment", "exp_avg of 2.weight", "nothing was switched"),
        ("rate", "lr of parameter group 1 of AdamW", "nothing was switched"),
        ("targets", "what 2.weight is to become", "nothing was switched"),
        ("nothing in one", "what 0.weight is to become", "nothing was switched"),
        ("ranks", "the rank that 1.weight is to have", "nothing was switched"),
    ):
        assert first[name] == second[name], name
        assert first[name].startswith(f"TransitionError: {what} is not the same in all processes, in process 1"), name
        assert then in first[name], name
    elsewhere = "failed in process 1 of 2, and nothing was done in any: "
    for name, there, here in (
        ("disk", "TransitionError: no room to keep 1.weight safe", f"the switch of 1.weight {elsewhere}no room"),
        ("interrupt", "KeyboardInterrupt: ", f"the switch of 1.weight {elsewhere}KeyboardInterrupt"),
        ("svd", "_LinAlgError: ", f"the switch of 1.weight {elsewhere}_LinAlgError"),
        ("nan", "TransitionError: 2.weight has non-finite weights", f"the switch {elsewhere}2.weight has non-finite"),
        ("pattern", "TransitionError: the pattern '9.*' matches no site", f"the switch {elsewhere}the pattern"),
        ("pending", "TransitionError: 0.weight has a pending", f"the switch {elsewhere}0.weight has a pending"),
    ):
        assert second[name].startswith(there), (name, second[name])
        assert first[name].startswith(f"TransitionError: {here}"), (name, first[name])
    assert first["at the end"] == second["at the end"]
