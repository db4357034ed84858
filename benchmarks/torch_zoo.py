"""`fuse_fx` on the model libraries of torch: what is folded, and whether the copy computes the same.

    python benchmarks/torch_zoo.py [--only PATTERN] [--again] [--time]

Every model has random weights and random BatchNorm statistics, and is called as its users call it, on small inputs.
Each library runs in a process of its own; a model that takes longer than LIMIT seconds is ended. Results are kept in
``build/torch_zoo.json``: what is there is not run again without ``--again``. The table is ``docs/torch_zoo.md``.
Libraries that are not installed are left out. ``--time`` measures those that have a result: the CPU time of `fuse_fx`,
verification included, and of one forward of a batch of 32 (as four of eight for images of more than 256 pixels a side),
on one thread, on images of the size that the model is made for where that is in SIDES.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import importlib.util
import json
import os
import select
import subprocess
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import process_time
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "build" / "torch_zoo.json", ROOT / "docs" / "torch_zoo.md"
LIMIT = 600
AT_ONCE = 32 * 3 * 256 * 256
"""Numbers in a batch beyond which its forward takes too much memory."""
SIDES = {"torchvision": 224, "timm": 224, "mmpretrain": 224, "segmentation_models_pytorch": 256, "ultralytics": 640}


@dataclass
class Case:
    """A model with its example, arguments of another batch or size, and the fusing method of its own library."""

    model: Any
    example: Any
    other: Any
    own: Callable[[Any], Any] | None = None


def names(words: str) -> list[str]:
    return words.split()


# The libraries


def images(n: int, *sizes: int, channels: int = 3) -> Any:
    import torch

    return torch.randn(n, channels, *(sizes if len(sizes) > 1 else sizes * 2))


def of_torchvision(name: str) -> Case:
    import torch
    import torchvision

    off: dict[str, Any] = {"weights": None}
    kind = name
    if name.startswith("features/"):
        from torchvision.models.feature_extraction import create_feature_extractor

        inner = torchvision.models.get_model(name.removeprefix("features/"), **off).eval()
        return Case(create_feature_extractor(inner, ["layer2", "layer4"]), images(2, 64), images(3, 96, 65))
    if "rcnn" in name or "retinanet" in name or "fcos" in name or "ssd" in name:
        size = {} if "ssd" in name else {"min_size": 96, "max_size": 128}
        least = {"box_score_thresh" if "rcnn" in name else "score_thresh": 0.0}  # or else nothing would be detected
        model = torchvision.models.get_model(kind, **off, weights_backbone=None, **size, **least)
        return Case(model, ([torch.rand(3, 96, 80), torch.rand(3, 64, 96)],), ([torch.rand(3, 72, 96)],))
    if "deeplab" in name or "fcn_" in name or "lraspp" in name:
        return Case(torchvision.models.get_model(kind, **off, weights_backbone=None), images(2, 64), images(3, 96, 65))
    if "raft" in name:
        return Case(
            torchvision.models.get_model(kind, **off),
            (images(1, 128), images(1, 128)),
            (images(2, 128, 136), images(2, 128, 136)),
        )
    if name in ("r3d_18", "mc3_18", "r2plus1d_18", "s3d"):
        frames, size = (16, 224) if name == "s3d" else (8, 32)
        return Case(
            torchvision.models.get_model(kind, **off),
            torch.randn(2, 3, frames, size, size),
            torch.randn(1, 3, frames, size, size + 16),
        )
    if name in ("googlenet", "inception_v3"):
        model = torchvision.models.get_model(kind, **off, init_weights=False)
        return Case(model, images(2, 96), images(3, 128, 112))
    fixed = name.startswith(("vit", "maxvit"))
    size = 224 if fixed else 64
    return Case(torchvision.models.get_model(kind, **off), images(2, size), images(3, size, size if fixed else 80))


TORCHVISION = names(
    "resnet18 resnext50_32x4d wide_resnet50_2 densenet121 vgg11_bn googlenet inception_v3 mobilenet_v2 "
    "mobilenet_v3_small mnasnet0_5 shufflenet_v2_x1_0 regnet_x_400mf regnet_y_400mf efficientnet_b0 "
    "efficientnet_v2_s convnext_tiny swin_t vit_b_32 maxvit_t squeezenet1_1 deeplabv3_resnet50 "
    "deeplabv3_mobilenet_v3_large fcn_resnet50 lraspp_mobilenet_v3_large r3d_18 mc3_18 r2plus1d_18 s3d raft_small "
    "fasterrcnn_resnet50_fpn fasterrcnn_mobilenet_v3_large_320_fpn maskrcnn_resnet50_fpn keypointrcnn_resnet50_fpn "
    "maskrcnn_resnet50_fpn_v2 retinanet_resnet50_fpn fcos_resnet50_fpn ssdlite320_mobilenet_v3_large "
    "features/resnet18 quantized_resnet18 quantized_mobilenet_v2 quantized_mobilenet_v3_large "
    "quantized_shufflenet_v2_x0_5"
)


def of_timm(name: str) -> Case:
    import timm

    options: dict[str, Any] = {}
    size = 64
    if name.startswith(("levit", "efficientformer_", "xcit", "coatnet", "tiny_vit", "vit", "fastvit_mci", "resmlp")):
        size = 224
    if name.startswith("features/"):
        options["features_only"] = True
    model = timm.create_model(name.removeprefix("features/"), pretrained=False, **options)
    fixed = size == 224

    def own(module: Any) -> Any:
        from timm.utils.model import reparameterize_model

        for m in module.modules():
            if hasattr(m, "fuse") and not hasattr(m, "reparameterize"):
                return None
        return reparameterize_model(module)

    has_own = any(hasattr(m, name) for m in model.modules() for name in ("reparameterize", "switch_to_deploy", "fuse"))
    return Case(model, images(2, size), images(3, size, size if fixed else 96), own if has_own else None)


TIMM = names(
    "resnet18 resnet50d resnest14d seresnet50 skresnet18 res2net50_26w_4s regnetx_002 regnety_002 nfnet_f0 "
    "efficientnet_b0 mobilenetv2_100 mobilenetv3_small_100 mobilenetv4_conv_small mixnet_s ghostnet_100 ghostnetv2_100 "
    "hardcorenas_a mobileone_s0 repvgg_a0 repvit_m0_9 repghostnet_050 fastvit_t8 fastvit_mci0 inception_next_tiny "
    "levit_128s levit_conv_128s efficientvit_b0 efficientvit_m0 edgenext_xx_small mobilevit_xxs mobilevitv2_050 "
    "convnextv2_atto dla34 hrnet_w18_small selecsls42 vovnet39a ese_vovnet19b_dw cspresnet50 darknet53 "
    "dpn48b xception41 "
    "inception_resnet_v2 nasnetalarge pnasnet5large rexnet_100 tinynet_e lcnet_050 swiftformer_xs "
    "starnet_s1 shvit_s1 hgnetv2_b0 efficientformer_l1 efficientformerv2_s0 poolformer_s12 visformer_tiny "
    "xcit_nano_12_p16_224 tiny_vit_5m_224 coatnet_nano_rw_224 mambaout_femto "
    "gernet_s eca_resnet33ts lambda_resnet26t fbnetc_100 legacy_seresnet18 "
    "cs3darknet_s convmixer_768_32 ghostnetv3_050 mobilenetv4_hybrid_medium fasternet_t0 nextvit_small resmlp_12_224 "
    "features/resnet18 features/mobilenetv3_small_100 features/regnetz_b16 features/efficientnet_lite0 "
    "features/hrnet_w18_small features/repvgg_a0 features/fastvit_t8 features/ghostnetv2_100"
)


def _cfg(name: str, **options: Any) -> Any:
    import transformers

    return getattr(transformers, name)(**options)


def _detr(config: str) -> Any:
    """A configuration of DETR's kind over a small ResNet."""
    return _cfg(
        config,
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=_cfg("ResNetConfig", **_SMALL_RESNET, out_features=["stage4"]),
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        num_queries=6,
    )


def _detr_options() -> dict[str, Any]:
    return {
        "encoder_hidden_dim": 32,
        "encoder_ffn_dim": 48,
        "encoder_attention_heads": 2,
        "d_model": 32,
        "num_queries": 12,
        "decoder_in_channels": [32, 32, 32],
        "decoder_ffn_dim": 48,
        "decoder_layers": 2,
        "decoder_attention_heads": 2,
        "encoder_in_channels": [32, 48, 64],
    }


def _rt_backbone() -> Any:
    return _cfg(
        "RTDetrResNetConfig",
        embedding_size=16,
        hidden_sizes=[16, 32, 48, 64],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )


def _hg_backbone() -> Any:
    return _cfg(
        "HGNetV2Config",
        stem_channels=[3, 8, 8],
        stage_in_channels=[8, 16, 32, 48],
        stage_mid_channels=[8, 8, 16, 16],
        stage_out_channels=[16, 32, 48, 64],
        hidden_sizes=[16, 32, 48, 64],
        stage_num_blocks=[1, 1, 1, 1],
        stage_numb_of_layers=[2, 2, 2, 2],
        out_features=["stage2", "stage3", "stage4"],
    )


_SMALL_RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
_SEGMENTER: dict[str, Any] = {
    "hidden_sizes": [8, 16, 24, 32],
    "num_attention_heads": [1, 2, 2, 2],
    "decoder_hidden_size": 16,
}
_SMALL_BEIT: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": 64,
    "patch_size": 16,
    "out_indices": [0, 1, 2, 3],
    "pool_scales": [1, 2],
    "auxiliary_channels": 8,
}
_TINY_BERT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 99,
}


def _resnet_backbone() -> Any:
    return _cfg("ResNetConfig", **_SMALL_RESNET, out_features=["stage1", "stage2", "stage3", "stage4"])


def _pixels(size: int = 64, other: int = 96, name: str = "pixel_values") -> tuple[Any, Any]:
    return {name: images(2, size)}, {name: images(3, other, size)}


def _tokens(*more: str) -> tuple[Any, Any]:
    import torch

    def made(n: int, length: int) -> dict[str, Any]:
        ids = torch.randint(1, 90, (n, length))
        given: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return given | {name: torch.randint(1, 90, (n, length)) for name in more}

    return made(2, 9), made(3, 11)


def _audio(length: int = 1600) -> tuple[Any, Any]:
    import torch

    return {"input_values": torch.randn(2, length)}, {"input_values": torch.randn(3, length + 320)}


def transformers_cases() -> dict[str, tuple[str, Callable[[], Any], Callable[[], tuple[Any, Any]]]]:
    """By name: a class, its configuration, and the arguments."""
    wav: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "conv_dim": (32, 32),
        "conv_stride": (5, 4),
        "conv_kernel": (10, 4),
        "num_feat_extract_layers": 2,
        "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 2,
        "vocab_size": 30,
    }
    return {
        "resnet": ("ResNetForImageClassification", lambda: _cfg("ResNetConfig", **_SMALL_RESNET), _pixels),
        "resnet-hidden-states": (
            "ResNetForImageClassification",
            lambda: _cfg("ResNetConfig", **_SMALL_RESNET, output_hidden_states=True),
            _pixels,
        ),
        "regnet": (
            "RegNetForImageClassification",
            lambda: _cfg("RegNetConfig", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], groups_width=4),
            _pixels,
        ),
        "mobilenet-v1": ("MobileNetV1ForImageClassification", lambda: _cfg("MobileNetV1Config"), _pixels),
        "mobilenet-v2": ("MobileNetV2ForImageClassification", lambda: _cfg("MobileNetV2Config"), _pixels),
        "mobilenet-v2-segmentation": (
            "MobileNetV2ForSemanticSegmentation",
            lambda: _cfg("MobileNetV2Config", num_labels=5),
            _pixels,
        ),
        "efficientnet": (
            "EfficientNetForImageClassification",
            lambda: _cfg("EfficientNetConfig", hidden_dim=1280, width_coefficient=1.0, depth_coefficient=1.0),
            _pixels,
        ),
        "levit": ("LevitForImageClassification", lambda: _cfg("LevitConfig"), lambda: _pixels(224, 224)),
        "levit-teacher": (
            "LevitForImageClassificationWithTeacher",
            lambda: _cfg("LevitConfig"),
            lambda: _pixels(224, 224),
        ),
        "cvt": ("CvtForImageClassification", lambda: _cfg("CvtConfig", depth=[1, 2, 3]), _pixels),
        "swiftformer": (
            "SwiftFormerForImageClassification",
            lambda: _cfg("SwiftFormerConfig", depths=[1, 1, 2, 1], embed_dims=[16, 24, 32, 48]),
            _pixels,
        ),
        "mobilevit": ("MobileViTForImageClassification", lambda: _cfg("MobileViTConfig"), _pixels),
        "mobilevit-segmentation": (
            "MobileViTForSemanticSegmentation",
            lambda: _cfg("MobileViTConfig", num_labels=5),
            _pixels,
        ),
        "mobilevitv2": ("MobileViTV2ForImageClassification", lambda: _cfg("MobileViTV2Config"), _pixels),
        "poolformer": (
            "PoolFormerForImageClassification",
            lambda: _cfg("PoolFormerConfig", depths=[1, 1, 1, 1]),
            _pixels,
        ),
        "convnext": (
            "ConvNextForImageClassification",
            lambda: _cfg("ConvNextConfig", hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1]),
            _pixels,
        ),
        "bit": (
            "BitForImageClassification",
            lambda: _cfg("BitConfig", embedding_size=32, hidden_sizes=[128, 128, 128, 128], depths=[1, 1, 1, 1]),
            _pixels,
        ),
        "hgnetv2": (
            "HGNetV2ForImageClassification",
            lambda: _cfg(
                "HGNetV2Config",
                stem_channels=[3, 8, 8],
                stage_in_channels=[8, 16, 32, 48],
                stage_mid_channels=[8, 8, 16, 16],
                stage_out_channels=[16, 32, 48, 64],
                hidden_sizes=[16, 32, 48, 64],
                stage_num_blocks=[1, 1, 1, 1],
                stage_numb_of_layers=[2, 2, 2, 2],
            ),
            _pixels,
        ),
        "textnet": ("TextNetForImageClassification", lambda: _cfg("TextNetConfig"), _pixels),
        "pp-lcnet": ("PPLCNetForImageClassification", lambda: _cfg("PPLCNetConfig"), _pixels),
        "focalnet": (
            "FocalNetForImageClassification",
            lambda: _cfg("FocalNetConfig", embed_dim=16, depths=[1, 1, 1, 1], image_size=64),
            lambda: _pixels(64, 64),
        ),
        "swin": (
            "SwinForImageClassification",
            lambda: _cfg(
                "SwinConfig", embed_dim=16, depths=[1, 1, 1, 1], num_heads=[2, 2, 2, 2], window_size=2, image_size=64
            ),
            lambda: _pixels(64, 64),
        ),
        "vit": (
            "ViTForImageClassification",
            lambda: _cfg(
                "ViTConfig", **{k: v for k, v in _TINY_BERT.items() if k != "vocab_size"}, image_size=32, patch_size=8
            ),
            lambda: _pixels(32, 32),
        ),
        "pvt-v2": (
            "PvtV2ForImageClassification",
            lambda: _cfg(
                "PvtV2Config", hidden_sizes=[8, 16, 16, 32], depths=[1, 1, 1, 1], num_attention_heads=[1, 2, 2, 4]
            ),
            _pixels,
        ),
        "segformer": ("SegformerForSemanticSegmentation", lambda: _cfg("SegformerConfig", **_SEGMENTER), _pixels),
        "glpn": (
            "GLPNForDepthEstimation",
            lambda: _cfg("GLPNConfig", **_SEGMENTER | {"decoder_hidden_size": 16}),
            _pixels,
        ),
        "upernet": (
            "UperNetForSemanticSegmentation",
            lambda: _cfg(
                "UperNetConfig",
                backbone_config=_resnet_backbone(),
                hidden_size=16,
                pool_scales=[1, 2],
                auxiliary_in_channels=24,
                auxiliary_channels=8,
                num_labels=5,
            ),
            _pixels,
        ),
        "dpt": (
            "DPTForSemanticSegmentation",
            lambda: _cfg(
                "DPTConfig",
                hidden_size=32,
                num_hidden_layers=4,
                num_attention_heads=2,
                intermediate_size=48,
                image_size=64,
                patch_size=16,
                backbone_out_indices=[0, 1, 2, 3],
                is_hybrid=False,
                neck_hidden_sizes=[8, 16, 24, 32],
                fusion_hidden_size=16,
                num_labels=5,
                use_batch_norm_in_fusion_residual=True,
            ),
            lambda: _pixels(64, 64),
        ),
        "depth-anything": (
            "DepthAnythingForDepthEstimation",
            lambda: _cfg(
                "DepthAnythingConfig",
                backbone_config=_cfg(
                    "Dinov2Config",
                    hidden_size=32,
                    num_hidden_layers=4,
                    num_attention_heads=2,
                    image_size=56,
                    patch_size=14,
                    out_features=["stage1", "stage2", "stage3", "stage4"],
                    reshape_hidden_states=False,
                ),
                patch_size=14,
                reassemble_hidden_size=32,
                neck_hidden_sizes=[8, 16, 24, 32],
                fusion_hidden_size=16,
                head_hidden_size=8,
            ),
            lambda: _pixels(56, 56),
        ),
        "zoedepth": (
            "ZoeDepthForDepthEstimation",
            lambda: _cfg(
                "ZoeDepthConfig",
                backbone_config=_cfg(
                    "BeitConfig",
                    hidden_size=32,
                    num_hidden_layers=4,
                    num_attention_heads=2,
                    intermediate_size=48,
                    image_size=64,
                    patch_size=16,
                    out_features=["stage1", "stage2", "stage3", "stage4"],
                    reshape_hidden_states=False,
                ),
                backbone_hidden_size=32,
                neck_hidden_sizes=[8, 16, 24, 32],
                fusion_hidden_size=16,
                bottleneck_features=16,
                num_relative_features=8,
            ),
            lambda: _pixels(64, 64),
        ),
        "rt-detr": (
            "RTDetrForObjectDetection",
            lambda: _cfg("RTDetrConfig", **_detr_options(), backbone_config=_rt_backbone()),
            _pixels,
        ),
        "rt-detr-v2": (
            "RTDetrV2ForObjectDetection",
            lambda: _cfg("RTDetrV2Config", **_detr_options(), backbone_config=_rt_backbone()),
            _pixels,
        ),
        "d-fine": (
            "DFineForObjectDetection",
            lambda: _cfg("DFineConfig", **_detr_options(), backbone_config=_hg_backbone()),
            _pixels,
        ),
        "detr": (
            "DetrForObjectDetection",
            lambda: _detr("DetrConfig"),
            _pixels,
        ),
        "conditional-detr": (
            "ConditionalDetrForObjectDetection",
            lambda: _detr("ConditionalDetrConfig"),
            _pixels,
        ),
        "table-transformer": (
            "TableTransformerForObjectDetection",
            lambda: _detr("TableTransformerConfig"),
            _pixels,
        ),
        "superpoint": ("SuperPointForKeypointDetection", lambda: _cfg("SuperPointConfig"), _pixels),
        "vitmatte": (
            "VitMatteForImageMatting",
            lambda: _cfg(
                "VitMatteConfig",
                backbone_config=_cfg(
                    "VitDetConfig",
                    num_channels=4,
                    hidden_size=32,
                    num_hidden_layers=2,
                    num_attention_heads=2,
                    image_size=64,
                    patch_size=16,
                    out_features=["stage2"],
                ),
                hidden_size=32,
                fusion_hidden_sizes=[32, 16, 8, 4],
                convstream_hidden_sizes=[4, 8, 12],
            ),
            lambda: ({"pixel_values": images(2, 64, channels=4)}, {"pixel_values": images(3, 64, channels=4)}),
        ),
        "vitpose": (
            "VitPoseForPoseEstimation",
            lambda: _cfg(
                "VitPoseConfig",
                backbone_config=_cfg(
                    "VitPoseBackboneConfig",
                    hidden_size=32,
                    num_hidden_layers=2,
                    num_attention_heads=2,
                    image_size=[64, 48],
                    out_features=["stage2"],
                ),
                use_simple_decoder=False,
            ),
            lambda: ({"pixel_values": images(2, 64, 48)}, {"pixel_values": images(3, 64, 48)}),
        ),
        "bert": ("BertForSequenceClassification", lambda: _cfg("BertConfig", **_TINY_BERT), _tokens),
        "squeezebert": (
            "SqueezeBertForSequenceClassification",
            lambda: _cfg("SqueezeBertConfig", embedding_size=32, **_TINY_BERT),
            _tokens,
        ),
        "gpt2": ("GPT2LMHeadModel", lambda: _cfg("GPT2Config", n_embd=32, n_layer=2, n_head=2, vocab_size=99), _tokens),
        "t5": (
            "T5ForConditionalGeneration",
            lambda: _cfg("T5Config", d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=2, vocab_size=99),
            lambda: _tokens("decoder_input_ids"),
        ),
        "llama": (
            "LlamaForCausalLM",
            lambda: _cfg("LlamaConfig", **_TINY_BERT),
            _tokens,
        ),
        "clip": (
            "CLIPModel",
            lambda: _cfg(
                "CLIPConfig",
                text_config={**_TINY_BERT, "eos_token_id": 98},
                vision_config={
                    "hidden_size": 32,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                    "intermediate_size": 48,
                    "image_size": 32,
                    "patch_size": 8,
                },
            ),
            lambda: tuple(a | b for a, b in zip(_tokens(), _pixels(32, 32), strict=True)),
        ),
        "align": (
            "AlignModel",
            lambda: _cfg(
                "AlignConfig",
                projection_dim=80,
                text_config=_TINY_BERT,
                vision_config={"hidden_dim": 640, "width_coefficient": 0.25, "depth_coefficient": 0.3},
            ),
            lambda: tuple(a | b for a, b in zip(_tokens(), _pixels(64, 64), strict=True)),
        ),
        "wav2vec2": ("Wav2Vec2ForCTC", lambda: _cfg("Wav2Vec2Config", **wav), _audio),
        "wav2vec2-conformer": ("Wav2Vec2ConformerForCTC", lambda: _cfg("Wav2Vec2ConformerConfig", **wav), _audio),
        "hubert-batch-norm": ("HubertModel", lambda: _cfg("HubertConfig", **wav, conv_pos_batch_norm=True), _audio),
        "parakeet": (
            "ParakeetForCTC",
            lambda: _cfg(
                "ParakeetCTCConfig",
                vocab_size=40,
                pad_token_id=39,
                encoder_config={
                    "hidden_size": 32,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                    "intermediate_size": 48,
                    "num_mel_bins": 16,
                    "subsampling_conv_channels": 8,
                },
            ),
            lambda: ({"input_features": _normal(2, 40, 16)}, {"input_features": _normal(3, 56, 16)}),
        ),
        "whisper": (
            "WhisperForConditionalGeneration",
            lambda: _cfg(
                "WhisperConfig",
                d_model=32,
                encoder_layers=1,
                decoder_layers=1,
                encoder_attention_heads=2,
                decoder_attention_heads=2,
                encoder_ffn_dim=48,
                decoder_ffn_dim=48,
                vocab_size=99,
                max_source_positions=20,
                num_mel_bins=16,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
                decoder_start_token_id=1,
            ),
            lambda: (
                {"input_features": _normal(2, 16, 40), "decoder_input_ids": _whole(2, 5)},
                {"input_features": _normal(3, 16, 40), "decoder_input_ids": _whole(3, 7)},
            ),
        ),
        "speecht5": (
            "SpeechT5ForTextToSpeech",
            lambda: _cfg(
                "SpeechT5Config",
                hidden_size=32,
                encoder_layers=1,
                decoder_layers=1,
                encoder_attention_heads=2,
                decoder_attention_heads=2,
                encoder_ffn_dim=48,
                decoder_ffn_dim=48,
                vocab_size=40,
                speech_decoder_postnet_units=16,
                speech_decoder_prenet_units=16,
                speaker_embedding_dim=8,
                num_mel_bins=16,
            ),
            lambda: (
                {
                    "input_ids": _whole(2, 7, 39),
                    "decoder_input_values": _normal(2, 6, 16),
                    "speaker_embeddings": _normal(2, 8),
                },
                {
                    "input_ids": _whole(3, 9, 39),
                    "decoder_input_values": _normal(3, 8, 16),
                    "speaker_embeddings": _normal(3, 8),
                },
            ),
        ),
        "clap-audio": (
            "ClapAudioModel",
            lambda: _cfg(
                "ClapAudioConfig",
                depths=[1, 1],
                num_attention_heads=[2, 2],
                patch_embeds_hidden_size=16,
                hidden_size=32,
                window_size=4,
                spec_size=64,
                num_mel_bins=16,
            ),
            lambda: (
                {"input_features": _normal(2, 1, 64, 16), "is_longer": None},
                {"input_features": _normal(3, 1, 64, 16), "is_longer": None},
            ),
        ),
        "patchtst-batch-norm": (
            "PatchTSTForPrediction",
            lambda: _cfg(
                "PatchTSTConfig",
                num_input_channels=2,
                context_length=32,
                patch_length=4,
                patch_stride=4,
                d_model=16,
                num_attention_heads=2,
                num_hidden_layers=2,
                ffn_dim=32,
                prediction_length=4,
                norm_type="batchnorm",
            ),
            lambda: ({"past_values": _normal(2, 32, 2)}, {"past_values": _normal(3, 32, 2)}),
        ),
        "patchtsmixer-batch-norm": (
            "PatchTSMixerForPrediction",
            lambda: _cfg(
                "PatchTSMixerConfig",
                context_length=32,
                patch_length=8,
                patch_stride=8,
                num_input_channels=2,
                d_model=8,
                num_layers=2,
                prediction_length=4,
                norm_mlp="BatchNorm",
            ),
            lambda: ({"past_values": _normal(2, 32, 2)}, {"past_values": _normal(3, 32, 2)}),
        ),
        "efficientloftr": (
            "EfficientLoFTRForKeypointMatching",
            lambda: _cfg("EfficientLoFTRConfig"),
            lambda: ({"pixel_values": _normal(1, 2, 3, 64, 64)}, {"pixel_values": _normal(2, 2, 3, 64, 96)}),
        ),
        "resnet-backbone": (
            "ResNetBackbone",
            lambda: _cfg("ResNetConfig", **_SMALL_RESNET, out_features=["stage2", "stage4"]),
            _pixels,
        ),
        "resnet-tuple": (
            "ResNetForImageClassification",
            lambda: _cfg("ResNetConfig", **_SMALL_RESNET),
            lambda: tuple(given | {"return_dict": False} for given in _pixels()),
        ),
        "timm-backbone": (
            "TimmBackbone",
            lambda: _cfg("TimmBackboneConfig", backbone="resnet18", use_pretrained_backbone=False, out_indices=(1, 3)),
            _pixels,
        ),
        "timm-wrapper": (
            "TimmWrapperForImageClassification",
            lambda: _cfg("TimmWrapperConfig", architecture="mobilenetv3_small_100", num_labels=5),
            _pixels,
        ),
        "beit-segmentation": (
            "BeitForSemanticSegmentation",
            lambda: _cfg("BeitConfig", **_SMALL_BEIT),
            lambda: _pixels(64, 64),
        ),
        "data2vec-segmentation": (
            "Data2VecVisionForSemanticSegmentation",
            lambda: _cfg("Data2VecVisionConfig", **_SMALL_BEIT),
            lambda: _pixels(64, 64),
        ),
        "maskformer": (
            "MaskFormerForInstanceSegmentation",
            lambda: _cfg(
                "MaskFormerConfig",
                backbone_config=_resnet_backbone(),
                fpn_feature_size=32,
                mask_feature_size=32,
                decoder_config=_detr("DetrConfig"),
            ),
            _pixels,
        ),
        "mask2former": (
            "Mask2FormerForUniversalSegmentation",
            lambda: _cfg(
                "Mask2FormerConfig",
                backbone_config=_resnet_backbone(),
                feature_size=32,
                mask_feature_size=32,
                hidden_dim=32,
                encoder_feedforward_dim=16,
                encoder_layers=1,
                decoder_layers=2,
                num_attention_heads=2,
                dim_feedforward=16,
                num_queries=4,
            ),
            _pixels,
        ),
        "groupvit": (
            "GroupViTModel",
            lambda: _cfg(
                "GroupViTConfig",
                projection_dim=16,
                projection_intermediate_dim=32,
                text_config={**_TINY_BERT, "eos_token_id": 98},
                vision_config={
                    "hidden_size": 32,
                    "depths": [1, 1],
                    "num_group_tokens": [8, 0],
                    "num_output_groups": [8, 8],
                    "num_attention_heads": 2,
                    "intermediate_size": 32,
                    "image_size": 32,
                    "patch_size": 8,
                },
            ),
            lambda: tuple(a | b for a, b in zip(_tokens(), _pixels(32, 32), strict=True)),
        ),
        "superglue": (
            "SuperGlueForKeypointMatching",
            lambda: _cfg(
                "SuperGlueConfig",
                keypoint_detector_config={"model_type": "superpoint"},
                hidden_size=256,
                keypoint_encoder_sizes=[32, 64],
                gnn_layers_types=["self", "cross"],
            ),
            lambda: ({"pixel_values": _normal(1, 2, 3, 64, 64)}, {"pixel_values": _normal(2, 2, 3, 64, 96)}),
        ),
        "informer": (
            "InformerModel",
            lambda: _cfg(
                "InformerConfig",
                prediction_length=4,
                context_length=16,
                input_size=1,
                lags_sequence=[1, 2],
                num_time_features=1,
                d_model=16,
                encoder_layers=2,
                decoder_layers=1,
                encoder_attention_heads=2,
                decoder_attention_heads=2,
                encoder_ffn_dim=16,
                decoder_ffn_dim=16,
            ),
            lambda: tuple(
                {
                    "past_values": _normal(n, 18),
                    "past_time_features": _normal(n, 18, 1),
                    "past_observed_mask": _normal(n, 18) * 0 + 1,
                    "future_values": _normal(n, 4),
                    "future_time_features": _normal(n, 4, 1),
                }
                for n in (2, 3)
            ),
        ),
        "perceiver-conv": (
            "PerceiverForImageClassificationConvProcessing",
            lambda: _cfg(
                "PerceiverConfig",
                num_latents=8,
                d_latents=32,
                num_blocks=1,
                num_self_attends_per_block=1,
                num_self_attention_heads=2,
                num_cross_attention_heads=2,
            ),
            lambda: _pixels(224, 224, name="inputs"),
        ),
        "seamless-m4t": (
            "SeamlessM4TForSpeechToText",
            lambda: _cfg(
                "SeamlessM4TConfig",
                hidden_size=32,
                vocab_size=50,
                t2u_vocab_size=50,
                feature_projection_input_dim=16,
                speech_encoder_layers=1,
                speech_encoder_attention_heads=2,
                speech_encoder_intermediate_size=32,
                max_position_embeddings=64,
                **{
                    f"{part}{side}_{what}": n
                    for part in ("", "t2u_")
                    for side in ("encoder", "decoder")
                    for what, n in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 32))
                },
            ),
            lambda: (
                {"input_features": _normal(2, 16, 16), "decoder_input_ids": _whole(2, 4, 40)},
                {"input_features": _normal(3, 24, 16), "decoder_input_ids": _whole(3, 5, 40)},
            ),
        ),
        "ppocr-det": ("PPOCRV5MobileDetForObjectDetection", lambda: _cfg("PPOCRV5MobileDetConfig"), _pixels),
    }


def _normal(*shape: int) -> Any:
    import torch

    return torch.randn(shape)


def _whole(n: int, length: int, below: int = 90) -> Any:
    import torch

    return torch.randint(3, below, (n, length))


def of_transformers(name: str) -> Case:
    import transformers

    transformers.logging.set_verbosity_error()
    kind, config, given = transformers_cases()[name]
    example, other = given()
    return Case(getattr(transformers, kind)(config()), example, other)


def of_ultralytics(name: str) -> Case:
    from ultralytics.nn import tasks

    kind = tasks.DetectionModel
    for part, other in (
        ("-seg", "SegmentationModel"),
        ("-cls", "ClassificationModel"),
        ("-pose", "PoseModel"),
        ("-obb", "OBBModel"),
        ("world", "WorldModel"),
        ("rtdetr", "RTDETRDetectionModel"),
        ("yoloe", "YOLOEModel"),
        ("yoloe-11s-seg", "YOLOESegModel"),
    ):
        if part in name:
            kind = getattr(tasks, other)
    model = kind(f"{name}.yaml", verbose=False)
    other = images(3, 128, 64) if "-p6" in name else images(3, 96, 64)
    return Case(model, images(2, 64), other, lambda module: module.fuse(verbose=False))


ULTRALYTICS = names(
    "yolov3-tiny yolov5n yolov6n yolov8n yolov8n-p2 yolov8n-ghost yolov8n-seg yolov8n-pose yolov8n-obb yolov8n-cls "
    "yolov8n-worldv2 yolov9t yolov10n yolo11n yolo11n-seg yolo11n-cls yolo12n yolo26n rtdetr-resnet50 "
    "yolo11n-pose yolo11n-obb yolo12n-seg yolo26n-seg yolo26n-pose yolo26n-cls yoloe-11s yoloe-11s-seg yolov8n-p6 "
    "yolov8n-rtdetr"
)


def of_smp(name: str) -> Case:
    import segmentation_models_pytorch as smp

    architecture, encoder = name.split("/")
    model = getattr(smp, architecture)(encoder_name=encoder, encoder_weights=None, classes=3)
    size = 128 if architecture == "PAN" else 64
    return Case(model, images(2, size), images(3, size + 32, size))


SMP = names(
    "Unet/resnet18 UnetPlusPlus/mobilenet_v2 MAnet/resnet18 Linknet/resnet18 FPN/efficientnet-b0 PSPNet/resnet18 "
    "PAN/resnet18 DeepLabV3/resnet18 DeepLabV3Plus/mobilenet_v2 UPerNet/timm-mobilenetv3_small_minimal_100 "
    "Segformer/mit_b0 Unet/mobileone_s0 "
    "Unet/vgg11_bn FPN/resnet18 UnetPlusPlus/resnet18 MAnet/mobilenet_v2 Linknet/timm-regnetx_002 PSPNet/mobilenet_v2 "
    "DeepLabV3Plus/resnet18 Unet/tu-mobilenetv3_small_100"
)


def of_open_clip(name: str) -> Case:
    import open_clip

    model = open_clip.create_model(name, pretrained=None)
    size = model.visual.image_size
    size = size[0] if isinstance(size, tuple) else size
    length = model.context_length
    return Case(
        model,
        (images(2, size), _whole(2, length)),
        (images(3, size), _whole(3, length)),
    )


OPEN_CLIP = names("RN50 MobileCLIP-S1 MobileCLIP2-S0 ViT-S-32 convnext_tiny ViTamin-S")


def of_mmpretrain(name: str) -> Case:
    from mmengine.registry import init_default_scope
    from mmpretrain.registry import MODELS

    # its models of images and text derive from classes that transformers has no more
    sys.modules.setdefault("mmpretrain.models.multimodal", types.ModuleType("multimodal"))
    init_default_scope("mmpretrain")
    backbone, channels = MMPRETRAIN[name]
    model = MODELS.build(
        {
            "type": "ImageClassifier",
            "backbone": backbone,
            "neck": {"type": "GlobalAveragePooling"},
            "head": {"type": "LinearClsHead", "num_classes": 10, "in_channels": channels},
        }
    )

    def own(module: Any) -> Any:
        for m in module.modules():
            if hasattr(m, "switch_to_deploy"):
                m.switch_to_deploy()
        return module

    has_own = any(hasattr(m, "switch_to_deploy") for m in model.modules())
    sizes = ((224,), (224,)) if name == "levit-128s" else ((64,), (96, 64))
    return Case(model, images(2, *sizes[0]), images(3, *sizes[1]), own if has_own else None)


MMPRETRAIN: Mapping[str, tuple[dict[str, Any], int]] = {
    "resnet18": ({"type": "ResNet", "depth": 18}, 512),
    "resnet50-v1d": ({"type": "ResNetV1d", "depth": 50}, 2048),
    "resnest50": ({"type": "ResNeSt", "depth": 50}, 2048),
    "res2net50": ({"type": "Res2Net", "depth": 50, "scales": 4, "base_width": 26}, 2048),
    "seresnet50": ({"type": "SEResNet", "depth": 50}, 2048),
    "regnetx-400mf": ({"type": "RegNet", "arch": "regnetx_400mf"}, 384),
    "shufflenet-v1": ({"type": "ShuffleNetV1", "groups": 3}, 960),
    "shufflenet-v2": ({"type": "ShuffleNetV2"}, 1024),
    "mobilenet-v2": ({"type": "MobileNetV2"}, 1280),
    "mobilenet-v3": ({"type": "MobileNetV3", "arch": "small"}, 576),
    "mobileone-s0": ({"type": "MobileOne", "arch": "s0"}, 1024),
    "repvgg-a0": ({"type": "RepVGG", "arch": "A0"}, 1280),
    "repmlp-b224": (
        {
            "type": "RepMLPNet",
            "arch": "B",
            "img_size": 64,
            "patch_size": 4,
            "out_indices": (3,),
            "reparam_conv_kernels": (1, 3),
        },
        768,
    ),
    "replknet-31b": ({"type": "RepLKNet", "arch": "31B", "out_indices": (3,)}, 1024),
    "efficientnet-b0": ({"type": "EfficientNet", "arch": "b0"}, 1280),
    "hrnet-w18": ({"type": "HRNet", "arch": "w18"}, 144),
    "densenet121": ({"type": "DenseNet", "arch": "121"}, 1024),
    "cspresnet50": ({"type": "CSPResNet", "depth": 50}, 1024),
    "van-tiny": ({"type": "VAN", "arch": "tiny"}, 256),
    "mobilevit-xxsmall": ({"type": "MobileViT", "arch": "xx_small"}, 320),
    "levit-128s": ({"type": "LeViT", "arch": "128s"}, 384),
    "riformer-s12": ({"type": "RIFormer", "arch": "s12"}, 512),
    "vgg11-bn": ({"type": "VGG", "depth": 11, "norm_cfg": {"type": "BN"}}, 512),
    "resnext50": ({"type": "ResNeXt", "depth": 50}, 2048),
    "seresnext50": ({"type": "SEResNeXt", "depth": 50}, 2048),
    "convmixer-768": ({"type": "ConvMixer", "arch": "768/32"}, 768),
    "inception-v3": ({"type": "InceptionV3", "num_classes": 10, "aux_logits": False}, 2048),
}

LIBRARIES: Mapping[str, tuple[str, Callable[[str], Case], Callable[[], list[str]]]] = {
    "torchvision": ("torchvision", of_torchvision, lambda: TORCHVISION),
    "timm": ("timm", of_timm, lambda: TIMM),
    "transformers": ("transformers", of_transformers, lambda: list(transformers_cases())),
    "ultralytics": ("ultralytics", of_ultralytics, lambda: ULTRALYTICS),
    "segmentation_models_pytorch": ("segmentation_models_pytorch", of_smp, lambda: SMP),
    "mmpretrain": ("mmpretrain", of_mmpretrain, lambda: list(MMPRETRAIN)),
    "open_clip": ("open_clip", of_open_clip, lambda: OPEN_CLIP),
}
"""By name: the package, what builds a model, and the names of the models."""


# One model


def called(model: Any, given: Any) -> Any:
    import torch
    from torch.utils import _pytree as pytree

    given = pytree.tree_map_only(torch.Tensor, torch.clone, given)
    with torch.no_grad():
        torch.manual_seed(1)
        if isinstance(given, dict):
            return model(**given)
        return model(*given) if isinstance(given, tuple) else model(given)


def randomised(case: Case) -> None:
    """BatchNorms get statistics that fit what they see, in one pass over the example, and parameters of their own."""
    import torch
    from torch import nn

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = case.model

        def forward(self, *_: Any) -> Any:
            return called(self.model, case.example)

    from reparamc.testing import randomize_batchnorm, randomize_layer_scales

    case.model.eval()
    randomize_layer_scales(case.model, 0)
    randomize_batchnorm(Holder().eval(), 0, torch.zeros(1))


def error_of(actual: Any, expected: Any) -> float | str:
    """The largest difference of any tensor relative to its largest value; or how else two results differ."""
    import torch

    from reparamc.equivalence.runnable import leaves

    found, wanted = dict(leaves(actual, types=True)), dict(leaves(expected, types=True))
    if list(found) != list(wanted):
        return "another structure"
    worst = 0.0
    for path, e in wanted.items():
        a = found[path]
        if not isinstance(e, torch.Tensor):
            if type(a) is not type(e) or (isinstance(e, int | float | str | type) and a != e):
                return f"another type at {path or 'the output'}"
            continue
        if a.shape != e.shape or a.dtype != e.dtype:
            return f"another shape or dtype at {path}"
        if e.numel() and e.is_floating_point():
            e, a = e.double().nan_to_num(posinf=0, neginf=0), a.double().nan_to_num(posinf=0, neginf=0)
            worst = max(worst, float((a - e).abs().max() / e.abs().max().clamp_min(1e-30)))
        elif not torch.equal(a, e):
            worst = max(worst, float((a != e).double().mean()))
    return worst


def counts(model: Any) -> tuple[int, int]:
    """BatchNorms, and convolutions and matrices: those that are modules, and calls of functions in graphs."""
    from torch import fx, nn

    from reparamc.fx.calls import operation

    norm = conv = 0
    for m in model.modules():
        frozen = "BatchNorm" in type(m).__name__ and hasattr(m, "running_var")
        norm += isinstance(m, nn.modules.batchnorm._BatchNorm) or frozen
        conv += isinstance(m, nn.modules.conv._ConvNd | nn.Linear)
        for node in m.graph.nodes if isinstance(m, fx.GraphModule) else ():
            call = operation(node, m) if node.op == "call_function" else None
            norm += call is not None and call.op in ("batch_norm", "native_batch_norm")
            conv += call is not None and getattr(node.target, "__name__", "").startswith(("conv", "linear"))
    return norm, conv


def in_float64(case: Case, *calls: Any) -> tuple[Any, ...]:
    """The model and arguments of ``calls`` in float64, where rounding hides nothing."""
    import torch
    from torch.utils import _pytree as pytree

    made = pytree.tree_map_only(torch.Tensor, lambda t: t.double() if t.is_floating_point() else t, calls)
    return copy.deepcopy(case.model).double(), *made


def _rank(error: float | str) -> tuple[bool, float]:
    return (True, 0.0) if isinstance(error, str) else (False, error)


def measured(library: str, name: str) -> dict[str, Any]:
    """One row of the table."""
    import torch

    from reparamc import fuse_fx

    torch.manual_seed(0)
    case = LIBRARIES[library][1](name)
    randomised(case)
    row: dict[str, Any] = {"before": counts(case.model)}
    expected, expected_other = called(case.model, case.example), None
    try:
        expected_other = called(case.model, case.other)
    except Exception as error:
        row["other"] = f"the model refuses it: {error}"[:200]
    start = process_time()
    fused = fuse_fx(case.model, case.example)
    row["seconds"] = process_time() - start
    report = fused.meta["reparamc"]
    row["way"] = "parts" if report.parts else "graph"
    row["after"] = counts(fused)
    row["reported"] = [report.before.batchnorm, report.after.batchnorm]
    row["note"], row["failed"] = report.note, [f"{f.where}: {f.error}" for f in report.failed][:3]
    row["same type"] = type(called(fused, case.example)) is type(expected)
    row["example"] = error_of(called(fused, case.example), expected)
    if expected_other is not None:
        row["other"] = error_of(called(fused, case.other), expected_other)
    if any(isinstance(row.get(key), float) and row[key] > 1e-3 for key in ("example", "other")):
        model, *calls = in_float64(case, case.example, *[case.other] * (expected_other is not None))
        fused = fuse_fx(model, calls[0], verify=False)  # rounding that grows, or a fault?
        row["float64"] = max((error_of(called(fused, call), called(model, call)) for call in calls), key=_rank)
    if row["after"][0]:
        row["stays"] = sorted({f"{p.where} ({p.how}): {p.why}"[:300] for p in report.parts if p.batchnorm})[:8]
        row["kept"] = [f"{k.where}: {k.reason}"[:200] for k in report.kept if "atch" in k.name or "norm" in k.name][:8]
    row["lines"], row["characters"] = str(report).count("\n") + 1, len(str(report))
    if case.own is not None:
        try:
            own = case.own(copy.deepcopy(case.model))
            row["own"] = None if own is None else counts(own)
            if own is not None:
                row["own error"] = error_of(called(own, case.example), expected)
        except Exception as error:
            row["own"] = f"{type(error).__name__}: {error}"[:100]
    return row


def timed(library: str, name: str) -> dict[str, float]:
    """CPU seconds of `fuse_fx`, and of one forward of a batch of 32; as four of eight where that is large."""
    import torch
    from torch.utils import _pytree as pytree

    from reparamc import fuse_fx

    torch.set_num_threads(1)
    case = LIBRARIES[library][1](name)
    case.model.eval()
    side = 224 if name.endswith("-cls") else SIDES.get(library)

    def of_real_size(t: torch.Tensor) -> torch.Tensor:
        return torch.randn(2, t.shape[1], side, side) if side and t.ndim == 4 and t.is_floating_point() else t

    example = pytree.tree_map_only(torch.Tensor, of_real_size, case.example)
    n = 32 if _numbers(_batch(example, 32)) <= AT_ONCE else 8
    batch = _batch(example, n)
    fuse_fx(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4)).eval(), torch.ones(2, 3, 4, 4))
    called(case.model, example)  # all modules are imported then
    forwards: list[float] = []
    for _ in range(2):
        start = process_time()
        called(case.model, batch)
        forwards.append(32 // n * (process_time() - start))
    start = process_time()
    fuse_fx(case.model, example)
    return {"forward": min(forwards), "fuse": process_time() - start}


def _numbers(given: Any) -> int:
    """How many numbers the tensors in ``given`` have."""
    import torch
    from torch.utils import _pytree as pytree

    return sum(t.numel() for t in pytree.tree_leaves(given) if isinstance(t, torch.Tensor))


def _batch(given: Any, n: int) -> Any:
    """``given`` with its first example ``n`` times."""
    import torch
    from torch.utils import _pytree as pytree

    if isinstance(given, tuple) and isinstance(given[0], list):
        return (given[0][:1] * n,)
    return pytree.tree_map_only(torch.Tensor, lambda t: t[:1].repeat(n, *[1] * (t.ndim - 1)), given)


def child(library: str, names: list[str], time: bool) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is downloaded
    warnings.simplefilter("ignore")
    sys.path.insert(0, str(ROOT))
    import fastvit_zoo.torchvision_operators  # noqa: F401  # torchvision can be imported

    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes elsewhere
    for name in names:
        try:
            row = timed(library, name) if time else measured(library, name)
        except Exception as error:
            import traceback

            row = {"error": f"{type(error).__name__}: {error}"[:400], "trace": traceback.format_exc()[-1500:]}
        print(json.dumps({"name": name, **row}), file=out, flush=True)


# All models


def rows(library: str, names: list[str], time: bool) -> Iterator[dict[str, Any]]:
    """The rows of models of one library, in processes that are ended where one model takes too long."""
    waiting = list(names)
    while waiting:
        command = [sys.executable, __file__, "--child", library, *waiting, *["--time"] * time]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert process.stdout is not None
        while waiting:
            ready, _, _ = select.select([process.stdout], [], [], LIMIT)
            line = process.stdout.readline() if ready else ""
            if not line:
                process.kill()
                process.wait()
                yield {"name": waiting.pop(0), "error": "ended" if ready else f"more than {LIMIT} seconds"}
                break
            row = json.loads(line)
            waiting.remove(row["name"])
            yield row
        process.wait()


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The page of the documentation."""
    found = {name: row for name, row in results.items() if "after" in row}
    times = [row["fuse"] / row["forward"] for row in found.values() if "fuse" in row]
    head = PAGE_TEXT.format(
        models=len(found),
        whole=sum(not row["after"][0] for row in found.values()),
        timed=len(times),
        over=sum(ratio > 1 for ratio in times),
    )
    lines = [head]
    for name, row in sorted(found.items()):
        library, _, model = name.partition("/")
        own = " / ".join(map(str, row["own"])) if isinstance(row.get("own"), list | tuple) else ""
        norms, convs = (f"{a} > {b}" for a, b in zip(row["before"], row["after"], strict=True))
        errors = (_shown(row.get(key)) for key in ("example", "other", "float64"))
        times = (
            f"{row['fuse']:.1f} / {row['forward']:.1f} = {row['fuse'] / row['forward']:.1f}" if "fuse" in row else ""
        )
        cells = [library, model, row["way"], norms, convs, own, *errors, times]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _shown(error: Any) -> str:
    return f"{error:.0e}" if isinstance(error, float) else "refused" if error else ""


PAGE_TEXT = """# Model libraries of torch

`python benchmarks/torch_zoo.py` makes this table. Each model has random weights and random BatchNorm statistics that
fit what the layers see, and is called as its users call it, on small inputs: positional or keyword arguments, lists of
images, tokens. None of these {models} models is refused, and all return results of the same type. All rows
were made on one state of the code, but those of levit-128s of mmpretrain, deeplabv3_resnet50, fcn_resnet50 and
fasterrcnn_resnet50_fpn, which were made on later ones. Models that
the script knows and that are not in the table were not run, most of them because one forward takes long. Rows of
detectors are of all boxes, none left out for its score; where the first error is large, rounding has changed their
order.

No BatchNorm stays in {whole} models. Why one stays in the others:

- clap-audio, patchtsmixer, repmlp: it acts on another axis than the layer beside it;
- hubert: a padding with zeros comes between it and the convolution;
- densenet121, dpn48b, van-tiny, replknet-31b, repmlp: an activation or a sum comes between, or a skip connection reads
  it too;
- swiftformer, patchtst, mobilevit-xxsmall of mmpretrain, yolov8n-worldv2, yoloe-11s: it would be exact, but Python that
  takes optional arguments, or cannot be followed, calls it and the layer beside it, and stays;
- yoloe-11s and yolo26n-seg: ten and two, in parts that the example does not run (prompts, and a loss);
- resnest50 of mmpretrain: torch.fx cannot follow `*x.shape[2:]` of its split attention, with two BatchNorms each;
- convmixer-768 of mmpretrain: it comes after an activation, and a sum reads it;
- xcit_nano_12_p16_224: it comes after an activation, and goes into a depthwise convolution that pads with zeros.

More Conv than before: a convolution of joined channels is computed in parts where one of them may then go before an
upsampling, or into the convolution before it (DeepLabV3, MobileViT, UnetPlusPlus, CSPResNet, DPN); matrices of
SwiftFormer that were parameters are layers. More Conv than after the library's own method: `fuse` of YOLOv10 and YOLO26
removes the head that is for training (24 Conv, more in those for segmentation and poses), and its predictions from the
result, which is then of another structure; a copy keeps both. RepMLP writes convolutions into a matrix over all
positions, and keeps 77 BatchNorms for that, where a copy has 24 and all Conv: its blocks branch on sizes.

*Way*: the result is one graph, or a module of the same class in which parts are fused. *BatchNorm* and *Conv* (matrices
included) are counted before and after; *own method* has the same two numbers after the library's own method
(`fuse`, `reparameterize_model`, `switch_to_deploy`), where it has one. Errors are the largest difference relative to
the largest value of the output, in float32, on the example and on another batch and size ("refused": the model itself
takes no other size). Where one of them is above 0.001, *float64* shows that rounding is all there is to it, on both:
random networks may amplify it (a change of 1e-7 in the input of efficientvit_m0 and shvit_s1 changes their outputs
about 1e13 times). *Time*: `fuse_fx` with verification / one forward of a batch of 32, in CPU seconds on one thread,
measured by `python benchmarks/torch_zoo.py --time`, the quicker of two forwards; images are of the size that the model
is made for (224, segmentation_models_pytorch 256, detectors 640, of which a batch is four of eight), those of
transformers as small as in the rest of the table. Of the {timed} models that were measured, {over} take more than one
such forward; all of transformers do, as their forward is of small models on small images.

| library | model | way | BatchNorm | Conv | own method | example | other size | float64 | time |
|---|---|---|---|---|---|---|---|---|---|"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", metavar="PATTERN", help="models such as 'timm/*' or '*resnet*'")
    parser.add_argument("--again", action="store_true", help="run what has a result already")
    parser.add_argument("--time", action="store_true", help="measure times as well")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child[0], options.child[1:], options.time)
        return
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    RESULTS.parent.mkdir(exist_ok=True)
    for library, (package, _, names) in LIBRARIES.items():
        if importlib.util.find_spec(package) is None:
            continue
        chosen = [n for n in names() if any(fnmatch.fnmatch(f"{library}/{n}", p) for p in options.only.split(","))]
        done = {name for name, row in results.items() if "error" not in row}
        if options.time:
            chosen = [n for n in chosen if f"{library}/{n}" in done]
            done = {name for name in done if "fuse" in results[name]}
        chosen = [n for n in chosen if f"{library}/{n}" not in done or options.again]
        for row in rows(library, chosen, options.time):
            name = f"{library}/{row.pop('name')}"
            results[name] = {**results[name], **row} if options.time else row
            RESULTS.write_text(json.dumps(results, indent=1))
            print(name, {k: v for k, v in row.items() if k != "trace"}, flush=True)
    PAGE.write_text(table(results))


if __name__ == "__main__":
    main()
