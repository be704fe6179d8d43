"""What the columns of the neighbours are computed by, on values that are known; the whole of it where they are
installed.
"""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from benchmarks.measuring import DIGITS
from benchmarks.neighbours import (
    Ours,
    agree,
    compiled_step,
    follows,
    is_plain,
    mean_rank,
    neighbours,
    require,
    share_changed,
    step_flops,
    succeeds,
)


def test_changes_of_weights_are_counted_and_their_ranks_taken():
    column, row = torch.randn(8, 1).double(), torch.randn(1, 4).double()
    changes = {"rank 1 of 4": column @ row, "rank 2 of 2": torch.eye(2).double(), "frozen": torch.zeros(30)}
    assert share_changed(changes) == (32 + 2) / (32 + 4 + 30)
    assert mean_rank(changes) == pytest.approx((1 / 4 + 1) / 2)


def test_the_dense_model_has_the_flops_of_itself_and_low_has_fewer():
    dense, net = DIGITS.model(), Ours().model(DIGITS)
    assert step_flops(DIGITS, net) == step_flops(DIGITS, dense)
    optimizer, average = torch.optim.SGD(net.parameters(), lr=0.1), AveragedModel(net)
    Ours().change_(DIGITS, net, optimizer, average)
    assert step_flops(DIGITS, net) < 0.4 * step_flops(DIGITS, dense)


def test_an_average_of_other_shapes_does_not_follow(capsys):
    def averaged(model: nn.Module) -> AveragedModel:
        return AveragedModel(copy.deepcopy(model), multi_avg_fn=get_ema_multi_avg_fn(0.5))

    x, model = torch.randn(3, 4), nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    assert follows(averaged(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))), model, x)
    other = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    assert not follows(averaged(other), model, x)
    assert capsys.readouterr().err.startswith("RuntimeError: The size of tensor"), "the reason is told"


def test_plain_are_torchs_own_layers_and_those_of_the_model():
    class Own(nn.Module):
        pass

    class Adapter(nn.Linear):
        pass

    dense = nn.Sequential(Own(), nn.Linear(2, 2))
    assert is_plain(nn.Sequential(Own(), nn.Sequential(nn.Linear(2, 1), nn.Linear(1, 2))), dense)
    assert not is_plain(nn.Sequential(Own(), Adapter(2, 2)), dense)
    net = Ours().model(DIGITS)
    assert not is_plain(net, DIGITS.model()), "its sites are classes of this package"
    assert is_plain(Ours().result(net), DIGITS.model())


def test_a_check_that_raises_or_disagrees_is_a_no(capsys):
    class Breaks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = DIGITS.model()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            torch._dynamo.graph_break()
            return self.inner(x)

    assert not succeeds(lambda: compiled_step(DIGITS, Breaks()))
    assert capsys.readouterr().err
    assert not agree(torch.ones(3), torch.tensor([1.0, 1.0, 1.01]))
    assert agree(torch.ones(3), torch.tensor([1.0, 1.0, 1.00001]))


def test_a_neighbour_that_is_missing_is_told_with_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", sys.modules.get("torchvision"))  # put back afterwards
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"installed by pip install 'dynrank-fx\[neighbours\]'"):
        require()


@pytest.mark.fuzz
@pytest.mark.filterwarnings("ignore")
def test_it_measures_where_the_neighbours_are_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", sys.modules.get("torchvision"))
    pytest.importorskip("torch_pruning")
    try:
        require()
    except ImportError as error:
        pytest.skip(str(error))
    columns = zip(*neighbours(True).rows, strict=True)
    _, whats, *tools = columns
    ours, lora, pruning = (dict(zip(whats, cells, strict=True)) for cells in tools)
    assert ours["rank of that change, over the full rank"] > 0.9
    assert lora["rank of that change, over the full rank"] < 0.5
    assert lora["parameters of the result"] == 1.0
    held = "then the optimizer holds exactly the parameters that train"
    assert (ours[held], lora[held], pruning[held]) == ("yes", "–", "no")
