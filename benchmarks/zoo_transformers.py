"""Architectures of transformers for the model zoo: few layers, small widths, small images, random weights.

transformers is imported when a network is made.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Made = tuple[nn.Module, Any]

_TEXT = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_BERT = {**_TEXT, "intermediate_size": 48, "max_position_embeddings": 32}
_VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "patch_size": 8}
_PYRAMID = {"depths": (1, 1), "sr_ratios": (2, 1), "hidden_sizes": (16, 32), "num_attention_heads": (2, 4)}
_SEGFORMER = {**_PYRAMID, "num_encoder_blocks": 2, "patch_sizes": (7, 3), "strides": (4, 2), "mlp_ratios": (2, 2)}
_STAGES = {"depths": (1, 2), "hidden_sizes": (24, 32)}


def _built(config: str, model: str, options: dict[str, Any]) -> nn.Module:
    """``model`` and ``config`` are names of classes of transformers."""
    import transformers

    return getattr(transformers, model)(getattr(transformers, config)(**options))


def _image(config: str, model: str, side: int = 32, name: str = "pixel_values", **options: Any) -> Callable[[], Made]:
    return lambda: (_built(config, model, options), {name: torch.randn(2, 3, side, side)})


def _text(config: str, model: str, **options: Any) -> Callable[[], Made]:
    return lambda: (_built(config, model, options), {"input_ids": torch.randint(3, 60, (2, 12))})


def _sound(config: str, model: str, *shape: int, name: str = "input_values", **options: Any) -> Callable[[], Made]:
    return lambda: (_built(config, model, options), {name: torch.randn(2, *shape)})


def _encoder_decoder() -> Made:
    """T5 with both halves: two kinds of input."""
    options = {**_T5, "num_decoder_layers": 1, "feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0}
    inputs = {"input_ids": torch.randint(3, 60, (2, 12)), "decoder_input_ids": torch.randint(3, 60, (2, 5))}
    return _built("T5Config", "T5ForConditionalGeneration", {**options, "use_cache": False}), inputs


def _segmenter() -> Made:
    """UPerNet on ConvNeXt: a backbone that returns the maps of several stages."""
    import transformers

    backbone = transformers.ConvNextConfig(
        depths=[1, 1, 1, 1], hidden_sizes=[16, 16, 24, 24], out_features=["stage1", "stage2", "stage3", "stage4"]
    )
    config = transformers.UperNetConfig(
        backbone_config=backbone, hidden_size=24, auxiliary_channels=16, auxiliary_in_channels=24, num_labels=4
    )
    return transformers.UperNetForSemanticSegmentation(config), {"pixel_values": torch.randn(2, 3, 64, 64)}


def _depth() -> Made:
    """Depth Anything: convolutions on the maps of a DINOv2."""
    import transformers

    backbone = transformers.Dinov2Config(
        **_without(_VIT, "intermediate_size"),
        image_size=32,
        out_features=["stage1", "stage2"],
        reshape_hidden_states=False,
    )
    config = transformers.DepthAnythingConfig(
        backbone_config=backbone, patch_size=8, reassemble_hidden_size=32, reassemble_factors=[2, 1],
        neck_hidden_sizes=[16, 24], fusion_hidden_size=16, head_hidden_size=8, depth_estimation_type="metric",
        max_depth=1,
    )  # fmt: skip
    return transformers.DepthAnythingForDepthEstimation(config), {"pixel_values": torch.randn(2, 3, 32, 32)}


def _without(options: dict[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key not in names}


_T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
_RESNET = {**_STAGES, "embedding_size": 16, "layer_type": "basic"}
_SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4}
_WAV = {**_BERT, "conv_dim": (16, 16, 16), "conv_stride": (5, 2, 2), "conv_kernel": (10, 3, 3)}
_WAV |= {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "num_feat_extract_layers": 3}
_LEVIT = {"image_size": 64, "hidden_sizes": (16, 24, 32), "num_attention_heads": (2, 3, 4), "depths": (1, 1, 1)}
_EFFICIENT = {
    "width_coefficient": 0.25, "depth_coefficient": 0.4, "hidden_dim": 320, "depthwise_padding": (), "depth_divisor": 8,
}  # fmt: skip
_LLAMA = {**_TEXT, "intermediate_size": 48, "num_key_value_heads": 2, "use_cache": False}
_HIERA = {"image_size": (32, 32), "embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2), "num_query_pool": 1}
_HIERA |= {"masked_unit_size": (4, 4), "masked_unit_attention": (True, False)}
_MOBILEVIT = {"image_size": 64, "hidden_sizes": (16, 24, 32), "neck_hidden_sizes": (8, 8, 16, 16, 24, 24, 48)}
_MOBILEVIT2 = {"image_size": 64, "width_multiplier": 0.25, "base_attn_unit_dims": (32, 48, 64)}
_HGNET: dict[str, Any] = {
    "stem_channels": (3, 8, 16), "stage_in_channels": (16, 24), "stage_mid_channels": (8, 16),
    "stage_out_channels": (24, 48), "stage_num_blocks": (1, 2), "stage_downsample": (False, True),
    "stage_light_block": (False, True), "stage_kernel_size": (3, 5), "stage_numb_of_layers": (2, 2),
    "stage_downsample_strides": (2, 2), "depths": (1, 2), "hidden_sizes": (24, 48), "embedding_size": 16,
}  # fmt: skip

TRANSFORMERS: dict[str, Callable[[], Made]] = {
    "hf-resnet-basic": _image("ResNetConfig", "ResNetForImageClassification", **_RESNET),
    "hf-resnet-bottleneck": _image(
        "ResNetConfig", "ResNetForImageClassification", **{**_RESNET, "layer_type": "bottleneck"}
    ),
    "hf-regnet-x": _image(
        "RegNetConfig", "RegNetForImageClassification", **{**_RESNET, "layer_type": "x"}, groups_width=8
    ),
    "hf-regnet-y": _image(
        "RegNetConfig", "RegNetForImageClassification", **{**_RESNET, "layer_type": "y"}, groups_width=8
    ),
    "hf-bit": _image("BitConfig", "BitForImageClassification", **_STAGES, embedding_size=16, num_groups=8),
    "hf-convnext": _image("ConvNextConfig", "ConvNextForImageClassification", **_STAGES, num_stages=2),
    "hf-convnextv2": _image("ConvNextV2Config", "ConvNextV2ForImageClassification", **_STAGES, num_stages=2),
    "hf-dinov3-convnext": _image(
        "DINOv3ConvNextConfig", "DINOv3ConvNextModel", depths=[1, 1, 1, 1], hidden_sizes=[16, 16, 24, 32]
    ),
    "hf-mobilenet-v1": _image("MobileNetV1Config", "MobileNetV1ForImageClassification", depth_multiplier=0.25),
    "hf-mobilenet-v2": _image("MobileNetV2Config", "MobileNetV2ForImageClassification", depth_multiplier=0.25),
    "hf-mobilevit": _image("MobileViTConfig", "MobileViTForImageClassification", 64, **_MOBILEVIT),
    "hf-mobilevitv2": _image("MobileViTV2Config", "MobileViTV2ForImageClassification", 64, **_MOBILEVIT2),
    "hf-efficientnet": _image("EfficientNetConfig", "EfficientNetForImageClassification", **_EFFICIENT),
    "hf-hgnet-v2": _image("HGNetV2Config", "HGNetV2ForImageClassification", **_HGNET),
    "hf-pp-lcnet": _image("PPLCNetConfig", "PPLCNetForImageClassification", scale=0.5, class_expand=64),
    "hf-textnet": _image(
        "TextNetConfig", "TextNetForImageClassification",
        conv_layer_kernel_sizes=[[[3, 3]], [[3, 3], [1, 3]], [[3, 1]], [[3, 3]]],
        conv_layer_strides=[[2], [2, 1], [2], [1]], stem_out_channels=8, hidden_sizes=(8, 16, 24, 32, 32),
    ),
    "hf-swiftformer": _image(
        "SwiftFormerConfig", "SwiftFormerForImageClassification", 64, depths=(1, 1, 1, 1), embed_dims=(16, 16, 24, 32),
        mlp_ratio=2,
    ),
    "hf-poolformer": _image(
        "PoolFormerConfig", "PoolFormerForImageClassification", num_encoder_blocks=2, patch_sizes=(7, 3),
        strides=(4, 2), padding=(2, 1), depths=(1, 1), hidden_sizes=(16, 32), mlp_ratio=2.0,
    ),
    "hf-vit": _image("ViTConfig", "ViTForImageClassification", **_VIT, image_size=32),
    "hf-deit": _image("DeiTConfig", "DeiTForImageClassificationWithTeacher", **_VIT, image_size=32),
    "hf-beit": _image("BeitConfig", "BeitForImageClassification", **_VIT, image_size=32),
    "hf-data2vec-vision": _image(
        "Data2VecVisionConfig", "Data2VecVisionForImageClassification", **_VIT, image_size=32
    ),
    "hf-dinov2": _image(
        "Dinov2Config", "Dinov2ForImageClassification", **_without(_VIT, "intermediate_size"), image_size=32,
        use_swiglu_ffn=True,
    ),
    "hf-clip-vision": _image("CLIPVisionConfig", "CLIPVisionModelWithProjection", **_VIT, image_size=32),
    "hf-siglip-vision": _image("SiglipVisionConfig", "SiglipVisionModel", **_VIT, image_size=32),
    "hf-yolos": _image("YolosConfig", "YolosForObjectDetection", **_VIT, image_size=[32, 32], num_detection_tokens=4),
    "hf-swin": _image("SwinConfig", "SwinForImageClassification", **_SWIN),
    "hf-swinv2": _image("Swinv2Config", "Swinv2ForImageClassification", **_SWIN),
    "hf-levit": _image("LevitConfig", "LevitForImageClassification", 64, **_LEVIT, key_dim=(8, 8, 8)),
    "hf-pvt": _image(
        "PvtConfig", "PvtForImageClassification", image_size=32, num_encoder_blocks=2, depths=(1, 1),
        sequence_reduction_ratios=(2, 1), hidden_sizes=(16, 32), patch_sizes=(4, 2), strides=(4, 2),
        num_attention_heads=(2, 4), mlp_ratios=(2, 2),
    ),
    "hf-pvt-v2": _image(
        "PvtV2Config", "PvtV2ForImageClassification", image_size=32, **_SEGFORMER,
    ),
    "hf-segformer": _image(
        "SegformerConfig", "SegformerForSemanticSegmentation", **_SEGFORMER, decoder_hidden_size=24
    ),
    "hf-glpn": _image("GLPNConfig", "GLPNForDepthEstimation", **_SEGFORMER, decoder_hidden_size=16),
    "hf-focalnet": _image(
        "FocalNetConfig", "FocalNetForImageClassification", image_size=32, embed_dim=16, hidden_sizes=(16, 32),
        depths=(1, 1), focal_levels=(2, 2), focal_windows=(3, 3), use_layerscale=True,
    ),
    "hf-cvt": _image(
        "CvtConfig", "CvtForImageClassification", embed_dim=(16, 24, 32), num_heads=(1, 2, 2), depth=(1, 2, 3),
        mlp_ratio=(2.0, 2.0, 2.0), drop_path_rate=(0.0, 0.0, 0.0),
    ),
    "hf-hiera": _image("HieraConfig", "HieraForImageClassification", **_HIERA),
    "hf-upernet": _segmenter,
    "hf-depth-anything": _depth,
    "hf-bert": _text("BertConfig", "BertForSequenceClassification", **_BERT),
    "hf-distilbert": _text(
        "DistilBertConfig", "DistilBertForSequenceClassification", vocab_size=64, dim=32, n_layers=2, n_heads=4,
        hidden_dim=48,
    ),
    "hf-albert": _text("AlbertConfig", "AlbertForSequenceClassification", **_BERT, embedding_size=16),
    "hf-squeezebert": _text("SqueezeBertConfig", "SqueezeBertForSequenceClassification", **_BERT, embedding_size=32),
    "hf-mobilebert": _text(
        "MobileBertConfig", "MobileBertForSequenceClassification", **_BERT, embedding_size=16,
        intra_bottleneck_size=16, num_feedforward_networks=2,
    ),
    "hf-fnet": _text(
        "FNetConfig", "FNetForSequenceClassification", **_without(_BERT, "num_attention_heads")
    ),
    "hf-gpt2": _text(
        "GPT2Config", "GPT2LMHeadModel", vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32, use_cache=False
    ),
    "hf-llama": _text("LlamaConfig", "LlamaForCausalLM", **_LLAMA),
    "hf-opt": _text(
        "OPTConfig", "OPTForCausalLM", **_TEXT, ffn_dim=48, max_position_embeddings=32, use_cache=False
    ),
    "hf-mamba": _text(
        "MambaConfig", "MambaForCausalLM", vocab_size=64, hidden_size=32, state_size=8, num_hidden_layers=2,
        use_cache=False,
    ),
    "hf-t5-encoder": _text("T5Config", "T5EncoderModel", **_T5),
    "hf-t5": _encoder_decoder,
    "hf-wav2vec2": _sound("Wav2Vec2Config", "Wav2Vec2ForCTC", 1600, **_WAV),
    "hf-whisper-encoder": _sound(
        "WhisperConfig", "WhisperForAudioClassification", 16, 64, name="input_features", vocab_size=64, num_mel_bins=16,
        encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=48, decoder_layers=1, d_model=32,
        max_source_positions=32, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    ),
    "hf-hifi-gan": _sound(
        "SpeechT5HifiGanConfig", "SpeechT5HifiGan", 8, 16, name="spectrogram", model_in_dim=16,
        upsample_initial_channel=32, upsample_rates=(4, 2), upsample_kernel_sizes=(8, 4), resblock_kernel_sizes=(3, 5),
        resblock_dilation_sizes=((1, 3), (1, 3)),
    ),
}  # fmt: skip
