"""Settings from YAML files and from ``KEY VALUE`` pairs at the end of the command line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tightfit.cli.setting import Setting
from tightfit.errors import UnsupportedInput, first_line
from tightfit.train.registry import did_you_mean

#: A configuration is a few kilobytes.
_MOST_BYTES = 1_000_000
_MOST_NODES = 10_000


def key_of(word: str) -> str:
    """Return the name of the setting that a word like ``BATCH-SIZE`` stands for."""
    return word.lower().replace("-", "_")


def read_config_file(path: Path, settings: Mapping[str, Setting]) -> dict[str, Any]:
    """Read the values of settings from a YAML file.

    Raises:
        UnsupportedInput: the file cannot be read, or sets what is not a setting.
    """
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise UnsupportedInput(
                f"the configuration file {path} has more than {_MOST_BYTES:,} bytes, so it is not one. "
                f"Check --config-file."
            )
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        if _size(content, {}) > _MOST_NODES:  # what aliases stand for is counted each time
            raise UnsupportedInput(
                f"the configuration file {path} holds more than {_MOST_NODES:,} values, written out. "
                f"Leave its aliases out."
            )
    except UnsupportedInput:
        raise
    except OSError as problem:
        raise UnsupportedInput(
            f"the configuration file {path} cannot be read: {problem.strerror}. Check --config-file."
        ) from None
    except (yaml.YAMLError, ValueError, RecursionError) as problem:
        raise UnsupportedInput(
            f"the configuration file {path} is not YAML: {first_line(problem)}. Write one `key: value` per line."
        ) from None
    if not isinstance(content, Mapping):
        raise UnsupportedInput(
            f"the configuration file {path} holds no settings. Write one `key: value` per line, e.g. `steps: 100`."
        )
    values = {}
    for key, value in _flat(content, settings):
        name, inner = _named(key, settings, f"the configuration file {path}")
        if inner:
            raise UnsupportedInput(
                f"{path}: {key} sets a part of {name}, which is done under it. Write {name}: and below it {inner}: ..."
            )
        values[name] = settings[name].convert(value, f"{path}: {key}")
    return values


def _size(content: Any, known: dict[int, int]) -> int:
    """Count the values in nested containers; one that holds itself counts as endless."""
    if not isinstance(content, Mapping | list | tuple | set):
        return 1
    if id(content) not in known:
        known[id(content)] = _MOST_NODES + 1
        inside = content.values() if isinstance(content, Mapping) else content
        known[id(content)] = 1 + sum(_size(value, known) for value in inside)
    return known[id(content)]


def _flat(content: Mapping[Any, Any], settings: Mapping[str, Setting], section: str = "") -> Iterator[tuple[str, Any]]:
    """Yield keys and values; those in a section, as in YACS files, with the section's name as prefix."""
    for key, value in content.items():
        setting = settings.get(key_of(str(key)))
        if isinstance(value, Mapping) and (setting is None or not setting.is_mapping):
            yield from _flat(value, settings, f"{section}{key}.")
        else:
            yield f"{section}{key}", value


def _known_key(key: str, settings: Mapping[str, Setting], where: str) -> str:
    name = key_of(key)
    if name not in settings:
        raise UnsupportedInput(
            f"{where} sets {key!r}, which is not a setting.{did_you_mean(name, settings)} "
            f"Settings are: {', '.join(settings)}."
        )
    return name


def _named(key: str, settings: Mapping[str, Setting], where: str) -> tuple[str, str]:
    """Find the setting that a key names, and the key inside it if it is a mapping.

    Sections are for people: ``MODEL.DIST_TRAIN`` is ``dist_train``, and ``MODEL.NAME`` is ``model``.
    """
    base, _, inner = key.partition(".")
    setting = settings.get(key_of(base))
    if not inner or (setting is not None and setting.is_mapping):
        return _known_key(base, settings, where), inner
    last = inner.rpartition(".")[2]
    if key_of(last) == "name" and setting is not None:
        return setting.name, ""
    return _known_key(last, settings, where), ""


def split_pairs(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split ``key=value`` words from the overrides after them, which argparse took for more of them."""
    for position, word in enumerate(words):
        if "=" not in word:
            return list(words[:position]), list(words[position:])
    return list(words), []


def parse_pairs(pairs: Sequence[str], flag: str) -> dict[str, object]:
    """Parse ``key=value`` words of a flag, the values as YAML."""
    parsed: dict[str, object] = {}
    for pair in pairs:
        key, _, text = pair.partition("=")
        if not key:
            raise UnsupportedInput(f"{flag} {pair} sets nothing: the key is missing. Write {flag} key=value.")
        parsed[key] = yaml.safe_load(text)
    return parsed


def apply_overrides(values: dict[str, Any], words: Sequence[str], settings: Mapping[str, Setting]) -> None:
    """Put ``KEY VALUE`` words into `values`.

    Raises:
        UnsupportedInput: a word is left over, or a key is not a setting.
    """
    if len(words) % 2:
        raise UnsupportedInput(
            f"the overrides {' '.join(words)!r} are not pairs: {words[-1]!r} is left over. "
            f"Write them as KEY VALUE KEY VALUE, e.g. STEPS 100 LR 0.01."
        )
    for key, text in zip(words[::2], words[1::2], strict=True):
        name, inner = _named(key, settings, "the command line")
        setting = settings[name]
        if inner:
            values[name] = {**values.get(name, {}), inner.lower(): yaml.safe_load(text)}
        elif setting.is_mapping:
            raise UnsupportedInput(f"the override {key} does not name one setting. Write {key}.KEY.")
        else:
            values[name] = setting.convert(text, key)
