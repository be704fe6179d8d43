"""``pilot``: short runs of equal compute, what they say, and what to do next."""

from __future__ import annotations

import json
from collections.abc import Callable

NARROWER = """
def narrower(share):
    from torch import nn
    width = max(1, round(share * 16))
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.Flatten(),
        nn.Linear(16 * width, 2 * width), nn.Linear(2 * width, 8),
    )
"""
# Factors so large that every one of their steps is shortened.
LARGE = """
def model():
    from torch import nn
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 16), nn.Linear(16, 8))
    net[1].weight.data *= 20
    return net
"""
SHORT = ("pilot", "model.py", "--steps", "20", "--no-compile", "--rank", "1")


def test_the_table_has_each_way_and_the_next_command(write: Callable[..., str], run: Callable[..., object]) -> None:
    write()
    lines = run(*SHORT, "--exclude", "0.weight").stdout.splitlines()
    assert [line.split("  ")[0] for line in lines[2:6]] == [
        "dense, as it is", "LOW alone", "auto, 12% FULL", "auto, 40% FULL",
    ]  # fmt: skip
    assert all("20 dense steps" in line or "21 dense steps" in line or "19 dense steps" in line for line in lines[2:6])
    assert lines[7].startswith("best of the small models: ")
    assert "add narrower(share) to the model file" in lines[7]
    assert lines[8].startswith("next: dynrank-fx train model.py --rank 1 --exclude 0.weight --no-compile --schedule ")


def test_a_loss_below_zero_or_of_nothing_has_its_verdict(write: Callable[..., str], run: Callable[..., object]) -> None:
    write(more="def loss(output, batch): return F.cross_entropy(output, batch[1]) * 0 - 1")
    assert "0.0000 below the loss of dense" in run(*SHORT).stdout


def test_a_narrower_model_is_beside_them_and_the_same_seed_gives_the_same(
    write: Callable[..., str], run: Callable[..., object]
) -> None:
    write(more=NARROWER)
    found, again = (json.loads(run(*SHORT, "--json").stdout) for _ in range(2))
    assert [each["loss"] for each in found["trials"]] == [each["loss"] for each in again["trials"]]
    ways = {each["way"]: each for each in found["trials"]}
    assert list(ways)[-1] == "narrower dense"
    assert 0.7 < ways["narrower dense"]["size"] / ways["LOW alone"]["size"] < 1.4
    assert ways["narrower dense"]["options"] == []
    assert found["best"] in ways


def test_steps_in_the_measure_of_the_product_are_those_of_factors_and_of_the_next_command(
    write: Callable[..., str], run: Callable[..., object]
) -> None:
    write(more=LARGE)
    each, product = (
        {one["way"]: one for one in json.loads(run(*SHORT, "--json", *given).stdout)["trials"]}
        for given in ((), ("--factor-steps", "product"))
    )
    assert {way for way in each if each[way]["loss"] == product[way]["loss"]} == {"dense, as it is"}
    assert " --factor-steps product " in run(*SHORT, "--factor-steps", "product").stdout.splitlines()[8]


def test_what_a_pilot_cannot_do_is_refused(write: Callable[..., str], refused: Callable[..., str]) -> None:
    write(more="def narrower(share): return share\n")
    assert refused(*SHORT, noisy=True).startswith("model.py: narrower(share) returned float, not a torch.nn.Module")
    write(more=NARROWER.replace("share * 16", "16 if share else 0"))
    assert "of the dense model's FLOPs, and LOW" in refused(*SHORT, noisy=True)
    write(more=NARROWER.replace("Conv2d(3", "Conv2d(5"))
    assert refused(*SHORT, noisy=True).startswith("model.py: narrower(0.")
    assert "20" in refused("pilot", "model.py", "--steps", "5")
    assert "device" in refused("pilot", "model.py", "--device", "junk")
