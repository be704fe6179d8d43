"""The models of the zoo: real architectures with random weights, and small inputs for them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

SOURCES = ("torchvision", "timm", "transformers")


@dataclass(frozen=True)
class ZooCase:
    """One architecture: how it is made, and inputs for it (a tuple of arguments, or a dict of keyword arguments).

    source: the library it comes from. family: models of one design. The batch is the first dimension of every input,
    and is 2.
    """

    name: str
    source: str
    family: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Any, ...] | dict[str, Any]]


def cases_of(source: str) -> list[ZooCase]:
    """The list of one library, which is imported only here."""
    if not Path(__file__).with_name(f"{source}_cases.py").is_file():
        return []
    importlib.import_module("schemas")  # before torchvision, which timm and transformers import too
    return importlib.import_module(f"{source}_cases").cases()


def all_cases() -> list[ZooCase]:
    return [case for source in SOURCES for case in cases_of(source)]
