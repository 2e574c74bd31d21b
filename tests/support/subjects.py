"""What each folder of the tests is about: its marker; with the package's folders the table in CONTRIBUTING.md."""

from __future__ import annotations

from pathlib import PurePosixPath

#: By marker, the folders (and files) under tests/ that have it; the more exact path decides.
SUBJECTS: dict[str, tuple[str, ...]] = {
    "solver": ("records", "simulation", "solver"),
    "profiling": ("profiling", "device"),
    "engine": ("operators", "step", "replay", "installation", "verification"),
    "planning": ("planning",),
    "distributed": ("distributed", "train/launch", "train/parallel", "replay/test_ddp.py", "profiling/test_fsdp.py"),
    "train": ("train",),
    "cli": ("cli",),
    "report": ("report", "explanation"),
    "integrations": ("integrations",),
    "promises": ("promises", "real_libraries", "test_recipes.py", "test_suite.py"),
    "benchmarks": ("benchmarks",),
    "project": (
        "emulated_cuda",
        "test_architecture.py",
        "test_layout.py",
        "test_pictures.py",
        "test_portability.py",
        "test_public_api.py",
        "test_readme.py",
        "test_typed.py",
    ),
}

#: Folders with tests that have no counterpart of the same name in the package, and why.
WITHOUT_COUNTERPART = {
    "benchmarks": "the benchmarks are beside the package",
    "emulated_cuda": "the CUDA runtime on which the tests of `gpu` run without a GPU",
    "gpu": "needs a CUDA device, whatever it is about",
    "promises": "whole trainings, as a user would write them: what users of other tools suffer from",
    "real_libraries": "needs libraries that only `make test-cuda` installs, whatever of the package they try",
}


def subject_of(path: str) -> str | None:
    """The marker of a test file, by its path under tests/; None if it has none."""
    parts = PurePosixPath(path)
    found = {place: marker for marker, places in SUBJECTS.items() for place in places if parts.is_relative_to(place)}
    return found[max(found, key=len)] if found else None
