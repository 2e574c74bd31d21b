from __future__ import annotations

import pytest

from tightfit.errors import UnsupportedInput
from tightfit.train.registry import Registry, did_you_mean, folder_name


def test_a_close_name_is_suggested() -> None:
    assert did_you_mean("resnt", ["gpt", "resnet", "lstm"]) == " Did you mean 'resnet'?"


def test_a_far_name_is_not() -> None:
    assert did_you_mean("zzzzz", ["gpt", "resnet"]) == ""


def test_an_unknown_name_lists_the_known_ones() -> None:
    registry = Registry("model", {"gpt": 1, "lstm": 2}, "or write your own")
    assert registry["lstm"] == 2
    with pytest.raises(UnsupportedInput, match=r"no model 'lsmt'. Did you mean 'lstm'\? Known names: gpt, lstm; or"):
        registry["lsmt"]


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("gpt-tiny", "gpt-tiny"),
        ("my.models:build", "my.models-build"),
        ("transformers:a/b/config.json", "transformers-a-b-config.json"),
        ("../..", "unnamed"),
    ],
)
def test_folder_names_hold_no_separator(spec: str, name: str) -> None:
    assert folder_name(spec) == name
