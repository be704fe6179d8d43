"""Several processes that train one net: what one of them decides all do, what fails in one fails in all, and what must
be equal is compared.
"""

from .digests import Digest, digest_of, unequal
from .together import ALONE, Processes, started

__all__ = ["ALONE", "Digest", "Processes", "digest_of", "started", "unequal"]
