"""What is decided for single sites, by name: another rank, another layout, or to stay dense."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ..errors import PlanError
from ..layouts import CONV_LAYOUTS, ConvLayout
from .ranks import RankPolicy, checked_policy
from .site import Site, matches


@dataclass(frozen=True)
class Override:
    """What is decided otherwise for the sites whose names fit a pattern; None keeps what holds for the others.

    Attributes:
        rank: A rank policy of their own.
        layout: The layout of those that are convolutions, such as ``TuckerLayout``.
        dense: Whether they are left dense.

    Raises:
        PlanError: For a value that is none of these.
    """

    rank: RankPolicy | None = None
    layout: ConvLayout | None = None
    dense: bool | None = None

    def __post_init__(self) -> None:
        if self.dense is not None and not isinstance(self.dense, bool):
            raise PlanError(f"{self.dense!r} does not say whether sites stay dense: give dense=True or dense=False")
        if self.rank is not None:
            checked_policy(self.rank)
        if self.layout is not None:
            checked_conv_layout(self.layout)


def checked_conv_layout(layout: ConvLayout) -> ConvLayout:
    """The layout itself. Raises PlanError for what is none of convolutions."""
    if layout not in CONV_LAYOUTS:
        names = ", ".join(each.__name__ for each in CONV_LAYOUTS)
        hint = "the class itself, without (): " if isinstance(layout, CONV_LAYOUTS) else ""
        raise PlanError(f"{layout!r} is no layout of convolutions: give {hint}one of {names}")
    return layout


def checked_pattern(pattern: str) -> str:
    """The pattern itself. Raises PlanError for what is none."""
    if not isinstance(pattern, str):
        raise PlanError(f"{pattern!r} is no pattern of names: give a text such as 'blocks.*'")
    return pattern


def checked_overrides(overrides: Mapping[str, Override]) -> Mapping[str, Override]:
    """The overrides themselves. Raises PlanError for what are none."""
    if not isinstance(overrides, Mapping):
        raise PlanError(f"overrides are a dict from patterns to Override, not a {type(overrides).__name__}")
    for pattern, override in overrides.items():
        checked_pattern(pattern)
        if not isinstance(override, Override):
            raise PlanError(
                f"the override of {pattern!r} is {override!r}: give an Override, such as Override(dense=True)"
            )
    return overrides


def override_of(site: Site, overrides: Mapping[str, Override]) -> Override:
    """All that the fitting patterns say of a site together; a later one wins."""
    combined = Override()
    for pattern, override in overrides.items():
        if matches(site, [pattern]):
            said = {key: value for key, value in vars(override).items() if value is not None}
            combined = replace(combined, **said)
    return combined
