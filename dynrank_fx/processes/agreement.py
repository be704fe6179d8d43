"""That several processes hold the same: one short message where they do, and a sentence where they do not."""

from __future__ import annotations

import hashlib

from ..errors import DynrankError
from .digests import Digest, unequal
from .together import Processes


def agree(processes: Processes, digest: Digest, error: type[DynrankError], when: str) -> None:
    """Compare what every process has. All raise such an error where they differ, which names the first that does.

    when: the end of the sentence, what this means and what to do.
    """
    if processes.count == 1:
        return
    if len(set(processes.gathered(hashlib.sha256(repr(list(digest.items())).encode()).hexdigest()))) == 1:
        return
    found = unequal(processes.gathered(digest))
    name, ranks = found if found is not None else ("the order of what is compared", [processes.count - 1])
    raise error(f"{name} is not the same in all processes, {others(ranks, processes.count)}: {when}")


def others(ranks: list[int], count: int) -> str:
    """Words for the processes, of so many, that have another than most."""
    which = f"process {ranks[0]}" if len(ranks) == 1 else f"processes {', '.join(map(str, ranks))}"
    return f"in {which} of {count} it is another"
