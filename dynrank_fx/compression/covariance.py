"""What the outputs of sites hold, and the cut that keeps them (not the weights) best.

Of the outputs y = W x [m] before the bias, the covariance C [m, m] decides: W' = V Vᵀ W with V the top eigenvectors of
C has the least E‖y − y'‖² of all rank-r weights, when (I − V Vᵀ) E[y] goes into the bias. Where no bias can take that
up, C = E[y yᵀ] is about zero, not about the mean. Where n < m the covariance of the inputs stands in its place,
C = W E[x xᵀ] Wᵀ.

Where a kernel slides over what was cut (the input layout of a convolution), W [outputs · positions of the kernel, n]
counts every position of the kernel as outputs of its own, x is about zero, and no bias takes anything up.

Sources: it is the principal components of the outputs (Zhang et al., arXiv 1505.06798), and the same as an SVD of the
weight whitened by its inputs (SVD-LLM, arXiv 2403.07378), without an inverse.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..layouts import Factors, Layout, TwoFactors


@torch.no_grad()
def output_basis(W: Tensor, covariance: Tensor, shrink: float, *, of_inputs: bool) -> tuple[Tensor, Tensor]:
    """The directions of the outputs y = W x by what they hold: V [g, m, k] orthonormal, and √λ [g, k], λ falling.

    covariance: E[y yᵀ] [g, m, m], or E[x xᵀ] [g, n, n] where of_inputs, of centred y or x. With C = E[y yᵀ], which is
    W E[x xᵀ] Wᵀ, min ‖y − y'‖² over y' = V_r V_rᵀ y is Σ_{i>r} λ_i, reached by the top eigenvectors of C. shrink: so
    large a share of W Wᵀ, at the trace of C, is added to C: what too few data leave open is then settled as by plain
    SVD. All in float64.
    """
    W, C = W.double(), covariance.to(torch.float64, copy=True)
    m, n = W.shape[-2:]
    if not of_inputs:
        if shrink:
            C += _per_energy(W, shrink, C.diagonal(dim1=-2, dim2=-1).sum(-1))[..., None] * (W @ W.mT)
        return _eigenbasis(C)
    # C + s W Wᵀ = W (E[x xᵀ] + s I) Wᵀ.
    C.diagonal(dim1=-2, dim2=-1).add_(_per_energy(W, shrink, (C * (W.mT @ W)).sum((-2, -1))))
    if _DIRECT < m <= n:
        return _eigenbasis(W @ C @ W.mT)
    values, Q = torch.linalg.eigh(C)
    return _left_basis(W @ Q.mul_(values.clamp_min(0).sqrt()[..., None, :]))


@torch.no_grad()
def output_energies(W: Tensor, covariance: Tensor, *, of_inputs: bool) -> Tensor:
    """√λ [g, k] of ``output_basis`` without a share of W Wᵀ; without V, which costs most of the time.

    Of inputs, with m > n: the λ of C = W E[x xᵀ] Wᵀ are those of E^½ Wᵀ W E^½ [g, n, n].
    """
    m, n = W.shape[-2:]
    if of_inputs and min(m, n) <= _DIRECT:
        return output_basis(W, covariance, 0.0, of_inputs=True)[1]
    W, C = W.double(), covariance.double()
    if of_inputs and m <= n:
        C = W @ C @ W.mT
    elif of_inputs:
        values, Q = torch.linalg.eigh(C)
        half = Q * values.clamp_min(0).sqrt()[..., None, :]
        C = half.mT @ (W.mT @ W) @ half
    found: Tensor = torch.linalg.eigvalsh(C).flip(-1).clamp_min(0).sqrt()
    return found


def _per_energy(W: Tensor, shrink: float, energy: Tensor) -> Tensor:
    """s [g, 1], with which s W Wᵀ has ``shrink`` times this trace [g]."""
    scale = shrink * energy.clamp_min(0) / W.square().sum((-2, -1)).clamp_min(torch.finfo(W.dtype).tiny)
    return scale[..., None]


def _eigenbasis(C: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvectors of C and the roots of its eigenvalues, largest first."""
    values, Q = torch.linalg.eigh(C)
    return Q.flip(-1), values.flip(-1).clamp_min(0).sqrt()


# Up to this many rows or columns the SVD of Y itself is cheap.
_DIRECT = 512


def _left_basis(Y: Tensor) -> tuple[Tensor, Tensor]:
    """Left singular vectors and singular values, float64; of a large tall matrix by its Gram matrix."""
    if min(Y.shape[-2:]) <= _DIRECT:
        U, S, _ = torch.linalg.svd(Y, full_matrices=False)
        return U, S
    Y = Y @ _eigenbasis(Y.mT @ Y)[0]
    U, R = torch.linalg.qr(Y)  # the columns are orthogonal up to rounding, which QR takes away
    return U.mul_(R.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]), R.diagonal(dim1=-2, dim2=-1).abs()


@torch.no_grad()
def projected(W: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of V Vᵀ W, W [g, m, n], V [g, m, r] orthonormal, balanced column by row."""
    right = V.mT @ W.double()
    S = torch.linalg.vector_norm(right, dim=-1, keepdim=True)
    S = torch.maximum(S, torch.finfo(W.dtype).eps * S.amax(-2, keepdim=True))
    root = torch.where(S > 0, S, 1).sqrt()
    return (V * root.mT).to(W.dtype), (right / root).to(W.dtype)


@dataclass(frozen=True)
class Covariance:
    """What was seen of one site, or of the sites that share a right factor.

    Sites that read the same inputs hold one and the same matrix.

    Attributes:
        sites: The site's name, or those of all that share.
        layout: The layout of the weight.
        rows: Whether outputs go along the rows of the matrix view.
        of_inputs: Whether it is that of what goes in, and not of what comes out.
        matrix: E[y yᵀ] [g, k, k], about the means that a bias can take up, in the format of the weight: its rounding is
            far below what any sample of data leaves open.
        count: How many y were seen, in each group.
        sums: By the name of a module, or of a parameter given as a bias, (Σ y [g, k], how many) over the calls whose
            mean it can take up.
    """

    sites: tuple[str, ...]
    layout: TwoFactors
    rows: bool
    of_inputs: bool
    matrix: Tensor
    count: int
    sums: Mapping[str, tuple[Tensor, int]]

    def oriented(self, weight: Tensor) -> Tensor:
        """The matrix view with outputs along the rows."""
        matrix = self.layout.to_matrix(weight)
        return matrix if self.rows else matrix.mT

    def oriented_factors(self, factors: Factors) -> tuple[Tensor, Tensor]:
        """The factors as matrices, float64, with outputs along the rows of the first."""
        B, A = (matrix.double() for matrix in self.layout.to_matrices(factors))
        return (B, A) if self.rows else (A.mT, B.mT)

    def basis(self, weight: Tensor, shrink: float | None) -> tuple[Tensor, Tensor]:
        """Directions of the outputs and the root of what each holds, see ``output_basis``.

        shrink: by default k / (k + rows seen), k the size of the covariance: as much as C
        itself where there are hardly any data, and next to nothing where there are plenty.
        """
        if shrink is None:
            k = self.matrix.shape[-1]
            shrink = k / (k + self.count)
        return output_basis(self.oriented(weight), self.matrix, shrink, of_inputs=self.of_inputs)


@dataclass
class Bases:
    """Bases of weights that were asked for before, up to so many bytes; what does not fit is found anew each time."""

    room: int
    _kept: dict[tuple[str, float | None], tuple[Tensor, tuple[Tensor, Tensor]]] = field(default_factory=dict)

    def of(self, seen: Covariance, weight: Tensor, shrink: float | None) -> tuple[Tensor, Tensor]:
        """As ``seen.basis``."""
        key = seen.sites[0], shrink
        if key in self._kept and torch.equal(self._kept[key][0], weight):
            return self._kept[key][1]
        found = seen.basis(weight, shrink)
        needed = sum(each.nbytes for each in (weight, *found))
        if key not in self._kept and needed <= self.room:
            self.room -= needed
            self._kept[key] = weight, found
        return found


@dataclass(frozen=True)
class Calibration:
    """What the outputs of the sites hold, as ``calibrate`` found it on data.

    Attributes:
        covariances: What was seen, by site.
        plain: By site, why it is cut by plain SVD all the same.
        order: Sites by their first call, those that share a factor by its owner.
        shrink: How much of the weight's own spectrum is mixed in, see ``calibrate``.
        bases: Remembers what was found of the weights; None to find it anew each time.
    """

    covariances: Mapping[str, Covariance]
    plain: Mapping[str, str]
    order: tuple[str, ...]
    shrink: float | None = None
    bases: Bases | None = field(default=None, repr=False, compare=False)

    def split(self, sites: Sequence[str], layout: Layout, weight: Tensor, rank: int) -> Factors | None:
        """Factors that keep the outputs of a site best; ``enter_`` takes this method as its ``split``.

        Args:
            sites: The site's name, or those of the sites that share a factor, its owner first.
            layout: The layout of the weight.
            weight: The weight, or those of the sites that share a factor, one above the other.
            rank: The rank r.

        Returns:
            (left, right), or None where nothing is known of the outputs.
        """
        seen = self.covariances.get(sites[0])
        if seen is None:
            return None
        found = seen.basis(weight, self.shrink) if self.bases is None else self.bases.of(seen, weight, self.shrink)
        V = found[0][..., :rank]
        left, right = projected(seen.oriented(weight), V)
        matrices = (left, right) if seen.rows else (right.mT, left.mT)
        return seen.layout.from_matrices(matrices, tuple(weight.shape))

    @property
    def scarce(self) -> list[str]:
        """Sites of which fewer outputs were seen than these have entries: what they hold is hardly known."""
        return [name for name, seen in self.covariances.items() if seen.count < seen.matrix.shape[-1]]

    def spectrum(self, site: str, weight: Tensor) -> Tensor | None:
        """How much each direction of a site's outputs holds.

        The error of a cut to rank r is the sum of the squares beyond the first r.

        Args:
            site: The site's name; of sites that share a factor, the owner's.
            weight: The weight, or those of the sites that share a factor, one above the other.

        Returns:
            Roots of the energies, [g, min(m, n)], largest first, on the CPU; None where nothing is known of the
                outputs.
        """
        seen = self.covariances.get(site)
        if seen is None:
            return None
        values = output_energies(seen.oriented(weight), seen.matrix, of_inputs=seen.of_inputs)
        return values[..., : min(seen.layout.matrix_shape(tuple(weight.shape)))].cpu()
