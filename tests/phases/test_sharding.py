"""Sites in parts (FSDP2): what a switch refuses, carries and undoes, and what else reads sharded weights."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from several import in_processes
from switching import Pair, chain, trained
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import fully_shard

import dynrank_fx as dr
from dynrank_fx.phases import switch, tried
from dynrank_fx.processes import Heard, digest_of, is_part, outlined, own, started, whole
from dynrank_fx.rewrite import switched_modules
from dynrank_fx.training import PhaseSettings, cost_of

FULL, LOW, ADAPTOR = dr.Phase.FULL, dr.Phase.LOW, dr.Phase.ADAPTOR
DRAW = torch.Generator().manual_seed(5)
X = torch.randn(8, 16, generator=DRAW)


def _sharded(net: nn.Module, **choices: Any) -> nn.Module:
    fully_shard(net, **choices)
    return net


def _said(do: Callable[[], object], *kinds: type[Exception]) -> str:
    try:
        do()
    except (dr.DynrankError, *kinds) as error:
        return str(error)
    return ""


def _snapshot(net: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, object]:
    """What this process holds, to the bit, and as which objects."""
    held: dict[str, object] = {f"phase of {name}": phase for name, phase in dr.phases_of(net).items()}
    for name, p in net.named_parameters():
        held |= {name: own(p).clone(), f"cut of {name}": outlined(p), f"grad of {name}": p.grad is None}
        held |= {f"{key} of {name}": own(value).clone() for key, value in optimizer.state[p].items()}
    groups = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    names = {id(p): name for name, p in net.named_parameters()}
    return digest_of(held) | {"groups": [[names[each] for each in group] for group in groups]}


def _refused(rank: int) -> dict[str, str]:
    said: dict[str, str] = {}
    early = chain()
    optimizer = trained(early)
    fully_shard(early)
    said["early"] = _said(lambda: dr.enter_(early, LOW, optimizer))
    said["early phases"] = _said(lambda: dr.Phases(early, optimizer, dr.schedules.always(LOW), steps=4))

    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x)

    nested = dr.transform(Nested(), (X,))
    fully_shard(nested.get_submodule("block"))
    said["unreached"] = _said(lambda: dr.enter_(nested, LOW))
    net = _sharded(chain())
    optimizer = trained(net)
    dr.enter_(net, LOW, optimizer)
    before = _snapshot(net, optimizer)
    net(X).sum().backward()
    said["pending"] = _said(lambda: dr.enter_(net, FULL, optimizer))
    optimizer.zero_grad()
    net.set_requires_gradient_sync(False)
    net(X).sum().backward()
    said["unreduced"] = _said(lambda: dr.enter_(net, FULL, optimizer))
    net.set_requires_gradient_sync(True)
    net(X).sum().backward()
    optimizer.zero_grad()
    moment = optimizer.state[switched_modules(net)["0.weight"][0].factors[0]]["exp_avg"]
    kept = own(moment).clone()
    if rank == 1:
        own(moment)[0, 0] = torch.inf
    said["moment"] = _said(lambda: dr.enter_(net, FULL, optimizer))
    own(moment).copy_(kept)
    assert _snapshot(net, optimizer) == before
    for name, width, seed in (("seeds", 16, rank), ("sizes", 16 - 4 * rank, 0)):
        torch.manual_seed(seed)
        unlike = nn.Sequential(nn.Linear(16, width), nn.Linear(width, 16))
        unlike = _sharded(dr.transform(unlike, (X,), rank=dr.Fixed(3)))
        optimizer = torch.optim.SGD(unlike.parameters(), lr=0.1)
        said[name] = _said(lambda net=unlike: dr.enter_(net, FULL))
        said[f"{name} of phases"] = _said(
            lambda net=unlike, o=optimizer: dr.Phases(net, o, dr.schedules.always(FULL), steps=4)
        )
    torch.manual_seed(rank)
    loaded = dr.transform(nn.Sequential(nn.Linear(16, 16)), (X,), rank=dr.Fixed(3), leave=())
    state = started().from_one(0, lambda: dict(loaded.state_dict()), dr.DynrankError, "")
    set_model_state_dict(_sharded(loaded), state, options=StateDictOptions(full_state_dict=True))
    said["loaded"] = _said(lambda: dr.enter_(loaded, LOW))
    said["copy"] = _said(lambda: dr.truncate(net))
    said["inlined"] = _said(lambda: dr.inline(net))
    return said


def _undone(rank: int) -> dict[str, bool]:
    """A failure at the second site, of one process: all is as before, and goes on as if nothing had been."""
    same: dict[str, bool] = {}
    for phase, other in ((FULL, LOW), (LOW, FULL)):
        # The generator makes each right before it is trained: chain() seeds what trained() draws.
        pairs = [(each, trained(each)) for each in (_sharded(chain()) for _ in range(2))]
        net = pairs[0][0]
        for each, optimizer in pairs:
            dr.enter_(each, phase, optimizer)
        before, first = _snapshot(*pairs[0]), next(net.parameters())
        assert set(tried(net, other, lambda net=net: (net(X), dr.phases_of(net))[1]).values()) == {other}
        assert tried(net, phase, lambda: "there already") == "there already"
        same[f"tried {other.name}"] = _snapshot(*pairs[0]) == before
        assert "no room" in _failing(rank, *pairs[0], other)
        same[f"as before {other.name}"] = _snapshot(*pairs[0]) == before and next(net.parameters()) is first
        for each, optimizer in pairs:
            for then in (other, phase):
                each(X[rank::2]).square().sum().backward()
                optimizer.step()
                optimizer.zero_grad()
                dr.enter_(each, then, optimizer)
        same[f"goes on {other.name}"] = _snapshot(*pairs[0]) == _snapshot(*pairs[1])
    return same


def _failing(rank: int, net: nn.Module, optimizer: torch.optim.Optimizer, phase: dr.Phase) -> str:
    """What is said where the second site cannot be installed in process 1."""
    install, count = switch._install, [0]

    def failing(*args: Any) -> Any:
        count[0] += 1
        done = install(*args)
        if count[0] == 2 and rank == 1:
            raise dr.TransitionError("no room")
        return done

    switch._install = failing
    try:
        return _said(lambda: dr.enter_(net, phase, optimizer))
    finally:
        switch._install = install


def _between(rank: int) -> list[str]:
    """What is said of a process that fails between any two messages of a switch, by rows and of whole weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 12))
    net = _sharded(dr.transform(model, (X,), rank=dr.Fixed(3), leave=(), allow_unprofitable=True))
    optimizer, hear, said = trained(net), Heard.hear, list[str]()
    for phase in (LOW, FULL):
        before, last = _snapshot(net, optimizer), 0
        while not (last and said[-1] == ""):
            count, last = itertools.count(), last + 1

            def failing(processes: Heard, at: int = last, count: Any = count) -> None:
                if next(count) + 1 == at and rank == 1:
                    raise MemoryError(f"at message {at}")
                hear(processes)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Heard, "hear", failing)
                said.append(_said(lambda phase=phase: dr.enter_(net, phase, optimizer), MemoryError))
            assert (_snapshot(net, optimizer) == before) == (said[-1] != "")
    return said


def _carried(rank: int) -> dict[str, Tensor]:
    """Pending gradients of a whole batch go to the factors, from parts as from the whole."""
    found = {}
    for sharded in (False, True):
        net = _sharded(chain()) if sharded else chain()
        optimizer = trained(net)
        (net(X).square().mean()).backward()
        dr.enter_(net, LOW, optimizer)
        site = switched_modules(net)["1.weight"][0]
        left, right = (whole(p.detach()) for p in site.factors)
        grads = [whole(p.grad) for p in site.factors]
        found[f"{sharded}"] = left @ grads[1] + grads[0] @ right  # of the weight, whatever the factors' signs
    return found


def _states(rank: int) -> None:
    """A switch before the first forward, unsharded, and after weights were loaded, of the same grouping as before."""
    net, reference = _sharded(chain(), reshard_after_forward=False), chain()
    dr.enter_(net, LOW)
    dr.enter_(net, FULL)
    torch.testing.assert_close(net(X), reference(X), atol=2.0, rtol=1.0)
    net(X)  # leaves the root unsharded
    assert not any(is_part(p) for p in net.parameters())
    dr.enter_(net, {"0.weight": LOW})
    assert all(is_part(p) for p in net.parameters())
    handle = net.unshard(async_op=True)
    dr.enter_(net, {"2.weight": LOW})
    handle.wait()
    (group,) = net._get_fsdp_state()._fsdp_param_groups
    fqns = [param._param_fqn for param in group.fsdp_params]
    assert fqns == [name for name, _ in net.named_parameters()]
    state = {name: value.detach().clone() for name, value in net.state_dict().items()}
    before = net(X).detach()
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()
    net.load_state_dict(state)
    torch.testing.assert_close(net(X), before, atol=0, rtol=0)
    dr.replan_(net, dr.plan_of(net).with_ranks({"0.weight": 2, "1.weight": 3}))
    assert tuple(switched_modules(net)["0.weight"][0].factors[0].shape) == (16, 2)
    outputs = net(X).detach()
    dr.enter_(net, ADAPTOR)
    dr.enter_(net, FULL)
    torch.testing.assert_close(net(X), outputs)


class _Looking:
    """A schedule that looks at spectra, and draws at random."""

    def __init__(self, seed: int) -> None:
        self._draw, self.seen = random.Random(seed), list[float]()

    def __call__(self, state: dr.TrainState) -> dict[str, dr.Phase]:
        self.seen += [state.spectra[name][0] for name in state.sites if self._draw.random() < 0.5]
        return {name: self._draw.choice([FULL, LOW]) for name in state.sites}


def _scheduled(net: nn.Module, x: Tensor) -> dict[str, Any]:
    """Everything that goes with a schedule."""
    settings = PhaseSettings(random_init=False, landing=True, spectra=True, decay=dr.Decay.PRODUCT, rewarm=2)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.1, eps=1e-3)
    phases = dr.Phases(net, optimizer, _turns, 4, steps=12, settings=settings)
    for _ in range(48):
        (net(x) - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert phases.diverged() is None
    return {
        "weights": {name: _weight(modules[0]) for name, modules in switched_modules(net).items()},
        "spectra": [record.to_json()["switch_spectra"] for record in phases.history],
        "cost": cost_of(net),
    }


def _phases(rank: int) -> dict[str, Any]:
    found = _scheduled(_sharded(chain()), X[rank::2])
    drawn = _sharded(chain())
    schedule, optimizer = _Looking(rank), torch.optim.SGD(drawn.parameters(), lr=1e-2)
    phases = dr.Phases(drawn, optimizer, schedule, 6, steps=1, settings=PhaseSettings(random_init=True, spectra=True))
    for _ in range(6):
        drawn(X).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    found["drawn"] = [dict(record.phases) for record in phases.history], len(schedule.seen) > 0
    found["random"] = digest_of({name: whole(p.detach()) for name, p in drawn.named_parameters()})
    return found


def _turns(state: dr.TrainState) -> dr.Phase:
    return LOW if state.epoch % 2 else FULL


def _weight(module: Any) -> Tensor:
    if module.phase == int(FULL):
        return whole(module._parameters["weight"]).detach().clone()
    return module.joined([whole(p) for p in module.factors])


def _saved(rank: int, folder: str) -> dict[str, Any]:
    torch.manual_seed(0)
    net = _sharded(dr.transform(Pair(), (X,), rank=dr.Fixed(3)))
    dr.enter_(net, {"a": LOW})
    dr.save(net, Path(folder) / "net")
    return {"outputs": net(X).detach()}


def _everything(rank: int, folder: str) -> dict[str, Any]:
    _states(rank)
    return {
        "refused": _refused(rank),
        "undone": _undone(rank),
        "between": _between(rank),
        "carried": _carried(rank),
        "phases": _phases(rank),
        "saved": _saved(rank, folder),
    }


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("sharded")
    return folder, in_processes(_everything, str(folder))


def test_what_cannot_be_switched_says_what_to_do(both: Any) -> None:
    for done in both[1]:
        said = done["refused"]
        assert "made before fully_shard" in said["early"]
        assert "made before fully_shard" in said["early phases"]
        assert "called on block, which the graph of the net never calls" in said["unreached"]
        assert "has a pending gradient" in said["pending"]
        assert "wait unreduced" in said["unreduced"]
        assert "state of 0.weight is not finite" in said["moment"]
        assert (
            "0.weight was not the same in all processes when the net was made, in process 1 of 2 it is" in said["seeds"]
        )
        assert said["sizes"] == said["seeds of phases"] == said["seeds"]
        assert "0.weight is not the same in all processes, in process 1 of 2" in said["sizes of phases"]
        assert said["loaded"] == ""
        assert "dr.save(net, folder)" in said["copy"]
        assert "dr.save(net, folder)" in said["inlined"]


def test_a_failure_in_one_process_leaves_all_as_they_were(both: Any) -> None:
    for done in both[1]:
        assert done["undone"] == dict.fromkeys(done["undone"], True)


def test_a_failure_between_two_messages_of_a_switch_keeps_nobody_waiting(both: Any) -> None:
    first, second = (done["between"] for done in both[1])
    assert len(first) > 20
    for here, there in zip(first, second, strict=True):
        assert here.endswith(f"failed in process 1 of 2, and nothing was done in any: MemoryError: {there}") or (
            here == there == ""
        )


def test_pending_gradients_in_parts_are_carried(both: Any) -> None:
    for done in both[1]:
        torch.testing.assert_close(done["carried"]["True"], done["carried"]["False"], rtol=1e-4, atol=1e-6)


def test_a_schedule_with_all_that_goes_with_it(both: Any) -> None:
    first, second = (done["phases"] for done in both[1])
    alone = _scheduled(chain(), X)
    for name, weight in alone["weights"].items():
        assert (first["weights"][name] - weight).norm() / weight.norm() < 1e-5
    for ours, theirs in zip(first["spectra"], alone["spectra"], strict=True):
        for name in theirs:
            torch.testing.assert_close(torch.tensor(ours[name]), torch.tensor(theirs[name]), rtol=2e-3, atol=1e-4)
    assert first["cost"] == alone["cost"]
    assert first["drawn"][0] == second["drawn"][0]
    assert (first["drawn"][1], second["drawn"][1]) == (True, False)
    assert first["random"] == second["random"]


def test_a_sharded_net_is_saved_whole(both: Any) -> None:
    folder, done = both
    net = dr.load(folder / "net", Pair(), (X,))
    for each in done:
        torch.testing.assert_close(net(X), each["saved"]["outputs"])
    assert {name: phase.name for name, phase in dr.phases_of(net).items()} == {"a.weight": "LOW", "b.weight": "FULL"}


def test_a_part_that_fully_shard_knows_nothing_of_is_refused(tmp_path: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        net = chain()
        module = switched_modules(net)["0.weight"][0]
        part = distribute_tensor(module.weight.detach(), init_device_mesh("cpu", (1,)))
        module._parameters["weight"] = nn.Parameter(part)
        with pytest.raises(dr.TransitionError, match=r"0\.weight is a DTensor that fully_shard knows nothing of"):
            dr.enter_(net, LOW)
    finally:
        torch.distributed.destroy_process_group()
