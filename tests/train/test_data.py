from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tightfit.cli.main import main
from tightfit.errors import UnsupportedInput
from tightfit.train.data import DATASETS, DataOptions, data_name, load_data
from tightfit.train.data.loader import BatchLoader
from tightfit.train.data.order import BatchOrder


def test_python_source_is_text_and_always_the_same() -> None:
    first = load_data("python-source", DataOptions(sequence_length=64))
    again = load_data("python-source", DataOptions(sequence_length=64))
    assert first.fingerprint == again.fingerprint
    assert first.facts.kind == "text"
    assert len(first.samples) > 10_000
    text = bytes(first.samples[0].tolist()).decode()
    assert text.startswith('"""')  # __future__.py's docstring: files come in the order of their names


def test_a_sequence_ends_where_the_next_begins(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(bytes(range(65, 91)))
    data = load_data(str(tmp_path / "a.txt"), DataOptions(sequence_length=5))
    assert len(data.samples) == 5
    assert bytes(data.samples[0].tolist()) == b"ABCDEF"
    assert bytes(data.samples[4].tolist()) == b"UVWXYZ"
    assert data.held_out is None  # the last tenth is shorter than a sample


def test_a_folder_is_read_in_order_without_binary_and_hidden_files(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    (folder / "sub").mkdir(parents=True)
    (folder / "b.txt").write_text("second")
    (folder / "a.txt").write_text("first")
    (folder / "sub" / "c.md").write_text("third")
    (folder / ".hidden").write_text("hidden")
    (folder / "d.bin").write_bytes(b"\0\1\2")
    data = load_data(str(folder), DataOptions(sequence_length=17))
    assert bytes(data.samples[0].tolist()) == b"first\nsecond\nthird"
    assert data.name == "corpus"
    assert data.held_out is None  # too little to hold any of it out


def test_a_folder_holds_whole_files_out_by_their_names(tmp_path: Path) -> None:
    for number in range(60):
        (tmp_path / f"{number}.txt").write_text(f"<{number:02}>" * 5)
    data = load_data(str(tmp_path), DataOptions(sequence_length=3))
    assert data.held_out is not None
    texts = [
        {bytes(part[i].tolist())[1:3] for i in range(len(part)) if bytes(part[i].tolist())[:1] == b"<"}
        for part in (data.samples, data.held_out)
    ]
    assert texts[1]
    assert not texts[0] & texts[1]
    again = load_data(str(tmp_path), DataOptions(sequence_length=3))
    assert again.fingerprint == data.fingerprint


def test_the_end_of_a_single_file_is_held_out(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(bytes(range(100)))
    data = load_data(str(tmp_path / "a.txt"), DataOptions(sequence_length=4))
    assert data.held_out is not None
    assert data.held_out[0].tolist() == [90, 91, 92, 93, 94]
    assert max(data.samples[len(data.samples) - 1].tolist()) < 90


def test_data_names_come_from_known_names_stems_and_factories(tmp_path: Path) -> None:
    (tmp_path / "novel.txt").write_text("It was")
    assert data_name("co2") == "co2"
    assert data_name(str(tmp_path / "novel.txt")) == "novel"
    assert data_name("my.data:make") == "my.data-make"


def test_digits_are_images_with_classes() -> None:
    data = DATASETS["digits"].load(DataOptions(sequence_length=0))
    image, label = data.samples[0]
    assert image.shape == (data.facts.channels, 32, 32)
    assert 0 <= int(label) < 10
    assert data.held_out is not None
    assert len(data.samples) + len(data.held_out) == 1797
    assert len(data.held_out) == 359
    for part in (data.samples, data.held_out):
        assert {int(part[index][1]) for index in range(100)} == set(range(data.facts.classes))


def test_co2_is_a_series_without_gaps() -> None:
    data = DATASETS["co2"].load(DataOptions(sequence_length=52))
    assert data.samples[0].shape == (53, 1)
    assert data.held_out is not None
    weeks = int(2283 * 0.8)
    assert (len(data.samples), len(data.held_out)) == (weeks - 52, 2283 - weeks - 52)
    for part in (data.samples, data.held_out):
        assert torch.isfinite(part[len(part) - 1]).all()


def test_a_series_shorter_than_a_sample_is_refused() -> None:
    with pytest.raises(UnsupportedInput, match="--sequence-length"):
        DATASETS["co2"].load(DataOptions(sequence_length=5000))


def test_each_epoch_is_another_permutation_of_all_samples() -> None:
    order = BatchOrder(sample_count=10, batch_size=2, seed=3)
    epochs = [[index for step in range(5) for index in order.indices(5 * epoch + step)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [order.epoch_of(step) for step in (0, 4, 5)] == [0, 0, 1]


def test_the_order_depends_on_seed_and_step_alone() -> None:
    def jumped(seed: int) -> list[int]:
        return BatchOrder(sample_count=101, batch_size=4, seed=seed).indices(57)

    walked = BatchOrder(sample_count=101, batch_size=4, seed=3)
    for step in range(57):
        walked.indices(step)
    assert walked.indices(57) == jumped(3)
    assert jumped(3) != jumped(4)


def test_the_last_batch_of_an_epoch_may_be_incomplete_but_for_a_single_sample() -> None:
    order = BatchOrder(sample_count=11, batch_size=4, seed=0)
    assert order.steps_per_epoch == 3
    assert [len(order.indices(step)) for step in range(6)] == [4, 4, 3, 4, 4, 3]
    assert sorted(index for step in range(3) for index in order.indices(step)) == list(range(11))
    assert [order.sizes(first, 9) for first in (0, 2, 3, 8)] == [{4: 0, 3: 2}, {3: 2, 4: 3}, {4: 3, 3: 5}, {3: 8}]
    assert order.sizes(0, 2) == {4: 0}
    assert [order.ends_epoch(step) for step in range(4)] == [False, False, True, False]
    single = BatchOrder(sample_count=9, batch_size=4, seed=0)
    assert single.steps_per_epoch == 2
    assert [len(single.indices(step)) for step in range(4)] == [4, 4, 4, 4]
    assert single.sizes(0, 100) == {4: 0}


def test_a_batch_larger_than_the_data_is_refused() -> None:
    with pytest.raises(UnsupportedInput, match="--batch-size"):
        BatchOrder(sample_count=3, batch_size=4, seed=0)


def test_samples_of_unequal_shape_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parent)
    data = load_data("tests.train.user_code:ragged_data", DataOptions(sequence_length=0))
    order = BatchOrder(sample_count=len(data.samples), batch_size=2, seed=0)
    with pytest.raises(UnsupportedInput, match="same shape"):
        BatchLoader(data, order, samples_at_a_time=2).batch(0)


def test_arguments_reach_a_factory_and_nothing_else() -> None:
    data = load_data("tests.train.user_code:numbers", DataOptions(sequence_length=0, arguments={"count": 7}))
    assert len(data.samples) == 7
    with pytest.raises(UnsupportedInput, match=r"Did you mean 'count'\?"):
        load_data("tests.train.user_code:numbers", DataOptions(sequence_length=0, arguments={"cuont": 7}))
    with pytest.raises(UnsupportedInput, match="Leave the arguments out"):
        load_data("co2", DataOptions(sequence_length=8, arguments={"count": 7}))


def test_workers_that_hang_are_told_of_and_end_the_run(
    own_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("tightfit.train.data.loader._PATIENCE_S", 1)
    monkeypatch.setattr("tightfit.train.data.loader._MOST_WAITS", 3)
    words = ["--model", "tests.train.user_code:own_loss_model", "--dataset", "tests.train.user_code:hanging_numbers"]
    assert main(["train", *words, "--batch-size", "8", "--workers", "1", "--epochs", "1"]) == 2
    assert "hang, or wait for something that does not come" in capsys.readouterr().err
    assert [record.args[1] for record in caplog.records if "have not delivered" in record.message] == [1, 2, 3]  # type: ignore[index]  # args of a record are a tuple here
