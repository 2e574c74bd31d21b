"""Bad input: exit code 2, one clear message, no traceback, nothing written."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tightfit.cli.main import main

USER_CODE = "tests.train.user_code"
TINY = ["--model", "gpt-tiny", "--batch-size", "2", "--sequence-length", "16"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An otherwise empty working folder with a few bad data files."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("short")
    (tmp_path / "binaries").mkdir()
    (tmp_path / "binaries" / "a.bin").write_bytes(b"\0" * 100)
    (tmp_path / "dangling.txt").symlink_to("nowhere")
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "cut.jsonl").write_text('{"text": "whole"}\n{"text": "cut o')
    (tmp_path / "ragged.csv").write_text("text,label\na,0\nb,0,1\n")
    (tmp_path / "rows.csv").write_text("words,points\na,1\nb,2\nc,3\n")
    for name in ("cat", "dog"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        (tmp_path / "pictures" / name / "a.png").write_bytes(b"no image")
    return tmp_path


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def refused(words: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that must be refused; returns the message."""
    before = listing(folder)
    assert main(words) == 2
    captured = capsys.readouterr()
    assert listing(folder) == before
    assert "Traceback" not in captured.err
    last_line = captured.err.strip().splitlines()[-1]
    assert last_line.startswith("tightfit: ")
    assert captured.err.count("tightfit: ") == 1
    return last_line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "gtp"], r"no model 'gtp'. Did you mean 'gpt'\? Known names: gpt, gpt-tiny"),
        (["--model", f"{USER_CODE}:own_loss_modle"], r"has no 'own_loss_modle'. Did you mean 'own_loss_model'\?"),
        (["--model", "no_such_package:make"], "no module 'no_such_package'"),
        (["--model", "tests:"], "both sides of the colon"),
        (["--model", f"{USER_CODE}:NOT_CALLABLE"], "is of type int, which cannot be called"),
        (["--model", f"{USER_CODE}:not_a_model", "--dataset", "co2"], "returned a str, not a model"),
        (["--model", f"{USER_CODE}:own_loss_model"], "no dataset is given"),
        (
            ["--model", f"{USER_CODE}:own_loss_model", "--dataset", "co2", "--model-args", "wdith=3"],
            r"Did you mean 'width'\?",
        ),
        (["--model", "transformers:absent.json"], "no file 'absent.json'"),
        (["--model", "transformers:broken.json"], "is not a config that transformers"),
        (["--model", "gpt-tiny", "--task", "causal-lm"], "Leave --task out"),
        ([*TINY, "--dataset", "pyhton-source"], r"no dataset 'pyhton-source'. Did you mean 'python-source'\?"),
        ([*TINY, "--dataset", "absent/file.txt"], "no file or folder 'absent/file.txt'"),
        ([*TINY, "--dataset", "empty.txt"], "holds 0 bytes of text"),
        ([*TINY, "--dataset", "short.txt"], "holds 5 bytes of text, but one sample alone takes 17"),
        ([*TINY, "--dataset", "binaries"], "holds 0 bytes of text"),
        ([*TINY, "--dataset", "dangling.txt"], "no file or folder 'dangling.txt'"),
        ([*TINY, "--dataset", f"{USER_CODE}:no_data"], "returned no samples"),
        ([*TINY, "--dataset", f"{USER_CODE}:endless_data"], "without a length or numbered samples"),
        ([*TINY, "--dataset", "digits"], "'gpt-tiny' is trained on text"),
        ([*TINY, "--memory", "plenty"], "--memory 'plenty' is not a memory size"),
        ([*TINY, "--memory", "0%"], "--memory '0%' is not a memory size"),
        ([*TINY, "--memory=-8GiB"], "--memory '-8GiB' is not a memory size"),
        ([*TINY, "--memory", "150%"], "but the device cpu has only"),
        ([*TINY, "--memory", "900TiB"], "but the device cpu has only"),
        ([*TINY, "--memory", "100KiB"], r"budget of 100.0 KiB is too small: .* needs .* \(\d+ bytes\)"),
        ([*TINY, "--memory", "100KiB", "--grad-checkpoint", "off"], r"needs .* \(\d+ bytes\)"),
        ([*TINY, "--device", "gpu"], "names no device"),
        ([*TINY, "--device", "meta"], "of a kind that tightfit cannot measure"),
        ([*TINY, "--device", "cuda:99"], "CUDA devices"),
        ([*TINY, "--root-path", "empty.txt"], "because .*empty.txt is a file. Choose another --root-path"),
        ([*TINY, "--eval-dataset", "absent.txt"], "no file or folder 'absent.txt'"),
        ([*TINY, "--eval-dataset", "co2"], "gives series, but the model is trained on text"),
        ([*TINY, "--tokenizer", "absent"], "no tokenizer at absent"),
        ([*TINY, "--tokenizer", "broken.json"], "cannot be read as a tokenizer"),
        ([*TINY, "--dataset", "cut.jsonl"], "cut.jsonl, line 2: .* so this is no JSON"),
        ([*TINY, "--dataset", "ragged.csv"], "ragged.csv, line 3: there are 3 cells"),
        ([*TINY, "--dataset", "ragged.csv", "--text-column", "txet"], "there are 3 cells"),
        ([*TINY, "--dataset", "rows.csv", "--text-column", "wrods"], r"Did you mean 'words'\?"),
        ([*TINY, "--dataset", "rows.csv"], "Its columns are: words, points"),
        ([*TINY, "--dataset", "rows.csv", "--text-column", "words"], "holds 5 bytes of text"),
        ([*TINY, "--dataset", "pictures"], "'gpt-tiny' is trained on text"),
        (["--model", "resnet-tiny", "--dataset", "pictures", "--image-size", "0"], "--image-size is 0"),
        ([*TINY, "--batch-size", "1000000000"], "but the dataset has only"),
        ([*TINY, "--sequence-length", "1000000000"], "but one sample alone takes 1000000001"),
        ([*TINY, "--eval-samples", "-1"], "--eval-samples is -1, but it must be zero or more"),
        ([*TINY, "--precision", "fp16"], "--precision bf16 or fp32"),
        ([*TINY, "--ema-decay", "0.9", "--memory", "1KiB"], "moving average .* alone take"),
        ([*TINY, "--resume", "absent"], "no checkpoint at absent"),
        ([*TINY, "--resume", "binaries"], "not a complete checkpoint"),
        (
            ["--model", f"{USER_CODE}:vector_loss_model", "--dataset", f"{USER_CODE}:numbers"],
            "needs one number. Reduce it to a scalar",
        ),
        (
            ["--model", f"{USER_CODE}:lossless_model", "--dataset", f"{USER_CODE}:numbers"],
            "returned a str without a loss",
        ),
        (
            ["--model", f"{USER_CODE}:frozen_model", "--dataset", f"{USER_CODE}:numbers"],
            "no trainable parameter",
        ),
        (
            ["--model", f"{USER_CODE}:own_loss_model", "--dataset", f"{USER_CODE}:numbers", "--batch-size", "65"],
            "only 64 samples",
        ),
    ],
)
def test_train_refuses(words: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert re.search(message, refused(["train", *words], folder, capsys))


def test_following_the_printed_budget_leads_to_a_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *TINY, "--steps", "1", "--memory", str(100 * 1024)]) == 2
    needed = re.search(r"\((\d+) bytes\)", capsys.readouterr().err)
    assert needed is not None
    assert main(["train", *TINY, "--steps", "1", "--memory", needed[1]]) == 0


def test_json_does_not_change_what_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--model", "gtp", "--json"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Did you mean 'gpt'?" in captured.err


def test_a_used_run_folder_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = folder / "runs" / "python-source" / "gpt-tiny"
    run.mkdir(parents=True)
    (run / "notes.txt").write_text("mine")
    assert "--resume auto" in refused(["train", *TINY], folder, capsys)
    assert (run / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("content", ["{", "[]", '{"format": "tightfit.plan"}', "\x00\xff"])
def test_a_corrupt_plan_file_is_refused(content: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "plan.json").write_text(content, encoding="latin-1")
    assert "plan.json" in refused(["verify", *TINY, "--plan", "plan.json"], folder, capsys)


def test_an_absent_plan_file_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "absent.json" in refused(["verify", *TINY, "--plan", "absent.json"], folder, capsys)


def test_a_plan_of_another_model_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *TINY, "--output", "plan.json", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["planned_regions"] == 0
    words = ["verify", "--model", "lstm-tiny", "--batch-size", "2", "--plan", "plan.json"]
    assert "plan" in refused(words, folder, capsys)


def test_a_plan_and_a_budget_exclude_each_other(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["verify", *TINY, "--plan", "plan.json", "--memory", "1GiB"]
    assert "Give one of --plan and --memory" in refused(words, folder, capsys)


def test_an_output_in_no_folder_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "its folder does not exist" in refused(["plan", *TINY, "--output", "absent/plan.json"], folder, capsys)


def test_an_unexpected_error_is_exit_code_1(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk on fire")

    monkeypatch.setattr("tightfit.train.data.loader._batch_of", fail)
    assert main(["train", *TINY]) == 1
    assert "OSError: disk on fire" in capsys.readouterr().err


def test_data_that_is_not_a_number_ends_the_run_with_its_step(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", f"{USER_CODE}:own_loss_model", "--dataset", f"{USER_CODE}:numbers_with_nan", "--log-every", "1"]
    assert main(["train", *words]) == 1
    said = capsys.readouterr().err
    assert "the loss is nan at step" in said
    assert "Traceback" not in said


def test_an_image_that_cannot_be_read_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", "resnet-tiny", "--dataset", "pictures", "--image-size", "8", "--batch-size", "2"]
    assert "a.png cannot be read as an image" in refused(["train", *words], folder, capsys)
