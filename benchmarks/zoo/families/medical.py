"""Networks of MONAI, on small volumes of random numbers."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.zoo.subject import Subject, mean_square

_UNET = {"spatial_dims": 2, "in_channels": 1, "out_channels": 3}
_IMAGE = (2, 1, 64, 64)
_VIT = {
    "in_channels": 1,
    "img_size": (64, 64),
    "patch_size": (8, 8),
    "hidden_size": 48,
    "mlp_dim": 96,
    "num_layers": 4,
    "num_heads": 4,
    "spatial_dims": 2,
}
_STAGES = {"channels": (8, 16, 32), "strides": (2, 2)}

#: Options, and the shape of what goes in.
_NETWORKS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "UNet": (_UNET | _STAGES | {"num_res_units": 2}, _IMAGE),
    "AttentionUnet": (_UNET | _STAGES, _IMAGE),
    "BasicUNet": (_UNET | {"features": (8, 8, 16, 32, 64, 8)}, _IMAGE),
    "BasicUNetPlusPlus": (_UNET | {"features": (8, 8, 16, 32, 64, 8)}, _IMAGE),
    "DynUNet": (
        _UNET
        | {"kernel_size": (3, 3, 3), "strides": (1, 2, 2), "upsample_kernel_size": (2, 2), "filters": (8, 16, 32)},
        _IMAGE,
    ),
    "SegResNet": (_UNET | {"init_filters": 8, "dropout_prob": 0.1}, _IMAGE),
    "SegResNetDS": (_UNET | {"init_filters": 8, "dsdepth": 2}, _IMAGE),
    "VNet": (_UNET | {"dropout_dim": 2}, _IMAGE),
    "HighResNet": (_UNET, _IMAGE),
    "UNETR": (
        {
            "in_channels": 1,
            "out_channels": 3,
            "img_size": (64, 64),
            "spatial_dims": 2,
            "feature_size": 8,
            "hidden_size": 48,
            "mlp_dim": 96,
            "num_heads": 4,
        },
        _IMAGE,
    ),
    "SwinUNETR": (_UNET | {"feature_size": 12}, _IMAGE),
    "ViT": (_VIT, _IMAGE),
    "ViTAutoEnc": (_VIT, _IMAGE),
    "MedNeXtS": (_UNET, _IMAGE),
    "DenseNet121": ({"spatial_dims": 2, "in_channels": 1, "out_channels": 3}, _IMAGE),
    "AutoEncoder": (
        {"spatial_dims": 2, "in_channels": 1, "out_channels": 1, "channels": (8, 16, 32), "strides": (2, 2, 2)},
        _IMAGE,
    ),
    "VarAutoEncoder": (
        {
            "spatial_dims": 2,
            "in_shape": (1, 64, 64),
            "out_channels": 1,
            "latent_size": 8,
            "channels": (8, 16),
            "strides": (2, 2),
        },
        _IMAGE,
    ),
    "VQVAE": (
        {
            "spatial_dims": 2,
            "in_channels": 1,
            "out_channels": 1,
            "channels": (16, 32),
            "num_res_channels": (16, 32),
            "num_res_layers": 2,
            "downsample_parameters": ((2, 4, 1, 1), (2, 4, 1, 1)),
            "upsample_parameters": ((2, 4, 1, 1, 0), (2, 4, 1, 1, 0)),
            "num_embeddings": 16,
            "embedding_dim": 8,
        },
        _IMAGE,
    ),
    "AutoencoderKL": (
        {
            "spatial_dims": 2,
            "in_channels": 1,
            "out_channels": 1,
            "num_res_blocks": (1, 1, 1),
            "channels": (16, 32, 32),
            "attention_levels": (False, False, True),
            "latent_channels": 4,
            "norm_num_groups": 8,
        },
        _IMAGE,
    ),
    "EfficientNetBN": (
        {"model_name": "efficientnet-b0", "pretrained": False, "spatial_dims": 2, "in_channels": 1, "num_classes": 3},
        _IMAGE,
    ),
    "FlexibleUNet": ({"in_channels": 1, "out_channels": 3, "backbone": "efficientnet-b0", "pretrained": False}, _IMAGE),
    "ResNetFeatures": ({"model_name": "resnet18", "pretrained": False, "spatial_dims": 2, "in_channels": 1}, _IMAGE),
    "SEResNet50": ({"spatial_dims": 2, "in_channels": 1, "num_classes": 3}, _IMAGE),
    "Discriminator": ({"in_shape": (1, 64, 64), "channels": (8, 16, 32), "strides": (2, 2, 2)}, _IMAGE),
    "PatchDiscriminator": ({"spatial_dims": 2, "channels": 8, "in_channels": 1, "num_layers_d": 3}, _IMAGE),
    "Quicknat": ({"num_classes": 3, "num_channels": 1, "num_filters": 16}, _IMAGE),
    "HoVerNet": ({"mode": "fast", "out_classes": 3}, (1, 3, 256, 256)),
    "UNet-3d": (_UNET | _STAGES | {"num_res_units": 2, "spatial_dims": 3}, (1, 1, 32, 32, 32)),
    "SegResNet-3d": (_UNET | {"init_filters": 8, "spatial_dims": 3}, (1, 1, 32, 32, 32)),
    "VNet-3d": (_UNET | {"spatial_dims": 3}, (1, 1, 32, 32, 32)),
}


def build(family: str, name: str) -> Subject:
    from monai.networks import nets

    options, shape = _NETWORKS[name]
    model = getattr(nets, name.removesuffix("-3d"))(**options)
    return Subject.single(model, torch.randn(*shape), mean_square)
