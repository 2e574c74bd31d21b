"""The tests' folders are the package's, and each has its subject."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.subjects import SUBJECTS, WITHOUT_COUNTERPART, subject_of

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "tightfit"
FILES = sorted(path.relative_to(TESTS) for path in TESTS.rglob("test_*.py"))


def test_folders_mirror_the_packages() -> None:
    folders = {path.parts[0] for path in FILES if len(path.parts) > 1}
    counterparts = {path.name for path in PACKAGE.iterdir() if path.is_dir()}
    assert folders - counterparts == set(WITHOUT_COUNTERPART)


def test_each_file_has_a_subject() -> None:
    assert [path.as_posix() for path in FILES if path.parts[0] != "gpu" and subject_of(path.as_posix()) is None] == []
    assert subject_of("train/launch/test_runs.py") == "distributed"
    assert subject_of("train/test_run.py") == "train"
    assert subject_of("training/test_run.py") is None


def test_the_table_of_paths_names_every_folder_of_the_package_and_only_tests_that_exist() -> None:
    text = (TESTS.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| `tightfit/")]
    named = {path.strip(" `") for changed, *_ in rows for path in changed.split(",")}
    folders = {f"tightfit/{path.name}/" for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert {path for path in named if path.endswith("/")} >= folders
    assert [path for path in named if not (TESTS.parent / path).exists()] == []
    told = {path.strip(" `") for _, tests, *_ in rows for path in tests.split(",")}
    assert [path for path in told if not (TESTS.parent / path).exists()] == []


def test_each_marker_is_declared(pytestconfig: pytest.Config) -> None:
    declared = {line.partition(":")[0] for line in pytestconfig.getini("markers")}
    assert declared >= {*SUBJECTS, "slow", "thorough", "gpu"}
