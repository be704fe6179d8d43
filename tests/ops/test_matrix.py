"""Products with a matrix, against torch's own functions, and how each splits into two stages."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from op_cases import PART, TURNED, float64
from torch import Tensor

from dynrank_fx.ops import WHOLE, EinsumOp, EmbeddingOp, LinearOp, MatmulOp, ProductOp, View


@pytest.mark.parametrize("view", [WHOLE, PART, TURNED], ids=["the weight", "a part of it", "a transposed part"])
def test_linear_is_torchs_linear_by_what_the_view_takes(view: View) -> None:
    W = float64((9, 14))
    m, n = view.shape((9, 14))
    x, bias = float64((3, 4, n)), float64((m,))
    assert torch.equal(LinearOp(view)(x, W, bias), F.linear(x, view(W), bias))
    assert torch.equal(LinearOp(view)(x, W), F.linear(x, view(W)))


def test_matmul_multiplies_on_the_side_that_it_says() -> None:
    x, W = float64((2, 9, 9)), float64((9, 9))
    assert torch.equal(MatmulOp()(x, W), x @ W)
    assert torch.equal(MatmulOp(weight_first=True)(x, W), W @ x)
    assert torch.equal(MatmulOp(TURNED)(x[..., :5], W), x[..., :5] @ W[2:8, 1:6].T)


@pytest.mark.parametrize("weight_first", [False, True])
@pytest.mark.parametrize("batched", [False, True])
def test_a_bias_is_added_as_addmm_and_baddbmm_do(weight_first: bool, batched: bool) -> None:
    stack = (3,) if batched else ()
    W, x, bias = float64((*stack, 5, 5)), float64((*stack, 5, 5)), float64((5,))
    op = MatmulOp(weight_first=weight_first, batched=batched, beta=0.5, alpha=2)
    a, b = (W, x) if weight_first else (x, W)
    torch.testing.assert_close(op(x, W, bias), 0.5 * bias + 2 * torch.einsum("...ij,...jk->...ik", a, b))


def test_gathered_matrices_are_each_examples_own() -> None:
    x, W, at = float64((4, 2, 5)), float64((3, 5, 6)), torch.tensor([2, 0, 2, 1])
    got = MatmulOp(View(gathered=True), batched=True)(x, W, at=at)
    torch.testing.assert_close(got, torch.stack([x[i] @ W[int(k)] for i, k in enumerate(at)]))


def test_embedding_reads_rows_and_gives_gradients_as_torch_does() -> None:
    tokens = torch.tensor([[1, 3, 3], [5, 3, 0]])
    for settings in ({"padding_idx": 3}, {"scale_grad_by_freq": True}, {"sparse": True}):
        W = float64((6, 4)).requires_grad_()
        out, expected = EmbeddingOp(**settings)(tokens, W), F.embedding(tokens, W, **settings)
        assert torch.equal(out, W[tokens])
        (got,) = torch.autograd.grad(out.square().sum(), W)
        (wanted,) = torch.autograd.grad(expected.square().sum(), W)
        assert got.is_sparse == wanted.is_sparse == ("sparse" in settings)
        assert torch.equal(got.to_dense(), wanted.to_dense())


@pytest.mark.parametrize(
    ("op", "equation", "axes"),
    [
        (EinsumOp("bd", "de", "be"), "bd,de->be", ((), (0,), (1,))),
        (EinsumOp("bhd", "ehd", "bhe"), "bhd,ehd->bhe", ((1,), (2,), (0,))),
        (EinsumOp("blnd", "hnkd", "blhk"), "blnd,hnkd->blhk", ((), (1, 3), (0, 2))),
        (EinsumOp("...d", "ed", "...e", weight_first=True), "...d,ed->...e", ((), (1,), (0,))),
        (EinsumOp("d...a", "Ad", "A...a"), "d...a,Ad->A...a", ((), (1,), (0,))),
    ],
    ids=str,
)
def test_einsum_is_torchs_and_knows_which_axes_are_shared_contracted_and_free(op, equation, axes) -> None:
    sizes = dict(zip("bdehlnkaA", (2, 3, 4, 5, 2, 3, 2, 3, 4), strict=True))
    x = float64(tuple(size for c in op.x.replace("...", ".") for size in ((2, 3) if c == "." else (sizes[c],))))
    W = float64(tuple(sizes[c] for c in op.weight))
    out = torch.einsum(equation, x, W)
    torch.testing.assert_close(op(x, W), out)
    assert op.output_shape(tuple(x.shape), tuple(W.shape)) == tuple(out.shape)
    assert op.axes == axes


STAGED: dict[str, tuple[ProductOp, tuple[int, ...], bool]] = {
    "linear": (LinearOp(), (3, 6), False),
    "matmul": (MatmulOp(), (3, 5), True),
    "matmul, scaled": (MatmulOp(beta=0.5, alpha=2), (3, 5), True),
    "matmul with the weight first": (MatmulOp(weight_first=True, alpha=2, beta=0.5), (6, 3), False),
    "embedding": (EmbeddingOp(padding_idx=2), (3, 4), True),
}


@pytest.mark.parametrize("name", STAGED)
@pytest.mark.parametrize("biased", [False, True])
def test_its_two_stages_do_what_it_does_with_the_product_of_two_factors(name: str, biased: bool) -> None:
    """The factor with the contracted axis comes first: the left one where rows are summed over."""
    op, shape, rows = STAGED[name]
    assert op.contracts_rows is rows
    left, right = float64((5, 2)), float64((2, 6))
    x = torch.randint(5, shape) if isinstance(op, EmbeddingOp) else float64(shape)
    first, last = (left, right) if op.contracts_rows else (right, left)
    got = op.first(x, first)
    if not biased or isinstance(op, EmbeddingOp):
        torch.testing.assert_close(op.last(got, last), product(op, x, left @ right))
    else:
        bias = float64(tuple(op(x, left @ right).shape[-1:]))
        torch.testing.assert_close(op.last(got, last, bias), op(x, left @ right, bias))


def product(op: ProductOp, x: Tensor, W: Tensor) -> Tensor:
    if isinstance(op, EmbeddingOp):
        return W[x]
    if isinstance(op, MatmulOp):
        return W @ x if op.weight_first else x @ W
    return x @ W.T
