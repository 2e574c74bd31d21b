"""What a model needs to know about its data, and a dataset that is ready for the training loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch.utils.data import default_collate

Kind = Literal["text", "labelled-text", "text-pairs", "images", "series", "custom"]

#: A target that the loss ignores.
IGNORED = -100

#: What one sample of each kind is; shown where a model and a dataset do not fit together.
SAMPLE_FORMS: dict[Kind, str] = {
    "text": "a tensor of token numbers, one longer than the sequence length",
    "labelled-text": "a row of token numbers and its class number",
    "text-pairs": "a source row and a target row of token numbers",
    "images": "an image tensor (channels, height, width) and its class number",
    "series": "a tensor (time, features), one step longer than the sequence length",
    "custom": "whatever the dataset's own factory returns",
}


@dataclass(frozen=True, kw_only=True)
class DataFacts:
    """What a model needs to know about its data to be built for it."""

    kind: Kind
    """What a sample is; see `SAMPLE_FORMS`."""
    vocabulary_size: int = 0
    """Text: token numbers are below this."""
    bytes_per_token: float = 0.0
    """Text: bytes that a token stands for, on average; 0 if that is unknown."""
    padding: int = 0
    """Text: the token that pads shorter rows."""
    mask: int | None = None
    """Text: the mask token; None: the vocabulary has none."""
    is_padded: bool = False
    """Text for language models: rows are of different lengths, and padded with `IGNORED`."""
    features: int = 0
    """Series: numbers per time step."""
    season: int = 0
    """Series: steps after which it repeats itself, roughly; 0 if it does not."""
    channels: int = 0
    """Images: 1 for grey, 3 for colour."""
    image_size: int = 0
    """Images: height and width in pixels."""
    classes: int = 0
    """Images and labelled text: number of classes."""
    label_names: tuple[str, ...] = ()
    """What the classes are called, in the order of their numbers; empty if they are numbers."""

    @property
    def mask_token(self) -> int:
        """Text: the mask token; one more than the vocabulary has, if it has none."""
        return self.vocabulary_size if self.mask is None else self.mask


class Samples(Protocol):
    """Samples that are indexed by number."""

    def __len__(self) -> int:
        """Return how many there are."""

    def __getitem__(self, index: int, /) -> Any:
        """Return one of them."""


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """A dataset, ready for training."""

    name: str
    """Short name; it enters the run folder's path."""
    samples: Samples
    """For training."""
    held_out: Samples | None = None
    """For evaluation; None: there are none."""
    facts: DataFacts
    fingerprint: str
    """Tells whether the data is still the same when a run is resumed."""
    description: str
    """One line for people: what it is and how much of it."""
    collate: Callable[[list[Any]], Any] = default_collate
    """Makes one batch of samples, on the CPU."""
    sizes_vary: bool = False
    """Samples are of different sizes."""
    is_random: bool = False
    """Samples may draw random numbers, as augmentation does."""
