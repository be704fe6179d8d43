"""What the first process decides of spectra; of several processes see tests/phases/test_sharding.py."""

from __future__ import annotations

import pytest
import torch
from switching import chain

from dynrank_fx.processes import ALONE
from dynrank_fx.training import train_state
from dynrank_fx.training.deciding import SitesSpectra, decided


def test_spectra_are_computed_when_they_are_looked_at_and_once() -> None:
    net, asked = chain(), list[str]()
    spectra = SitesSpectra(net)
    assert (len(spectra), list(spectra)) == (3, ["0.weight", "1.weight", "2.weight"])
    spectra.ask = asked.append
    values = torch.tensor([spectra["1.weight"], spectra["1.weight"]]).double()
    assert asked == ["1.weight"]
    torch.testing.assert_close(values[0], torch.linalg.svdvals(net.get_parameter("1.weight").detach().double()))
    assert not spectra.in_parts


def test_alone_a_schedule_decides_by_itself() -> None:
    net = chain()
    state = train_state(net, torch.optim.SGD(net.parameters(), lr=0.1), 0, 2)
    assert decided(ALONE, state, lambda: len(state.spectra)) == 3
    with pytest.raises(KeyError):
        decided(ALONE, state, lambda: state.spectra["nothing"])
