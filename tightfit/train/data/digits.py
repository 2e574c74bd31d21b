"""Handwritten digits: the 1,797 scanned images that come with scikit-learn."""

from __future__ import annotations

import hashlib

import torch
import torch.nn.functional as F
from torch import Tensor

from tightfit.errors import UnsupportedInput
from tightfit.train.data.dataset_info import DataFacts, TrainingData
from tightfit.train.data.split import Subset, split_by_hash

IMAGE_SIZE = 32
HELD_OUT_SHARE = 0.2


class LabelledImages:
    """Images and their classes, in memory."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self._images = images
        self._labels = labels

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self._images[index], self._labels[index]


def load_digits() -> TrainingData:
    """Load 8x8 grey scans of handwritten digits (UCI, Alpaydin & Kaynak 1998), enlarged to 32x32; about a fifth of them
    is held out.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError:
        raise UnsupportedInput(
            "the dataset 'digits' comes with scikit-learn, which is not installed. "
            "Install it with: pip install 'tightfit[data]'"
        ) from None
    raw = load_digits()
    small = torch.tensor(raw.images.tolist(), dtype=torch.float32).unsqueeze(1) / 16.0
    images = F.interpolate(small, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", align_corners=False)
    labels = torch.tensor(raw.target.tolist(), dtype=torch.int64)
    training, held_out = split_by_hash((f"digit {number}" for number in range(len(labels))), HELD_OUT_SHARE)
    seen = images[training]  # held-out samples have no part in the normalisation
    digest = hashlib.sha256(raw.images.tobytes() + raw.target.tobytes()).hexdigest()
    samples = LabelledImages((images - seen.mean()) / seen.std(), labels)
    return TrainingData(
        name="digits",
        samples=Subset(samples, training),
        held_out=Subset(samples, held_out),
        facts=DataFacts(kind="images", channels=1, image_size=IMAGE_SIZE, classes=10),
        fingerprint=f"digits:{HELD_OUT_SHARE}:{digest}",
        description=f"handwritten digits: {len(training):,} grey images of {IMAGE_SIZE}x{IMAGE_SIZE} in 10 classes; "
        f"held out: {len(held_out):,}",
    )
