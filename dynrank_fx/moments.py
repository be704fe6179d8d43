"""What the outputs of sites hold, and the cut that keeps them (not the weights) best.

Of the outputs y = W x [m] before the bias, the second moment C [m, m] about their mean decides: W' = V Vᵀ W with V the
top eigenvectors of C has the least E‖y − y'‖² of all rank-r weights, when (I − V Vᵀ) E[y] goes into the bias. Where
n < m the moment of the inputs stands in its place, C = W E[x xᵀ] Wᵀ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from . import lowrank
from .layout import Factors, Layout
from .twofactors import TwoFactors


@dataclass
class Moments:
    """What was seen of one site, or of the sites that share a right factor.

    sites: the site's name, or those of all that share. rows: whether outputs go along the rows of the matrix view.
    of_inputs: the sums are over what goes in, not over what comes out. second: Σ y yᵀ [g, k, k]. sums: by name of
    a module, or of a parameter given as a bias, (Σ y [g, k], how many) over the calls whose mean it can take up.
    """

    sites: tuple[str, ...]
    layout: TwoFactors
    rows: bool
    of_inputs: bool
    second: Tensor
    count: int = 0
    sums: dict[str, tuple[Tensor, int]] = field(default_factory=dict)

    def centred(self) -> Tensor:
        """The moment about the means that a bias can take up."""
        second = self.second
        for total, n in self.sums.values():
            second = second - total[..., :, None] * total[..., None, :] / n
        return second / max(self.count, 1)

    def oriented(self, weight: Tensor) -> Tensor:
        """The matrix view with outputs along the rows."""
        matrix = self.layout.to_matrix(weight)
        return matrix if self.rows else matrix.mT

    def basis(self, weight: Tensor, shrink: float | None) -> tuple[Tensor, Tensor]:
        """Directions of the outputs and the root of what each holds, see ``lowrank.output_basis``.

        shrink: by default k / (k + rows seen), k the size of the moment: as much as C itself
        where there are hardly any data, and next to nothing where there are plenty.
        """
        if shrink is None:
            k = self.second.shape[-1]
            shrink = k / (k + self.count)
        return lowrank.output_basis(self.oriented(weight), self.centred(), shrink, of_inputs=self.of_inputs)


@dataclass(frozen=True)
class Calibration:
    """Moments by site. plain: why a site is cut by plain SVD all the same."""

    moments: Mapping[str, Moments]
    plain: Mapping[str, str]
    order: tuple[str, ...]
    """Sites by their first call, those that share a factor by its owner."""
    shrink: float | None = None

    def split(self, sites: Sequence[str], layout: Layout, weight: Tensor, rank: int) -> Factors | None:
        """Factors that keep the outputs of these sites best; None where nothing is known of them."""
        found = self.moments.get(sites[0])
        if found is None:
            return None
        V = found.basis(weight, self.shrink)[0][..., :rank]
        left, right = lowrank.projected(found.oriented(weight), V)
        matrices = (left, right) if found.rows else (right.mT, left.mT)
        return found.layout.from_matrices(matrices, tuple(weight.shape))

    @property
    def scarce(self) -> list[str]:
        """Sites of which fewer outputs were seen than these have entries: what they hold is hardly known."""
        return [name for name, found in self.moments.items() if found.count < found.second.shape[-1]]

    def spectrum(self, site: str, weight: Tensor) -> Tensor | None:
        """Roots of what each direction of the outputs holds, [g, min(m, n)], largest first: the error of a cut to rank
        r is the sum of squares beyond it.
        """
        found = self.moments.get(site)
        if found is None:
            return None
        return found.basis(weight, 0.0)[1][..., : min(found.layout.matrix_shape(tuple(weight.shape)))].cpu()
