"""Matrices whose rows several processes have: beside the whole matrix, and torch.linalg.svd of it in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from memory import Watched
from several import in_processes
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import dynrank_fx as dr
from dynrank_fx.layouts import LinearLayout
from dynrank_fx.phases import sharding, switch
from dynrank_fx.phases.rows import Rows, error_of
from dynrank_fx.processes import Processes, own, started

DRAW = torch.Generator().manual_seed(2)


def _matrix(m: int, n: int, decay: float, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """With singular values σ_i = scale · decay^i."""
    U, V = (torch.linalg.qr(torch.randn(size, n, generator=DRAW, dtype=torch.float64)).Q for size in (m, n))
    return ((U * scale * decay ** torch.arange(n)) @ V.mT).to(dtype)


# Narrow and wide enough for a Gram matrix in float32; a flat spectrum, and one that float32 cannot tell apart; sizes at
# which squares overflow and vanish; half precision; rows that are fewer than the rank in one of the processes.
CASES: dict[str, tuple[Tensor, int]] = {
    "narrow": (_matrix(50, 20, 0.8), 5),
    "wide": (_matrix(301, 160, 0.97), 16),
    "steep": (_matrix(200, 140, 0.6), 30),
    "large": (_matrix(60, 20, 0.8, 1e25), 4),
    "small": (_matrix(60, 20, 0.8, 1e-25), 4),
    "half": (_matrix(60, 20, 0.8, 1.0, torch.bfloat16), 4),
    "few": (_matrix(9, 8, 0.7), 7),
    "one": (_matrix(1, 1, 0.7), 1),
    "zero": (torch.zeros(10, 6), 2),
}


def _mine(tensor: Tensor, processes: Processes) -> Tensor:
    """The rows of this process, as FSDP2 cuts them."""
    parts = [*tensor.chunk(processes.count), *[tensor[:0]] * processes.count]
    return parts[processes.rank]


def _computed(rank: int) -> dict[str, Any]:
    processes = started()
    rows, found = Rows(processes, processes.count - 1), dict[str, Any]()
    for name, (W, r) in CASES.items():
        mine = _mine(W, processes)
        left, right = rows.split(mine, r)
        moments = _mine(torch.cat([W, W], 1)[:, : W.shape[1]].float().flip(1), processes)
        back = rows.pulled_back((left.float(), right.float()), moments)
        kept, bases = rows.followed(mine.float(), r)
        again, _ = rows.followed(mine.float(), r, bases)
        found[name] = {
            "left": left,
            "right": right,
            "back": back,
            "kept": (kept, again),
            "dense": [f((left.float(), right.float()), back) for f in (rows.first_moment, rows.second_moment)],
            "error": error_of(rows, rows.join((left, right)), mine),
        }
    return found


def _compared(each: list[dict[str, Any]]) -> None:
    layout = LinearLayout()
    for name, (W, r) in CASES.items():
        parts = [done[name] for done in each]
        left, right = torch.cat([part["left"] for part in parts]), parts[0]["right"]
        assert all(torch.equal(part["right"], right) for part in parts), name
        assert left.dtype == right.dtype == W.dtype
        sigma = torch.linalg.svdvals(W.double())
        least, eps = sigma[r:].norm(), torch.finfo(W.dtype).eps
        assert (W.double() - left.double() @ right.double()).norm() <= 1.001 * least + 4 * eps * sigma.norm(), name
        assert parts[0]["error"] == pytest.approx(float(least / sigma.norm().clamp_min(1e-30)), rel=2e-3, abs=4 * eps)
        exact = (left.float(), right.float())
        moments = torch.cat([W, W], 1)[:, : W.shape[1]].float().flip(1)
        back = torch.cat([part["back"][0] for part in parts]), parts[0]["back"][1]
        for ours, theirs in zip(back, layout.pulled_back(exact, moments), strict=True):
            assert (ours - theirs).norm() <= 1e-5 * theirs.norm()
        for index, theirs in enumerate((layout.first_moment(exact, back), layout.second_moment(exact, back))):
            ours = torch.cat([part["dense"][index] for part in parts])
            if bool(torch.isfinite(theirs).all()):  # squares of 1e25 are infinite in one process too
                assert (ours - theirs).norm() <= 1e-3 * theirs.norm(), name
        for index in (0, 1):
            # Else nothing tells the basis, or what a landing takes of it is infinite in one process too.
            if least > 1e-4 * sigma[0] and 1e-10 < sigma[0] < 1e10:
                kept = torch.cat([part["kept"][index] for part in parts])
                assert (W.double() - kept.double()).norm() <= 1.001 * least + 4 * eps * sigma.norm(), name


def test_alone_rows_are_the_whole() -> None:
    _compared([_computed(0)])


class _Tall(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 41), nn.Linear(41, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


def _in_each(rank: int) -> dict[str, Any]:
    """Which sites were gathered: the wide ones that are cut, and no other."""
    gathered = list[str]()
    real = sharding.in_hand

    def noting(groups: Any, *args: Any, **kwargs: Any) -> Any:
        gathered.extend(group.name for group in groups)
        return real(groups, *args, **kwargs)

    switch.in_hand = noting
    found: dict[str, Any] = {"computed": _computed(rank)}
    torch.manual_seed(0)
    net = dr.transform(_Tall(), (torch.randn(2, 16),), rank=dr.Fixed(3))
    fully_shard(net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    for name, phase in (("cut", dr.Phase.LOW), ("joined", dr.Phase.FULL), ("again", dr.Phase.LOW)):
        net(torch.randn(4, 16)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        gathered.clear()
        transition = dr.enter_(net, phase, optimizer)
        found[name] = list(gathered), {change.site: change.error for change in transition.changes}
    shapes = {(tuple(p.shape), tuple(optimizer.state[p]["exp_avg"].shape)) for p in net.parameters()}
    found["shapes"] = all(one == other for one, other in shapes)
    found["memory"] = _peak()
    switch.in_hand = real
    return found


def _peak() -> list[int]:
    """Bytes that a switch takes at most, on top of the parts that are there: of many equal sites."""
    torch.manual_seed(0)
    layers = [nn.Linear(*((96, 64) if index % 2 else (64, 96))) for index in range(12)]
    net = dr.transform(nn.Sequential(*layers), (torch.randn(2, 64),), rank=dr.Fixed(4))
    fully_shard(net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    net(torch.randn(4, 64)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    net.reshard()
    peaks = []
    for phase in (dr.Phase.LOW, dr.Phase.FULL):
        before = _held(net, optimizer)
        with Watched() as watched:
            dr.enter_(net, phase, optimizer)
        peaks.append(watched.peak - max(0, _held(net, optimizer) - before))
    return peaks


def _held(net: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the parts that this process has."""
    states = [value for state in optimizer.state.values() for value in state.values()]
    return sum(own(each).untyped_storage().nbytes() for each in (*net.parameters(), *states))


def test_two_processes_have_the_rows_of_one_matrix() -> None:
    each = in_processes(_in_each)
    _compared([done["computed"] for done in each])
    for done in each:
        assert done["cut"][0] == done["again"][0] == ["down.weight"]
        assert done["joined"][0] == []
        assert done["shapes"]
        assert done["cut"][1] == each[0]["cut"][1]
        # Of 12 sites of 64x96 with two moments never more than one in full, and what its SVD takes in float64.
        assert max(done["memory"]) < 4 * 3 * 4 * 64 * 96
