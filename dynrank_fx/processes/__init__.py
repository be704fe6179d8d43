"""Several processes that train one net: what one of them decides all do, what fails in one fails in all, and what must
be equal is compared.
"""

from .agreement import agree, others
from .asked import as_first_, check_same, in_group, whole_weights
from .digests import Digest, digest_of, unequal
from .origins import entries_of, of_unlike_wholes
from .shards import Outline, Shards, is_part, is_sharded, outlined, own, part_as, whole
from .together import ALONE, Heard, Processes, started
from .wrappers import check_wrapper, ignored_by, in_pipeline, let_go, processes_of, processes_training, wrappers_of

__all__ = [
    "ALONE",
    "Digest",
    "Heard",
    "Outline",
    "Processes",
    "Shards",
    "agree",
    "as_first_",
    "check_same",
    "check_wrapper",
    "digest_of",
    "entries_of",
    "ignored_by",
    "in_group",
    "in_pipeline",
    "is_part",
    "is_sharded",
    "let_go",
    "of_unlike_wholes",
    "others",
    "outlined",
    "own",
    "part_as",
    "processes_of",
    "processes_training",
    "started",
    "unequal",
    "whole",
    "whole_weights",
    "wrappers_of",
]
