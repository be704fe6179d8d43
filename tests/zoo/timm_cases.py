"""timm: at least one model of every module of timm.models, the smallest or one made shallow and narrow.

Left out is pnasnet, whose only model has 82 M parameters and no setting for fewer; nasnet is like it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import timm
import torch
from cases import ZooCase
from timm.layers import GroupNorm1, GroupNormAct, StdConv2d
from timm.models.metaformer import (
    Attention,
    GroupNorm1NoBias,
    LayerNorm2dNoBias,
    LayerNormNoBias,
    MetaFormer,
    SepConv,
)
from timm.models.mlp_mixer import Affine, GatedMlp, GluMlp, MlpMixer, ResBlock, SpatialGatingBlock
from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg
from torch import Tensor, nn

# module of timm.models, name, side of the image, and arguments. With img_size among them the side is that.
_MODELS: tuple[tuple[str, str, int, dict[str, Any]], ...] = (
    ("beit", "beit_base_patch16_224", 0, {"img_size": 48, "depth": 3, "embed_dim": 96, "num_heads": 3}),
    ("byoanet", "lambda_resnet26t", 64, {}),
    ("byoanet", "eca_halonext26ts", 256, {}),
    ("byoanet", "eca_botnext26ts_256", 0, {"img_size": 64}),
    ("byobnet", "test_byobnet", 64, {}),
    ("byobnet", "mobileone_s1", 32, {}),
    ("byobnet", "repvgg_a0", 32, {}),
    ("byobnet", "gernet_s", 32, {}),
    ("cait", "cait_xxs24_224", 0, {"img_size": 32, "depth": 3}),
    ("coat", "coat_tiny", 0, {"img_size": 64}),
    ("coat", "coat_lite_tiny", 0, {"img_size": 64}),
    ("convit", "convit_tiny", 0, {"img_size": 48, "depth": 4, "local_up_to_layer": 3}),
    ("convnext", "test_convnext", 32, {}),
    ("convnext", "convnextv2_atto", 32, {}),
    ("convnext", "convnext_zepto_rms", 32, {}),
    ("cpubone", "cpubone_nano", 64, {}),
    ("crossvit", "crossvit_9_240", 240, {"embed_dim": (32, 64), "num_heads": (2, 2)}),
    ("csatv2", "csatv2", 64, {"dims": (16, 32, 48, 96), "depths": (2, 2, 2, 2)}),
    ("cspnet", "cs3darknet_focus_s", 64, {}),
    ("cspnet", "cspresnet50", 32, {}),
    ("cspnext", "cspnext_tiny", 64, {}),
    ("davit", "davit_tiny", 64, {"depths": (1, 1, 2, 1), "embed_dims": (24, 48, 96, 192)}),
    ("deepseek_vit", "deepseek_vit_412m", 0, {"img_size": 84, "embed_dim": 64, "depth": 2, "num_heads": 4}),
    ("deit", "deit_tiny_distilled_patch16_224", 0, {"img_size": 48, "depth": 3}),
    ("deit", "deit3_small_patch16_224", 0, {"img_size": 48, "depth": 3, "embed_dim": 96, "num_heads": 3}),
    ("densenet", "densenet121", 32, {}),
    ("densenet", "densenetblur121d", 64, {}),
    ("dla", "dla46_c", 64, {}),
    ("dla", "dla46x_c", 64, {}),
    ("dpn", "dpn48b", 32, {}),
    ("edgenext", "edgenext_xx_small", 64, {}),
    ("efficientformer", "efficientformer_l1", 224, {"depths": (1, 1, 2, 2), "embed_dims": (24, 48, 96, 192)}),
    ("efficientformer_v2", "efficientformerv2_s0", 224, {}),
    ("efficientnet", "test_efficientnet", 32, {}),
    ("efficientnet", "test_efficientnet_gn", 32, {}),
    ("efficientnet", "test_efficientnet_evos", 32, {}),
    ("efficientnet", "efficientnet_lite0", 32, {}),
    ("efficientnet", "mixnet_s", 32, {}),
    ("efficientvim", "efficientvim_m1", 64, {}),
    ("efficientvit_mit", "efficientvit_b0", 64, {}),
    ("efficientvit_msra", "efficientvit_m0", 224, {}),
    ("eva", "eva02_tiny_patch14_224", 0, {"img_size": 56, "depth": 3}),
    ("eva", "vit_tiny_patch16_dinov3_qkvb", 0, {"img_size": 64, "depth": 3}),
    ("fasternet", "fasternet_t0", 64, {}),
    ("fastvit", "fastvit_t8", 64, {}),
    ("fastvit", "fastvit_sa12", 64, {"layers": (1, 1, 2, 1), "embed_dims": (32, 64, 128, 256)}),
    ("gemma4_vit", "gemma4_vit_167m", 0, {"img_size": 96, "depth": 2, "embed_dim": 64, "num_heads": 4, "head_dim": 16}),
    ("ghostnet", "ghostnet_050", 32, {}),
    ("ghostnet", "ghostnetv2_100", 64, {}),
    ("ghostnet", "ghostnetv3_050", 64, {}),
    ("hardcorenas", "hardcorenas_a", 32, {}),
    ("hgnet", "hgnetv2_b0", 64, {}),
    ("hiera", "hiera_tiny_224", 0, {"img_size": (64, 64), "embed_dim": 24, "mask_unit_size": (8, 8)}),
    ("hieradet_sam2", "sam2_hiera_tiny", 224, {"embed_dim": 24}),
    ("hrnet", "hrnet_w18_small", 64, {}),
    ("iformer", "iformer_t", 64, {}),
    ("inception_next", "inception_next_atto", 64, {}),
    ("inception_v3", "inception_v3", 75, {}),
    ("lcnetv2", "lcnetv2_small", 32, {}),
    ("levit", "levit_128s", 0, {"img_size": 64}),
    ("levit", "levit_conv_128s", 0, {"img_size": 64}),
    ("lowformer", "lowformer_b0", 64, {"width_list": [8, 16, 32, 64, 128]}),
    ("mambaout", "test_mambaout", 64, {}),
    ("maxxvit", "test_coatnet", 0, {"img_size": 64}),
    ("maxxvit", "test_maxvit", 0, {"img_size": 64}),
    ("mobilenetv3", "mobilenetv3_small_050", 32, {}),
    ("mobilenetv3", "mobilenetv4_conv_small_035", 32, {}),
    ("mobilenetv3", "lcnet_035", 32, {}),
    ("mobilenetv5", "mobilenetv5_base", 64, {"channel_multiplier": 0.25}),
    ("mobilevit", "mobilevit_xxs", 64, {}),
    ("mobilevit", "mobilevitv2_050", 64, {}),
    ("naflexvit", "naflexvit_base_patch16_gap", 64, {"depth": 3, "embed_dim": 96, "num_heads": 3}),
    ("nasnet", "nasnetalarge", 96, {"num_features": 672, "stem_size": 32}),
    ("nfnet", "test_nfnet", 32, {}),
    ("nfnet", "nf_regnet_b0", 32, {}),
    ("pit", "pit_ti_224", 0, {"img_size": 64}),
    ("pit", "pit_ti_distilled_224", 0, {"img_size": 64}),
    ("pvt_v2", "pvt_v2_b0", 64, {}),
    ("pvt_v2", "pvt_v2_b2_li", 64, {"depths": (1, 1, 2, 1), "embed_dims": (16, 32, 40, 64)}),
    ("qwen3_vit", "qwen3_vit_88m", 0, {"img_size": 64, "embed_dim": 64, "depth": 2, "num_heads": 4}),
    ("rdnet", "rdnet_tiny", 64, {"growth_rates": [16, 24, 24, 24, 24, 24, 32], "num_init_features": 32}),
    ("regnet", "regnetx_002", 32, {}),
    ("regnet", "regnety_002", 32, {}),
    ("regnet", "regnetv_040", 32, {"depth": 12, "w0": 24}),
    ("repghost", "repghostnet_050", 32, {}),
    ("repvit", "repvit_m0_9", 64, {}),
    ("res2net", "res2net50_14w_8s", 64, {"layers": [1, 1, 1, 1]}),
    ("resnest", "resnest14d", 64, {}),
    ("resnet", "test_resnet", 32, {}),
    ("resnet", "resnet10t", 32, {}),
    ("resnet", "ecaresnet26t", 32, {"layers": [1, 1, 1, 1]}),
    ("resnet", "seresnext26d_32x4d", 32, {"layers": [1, 1, 1, 1]}),
    ("resnet", "resnetblur50", 32, {"layers": [1, 1, 1, 1]}),
    ("resnetv2", "resnetv2_18", 32, {}),
    ("rexnet", "rexnet_100", 32, {}),
    ("selecsls", "selecsls42", 64, {}),
    ("senet", "legacy_seresnet18", 32, {}),
    ("senet", "legacy_seresnext26_32x4d", 32, {"layers": [1, 1, 1, 1]}),
    (
        "sequencer",
        "sequencer2d_s",
        56,
        {"layers": [1, 1, 1, 1], "embed_dims": [48, 96, 96, 96], "hidden_sizes": [12, 24, 24, 24]},
    ),
    ("shvit", "shvit_s1", 64, {}),
    ("sknet", "skresnet18", 32, {}),
    ("starnet", "starnet_s050", 32, {}),
    ("swiftformer", "swiftformer_xs", 64, {}),
    (
        "swin_transformer",
        "swin_tiny_patch4_window7_224",
        0,
        {"img_size": 64, "window_size": 4, "embed_dim": 24, "depths": (2, 2, 2, 2)},
    ),
    (
        "swin_transformer",
        "swin_s3_tiny_224",
        0,
        {"img_size": 64, "window_size": 4, "embed_dim": 24, "depths": (2, 2, 2, 2)},
    ),
    (
        "swin_transformer_v2",
        "swinv2_tiny_window8_256",
        0,
        {"img_size": 64, "window_size": 4, "embed_dim": 24, "depths": (2, 2, 2, 2)},
    ),
    (
        "swin_transformer_v2_cr",
        "swinv2_cr_tiny_224",
        0,
        {"img_size": 64, "window_size": 2, "embed_dim": 24, "depths": (2, 2, 2, 2)},
    ),
    ("tiny_vit", "tiny_vit_5m_224", 64, {}),
    ("tnt", "tnt_s_patch16_224", 0, {"img_size": 48, "depth": 3, "embed_dim": 96}),
    ("tresnet", "tresnet_m", 64, {"layers": [1, 1, 2, 1], "width_factor": 0.5}),
    ("twins", "twins_pcpvt_small", 0, {"img_size": 64, "depths": (1, 1, 2, 1), "embed_dims": (16, 32, 80, 128)}),
    ("twins", "twins_svt_small", 0, {"img_size": 64, "depths": (1, 1, 2, 1), "embed_dims": (16, 32, 64, 128)}),
    ("vgg", "vgg11_bn", 32, {"mlp_ratio": 0.05}),
    ("visformer", "visformer_tiny", 0, {"img_size": 64}),
    ("vision_transformer", "test_vit", 0, {"img_size": 48}),
    ("vision_transformer", "test_vit2", 0, {"img_size": 48}),
    ("vision_transformer", "test_vit3", 0, {"img_size": 48}),
    ("vision_transformer", "test_vit4", 0, {"img_size": 48}),
    (
        "vision_transformer",
        "vit_base_patch16_siglip_224",
        0,
        {"img_size": 48, "depth": 2, "embed_dim": 96, "num_heads": 3},
    ),
    ("vision_transformer_hybrid", "vit_tiny_r_s16_p8_224", 0, {"img_size": 64, "depth": 3}),
    ("vision_transformer_relpos", "test_vit_relpos", 0, {"img_size": 48}),
    (
        "vision_transformer_sam",
        "samvit_base_patch16_224",
        0,
        {"img_size": 64, "depth": 3, "embed_dim": 96, "num_heads": 3, "global_attn_indexes": (2,), "window_size": 2},
    ),
    ("vitamin", "vitamin_small_224", 0, {"img_size": 64, "depth": 2}),
    ("vovnet", "ese_vovnet19b_slim", 64, {}),
    ("vovnet", "ese_vovnet19b_slim_dw", 64, {}),
    ("xception", "legacy_xception", 75, {}),
    ("xception_aligned", "xception41p", 64, {}),
    ("xcit", "xcit_nano_12_p16_224", 0, {"img_size": 64, "depth": 3}),
)


_META = {"depths": (1, 1, 2, 1), "dims": (32, 64, 96, 128)}
_MIXER = {"img_size": 48, "patch_size": 16, "num_blocks": 2, "embed_dim": 96}
_POOLFORMER = {"norm_layers": GroupNorm1, "mlp_act": nn.GELU, "mlp_bias": True, "use_mlp_head": False}
_GMLP = {"block_layer": SpatialGatingBlock, "mlp_layer": GatedMlp, "mlp_ratio": 6}
_CAFORMER = {
    "token_mixers": [SepConv, SepConv, Attention, Attention],
    "norm_layers": [LayerNorm2dNoBias] * 2 + [LayerNormNoBias] * 2,
}
_MVIT = {"img_size": (64, 64)}

# The same for models whose own functions take no other sizes: the class, with the settings of the model named.
_CLASSES: tuple[tuple[str, str, int, type[nn.Module], dict[str, Any]], ...] = (
    ("convmixer", "convmixer_768_32", 32, timm.models.convmixer.ConvMixer, {"dim": 96, "depth": 4, "patch_size": 7}),
    (
        "focalnet",
        "focalnet_tiny_srf",
        64,
        timm.models.focalnet.FocalNet,
        {"depths": (1, 1, 2, 1), "embed_dim": 32, "drop_path_rate": 0.1},
    ),
    (
        "gcvit",
        "gcvit_xxtiny",
        64,
        timm.models.gcvit.GlobalContextVit,
        {"img_size": (64, 64), "depths": (1, 1, 2, 1), "embed_dim": 32},
    ),
    ("metaformer", "poolformer_s12", 64, MetaFormer, _META | _POOLFORMER),
    ("metaformer", "poolformerv2_s12", 64, MetaFormer, {**_META, "norm_layers": GroupNorm1NoBias}),
    (
        "metaformer",
        "convformer_s18",
        64,
        MetaFormer,
        {**_META, "token_mixers": SepConv, "norm_layers": LayerNorm2dNoBias},
    ),
    ("metaformer", "caformer_s18", 64, MetaFormer, _META | _CAFORMER),
    ("mlp_mixer", "mixer_s16_224", 48, MlpMixer, _MIXER),
    ("mlp_mixer", "gmlp_ti16_224", 48, MlpMixer, _MIXER | _GMLP),
    ("mlp_mixer", "gmixer_12_224", 48, MlpMixer, {**_MIXER, "mlp_ratio": (1.0, 4.0), "mlp_layer": GluMlp}),
    (
        "mlp_mixer",
        "resmlp_12_224",
        48,
        MlpMixer,
        {**_MIXER, "mlp_ratio": 4, "block_layer": ResBlock, "norm_layer": Affine},
    ),
    ("mvitv2", "mvitv2_tiny", 64, MultiScaleVit, {**_MVIT, "cfg": MultiScaleVitCfg(depths=(1, 1, 2, 1), embed_dim=24)}),
    (
        "mvitv2",
        "mvitv2_small_cls",
        64,
        MultiScaleVit,
        {**_MVIT, "cfg": MultiScaleVitCfg(depths=(1, 1, 2, 1), embed_dim=24, use_cls_token=True)},
    ),
    (
        "nest",
        "nest_tiny",
        64,
        timm.models.nest.Nest,
        {"img_size": 64, "embed_dims": (24, 48, 96), "num_heads": (1, 2, 4), "depths": (1, 1, 2)},
    ),
    ("nextvit", "nextvit_small", 64, timm.models.nextvit.NextViT, {"in_chans": 3, "depths": (1, 1, 5, 1)}),
    (
        "resnetv2",
        "resnetv2_50x1_bit",
        32,
        timm.models.resnetv2.ResNetV2,
        {"layers": [1, 1, 1, 1], "conv_layer": StdConv2d, "norm_layer": GroupNormAct, "stem_type": "fixed"},
    ),
    (
        "volo",
        "volo_d1_224",
        64,
        timm.models.volo.VOLO,
        {"img_size": 64, "layers": [1, 1, 1, 1], "embed_dims": [48, 96, 96, 96], "num_heads": [2, 4, 4, 4]},
    ),
)


def _shorter(name: str, kept: dict[str, tuple[int, ...]]) -> nn.Module:
    """The model with only some of the blocks in its rows of equal ones."""
    model = timm.create_model(name, pretrained=False, num_classes=10)
    for path, indices in kept.items():
        row = model.get_submodule(path)
        model.set_submodule(path, nn.Sequential(*(row[i] for i in indices)))
    return model


# The same for models that come in one size.
_SHORTENED: tuple[tuple[str, str, int, dict[str, tuple[int, ...]]], ...] = (
    ("inception_resnet_v2", "inception_resnet_v2", 75, {"repeat": (0,), "repeat_1": (0,), "repeat_2": (0,)}),
    ("inception_v4", "inception_v4", 75, {"features": (0, 1, 2, 3, 4, 5, 6, 10, 11, 18, 19)}),
)


def _model(name: str, kwargs: dict[str, Any]) -> nn.Module:
    return timm.create_model(name, pretrained=False, num_classes=10, **kwargs)


def _image(side: int) -> tuple[Tensor]:
    return (torch.randn(2, 3, side, side),)


def _side(side: int, kwargs: dict[str, Any]) -> int:
    size = kwargs.get("img_size", side)
    return size[0] if isinstance(size, tuple) else size


def cases() -> list[ZooCase]:
    made = [
        (family, name, _side(side, kwargs), partial(_model, name, kwargs)) for family, name, side, kwargs in _MODELS
    ]
    made += [
        (family, name, side, partial(kind, num_classes=10, **kwargs)) for family, name, side, kind, kwargs in _CLASSES
    ]
    made += [(family, name, side, partial(_shorter, name, kept)) for family, name, side, kept in _SHORTENED]
    return [
        ZooCase(name=name, source="timm", family=family, make=make, inputs=partial(_image, side))
        for family, name, side, make in sorted(made, key=lambda case: case[:2])
    ]
