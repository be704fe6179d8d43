"""Schemas of torchvision's own operators, which a torch without CUDA cannot load: ``import torchvision`` wants two of
them, and no model of the zoo calls any.

Importing this module declares them; do so before torchvision.
"""

from __future__ import annotations

import torch

_LIBRARY = torch.library.Library("torchvision", "FRAGMENT")
for _name in ("nms", "qnms"):
    if not hasattr(torch.ops.torchvision, _name):
        _LIBRARY.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
