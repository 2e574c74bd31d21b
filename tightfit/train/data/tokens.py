"""From text to numbers: bytes, or the tokens of a tokenizer from a local file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tightfit.errors import UnsupportedInput, first_line

_FILE = "tokenizer.json"
_CONFIG = "tokenizer_config.json"


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """How text becomes numbers."""

    name: str
    vocabulary_size: int
    """Numbers are below this."""
    encoder: Any = field(default=None, compare=False)
    """A `tokenizers.Tokenizer`; None: every byte is a token."""
    end: int | None = None
    """Stands between documents; None: nothing does."""
    padding: int = 0
    mask: int | None = None
    """The mask token; None: the vocabulary has none."""
    fingerprint: str = "bytes"

    @property
    def is_bytes(self) -> bool:
        """Every byte is a token, so that any file is text."""
        return self.encoder is None

    def encode(self, text: bytes, origin: str) -> list[int] | bytes:
        """Return the tokens of ``text``, without any that mark its ends.

        Raises:
            UnsupportedInput: it is not UTF-8, which a tokenizer needs; ``origin`` and the place are named.
        """
        if self.encoder is None:
            return text
        try:
            decoded = text.decode("utf-8")
        except UnicodeDecodeError as problem:
            raise UnsupportedInput(
                f"{origin} is not UTF-8 text: byte {problem.start} is {text[problem.start]:#04x}. A tokenizer reads "
                f"text only. Convert the file to UTF-8, leave it out, or leave out --tokenizer to train on bytes."
            ) from None
        numbers: list[int] = self.encoder.encode(decoded, add_special_tokens=False).ids
        return numbers


BYTES = Tokens(name="bytes", vocabulary_size=256)


def load_tokens(spec: str | None, model_folder: Path | None) -> Tokens:
    """Load what ``--tokenizer`` names: a tokenizer.json, or a folder that holds one; by default the model folder's own,
    and bytes if it has none.

    Raises:
        UnsupportedInput: there is no tokenizer there, or the file cannot be read as one.
    """
    if spec is None:
        if model_folder is None or not (model_folder / _FILE).is_file():
            return BYTES
        spec = str(model_folder)
    path = Path(spec)
    file = path / _FILE if path.is_dir() else path
    if not file.is_file():
        raise UnsupportedInput(
            f"there is no tokenizer at {file}, which --tokenizer names. Give a {_FILE}, or a folder that holds one; "
            f"transformers writes it with tokenizer.save_pretrained(FOLDER). Nothing is downloaded."
        )
    try:
        import tokenizers
    except ModuleNotFoundError:
        raise UnsupportedInput(
            "--tokenizer needs the tokenizers library, which is not installed. "
            "Install it with: pip install 'tightfit[transformers]'"
        ) from None
    try:
        encoder = tokenizers.Tokenizer.from_file(str(file))
    except Exception as problem:  # the library raises nothing more special
        raise UnsupportedInput(
            f"{file} cannot be read as a tokenizer: {first_line(problem)}. "
            f"Give a file that the tokenizers library, or transformers' save_pretrained, has written."
        ) from None
    encoder.no_truncation()
    encoder.no_padding()
    special = _special_tokens(file.parent / _CONFIG)

    def number(*names: str) -> int | None:
        for name in names:
            found = encoder.token_to_id(special.get(name, name))
            if found is not None:
                return int(found)
        return None

    end = number("eos_token", "sep_token", "</s>", "<|endoftext|>", "[SEP]")
    padding = number("pad_token", "<pad>", "[PAD]")
    return Tokens(
        name=folder_stem(path),
        vocabulary_size=encoder.get_vocab_size(with_added_tokens=True),
        encoder=encoder,
        end=end,
        padding=padding if padding is not None else end or 0,
        mask=number("mask_token", "[MASK]", "<mask>"),
        fingerprint=hashlib.sha256(file.read_bytes()).hexdigest(),
    )


def folder_stem(path: Path) -> str:
    """Return a name for the tokenizer at ``path``."""
    return path.resolve().name if path.is_dir() else path.resolve().parent.name


def _special_tokens(config: Path) -> Mapping[str, str]:
    """Read the names of special tokens by their roles, as transformers writes them beside a tokenizer."""
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    found: dict[str, str] = {}
    for role, token in content.items() if isinstance(content, dict) else ():
        if role.endswith("_token"):
            if isinstance(token, dict):
                token = token.get("content")
            if isinstance(token, str):
                found[role] = token
    return found
