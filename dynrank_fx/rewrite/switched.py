"""The module of one site: the dense weight, its factors or both, and a flag that says which.

Several modules may belong to one site: tied weights stay tied as in plain torch, by holding the same Parameter objects.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Never
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from ..aliases import StateDict
from ..errors import TransitionError
from ..layouts import Layout, TwoFactors, product_singular_values, singular_values
from ..ops import Op, Operand, Shape
from ..phase import ALPHA, Phase
from ..processes import whole

_FULL, _ADAPTOR = int(Phase.FULL), int(Phase.ADAPTOR)
TIED = "_tied_weights_keys"  # Hugging Face's: the names of a module's parameters that another one holds too
STEM = -1  # the call of the owner that applies a shared factor

_COPIES: WeakKeyDictionary[Switched, dict[int, int]] = WeakKeyDictionary()  # with the versions of their parameters


class Switched(nn.Module):
    """One weight that trains densely (FULL), as factors in its place (LOW) or as some beside it (ADAPTOR), and the
    ops that it is used by.

    site: the site's name. ops: what the module can do with its weight; a call says which by ``use``, the first being
    that of the module it replaced. phase: a plain int, see Phase. rank: of the next deflate, or of the factors in LOW.
    bare: the module stands where a bare parameter stood (``block.w``), whose name the dense weight keeps in
    ``state_dict``.

    Of sites that read the same input and share one ``right``, the first owns ``right``. In a graph its module
    applies it for all: a call with ``use=STEM`` gives x in FULL and ``right`` of x in LOW, which the sites then take in
    place of x (after_stem). Where the model's own code calls them, each applies the owner's ``right`` for itself.

    Exactly one of ``weight`` and the factors is registered at a time, and in ADAPTOR the buffer ``base``; the
    other names hold None, so that the dictionaries keep their keys and torch.compile sees one setting per flag.
    """

    phase: int

    def __init__(
        self,
        ops: Sequence[Op],
        layout: Layout,
        rank: int,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        *,
        site: str,
        bare: bool = False,
    ) -> None:
        super().__init__()
        self.ops, self.layout, self.site, self.bare = tuple(ops), layout, site, bare
        self.rank = rank
        self.phase = _FULL
        self.sharing: tuple[str, ...] = ()
        self.owner: tuple[Switched, ...] = ()  # in a tuple, so that it is no submodule
        self.after_stem = False
        self.shape: Shape = tuple(weight.shape)
        # Not register_parameter: `weight` is also a property, which it would take for a clash.
        self._parameters["weight"] = weight
        for name in layout.factor_names:
            self._parameters[name] = None
        self._parameters["bias"] = bias
        self._buffers["base"] = None

    def forward(self, x: Tensor, *bias: Tensor | None, use: int = 0, at: Tensor | None = None) -> Tensor:
        """``x`` as the op number ``use`` takes it. A bias given here (None included) stands in for the module's own.

        at: which matrices of a stack the op gathers.
        """
        b = bias[0] if bias else self._parameters["bias"]
        y: Tensor = self.compute(self.read, x, b, use, at)
        return y

    def __setstate__(self, state: dict[str, object]) -> None:
        """As a copy, or what was pickled, is filled."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        _COPIES[self] = _versions(self)

    def read(self, name: str) -> Tensor | None:
        """A parameter or the base, by name; a factor that another site owns, from there."""
        if name == "base":
            return self._buffers["base"]
        own = self._parameters[name]
        return own if own is not None or not self.owner else self.owner[0]._parameters[name]

    def compute(
        self, read: Callable[[str], Operand], x: Operand, bias: Operand, use: int = 0, at: Operand = None
    ) -> Operand:
        """The forward, on whatever ``read`` gives for the names: the module's own tensors, or proxies of a graph."""
        *first, (op, name) = self.stages[max(use, 0)]
        if self.phase == _FULL:
            return x if use == STEM else self.ops[use](x, read("weight"), bias, at)
        if use == STEM:
            stage, factor = first[0]
            return stage(x, read(factor))
        dense = x
        for stage, factor in () if self.after_stem else first:
            x = stage(x, read(factor), None, at)
        if self.phase != _ADAPTOR:
            return op(x, read(name), bias, at)
        # An op that scales its product (addmm) scales that of the branch too.
        scale = self.scale * (getattr(op, "alpha", 1) if bias is not None else 1)
        return self.ops[use](dense, read("base"), bias, at) + scale * op(x, read(name), None, at)

    def hold(self, phase: Phase, new: Mapping[str, nn.Parameter], base: Tensor | None = None) -> None:
        """Be in a phase, with these parameters of it by name and the base of an ADAPTOR."""
        for name in ("weight", *self.layout.factor_names):
            self._parameters[name] = new.get(name)
        self._buffers["base"] = base
        self.phase = int(phase)

    def share_right(self, names: tuple[str, ...], owner: Switched, *, after_stem: bool) -> None:
        """Become one of the sites that share the owner's ``right``."""
        self.sharing, self.owner = names, () if owner is self else (owner,)
        self.after_stem = after_stem

    @property
    def rank(self) -> int:
        """The rank of the factors in LOW and ADAPTOR, in FULL that of the next deflate."""
        return self._rank

    @rank.setter
    def rank(self, rank: int) -> None:
        names = self.layout.factor_names
        self._rank = rank
        # Per op, the (op, name of its factor) to apply one after the other.
        self.stages = tuple(
            tuple((stage, names[index]) for stage, index in self.layout.stages(op, rank)) for op in self.ops
        )

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """The names that hold this phase's parameters, the bias apart."""
        return self.names_in(Phase(self.phase))

    def names_in(self, phase: Phase) -> tuple[str, ...]:
        """The names that hold the parameters of a phase, the bias apart."""
        return ("weight",) if phase is Phase.FULL else self.layout.factor_names[: 1 if self.owner else None]

    @property
    def scale(self) -> float:
        """What the branch of an ADAPTOR is multiplied by."""
        return ALPHA / self.rank

    @property
    def factors(self) -> tuple[nn.Parameter, ...]:
        """The factors by the order of their names. Raises TransitionError in FULL, where there are none."""
        holders = [self, *((self.owner or (self,)) * (len(self.layout.factor_names) - 1))]
        factors = [each._parameters[name] for each, name in zip(holders, self.layout.factor_names, strict=True)]
        if any(factor is None for factor in factors):
            raise TransitionError(f"{self.site} is in FULL: it has no factors; enter LOW first")
        return tuple(factors)  # type: ignore[arg-type]

    @property
    def weight(self) -> Tensor:
        """The dense weight in every phase, for code that reads it; outside FULL it is computed, and differentiable."""
        dense = self._parameters["weight"]
        return dense if dense is not None else self.joined(self.factors, self._buffers["base"])

    def joined(self, factors: Sequence[Tensor], base: Tensor | None = None) -> Tensor:
        """The dense weight that these factors stand for, with the base of an ADAPTOR."""
        product = self.layout.join(tuple(factors))
        return product if base is None else base + self.scale * product

    @property
    def outline(self) -> Tensor:
        """A tensor of the shape, dtype and device of the dense weight, without memory: for code that asks for those."""
        return self._parameters[self.parameter_names[-1]].new_empty(()).expand(self.shape)  # type: ignore[union-attr]

    def __setattr__(self, name: str, value: Tensor | nn.Module) -> None:
        if name == "weight" and self.phase != _FULL:
            raise TransitionError(
                f"{self.site} has no weight to write in {Phase(self.phase).name}: enter FULL first, or write to "
                f"its factors"
            )
        if name == "weight" and isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            raise TransitionError(
                f"{self.site} has its weight as a parameter, which a switch replaces, and no plain tensor can be in "
                "its place, as the first FSDP (FullyShardedDataParallel) and pruning have it: shard by fully_shard, or "
                "wrap in DistributedDataParallel, and prune what truncate gives"
            )
        super().__setattr__(name, value)

    def extra_repr(self) -> str:
        return (
            f"{self.site}, {self.ops[0].kind} {'x'.join(map(str, self.shape))}, {self.layout.name} rank {self.rank}, "
            f"{Phase(self.phase).name}"
        )

    def _save_to_state_dict(self, destination: StateDict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.bare and prefix + "weight" in destination:
            destination[prefix.removesuffix(".")] = destination.pop(prefix + "weight")

    def _load_from_state_dict(self, *args: Any) -> None:  # Any: torch's own
        super()._load_from_state_dict(*args)
        if self in _COPIES:
            _COPIES[self] = _versions(self)

    def _replicate_for_data_parallel(self) -> Never:
        raise TransitionError(
            "DataParallel copies a module for every batch, which a site does not allow: use "
            "DistributedDataParallel, or one device"
        )

    def spectrum(self) -> Tensor:
        """Singular values per group [g, k] in float64 of the weight that the site stands for. Where several processes
        hold parts of it, all call this.
        """
        if self.phase == _FULL:
            return singular_values(self.layout.to_matrix(whole(self.weight.detach())))
        factors = tuple(whole(factor.detach()) for factor in self.factors)
        if self.phase == _ADAPTOR or not isinstance(self.layout, TwoFactors):
            return singular_values(self.layout.to_matrix(self.joined(factors, self._buffers["base"])))
        left, right = self.layout.to_matrices(factors)
        return product_singular_values(left, right)


def switched_modules(net: nn.Module) -> dict[str, list[Switched]]:
    """All modules of every site, by site name, in the order of the module tree."""
    sites: dict[str, list[Switched]] = {}
    for module in net.modules():
        if isinstance(module, Switched):
            sites.setdefault(module.site, []).append(module)
    return sites


def copies_of(module: Switched) -> list[Switched]:
    """What was copied of a site, or of one that is called the same, as far as it is still there."""
    return [each for each in list(_COPIES) if each.site == module.site and each is not module]


def is_written(copy: Switched) -> bool:
    """Whether something was written into the parameters of a copy since it was made, or loaded by a state_dict."""
    before = _COPIES.get(copy, {})
    return any(version > before.get(name, version) for name, version in _versions(copy).items())


def _versions(module: Switched) -> dict[int, int]:
    """torch's count of what was written into each parameter, by its id; there is none of those of inference mode."""
    parameters = [p for p in module._parameters.values() if p is not None and not p.is_inference()]
    return {id(parameter): parameter._version for parameter in parameters}
