"""Building the emulated runtime, what is said where that cannot be, and skipped tests in `make test-cuda`."""

from __future__ import annotations

from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.emulated_cuda import build, counters, generate, plugin, run


def _installed(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = ModuleSpec("torch", None, origin=str(site / "torch/__init__.py"))
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: spec)


def test_a_cpu_build_of_pytorch_is_refused_with_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _installed(tmp_path, monkeypatch)
    with pytest.raises(SystemExit, match=r"built for CPUs only.*make test-cuda"):
        run.main(["python", "-c", "pass"])


def test_missing_headers_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nvidia/cu13/include").mkdir(parents=True)
    (tmp_path / "nvidia/cu13/include/cuda_runtime_api.h").touch()
    monkeypatch.setattr(build, "TOOLKIT", tmp_path / "toolkit")
    with pytest.raises(build.CannotBuild, match=r"crt/host_defines\.h"):
        build.headers(tmp_path)


def test_a_command_must_be_given() -> None:
    with pytest.raises(SystemExit, match="No command was given"):
        run.main([])


def test_stubs_are_what_pytorch_wants_and_nobody_defines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = {
        "cudaMalloc",
        "cudaStreamQuery",
        "cudaIpcGetMemHandle",
        "cublasSgemm_v2",
        "cublasSetStream_v2",
        "cudnnFindConvolutionX",
    }
    monkeypatch.setattr(generate, "_undefined", lambda folder: wanted | {"malloc", "cudnnGetVersion", "ncclSend"})
    monkeypatch.setattr(generate, "_asked_by_name", lambda site: {"cuMemCreate", "cuMulticastCreate"})
    source = generate.stubs(tmp_path, ["cudaMalloc", "cuMemCreate"])
    bodies = dict(
        line[len("EXPORT long ") :].split("(void)") for line in source.splitlines() if line.startswith("EXPORT")
    )
    assert {name: body.strip() for name, body in bodies.items()} == {
        "cudaStreamQuery": "{ return 0; }",
        "cudaIpcGetMemHandle": "{ return NOT_SUPPORTED; }",
        "cublasSgemm_v2": "{ count_library_call(); return 0; }",
        "cublasSetStream_v2": "{ return 0; }",
        "cudnnFindConvolutionX": "{ return NOT_SUPPORTED_BY_CUDNN; }",
        "cuMulticastCreate": "{ return NOT_SUPPORTED; }",
    }


def test_a_skipped_test_has_failed_and_an_expected_failure_has_not() -> None:
    skipped = SimpleNamespace(outcome="skipped", longrepr=("test_cuda.py", 20, "Skipped: needs a CUDA device"))
    plugin.fail_if_skipped(skipped)
    assert skipped.outcome == "failed"
    assert "needs a CUDA device" in skipped.longrepr
    expected = SimpleNamespace(outcome="skipped", longrepr=None, wasxfail="not yet")
    plugin.fail_if_skipped(expected)
    assert expected.outcome == "skipped"


def test_the_tests_do_not_begin_without_the_runtime(
    monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config
) -> None:
    monkeypatch.setattr(counters, "is_active", lambda: False)
    with pytest.raises(pytest.UsageError, match=r"tests\.emulated_cuda\.run"):
        plugin.pytest_configure(pytestconfig)
