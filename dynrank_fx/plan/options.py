"""What a plan is made by: every choice of planning in one frozen value."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TypedDict

from ..checks import check_flags, is_list, is_whole, names_of
from ..errors import PlanError
from ..layouts import ChannelLayout, ConvLayout
from .overrides import Override, checked_conv_layout, checked_overrides, checked_pattern
from .ranks import RankPolicy, Ratio, checked_policy
from .roles import Role


@dataclass(frozen=True)
class PlanOptions:
    """What is factored, how, and to which rank. ``transform``, ``make_plan``, ``compress`` and the commands share it.

    Attributes:
        rank: The rank policy, for every site whose override names no other; by default a quarter of the smaller side.
        include: Shell patterns on names and aliases of weights; where there are any, only weights that fit one of them.
        exclude: Shell patterns; the weights that fit one of them stay dense.
        overrides: By shell pattern, what is decided otherwise for the weights that fit; of several, the later one wins.
        multiple_of: Ranks are rounded up to multiples of it, 1 or more.
        conv_layout: The layout of convolutions; one that it does not serve takes ``ChannelLayout``.
        share_inputs: Whether linears that read one input (query, key and value; gate and up) share their right
            factor, at a rank decided for all of them together. Where the net is of layers, each applies it for itself.
        leave: Roles whose weights stay dense, as far as the graphs tell them.
        allow_unprofitable: Whether a site is factored although its factors cost no less than the dense weight, in
            parameters or in FLOPs.

    Raises:
        PlanError: For a value that is none of these.
    """

    rank: RankPolicy = field(default_factory=lambda: Ratio(0.25))
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    overrides: Mapping[str, Override] = field(default_factory=dict)
    multiple_of: int = 1
    conv_layout: ConvLayout = ChannelLayout
    share_inputs: bool = False
    leave: Collection[Role] = ()
    allow_unprofitable: bool = False

    def __post_init__(self) -> None:
        checked_policy(self.rank)
        checked_conv_layout(self.conv_layout)
        checked_overrides(self.overrides)
        if not is_whole(self.multiple_of, 1):
            raise PlanError(f"ranks cannot be multiples of {self.multiple_of!r}; give 1 or more")
        for name in ("include", "exclude", "leave"):  # one by itself is meant as one, not as its letters
            given = getattr(self, name)
            object.__setattr__(self, name, tuple(given) if is_list(given) else (given,))
        for role in self.leave:
            if not isinstance(role, Role):
                raise PlanError(f"{role!r} is no role: give {names_of(Role)}")
        for pattern in (*self.include, *self.exclude):
            checked_pattern(pattern)
        check_flags(PlanError, share_inputs=self.share_inputs, allow_unprofitable=self.allow_unprofitable)


class PlanChoices(TypedDict, total=False):
    """The fields of ``PlanOptions`` as keyword arguments."""

    rank: RankPolicy
    include: Sequence[str]
    exclude: Sequence[str]
    overrides: Mapping[str, Override]
    multiple_of: int
    conv_layout: ConvLayout
    share_inputs: bool
    leave: Collection[Role]
    allow_unprofitable: bool


def chosen(options: PlanOptions | None, choices: PlanChoices) -> PlanOptions:
    """The options, but for what the keyword arguments say otherwise.

    Raises PlanError for options that are none, and TypeError for a keyword argument that is no field.
    """
    if options is not None and not isinstance(options, PlanOptions):
        raise PlanError(f"{options!r} is no PlanOptions: give one, or a rank policy as rank={options!r}")
    unknown = sorted(choices.keys() - {field.name for field in fields(PlanOptions)})
    if unknown:
        raise TypeError(f"there is no option {unknown[0]!r} of planning: PlanOptions has them all")
    return PlanOptions(**choices) if options is None else replace(options, **choices)
