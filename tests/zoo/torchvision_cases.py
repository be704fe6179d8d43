"""torchvision: every family of classification, and video, segmentation, detection's backbones, optical flow."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from cases import ZooCase
from torch import Tensor, nn
from torchvision import models
from torchvision.models.detection import backbone_utils
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformerBlockV2
from torchvision.models.video.mvit import MSBlockConfig, MViT
from torchvision.models.video.swin_transformer import SwinTransformer3d
from torchvision.models.vision_transformer import VisionTransformer

# family, name, side of the image, and arguments. Transformers are made shallow, large classifiers narrow.
_IMAGES: tuple[tuple[str, str, int, dict[str, Any]], ...] = (
    ("alexnet", "alexnet", 64, {}),
    ("densenet", "densenet121", 32, {}),
    ("densenet", "densenet121", 32, {"memory_efficient": True}),
    ("efficientnet", "efficientnet_b0", 32, {}),
    ("efficientnet", "efficientnet_b1", 32, {}),
    ("efficientnet_v2", "efficientnet_v2_s", 32, {}),
    ("googlenet", "googlenet", 64, {"init_weights": False, "aux_logits": False}),
    ("googlenet", "googlenet", 64, {"init_weights": False, "aux_logits": True}),
    ("inception", "inception_v3", 75, {"init_weights": False, "aux_logits": False}),
    ("inception", "inception_v3", 299, {"init_weights": False, "aux_logits": True}),
    ("mnasnet", "mnasnet0_5", 32, {}),
    ("mnasnet", "mnasnet1_0", 32, {}),
    ("mobilenet", "mobilenet_v2", 32, {}),
    ("mobilenet", "mobilenet_v3_small", 32, {}),
    ("mobilenet", "mobilenet_v3_large", 32, {}),
    ("regnet", "regnet_x_400mf", 32, {}),
    ("regnet", "regnet_y_400mf", 32, {}),
    ("resnet", "resnet18", 32, {}),
    ("resnet", "resnet34", 32, {}),
    ("resnet", "resnet50", 32, {}),
    ("resnet", "resnext50_32x4d", 32, {}),
    ("resnet", "wide_resnet50_2", 32, {}),
    ("shufflenet", "shufflenet_v2_x0_5", 32, {}),
    ("shufflenet", "shufflenet_v2_x1_0", 32, {}),
    ("squeezenet", "squeezenet1_0", 48, {}),
    ("squeezenet", "squeezenet1_1", 48, {}),
    ("vgg", "vgg11", 32, {}),
    ("vgg", "vgg11_bn", 32, {}),
    ("vgg", "vgg13", 32, {}),
    ("vgg", "vgg16_bn", 32, {}),
)

_FRAMES: tuple[tuple[str, str, tuple[int, int], dict[str, Any]], ...] = (
    ("video resnet", "r3d_18", (4, 32), {}),
    ("video resnet", "mc3_18", (4, 32), {}),
    ("video resnet", "r2plus1d_18", (4, 32), {}),
    ("s3d", "s3d", (14, 224), {}),
)

_SEGMENTATION: tuple[tuple[str, dict[str, Any]], ...] = (
    ("fcn_resnet50", {}),
    ("fcn_resnet50", {"aux_loss": True}),
    ("deeplabv3_resnet50", {}),
    ("deeplabv3_mobilenet_v3_large", {}),
    ("lraspp_mobilenet_v3_large", {}),
)


def _image(side: int, channels: int = 3) -> tuple[Tensor, ...]:
    return (torch.randn(2, channels, side, side),)


def _clip(frames: int, side: int) -> tuple[Tensor, ...]:
    return (torch.randn(2, 3, frames, side, side),)


def _named(name: str, kwargs: dict[str, Any]) -> str:
    said = {key: value for key, value in kwargs.items() if key in ("memory_efficient", "aux_logits", "aux_loss")}
    return " ".join([name, *(f"{key}={value}" for key, value in said.items())])


def _model(name: str, kwargs: dict[str, Any]) -> nn.Module:
    return models.get_model(name, weights=None, **kwargs)


def _segmenter(name: str, kwargs: dict[str, Any]) -> nn.Module:
    return models.get_model(name, weights=None, weights_backbone=None, num_classes=5, **kwargs)


def _slim_vgg(name: str) -> nn.Module:
    """A VGG with a small classifier: the first matrix of its own has 103 M parameters."""
    model = models.get_model(name, weights=None, num_classes=10)
    model.avgpool = nn.AdaptiveAvgPool2d(1)
    model.classifier[0], model.classifier[3] = nn.Linear(512, 128), nn.Linear(128, 128)
    model.classifier[6] = nn.Linear(128, 10)
    return model


def _slim_alexnet() -> nn.Module:
    model = models.alexnet(weights=None, num_classes=10)
    model.classifier[1], model.classifier[4] = nn.Linear(256 * 6 * 6, 128), nn.Linear(128, 128)
    model.classifier[6] = nn.Linear(128, 10)
    return model


def _vit(**kwargs: Any) -> nn.Module:
    return VisionTransformer(
        image_size=32, patch_size=8, num_layers=3, num_heads=4, hidden_dim=64, mlp_dim=128, num_classes=10, **kwargs
    )


def _conv_stem_vit() -> nn.Module:
    layer = models.vision_transformer.ConvStemConfig
    return _vit(conv_stem_configs=[layer(24, 3, 2), layer(48, 3, 2), layer(64, 3, 2)])


def _maxvit() -> nn.Module:
    return models.MaxVit(
        input_size=(64, 64),
        stem_channels=16,
        partition_size=2,
        block_channels=[16, 32, 64],
        block_layers=[1, 2, 1],
        head_dim=16,
        stochastic_depth_prob=0.1,
        num_classes=10,
    )


def _convnext() -> nn.Module:
    layer = models.convnext.CNBlockConfig
    blocks = [layer(48, 96, 2), layer(96, 192, 2), layer(192, 384, 3), layer(384, None, 2)]
    return models.ConvNeXt(blocks, stochastic_depth_prob=0.1, num_classes=10)


def _swin(**kwargs: Any) -> nn.Module:
    return models.SwinTransformer(
        patch_size=[4, 4],
        embed_dim=48,
        depths=[2, 2, 2, 2],
        num_heads=[3, 3, 6, 12],
        window_size=[4, 4],
        stochastic_depth_prob=0.2,
        num_classes=10,
        **kwargs,
    )


def _swin3d() -> nn.Module:
    return SwinTransformer3d(
        patch_size=[2, 4, 4],
        embed_dim=48,
        depths=[2, 2, 2],
        num_heads=[3, 3, 6],
        window_size=[2, 4, 4],
        stochastic_depth_prob=0.1,
        num_classes=10,
    )


def _mvit(version: str) -> nn.Module:
    """mvit_v1_b and mvit_v2_s in their own settings, with 4 of 16 blocks and fewer channels."""
    second = version == "v2"
    sizes = [(1, 16, 16), (2, 16, 32), (2, 32, 32), (4, 32, 64)]
    blocks = [
        MSBlockConfig(
            num_heads=heads,
            input_channels=before,
            output_channels=after,
            kernel_q=[3, 3, 3] if second or i in (1, 3) else [],
            kernel_kv=[3, 3, 3],
            stride_q=[1, 2, 2] if i in (1, 3) else [1, 1, 1] if second else [],
            stride_kv=[1, 4, 4] if i == 0 else [1, 2, 2] if i < 3 else [1, 1, 1],
        )
        for i, (heads, before, after) in enumerate(sizes)
    ]
    return MViT(
        spatial_size=(32, 32),
        temporal_size=4,
        block_setting=blocks,
        residual_pool=second,
        residual_with_cls_embed=not second,
        rel_pos_embed=second,
        proj_after_attn=second,
        num_classes=10,
    )


def _flow(name: str) -> nn.Module:
    return models.get_model(name, weights=None)


def _ssd_backbone() -> nn.Module:
    model = models.detection.ssd300_vgg16(weights=None, weights_backbone=None, num_classes=5)
    return model.backbone


def _ssdlite_backbone() -> nn.Module:
    return models.detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=5).backbone


def _retinanet_backbone() -> nn.Module:
    return models.detection.retinanet_resnet50_fpn(weights=None, weights_backbone=None, num_classes=5).backbone


class _Head(nn.Module):
    """A detection head over the feature maps of its backbone, without the boxes that follow."""

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, x: Tensor) -> Any:
        return self.head(list(self.backbone(x).values()))


def _retinanet_head() -> nn.Module:
    model = models.detection.retinanet_resnet50_fpn_v2(weights=None, weights_backbone=None, num_classes=5)
    return _Head(model.backbone, model.head)


def _fcos_head() -> nn.Module:
    model = models.detection.fcos_resnet50_fpn(weights=None, weights_backbone=None, num_classes=5)
    return _Head(model.backbone, model.head)


def _region_proposals() -> nn.Module:
    model = models.detection.fasterrcnn_mobilenet_v3_large_fpn(weights=None, weights_backbone=None, num_classes=5)
    return _Head(model.backbone, model.rpn.head)


def _pyramid(name: str) -> nn.Module:
    return backbone_utils.resnet_fpn_backbone(backbone_name=name, weights=None, trainable_layers=3)


def _mobile_pyramid(fpn: bool) -> nn.Module:
    return backbone_utils.mobilenet_backbone(
        backbone_name="mobilenet_v3_large", weights=None, fpn=fpn, trainable_layers=4
    )


# family, name, how it is made, side of the image
_DETECTION: tuple[tuple[str, str, Callable[[], nn.Module], int], ...] = (
    ("fpn", "resnet_fpn_backbone(resnet18)", partial(_pyramid, "resnet18"), 64),
    ("fpn", "resnet_fpn_backbone(resnet50)", partial(_pyramid, "resnet50"), 64),
    ("fpn", "mobilenet_backbone", partial(_mobile_pyramid, False), 64),
    ("fpn", "mobilenet_backbone fpn", partial(_mobile_pyramid, True), 64),
    ("ssd", "ssd300_vgg16.backbone", _ssd_backbone, 300),
    ("ssd", "ssdlite320.backbone", _ssdlite_backbone, 64),
    ("retinanet", "retinanet_resnet50_fpn.backbone", _retinanet_backbone, 64),
    ("retinanet", "retinanet_resnet50_fpn_v2 with head", _retinanet_head, 64),
    ("fcos", "fcos_resnet50_fpn with head", _fcos_head, 64),
    ("fasterrcnn", "fasterrcnn_mobilenet_v3_large_fpn with rpn.head", _region_proposals, 64),
)


def cases() -> list[ZooCase]:
    found = []

    def add(name: str, family: str, make: Callable[[], nn.Module], inputs: Callable[[], tuple[Any, ...]]) -> None:
        found.append(ZooCase(name=name, source="torchvision", family=family, make=make, inputs=inputs))

    for family, name, side, kwargs in _IMAGES:
        kwargs = {"num_classes": 10, **kwargs}
        make = partial(_slim_vgg, name) if family == "vgg" else partial(_model, name, kwargs)
        make = _slim_alexnet if family == "alexnet" else make
        add(_named(name, kwargs), family, make, partial(_image, side))
    add("convnext", "convnext", _convnext, partial(_image, 32))
    add("swin", "swin", _swin, partial(_image, 64))
    add("swin on a size to be padded", "swin", _swin, partial(_image, 54))
    add(
        "swin_v2",
        "swin_v2",
        partial(_swin, block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2),
        partial(_image, 64),
    )
    add("vit", "vit", _vit, partial(_image, 32))
    add("vit with conv stem", "vit", _conv_stem_vit, partial(_image, 32))
    add("maxvit", "maxvit", _maxvit, partial(_image, 64))
    for family, name, (frames, side), kwargs in _FRAMES:
        add(name, family, partial(_model, name, {"num_classes": 10, **kwargs}), partial(_clip, frames, side))
    add("swin3d", "swin3d", _swin3d, partial(_clip, 4, 32))
    for version in ("v1", "v2"):
        add(f"mvit_{version}", "mvit", partial(_mvit, version), partial(_clip, 4, 32))
    for name, kwargs in _SEGMENTATION:
        add(_named(name, kwargs), "segmentation", partial(_segmenter, name, kwargs), partial(_image, 64))
    for family, name, make, side in _DETECTION:
        add(name, family, make, partial(_image, side))
    for name in ("raft_small", "raft_large"):
        add(name, "raft", partial(_flow, name), lambda: (*_image(128), *_image(128)))
    return found
