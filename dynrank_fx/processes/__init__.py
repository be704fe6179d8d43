"""Several processes that train one net: what one of them decides all do, what fails in one fails in all, and what must
be equal is compared.
"""

from .asked import as_first_, check_same, processes_of, whole_weights
from .digests import Digest, digest_of, unequal
from .together import ALONE, Processes, started

__all__ = [
    "ALONE",
    "Digest",
    "Processes",
    "as_first_",
    "check_same",
    "digest_of",
    "processes_of",
    "started",
    "unequal",
    "whole_weights",
]
