"""Detection with torchvision's operators in C++: their sizes depend on the data, and differ from step to step."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.real_libraries.trainings import five_steps, trained


def test_deformable_convolutions_and_regions_of_interest() -> None:
    from torchvision import ops

    class Deformed(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.offset, self.mask = nn.Conv2d(channels, 18, 3, 1, 1), nn.Conv2d(channels, 9, 3, 1, 1)
            self.convolution, self.norm = ops.DeformConv2d(channels, channels, 3, 1, 1), nn.BatchNorm2d(channels)

        def forward(self, x: Tensor) -> Tensor:
            return x + F.relu(self.norm(self.convolution(x, 0.1 * self.offset(x), self.mask(x).sigmoid())))

    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.blocks = nn.Conv2d(3, 8, 3, 2, 1), nn.Sequential(*[Deformed(8) for _ in range(3)])
            self.boxes, self.classes = nn.Conv2d(8, 5, 1), nn.Linear(8 * 49, 3)

        def forward(self, images: Tensor) -> Tensor:
            features = self.blocks(self.stem(images))
            found = self.boxes(features)
            corners = found[:, :2].flatten(2).transpose(1, 2).sigmoid() * 16
            boxes = torch.cat([corners, corners + 1 + 6 * found[:, 2:4].flatten(2).transpose(1, 2).sigmoid()], -1)
            kept = [
                one[ops.nms(one.detach(), score.detach(), 0.3)[:8]]
                for one, score in zip(boxes, found[:, 4].flatten(1), strict=True)
            ]
            regions = ops.roi_align(features, kept, (7, 7), sampling_ratio=2)
            return self.classes(regions.flatten(1)).pow(2).mean() + found.pow(2).mean()

    def make() -> tuple[nn.Module, Tensor]:
        torch.manual_seed(0)
        return Detector(), torch.randn(2, 3, 32, 32)

    peaks = five_steps(make, lambda model, images: model(images), lambda model: model.blocks)  # type: ignore[no-any-return]  # calls of modules are not annotated
    assert peaks.replayed_ops > 0
    assert peaks.smallest < peaks.checkpointed < peaks.plain


def test_mask_rcnn() -> None:
    from torchvision.models.detection import MaskRCNN
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.faster_rcnn import TwoMLPHead

    class Layer(nn.Module):
        def __init__(self, inside: int, outside: int) -> None:
            super().__init__()
            self.convolution, self.norm = nn.Conv2d(inside, outside, 3, 2, 1), nn.BatchNorm2d(outside)

        def forward(self, x: Tensor) -> Tensor:
            return F.gelu(self.norm(self.convolution(x))).tanh()

    class Backbone(nn.Sequential):
        out_channels = 8

    def make() -> tuple[nn.Module, Any]:
        torch.manual_seed(0)
        model = MaskRCNN(
            Backbone(Layer(3, 8), Layer(8, 8), Layer(8, 8)),
            min_size=64,
            max_size=64,
            rpn_anchor_generator=AnchorGenerator(((16, 32),), ((1.0,),)),
            rpn_pre_nms_top_n_train=40,
            rpn_post_nms_top_n_train=20,
            box_head=TwoMLPHead(8 * 49, 16),
            box_predictor=Predictor(),
            box_batch_size_per_image=16,
            mask_head=nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1), nn.ReLU()),
            mask_predictor=nn.Conv2d(8, 3, 1),
        )
        images = [torch.rand(3, 64, 64) for _ in range(2)]
        boxes = torch.tensor([[5.0, 5.0, 30.0, 30.0], [20.0, 20.0, 60.0, 50.0]])
        masks = torch.zeros(2, 64, 64, dtype=torch.uint8)
        masks[:, 20:30, 20:30] = 1
        targets = [{"boxes": boxes.clone(), "labels": torch.tensor([1, 2]), "masks": masks.clone()} for _ in range(2)]
        batch = images, targets
        trained(model, batch, loss, steps=3)  # until as many regions are found as are asked for: fewer take less memory
        return model, batch

    class Predictor(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.classes, self.boxes = nn.Linear(16, 3), nn.Linear(16, 12)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.classes(x), self.boxes(x)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return torch.stack(list(model(*batch).values())).sum()

    peaks = five_steps(make, loss, lambda model: model.backbone)  # type: ignore[no-any-return]  # calls of modules are not annotated
    assert peaks.replayed_ops > 0
    assert peaks.smallest < peaks.plain
