"""Several processes that train one net: what one of them decides all do, what fails in one fails in all, and what must
be equal is compared.
"""

from .agreement import agree
from .digests import Digest, digest_of, unequal
from .together import ALONE, Processes, started
from .wrappers import check_wrapper, ignored_by, let_go, processes_of, wrappers_of

__all__ = [
    "ALONE",
    "Digest",
    "Processes",
    "agree",
    "check_wrapper",
    "digest_of",
    "ignored_by",
    "let_go",
    "processes_of",
    "started",
    "unequal",
    "wrappers_of",
]
