"""Which layout a weight gets, and which layouts a plan can name."""

from __future__ import annotations

import pytest
from layout_cases import by_layout
from op_cases import CONVS, EMBEDDINGS, OP_CASES, PRODUCTS, TRANSPOSED, OpCase

import dynrank_fx as dr
from dynrank_fx.layouts import CONV_LAYOUTS, LAYOUTS, ConvLayout, Layout, LinearLayout, layout_for, layout_named
from dynrank_fx.ops import EinsumOp, LinearOp

# What Tucker and CP do not serve: groups, transposed convolutions, and for CP other numbers of axes than two.
PLAIN = {"conv1d", "conv1d unbatched", "conv2d", "conv2d 1x1", "conv2d same", "conv2d reflected", "conv3d"}
CHOSEN = {name: set(CONVS | TRANSPOSED) for name in ("channel", "input", "spatial")} | {"tucker": PLAIN}
CHOSEN["cp"] = {name for name in PLAIN if name.startswith("conv2d")}


@pytest.mark.parametrize("name", CONVS | TRANSPOSED)
@pytest.mark.parametrize("chosen", CONV_LAYOUTS, ids=lambda layout: layout.name)
def test_a_convolution_gets_the_chosen_layout_or_the_channel_one(chosen: ConvLayout, name: str) -> None:
    layout = layout_for((CONVS | TRANSPOSED)[name].op, chosen)
    assert layout.name == (chosen.name if name in CHOSEN[chosen.name] else "channel")


@pytest.mark.parametrize("name", PRODUCTS | EMBEDDINGS)
def test_whatever_multiplies_by_a_matrix_has_one_layout_whichever_is_chosen(name: str) -> None:
    op = OP_CASES[name].op
    (layout,) = {layout_for(op, chosen) for chosen in CONV_LAYOUTS}
    assert layout.name == ("einsum" if isinstance(op, EinsumOp) else "linear")


@pytest.mark.parametrize("name", OP_CASES)
def test_the_layout_of_an_op_serves_it(name: str) -> None:
    assert all(layout_for(OP_CASES[name].op, chosen).serves(OP_CASES[name].op) for chosen in CONV_LAYOUTS)


@by_layout
def test_a_layout_is_found_again_by_its_name(layout: Layout, case: OpCase) -> None:
    assert layout_named(layout.name, case.op) == layout


def test_every_layout_has_a_name_of_its_own() -> None:
    assert len({layout.name for layout in LAYOUTS}) == len(LAYOUTS)
    assert {layout.name for layout in CONV_LAYOUTS} == CHOSEN.keys()
    assert LinearLayout in LAYOUTS


def test_an_unknown_layout_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        dr.PlanError,
        match="no layout 'tensor train'; choose one of linear, einsum, channel, input, spatial, tucker, cp",
    ):
        layout_named("tensor train", LinearOp())


@pytest.mark.parametrize(
    ("name", "layout", "words"),
    [
        ("linear", "channel", "the layout 'channel' does not serve linear"),
        ("conv1d", "cp", "the layout 'cp' does not serve conv1d"),
        ("conv2d in groups", "tucker", "the layout 'tucker' does not serve conv2d"),
        ("transposed 2d", "tucker", "the layout 'tucker' does not serve conv_transpose2d"),
        ("conv2d", "linear", "the layout 'linear' does not serve conv2d"),
        ("einsum", "linear", "the layout 'linear' does not serve einsum"),
    ],
)
def test_a_layout_that_does_not_serve_the_op_is_refused(name: str, layout: str, words: str) -> None:
    with pytest.raises(dr.PlanError, match=f"^{words}$"):
        layout_named(layout, OP_CASES[name].op)
