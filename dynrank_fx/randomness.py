"""The random generators a training run draws from: seeding them, and their state for a checkpoint."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from .aliases import StateDict


def seed_all(seed: int) -> None:
    """Seed Python, NumPy and torch (the CUDA devices too)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def generators_of(*data: object) -> tuple[torch.Generator, ...]:
    """The generators that data loaders and their samplers were given, which seeding does not reach."""
    holders = [holder for loader in data for holder in (loader, getattr(loader, "sampler", None))]
    held = [getattr(holder, "generator", None) for holder in holders]
    return tuple(dict.fromkeys(generator for generator in held if isinstance(generator, torch.Generator)))


def random_state(generators: Sequence[torch.Generator] = (), *, devices: bool = True) -> StateDict:
    """The state of the global generators and of these, as ``training/state_tree`` can store it. devices: whether those
    of the CUDA devices are among them.
    """
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if devices and torch.cuda.is_available() else [],
        "generators": [generator.get_state() for generator in generators],
    }


def set_random_state(state: StateDict, generators: Sequence[torch.Generator] = ()) -> None:
    """Go on from ``random_state(generators)``. CUDA states are taken over where there are as many devices as then."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    for generator, own in zip(generators, state["generators"], strict=True):
        generator.set_state(own)


@contextmanager
def drawing(course: StateDict | None) -> Iterator[None]:
    """Draw from a course of random numbers of its own, which goes on there; afterwards the global generators are as
    before. None for the global ones themselves.
    """
    if course is None:
        yield
        return
    before = random_state(devices=False)
    set_random_state(course)
    try:
        yield
    finally:
        course.update(random_state(devices=False))
        set_random_state(before)
