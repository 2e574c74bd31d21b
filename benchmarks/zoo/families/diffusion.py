"""Denoisers and autoencoders of diffusers, made small."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.zoo.subject import Subject, mean_square

_CHANNELS = (16, 32)
_DOWN, _UP = ("DownBlock2D", "AttnDownBlock2D"), ("AttnUpBlock2D", "UpBlock2D")
_IMAGE = (2, 4, 32, 32)
_TEXT = (2, 8, 32)
_HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}


def _time() -> torch.Tensor:
    return torch.tensor([3, 500])


def build(family: str, name: str) -> Subject:
    import diffusers

    make = _MAKERS[name]
    options, batch = make()
    model = getattr(diffusers, name.partition("/")[0])(**options)
    model.train()
    return Subject.single(model, batch, mean_square)


def _unet() -> Any:
    return (
        {
            "sample_size": 32,
            "in_channels": 4,
            "out_channels": 4,
            "block_out_channels": _CHANNELS,
            "layers_per_block": 1,
            "down_block_types": _DOWN,
            "up_block_types": _UP,
            "norm_num_groups": 8,
            "attention_head_dim": 8,
        },
        {"sample": torch.randn(*_IMAGE), "timestep": _time()},
    )


def _conditional() -> Any:
    return (
        {
            "sample_size": 32,
            "block_out_channels": _CHANNELS,
            "layers_per_block": 1,
            "norm_num_groups": 8,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "cross_attention_dim": 32,
            "attention_head_dim": 8,
        },
        {"sample": torch.randn(*_IMAGE), "timestep": _time(), "encoder_hidden_states": torch.randn(*_TEXT)},
    )


def _unet_1d() -> Any:
    return (
        {
            "sample_size": 64,
            "in_channels": 20,
            "out_channels": 4,
            "block_out_channels": (32, 32, 64),
            "extra_in_channels": 16,
            "layers_per_block": 1,
        },
        {"sample": torch.randn(2, 4, 64), "timestep": _time()},
    )


def _unet_3d() -> Any:
    return (
        {
            "sample_size": 16,
            "block_out_channels": (16, 32),
            "layers_per_block": 1,
            "norm_num_groups": 8,
            "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
            "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
            "cross_attention_dim": 32,
            "attention_head_dim": 8,
        },
        {
            "sample": torch.randn(1, 4, 4, 16, 16),
            "timestep": torch.tensor([3]),
            "encoder_hidden_states": torch.randn(1, 8, 32),
        },
    )


def _motion() -> Any:
    options, batch = _unet_3d()
    del options["attention_head_dim"]
    options |= {"num_attention_heads": 2} | {
        "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
        "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"),
        "motion_num_attention_heads": 2,
    }
    return options, batch


def _control() -> Any:
    return (
        {
            "block_out_channels": _CHANNELS,
            "layers_per_block": 1,
            "norm_num_groups": 8,
            "cross_attention_dim": 32,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "attention_head_dim": 8,
            "conditioning_embedding_out_channels": (16, 32),
        },
        {
            "sample": torch.randn(*_IMAGE),
            "timestep": _time(),
            "encoder_hidden_states": torch.randn(*_TEXT),
            "controlnet_cond": torch.randn(2, 3, 64, 64),
        },
    )


def _dit() -> Any:
    return (
        {"sample_size": 16, "in_channels": 4, "num_layers": 3, "patch_size": 2, **_HEADS},
        {"hidden_states": torch.randn(2, 4, 16, 16), "timestep": _time(), "class_labels": torch.tensor([1, 2])},
    )


def _pixart() -> Any:
    return (
        {
            "sample_size": 16,
            "in_channels": 4,
            "num_layers": 3,
            "caption_channels": 32,
            "cross_attention_dim": 32,
            "use_additional_conditions": False,
            **_HEADS,
        },
        {
            "hidden_states": torch.randn(2, 4, 16, 16),
            "timestep": _time(),
            "encoder_hidden_states": torch.randn(*_TEXT),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        },
    )


def _sd3() -> Any:
    return (
        {
            "sample_size": 16,
            "in_channels": 4,
            "num_layers": 3,
            "joint_attention_dim": 32,
            "caption_projection_dim": 32,
            "pooled_projection_dim": 16,
            "pos_embed_max_size": 16,
            **_HEADS,
        },
        {
            "hidden_states": torch.randn(2, 4, 16, 16),
            "timestep": _time(),
            "encoder_hidden_states": torch.randn(*_TEXT),
            "pooled_projections": torch.randn(2, 16),
        },
    )


def _flux() -> Any:
    return (
        {
            "in_channels": 16,
            "num_layers": 2,
            "num_single_layers": 2,
            "joint_attention_dim": 32,
            "pooled_projection_dim": 16,
            "axes_dims_rope": (4, 6, 6),
            **_HEADS,
        },
        {
            "hidden_states": torch.randn(2, 64, 16),
            "timestep": torch.tensor([0.1, 0.5]),
            "encoder_hidden_states": torch.randn(*_TEXT),
            "pooled_projections": torch.randn(2, 16),
            "img_ids": torch.zeros(64, 3),
            "txt_ids": torch.zeros(8, 3),
        },
    )


def _wan() -> Any:
    return (
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 3,
            "ffn_dim": 64,
            "text_dim": 32,
            "freq_dim": 16,
            "rope_max_seq_len": 32,
            "cross_attn_norm": True,
            **_HEADS,
        },
        {
            "hidden_states": torch.randn(1, 4, 2, 16, 16),
            "timestep": torch.tensor([3]),
            "encoder_hidden_states": torch.randn(1, 8, 32),
        },
    )


def _ltx() -> Any:
    return (
        {
            "in_channels": 8,
            "out_channels": 8,
            "num_layers": 3,
            "cross_attention_dim": 32,
            "caption_channels": 32,
            **_HEADS,
        },
        {
            "hidden_states": torch.randn(1, 64, 8),
            "timestep": torch.tensor([3]),
            "encoder_hidden_states": torch.randn(1, 8, 32),
            "encoder_attention_mask": torch.ones(1, 8),
            "num_frames": 4,
            "height": 4,
            "width": 4,
        },
    )


def _cogvideo() -> Any:
    return (
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 3,
            "text_embed_dim": 32,
            "time_embed_dim": 16,
            "sample_width": 16,
            "sample_height": 16,
            "sample_frames": 5,
            "max_text_seq_length": 8,
            **_HEADS,
        },
        {
            "hidden_states": torch.randn(1, 2, 4, 16, 16),
            "timestep": torch.tensor([3]),
            "encoder_hidden_states": torch.randn(1, 8, 32),
        },
    )


def _sana() -> Any:
    return (
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 3,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 16,
            "cross_attention_dim": 32,
            "caption_channels": 32,
            "sample_size": 16,
            **_HEADS,
        },
        {"hidden_states": torch.randn(2, 4, 16, 16), "timestep": _time(), "encoder_hidden_states": torch.randn(*_TEXT)},
    )


def _aura() -> Any:
    return (
        {
            "sample_size": 16,
            "in_channels": 4,
            "num_mmdit_layers": 2,
            "num_single_dit_layers": 2,
            "joint_attention_dim": 32,
            "caption_projection_dim": 32,
            "pos_embed_max_size": 64,
            **_HEADS,
        },
        {
            "hidden_states": torch.randn(2, 4, 16, 16),
            "timestep": torch.tensor([0.1, 0.5]),
            "encoder_hidden_states": torch.randn(*_TEXT),
        },
    )


def _autoencoder() -> Any:
    return (
        {
            "block_out_channels": _CHANNELS,
            "layers_per_block": 1,
            "norm_num_groups": 8,
            "latent_channels": 4,
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
        },
        {"sample": torch.randn(2, 3, 32, 32)},
    )


def _vq() -> Any:
    return (
        {
            "block_out_channels": _CHANNELS,
            "norm_num_groups": 8,
            "latent_channels": 3,
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
        },
        {"sample": torch.randn(2, 3, 32, 32)},
    )


def _tiny() -> Any:
    widths = (16, 16)
    return (
        {
            "encoder_block_out_channels": widths,
            "decoder_block_out_channels": widths,
            "num_encoder_blocks": (1, 2),
            "num_decoder_blocks": (2, 1),
        },
        {"sample": torch.randn(2, 3, 32, 32)},
    )


def _transformer() -> Any:
    return (
        {"in_channels": 16, "num_layers": 3, "cross_attention_dim": 32, "norm_num_groups": 8, **_HEADS},
        {"hidden_states": torch.randn(2, 16, 16, 16), "encoder_hidden_states": torch.randn(*_TEXT)},
    )


_MAKERS: dict[str, Any] = {
    "UNet2DModel": _unet,
    "UNet2DConditionModel": _conditional,
    "UNet1DModel": _unet_1d,
    "UNet3DConditionModel": _unet_3d,
    "UNetMotionModel": _motion,
    "ControlNetModel": _control,
    "DiTTransformer2DModel": _dit,
    "PixArtTransformer2DModel": _pixart,
    "SD3Transformer2DModel": _sd3,
    "FluxTransformer2DModel": _flux,
    "WanTransformer3DModel": _wan,
    "LTXVideoTransformer3DModel": _ltx,
    "CogVideoXTransformer3DModel": _cogvideo,
    "SanaTransformer2DModel": _sana,
    "AuraFlowTransformer2DModel": _aura,
    "AutoencoderKL": _autoencoder,
    "VQModel": _vq,
    "AutoencoderTiny": _tiny,
    "Transformer2DModel": _transformer,
}
