"""The examples of `docs/trainers.md` do what that page says."""

from __future__ import annotations

import importlib.util
import logging
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("name", "host"), [("transformers_trainer", "accelerate"), ("lightning_module", "lightning")])
def test_it_trains_to_the_same_bits(
    name: str, host: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], own_folder: None
) -> None:
    pytest.importorskip(host)
    monkeypatch.setattr(sys, "argv", [name])
    log = logging.getLogger("tightfit")
    level = log.level
    try:
        example(name).main()
    finally:
        log.setLevel(level)  # an example shows what is logged
    assert capsys.readouterr().out.splitlines()[-1].split(maxsplit=1)[1] == "equal, bit for bit"
