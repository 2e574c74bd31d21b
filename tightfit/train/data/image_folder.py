"""Folders of images: one folder for each class, as torchvision's ImageFolder reads them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tightfit.errors import UnsupportedInput
from tightfit.train.data.dataset_info import DataFacts, TrainingData
from tightfit.train.data.split import split_by_hash

_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})
HELD_OUT_SHARE = 0.1
#: Height and width in pixels, if nothing else is asked for.
USUAL_SIZE = 224
_HELD_OUT_NAMES = ("val", "valid", "validation", "test")


class ImageFiles:
    """Sample ``i`` is image ``i``, its shorter side scaled to the size and the middle cut out, and its class number."""

    def __init__(self, files: Sequence[Path], classes: Sequence[int], size: int) -> None:
        self._files = files
        self._classes = classes
        self._size = size

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return read_image(self._files[index], self._size), self._classes[index]


def is_image_folder(path: Path) -> bool:
    """Return whether there are images in folders below ``path``."""
    return path.is_dir() and any(
        file.suffix.lower() in _SUFFIXES for folder in path.iterdir() if folder.is_dir() for file in folder.rglob("*")
    )


def load_image_folder(path: Path, size: int) -> TrainingData:
    """Load the images under ``path``, in folders by class.

    Where there is a folder ``train`` and one called val, valid, validation or test, these are the two parts; else a
    tenth is held out, by a hash of the files' names.

    Raises:
        UnsupportedInput: there are no two classes, or Pillow is not installed.
    """
    _import_pillow()
    held_out_root = next((path / name for name in _HELD_OUT_NAMES if (path / name).is_dir()), None)
    root = path / "train" if held_out_root is not None and (path / "train").is_dir() else path
    names = tuple(sorted(folder.name for folder in root.iterdir() if folder.is_dir() and _images(folder)))
    if len(names) < 2:
        raise UnsupportedInput(
            f"{root} has images in {len(names)} folder{'s' if len(names) != 1 else ''}, but each class needs one, and "
            f"there are at least two. Sort the images into folders named after their classes."
        )
    files, classes = _listed(root, names)
    if root != path:
        assert held_out_root is not None
        extra = {folder.name for folder in held_out_root.iterdir() if folder.is_dir()} - set(names)
        if extra:
            raise UnsupportedInput(
                f"{held_out_root} has the class {sorted(extra)[0]!r}, which {root} does not have, so no model can know "
                f"it. Add it there, or remove it here."
            )
        samples = ImageFiles(files, classes, size)
        held_out = ImageFiles(*_listed(held_out_root, names), size)
    else:
        parts = split_by_hash((file.relative_to(root).as_posix() for file in files), HELD_OUT_SHARE)
        samples, held_out = (ImageFiles([files[i] for i in part], [classes[i] for i in part], size) for part in parts)
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(path).as_posix()}:{file.stat().st_size}\n".encode())
    return TrainingData(
        name=path.resolve().name,
        samples=samples,
        held_out=held_out if len(held_out) else None,
        facts=DataFacts(kind="images", channels=3, image_size=size, classes=len(names), label_names=names),
        fingerprint=f"images:{size}:{len(samples)}:{digest.hexdigest()}",
        description=f"{path}: {len(samples):,} images in {len(names)} classes, {size}x{size}"
        + (f"; held out: {len(held_out):,}" if len(held_out) else ""),
    )


def read_image(file: Path, size: int) -> Tensor:
    """Read an image as three colour channels, scaled to [-1, 1].

    Raises:
        UnsupportedInput: the file is no image, or was cut off.
    """
    image_module = _import_pillow()
    try:
        with image_module.open(file) as opened:
            image = opened.convert("RGB")
    except (OSError, SyntaxError, ValueError) as problem:
        raise UnsupportedInput(
            f"{file} cannot be read as an image: {problem}. Training needs every image. Replace the file, or remove it."
        ) from None
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    image = image.resize((width, height), image_module.Resampling.BILINEAR).crop((left, top, left + size, top + size))
    pixels = torch.from_numpy(np.array(image, dtype=np.float32))
    return (pixels.permute(2, 0, 1) / 127.5 - 1).contiguous()


def _images(folder: Path) -> list[Path]:
    return sorted(
        (file for file in folder.rglob("*") if file.suffix.lower() in _SUFFIXES and not file.name.startswith(".")),
        key=lambda file: file.relative_to(folder).as_posix(),
    )


def _listed(root: Path, names: Sequence[str]) -> tuple[list[Path], list[int]]:
    files: list[Path] = []
    classes: list[int] = []
    for number, name in enumerate(names):
        if (root / name).is_dir():
            found = _images(root / name)
            files += found
            classes += [number] * len(found)
    return files, classes


def _import_pillow() -> Any:
    try:
        from PIL import Image
    except ModuleNotFoundError:
        raise UnsupportedInput(
            "images are read with Pillow, which is not installed. Install it with: pip install 'tightfit[data]'"
        ) from None
    return Image
