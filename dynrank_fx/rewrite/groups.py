"""The sites of a net in groups that change together: those that share one right factor, and every other by itself."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..layouts import Layout
from ..ops import Shape
from ..phase import Phase
from ..processes import whole
from ..tracing import unwrap
from .switched import Switched, switched_modules


@dataclass(frozen=True)
class SiteGroup:
    """The sites that share one right factor, its owner first; a site that shares none is a group of one.

    sites: each with all of its modules, of which tied weights have several.
    """

    sites: tuple[tuple[Switched, ...], ...]

    @property
    def firsts(self) -> tuple[Switched, ...]:
        """One module of each site: the others of a site hold the same parameters."""
        return tuple(modules[0] for modules in self.sites)

    @property
    def owner(self) -> Switched:
        """The module that holds the right factor, and by whose site the group is called."""
        return self.sites[0][0]

    @property
    def name(self) -> str:
        """The owner's site."""
        return self.owner.site

    @property
    def names(self) -> tuple[str, ...]:
        """All sites, the owner's first."""
        return tuple(module.site for module in self.firsts)

    @property
    def modules(self) -> tuple[Switched, ...]:
        """All modules of all sites."""
        return tuple(module for modules in self.sites for module in modules)

    @property
    def shared(self) -> bool:
        """Whether several sites share the right factor."""
        return len(self.sites) > 1

    @property
    def layout(self) -> Layout:
        """The one layout of all its sites."""
        return self.owner.layout

    @property
    def shape(self) -> Shape:
        """That of ``weight``."""
        return (sum(module.shape[0] for module in self.firsts), *self.owner.shape[1:])

    @property
    def weight(self) -> Tensor:
        """What the right factor is of: the weights of all sites, one above the other, dense in every phase. Where
        several processes hold parts of them, all ask for it.
        """
        weights = [_dense(module) for module in self.firsts]
        return torch.cat(weights) if self.shared else weights[0]


def _dense(module: Switched) -> Tensor:
    """The dense weight of a site, also where it is in parts."""
    if module.phase == int(Phase.FULL):
        return whole(module.weight.detach())
    return module.joined([whole(factor.detach()) for factor in module.factors], module._buffers["base"])


def site_groups(net: nn.Module, names: Iterable[str] | None = None) -> list[SiteGroup]:
    """The groups that these sites are in, in the order of the names; by default all, in that of the module tree."""
    sites = switched_modules(unwrap(net))
    wanted = sites if names is None else [name for name in names if name in sites]
    groups = dict.fromkeys(sites[name][0].sharing or (name,) for name in wanted)
    return [SiteGroup(tuple(tuple(sites[name]) for name in group)) for group in groups]
