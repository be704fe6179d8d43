"""How a weight becomes factors and back: the algebra of every layout, on tensors alone."""

from .base import Factors, Layout
from .choose import CONV_LAYOUTS, LAYOUTS, ConvLayout, layout_for, layout_named
from .conv import ChannelLayout, InputLayout, SpatialLayout
from .matrix import EinsumLayout, LinearLayout
from .spectra import effective_rank, energy_rank, product_singular_values, singular_values, stable_rank
from .svd import SMALL, at_least_float32, full_precision, gram_basis, told_apart
from .tensor import CPLayout, TuckerLayout
from .two_factors import TwoFactors

__all__ = [
    "CONV_LAYOUTS",
    "LAYOUTS",
    "SMALL",
    "CPLayout",
    "ChannelLayout",
    "ConvLayout",
    "EinsumLayout",
    "Factors",
    "InputLayout",
    "Layout",
    "LinearLayout",
    "SpatialLayout",
    "TuckerLayout",
    "TwoFactors",
    "at_least_float32",
    "effective_rank",
    "energy_rank",
    "full_precision",
    "gram_basis",
    "layout_for",
    "layout_named",
    "product_singular_values",
    "singular_values",
    "stable_rank",
    "told_apart",
]
