"""Shells complete commands and flags: the script is written by shtab from the parser."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import shtab

from tightfit.cli.main import COMMANDS, main

ASK = 'source "$1"; COMP_WORDS=(tightfit "${@:2}"); COMP_CWORD=$(($# - 1)); _shtab_tightfit; echo "${COMPREPLY[@]}"'


@pytest.fixture
def script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    assert main(["--print-completion", "bash"]) == 0
    (tmp_path / "completion").write_text(capsys.readouterr().out, encoding="utf-8")
    return tmp_path / "completion"


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_commands_and_their_flags(script: Path) -> None:
    def completed(*words: str) -> list[str]:
        shown = subprocess.run(
            ["bash", "-c", ASK, "bash", str(script), *words], capture_output=True, text=True, timeout=120, check=True
        )
        return shown.stdout.split()

    assert set(completed("")) >= set(COMMANDS)
    assert completed("train", "--grad-ch") == ["--grad-checkpoint"]
    assert completed("report", "--pl") == ["--plots"]


@pytest.mark.parametrize("words", [[], ["ksh"], ["bash", "zsh"]])
def test_other_shells_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--print-completion", *words]) == 2
    assert "Give one of bash, zsh" in capsys.readouterr().err


def test_a_shell_that_the_installed_shtab_does_not_know_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shtab, "SUPPORTED_SHELLS", ["bash", "zsh"])
    assert main(["--print-completion", "fish"]) == 2
    assert "Install a newer one" in capsys.readouterr().err
