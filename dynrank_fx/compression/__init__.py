"""Cut at the end: truncate for good, by calibration and within a budget of the whole model."""

from .batchnorms import recalibrate_
from .calibration import calibrate
from .candidates import Candidates
from .covariance import Calibration
from .deploy import Deployed, dense_form, deployed
from .rank_parallel import rank_parallel_plan
from .recover import recover_
from .result import Compressed
from .site_times import SiteTimes
from .to_budget import MaxDrop, compress
from .truncation import cut_, truncate

__all__ = [
    "Calibration",
    "Candidates",
    "Compressed",
    "Deployed",
    "MaxDrop",
    "SiteTimes",
    "calibrate",
    "compress",
    "cut_",
    "dense_form",
    "deployed",
    "rank_parallel_plan",
    "recalibrate_",
    "recover_",
    "truncate",
]
