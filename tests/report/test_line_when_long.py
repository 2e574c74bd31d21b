"""What takes long says so in one line of a terminal, which does not stay; nobody else sees anything of it."""

from __future__ import annotations

from io import StringIO

import pytest

from tightfit.progress import heard_by, progress, showing_when_long


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True


def test_a_line_is_shown_and_erased() -> None:
    out = Terminal()
    with showing_when_long(0.0, out):
        progress("solving", 3, 12)
    assert "tightfit: solving, 3 of 12 (0 s so far)" in out.getvalue()
    assert out.getvalue().endswith("\r\x1b[2K")


def test_a_line_is_erased_where_something_fails() -> None:
    out = Terminal()

    def fail() -> None:
        with showing_when_long(0.0, out):
            progress("solving")
            raise ValueError("not so")

    with pytest.raises(ValueError, match="not so"):
        fail()
    assert out.getvalue().endswith("\r\x1b[2K")


def test_what_is_soon_done_shows_nothing() -> None:
    out = Terminal()
    with showing_when_long(3600.0, out):
        progress("solving")
    assert out.getvalue() == ""


def test_a_file_another_rank_and_who_listens_already_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    file, out, said = StringIO(), Terminal(), []
    with showing_when_long(0.0, file):
        progress("solving")
    with heard_by(lambda *one: said.append(one)), showing_when_long(0.0, out):
        progress("solving", 1, 2)
    monkeypatch.setenv("RANK", "1")
    with showing_when_long(0.0, out):
        progress("solving")
    assert (file.getvalue(), out.getvalue(), said) == ("", "", [("solving", 1, 2)])
