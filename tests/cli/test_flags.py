"""The command line is derived from the settings; this is what it looks like from outside."""

from __future__ import annotations

import inspect
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from tightfit.cli import flags
from tightfit.cli import setting as setting_module
from tightfit.cli.main import COMMANDS, main
from tightfit.cli.options import FrontierOptions, PlanOptions, TrainOptions, VerifyOptions
from tightfit.cli.setting import field_docs, settings_of
from tightfit.errors import UnsupportedInput
from tightfit.train.config import TrainConfig, to_yaml

SNAPSHOT = Path(__file__).parent / "flags.txt"


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Parse a command line; returns the options that the command would be called with."""

    def parse(*words: str) -> Any:
        caught: list[Any] = []
        command, _ = COMMANDS[words[0]]
        monkeypatch.setitem(COMMANDS, words[0], (command, lambda options, line: caught.append(options) or 0))
        assert main(words) == 0
        return caught[0]

    return parse


def snapshot() -> str:
    """Every command with its flags: group, values, default."""
    lines = []
    for name, (command, _) in COMMANDS.items():
        lines.append(name)
        defaults = {entry.name: entry.default for entry in fields(command.options)}
        for setting in settings_of(command.options):
            default = defaults[setting.name]
            values = "" if setting.type is bool else f" {setting.metavar}"
            shown = "" if default is MISSING or default in (None, False, ()) else f" = {default}"
            lines.append(f"  {setting.flag}{values}{shown}  [{setting.group}]")
    return "\n".join(lines) + "\n"


def test_a_new_flag_shows_up_here() -> None:
    assert snapshot() == SNAPSHOT.read_text(), (
        "flags have changed. If that is meant, write what snapshot() gives to tests/cli/flags.txt: "
        "python -c 'from tests.cli.test_flags import *; SNAPSHOT.write_text(snapshot())'"
    )


def test_help_is_grouped_and_fits_a_few_screens(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    headings = [line[:-1] for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert [h for h in headings if h != "options"] == [
        "model", "data", "optimization", "memory", "device", "training", "evaluation", "distributed",
        "run folder", "output",
    ]  # fmt: skip
    assert len(text.splitlines()) <= 170


@pytest.mark.parametrize("options", [TrainOptions, PlanOptions, FrontierOptions, VerifyOptions])
def test_every_flag_is_documented(options: type[Any]) -> None:
    docs = field_docs(options)
    assert [setting.name for setting in settings_of(options) if not docs.get(setting.name)] == []


def test_settings_are_derived_once_and_each_module_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Deriving them cost every start of the command line and every test of it 0.2 s."""
    kinds = {command.options for command, _ in COMMANDS.values()}
    modules = {base.__module__ for kind in kinds for base in kind.__mro__[:-1]}
    read: list[Any] = []
    source_of = inspect.getsource
    monkeypatch.setattr(inspect, "getsource", lambda thing: read.append(thing) or source_of(thing))
    setting_module._docs_in.cache_clear()
    setting_module._derive_settings.cache_clear()
    first = {kind: settings_of(kind) for kind in kinds}
    assert [thing.__name__ for thing in read] == list(dict.fromkeys(thing.__name__ for thing in read))
    assert {thing.__name__ for thing in read} == modules
    assert all(settings_of(kind) is first[kind] for kind in kinds)
    assert {thing.__name__ for thing in read} == modules


def test_only_the_flags_of_the_command_that_runs_are_added(parsed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    derived: list[type[Any]] = []
    settings = settings_of
    monkeypatch.setattr(flags, "settings_of", lambda kind: derived.append(kind) or settings(kind))
    parsed("plan")
    assert set(derived) == {PlanOptions}


def test_sections_as_in_yacs_files(parsed: Any, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("MODEL:\n  NAME: lstm\n  DIST_TRAIN: true\nSOLVER: {LR: 0.5, steps: 7}\n")
    found = parsed("train", "--config-file", str(tmp_path / "run.yaml"), "SOLVER.STEPS", "9", "INPUT.BATCH_SIZE", "3")
    assert (found.model, found.dist_train, found.lr, found.steps, found.batch_size) == ("lstm", True, 0.5, 9, 3)
    assert parsed("train", "--resume", "MODEL.DIST_TRAIN", "True").dist_train is True
    assert parsed("train", "--local_rank=1").local_rank == parsed("train", "--local-rank", "1").local_rank == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("MODEL: {DIST_TRAN: true}", "'DIST_TRAN', which is not a setting. Did you mean 'dist_train'"),
        ("SOLVER: {NAME: adamw}", "'NAME', which is not a setting"),
        ("model_args.width: 3", "Write model_args: and below it width"),
    ],
)
def test_bad_sections(content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text(content)
    assert main(["train", "--config-file", str(tmp_path / "run.yaml")]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--batch-size", "--batch_size"])
def test_both_spellings_of_a_flag_work(parsed: Any, flag: str) -> None:
    assert parsed("train", flag, "3").batch_size == 3
    assert parsed("train", f"{flag}=4").batch_size == 4


@pytest.mark.parametrize(
    ("words", "value"),
    [
        ([], "auto"),
        (["--grad-checkpoint"], "auto"),
        (["--grad_checkpoint"], "auto"),
        (["--grad_checkpoint", "full"], "full"),
        (["--grad-checkpoint=off"], "off"),
        (["--grad-checkpoint", "--steps", "3"], "auto"),
        (["--grad-checkpoint", "STEPS", "3"], "auto"),
        (["GRAD_CHECKPOINT", "full"], "full"),
    ],
)
def test_grad_checkpoint(parsed: Any, words: list[str], value: str) -> None:
    assert parsed("train", *words).grad_checkpoint == value


@pytest.mark.parametrize(
    ("words", "value"), [([], None), (["--resume"], "auto"), (["--resume", "auto"], "auto"), (["--resume", "x"], "x")]
)
def test_resume(parsed: Any, words: list[str], value: str | None) -> None:
    assert parsed("train", *words).resume == value


def test_file_flags_and_overrides_go_one_before_the_other(parsed: Any, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("steps: 1\nlr: 0.5\nbatch-size: 3\nmodel_args: {layers: 1, width: 8}\ngrad_checkpoint: off\n")
    options = parsed(
        "train", "--config-file", str(file), "--lr", "0.25", "--steps", "2", "--model-args", "width=16", "heads=2",
        "STEPS", "4", "MODEL_ARGS.heads", "4", "seed", "7",
    )  # fmt: skip
    assert (options.steps, options.lr, options.batch_size, options.seed) == (4, 0.25, 3, 7)
    assert options.model_args == {"layers": 1, "width": 16, "heads": 4}
    assert options.grad_checkpoint == "off"


def test_a_runs_own_configuration_can_be_given_back(parsed: Any, tmp_path: Path) -> None:
    config = TrainConfig(model="lstm", steps=5, model_args={"width": 8}, mark="x", lr=0.1, grad_checkpoint="off")
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    options = parsed("train", "--config-file", str(file))
    own = yaml.safe_load(to_yaml(config))
    assert {name: value for name, value in yaml.safe_load(to_yaml(options)).items() if name in own} == own


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--memry", "8GiB"], r"no flag --memry. Did you mean --memory\?"),
        (["--grad_checkpont"], r"Did you mean --grad-checkpoint\?"),
        (["-x"], "no flag -x"),
        (["--grad-checkpoint", "ful"], r"Did you mean 'full'\? Choose one of: auto, full, off"),
        (["--batch-size", "many"], "--batch-size is 'many', which is not a whole number"),
        (["--batch-size", "2.5"], "not a whole number"),
        (["--batch-size", "0"], "--batch-size is 0, but it must be at least 1"),
        (["--microbatch-size", "0"], "--microbatch-size is 0, but it must be at least 1"),
        (["--microbatch-size", "32"], "only 16 samples to split"),
        (["--accumulation-steps", "17"], "only 16 samples to split"),
        (
            ["--microbatch-size", "4", "--accumulation-steps", "4"],
            "both --microbatch-size 4 and --acc",
        ),
        (["--workers", "-1"], "--workers is -1, but it must be zero or more"),
        (["--optimizer", "adam-w"], r"Did you mean 'adamw'\?"),
        (["--weight-decay", "-0.1"], "--weight-decay is -0.1"),
        (["--momentum", "1"], r"--momentum is 1.0, but it must be in \[0, 1\)"),
        (["--beta2", "1.5"], r"--beta2 is 1.5, but it must be in \[0, 1\)"),
        (["--clip-norm", "0"], "every gradient would become zero"),
        (["--precision", "fp8"], r"Choose one of: fp32, bf16, fp16"),
        (["--schedule", "cosin"], r"Did you mean 'cosine'\?"),
        (["--warmup-steps", "-1"], "--warmup-steps is -1"),
        (["--min-lr-ratio", "2"], r"must be in \[0, 1\]"),
        (["--ema-decay", "1"], r"must be in \(0, 1\)"),
        (["--eval-every", "0"], "--eval-every is 0"),
        (["--early-stop", "0"], "--early-stop is 0"),
        (["--lr", "inf"], "Give a finite number above zero"),
        (["--quiet", "--verbose"], "Give one of them"),
        (["--lr", "fast"], "--lr is 'fast', which is not a number"),
        (["--lr", "-1"], "Give a finite number above zero"),
        (["--lr", "nan"], "Give a finite number above zero"),
        (["--seed", "-1"], "--seed is -1, but random generators take 0"),
        (["--steps"], "--steps: expected one argument"),
        (["--steps", "3", "--epochs", "1"], "both --epochs 1 and --steps 3 are given"),
        (["STEP", "3"], r"'STEP', which is not a setting. Did you mean 'steps'\?"),
        (["STEPS"], "'STEPS' is left over"),
        (["STEPS.x", "3"], "'x', which is not a setting"),
        (["MODEL_ARGS", "3"], "Write MODEL_ARGS.KEY"),
        (["--model-args", "=3"], "the key is missing"),
        (["--config-file", "absent.yaml"], "absent.yaml cannot be read"),
    ],
)
def test_bad_command_lines(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    with pytest.raises(UnsupportedInput, match=message):
        raise UnsupportedInput(captured.err)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("steps: [", "is not YAML"),
        ("", "holds no settings"),
        ("- steps", "holds no settings"),
        ("stpes: 3", r"sets 'stpes', which is not a setting. Did you mean 'steps'\?"),
        ("steps: many", "not a whole number"),
        ("model_args: 3", "takes key: value pairs"),
        ("\x00", "is not YAML"),
    ],
)
def test_bad_configuration_files(
    content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(content)
    assert main(["train", "--config-file", str(file)]) == 2
    with pytest.raises(UnsupportedInput, match=message):
        raise UnsupportedInput(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("words", "code"), [(["--help"], 0), (["train", "--help"], 0), ([], 2), (["trian"], 2), (["--hlep"], 2)]
)
def test_help_and_wrong_commands(words: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == code
    captured = capsys.readouterr()
    assert bool(captured.out) == (code == 0)
    assert bool(captured.err) == (code != 0)


def test_a_mistyped_command_gets_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    main(["trian"])
    assert "Did you mean 'train'?" in capsys.readouterr().err
