"""Several processes that train one net: what one of them decides all do, what fails in one fails in all, and what must
be equal is compared.
"""

from .agreement import agree
from .asked import as_first_, check_same, in_group, whole_weights
from .digests import Digest, digest_of, unequal
from .together import ALONE, Processes, started
from .wrappers import check_wrapper, ignored_by, let_go, processes_of, wrappers_of

__all__ = [
    "ALONE",
    "Digest",
    "Processes",
    "agree",
    "as_first_",
    "check_same",
    "check_wrapper",
    "digest_of",
    "ignored_by",
    "in_group",
    "let_go",
    "processes_of",
    "started",
    "unequal",
    "whole_weights",
    "wrappers_of",
]
