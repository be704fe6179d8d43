"""Parameters in parts: the whole of one, and others in its place within the group that is sent together."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from switching import chain
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

import dynrank_fx as dr
from dynrank_fx.processes import Outline, Shards, is_part, is_sharded, outlined, own, part_as, shards, whole
from dynrank_fx.rewrite import switched_modules

LOW, FULL = dr.Phase.LOW, dr.Phase.FULL


@pytest.fixture(autouse=True)
def _one_process(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_a_part_becomes_the_whole_and_the_whole_a_part() -> None:
    net = chain()
    plain = net.get_parameter("0.weight").detach().clone()
    assert not Shards([net])
    fully_shard(net)
    part = net.get_parameter("0.weight")
    assert (is_part(part), is_part(plain), is_sharded(net), is_sharded(nn.Linear(2, 2))) == (True, False, True, False)
    assert whole(plain) is plain
    assert own(plain) is plain
    gathered = whole(part)
    assert torch.equal(gathered, plain)
    assert gathered.data_ptr() != own(part).data_ptr(), "what is done to it does not reach the part"
    value = torch.randn(5, 3)
    again = part_as(value, part, axis=0)
    assert isinstance(again, DTensor)
    assert torch.equal(whole(again), value)
    outline = Outline.of(again)
    assert outline is not None
    assert torch.equal(whole(outline.around(own(again))), value)
    assert Outline.of(plain) is None
    assert outlined(plain) is plain
    assert str(outlined(again)) == "torch.float32 (5, 3) in parts (Shard(dim=0),) of 1"


def test_parameters_are_exchanged_in_their_group_and_its_order() -> None:
    net = chain()
    fully_shard([net.get_submodule("0"), net.get_submodule("1")])
    fully_shard(net)
    pair, rest = (net.get_submodule(name)._get_fsdp_state()._fsdp_param_groups[0] for name in ("0", ""))
    dr.enter_(net, {"0.weight": LOW, "2.weight": LOW})
    names = [
        [(p._module_info.module.site, p._module_info.param_name) for p in group.fsdp_params] for group in (pair, rest)
    ]
    zero, one, two = "0.weight", "1.weight", "2.weight"
    assert names[0] == [(zero, "left"), (zero, "right"), (zero, "bias"), (one, "weight"), (one, "bias")]
    assert names[1] == [(two, "left"), (two, "right"), (two, "bias")]
    hooks = [len(module._load_state_dict_post_hooks) for module in switched_modules(net)[zero]]
    dr.enter_(net, FULL)
    dr.enter_(net, {"0.weight": LOW})
    assert [len(module._load_state_dict_post_hooks) for module in switched_modules(net)[zero]] == hooks
    assert [p.sharded_param for p in pair.fsdp_params] == [p for m in pair.modules for p in m.parameters()]


def test_a_weight_is_cut_as_before_when_it_comes_again() -> None:
    net = chain()
    fully_shard(net, shard_placement_fn=lambda p: Shard(1) if p.ndim == 2 else None)
    dr.enter_(net, LOW)
    assert net.get_parameter("0.left").placements == (Shard(0),)
    dr.enter_(net, FULL)
    assert net.get_parameter("0.weight").placements == (Shard(1),)


def test_tied_weights_of_two_groups_are_refused() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)
            self.b.weight = self.a.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x))

    net = dr.transform(Tied(), (torch.randn(2, 16),))
    fully_shard(net.get_submodule("a"))
    with pytest.raises(dr.TransitionError, match=r"a\.weight is tied to modules outside of its FSDP group"):
        dr.enter_(net, LOW)
    together = dr.transform(Tied(), (torch.randn(2, 16),))
    fully_shard(together)
    dr.enter_(together, LOW)
    a, b = switched_modules(together)["a.weight"]
    assert a.factors[0] is b.factors[0]
    together(torch.randn(2, 16)).sum().backward()


def test_another_inside_of_torch_is_refused_before_anything_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    net = chain()
    fully_shard(net)
    monkeypatch.setattr(shards, "_USED", (*shards._USED, "what_it_does_not_have"))
    with pytest.raises(dr.TransitionError, match=r"parameters of fully_shard in another way than torch 2\.11"):
        dr.enter_(net, LOW)
    assert set(dr.phases_of(net).values()) == {FULL}
