"""Data in files as people have them: tables, images, text for a tokenizer; and what is wrong with some of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tightfit.errors import UnsupportedInput
from tightfit.train.data import DataOptions, load_data
from tightfit.train.data.loader import BatchLoader
from tightfit.train.data.order import BatchOrder
from tightfit.train.data.rows import Columns
from tightfit.train.data.tokens import BYTES, load_tokens
from tightfit.train.largest_batch import largest_microbatch

WORDS = ["good film", "bad film", "a very good film indeed", "dull", "fine"] * 8
LABELS = ["pos", "neg", "pos", "neg", "pos"] * 8


def options(length: int = 16, **settings: Any) -> DataOptions:
    return DataOptions(sequence_length=length, **settings)


def tokenizer(folder: Path) -> Path:
    """A small tokenizer of whole words, as transformers saves one."""
    import tokenizers

    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = ["[UNK]", "[PAD]", "<eos>", "[MASK]"]
    made.train_from_iterator(WORDS, tokenizers.trainers.WordLevelTrainer(special_tokens=special))
    folder.mkdir(exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    names = {"eos_token": "<eos>", "pad_token": {"content": "[PAD]"}, "mask_token": "[MASK]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder


def write_csv(path: Path) -> Path:
    rows = [f'"{text}",{label}' for text, label in zip(WORDS, LABELS, strict=True)]
    path.write_text("\n".join(["text,label", *rows]) + "\n")
    return path


def write_jsonl(path: Path, **columns: list[Any]) -> Path:
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# ------------------------------------------------------------------------------------------------ tokens


def test_bytes_are_the_tokens_where_no_tokenizer_is(tmp_path: Path) -> None:
    assert load_tokens(None, None) is BYTES
    assert load_tokens(None, tmp_path) is BYTES


@pytest.mark.parametrize("by_file", [True, False])
def test_a_tokenizer_from_a_file_or_its_folder(tmp_path: Path, by_file: bool) -> None:
    folder = tokenizer(tmp_path / "tok")
    tokens = load_tokens(str(folder / "tokenizer.json" if by_file else folder), None)
    assert load_tokens(None, folder) == tokens
    assert tokens.encoder.id_to_token(tokens.end) == "<eos>"
    assert tokens.encoder.id_to_token(tokens.padding) == "[PAD]"
    assert tokens.encoder.id_to_token(tokens.mask) == "[MASK]"
    numbers = tokens.encode(b"good film", "here")
    assert [tokens.encoder.id_to_token(number) for number in numbers] == ["good", "film"]
    assert max(numbers) < tokens.vocabulary_size


def test_documents_are_joined_with_an_end_between_them(tmp_path: Path) -> None:
    tokens = load_tokens(str(tokenizer(tmp_path / "tok")), None)
    path = write_jsonl(tmp_path / "a.jsonl", text=WORDS)
    data = load_data(str(path), options(4, tokens=tokens, accepts=("text",)))
    assert data.facts.kind == "text"
    assert data.facts.vocabulary_size == tokens.vocabulary_size
    assert data.held_out is not None
    row = data.samples[0].tolist()
    assert len(row) == 5
    assert tokens.end in row
    assert 2 < data.facts.bytes_per_token < 6


@pytest.mark.parametrize(
    ("spec", "message"),
    [("absent", "no tokenizer at absent"), ("broken.json", "cannot be read as a tokenizer")],
)
def test_what_is_no_tokenizer(spec: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("broken.json").write_text("{}")
    with pytest.raises(UnsupportedInput, match=message):
        load_tokens(spec, None)


def test_text_that_is_not_utf8_is_named_with_its_place(tmp_path: Path) -> None:
    tokens = load_tokens(str(tokenizer(tmp_path / "tok")), None)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 100)
    with pytest.raises(UnsupportedInput, match=r"latin\.txt is not UTF-8 text: byte 3 is 0xe9"):
        load_data(str(tmp_path / "latin.txt"), options(tokens=tokens))
    assert len(load_data(str(tmp_path / "latin.txt"), options()).samples) > 1  # as bytes it is fine


# ------------------------------------------------------------------------------------------------ tables


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json"])
def test_labelled_text_from_every_kind_of_table(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"reviews.{kind}"
    if kind == "csv":
        write_csv(path)
    elif kind == "tsv":
        path.write_text("text\tlabel\n" + "".join(f"{a}\t{b}\n" for a, b in zip(WORDS, LABELS, strict=True)))
    elif kind == "jsonl":
        write_jsonl(path, text=WORDS, label=LABELS)
    else:
        path.write_text(json.dumps([{"text": a, "label": b} for a, b in zip(WORDS, LABELS, strict=True)]))
    data = load_data(str(path), options(accepts=("labelled-text",)))
    assert (data.name, data.facts.kind, data.facts.label_names) == ("reviews", "labelled-text", ("neg", "pos"))
    assert data.held_out is not None
    assert len(data.samples) + len(data.held_out) == 40
    for part in (data.samples, data.held_out):
        for number in range(len(part)):
            sample = part[number]
            text = bytes(sample["input_ids"].tolist()).decode()
            assert text in {word[:16] for word in WORDS}
            assert data.facts.label_names[int(sample["labels"])] == LABELS[[w[:16] for w in WORDS].index(text)]


def test_rows_are_padded_to_the_longest_and_the_longest_batch_is_found(tmp_path: Path) -> None:
    texts = ["ab"] * 30 + ["a much longer row"] + ["abc"] * 9
    data = load_data(
        str(write_jsonl(tmp_path / "a.jsonl", text=texts, label=[0, 1] * 20)), options(64, accepts=("labelled-text",))
    )
    batch = data.collate([data.samples[number] for number in range(len(data.samples))])
    lengths = batch["attention_mask"].sum(1)
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    assert set(lengths.tolist()) <= {2, 3, 17}
    assert not batch["input_ids"][batch["attention_mask"] == 0].any()
    if 17 in lengths:
        order = BatchOrder(sample_count=len(data.samples), batch_size=4, seed=0)
        loader = BatchLoader(data, order, samples_at_a_time=4)
        extreme = largest_microbatch(data, loader, 0, 20)
        assert lengths.argmax().item() in extreme.numbers
        assert loader.batch(extreme.step).parts[extreme.place]["input_ids"].shape == (4, 17)


def test_pairs_have_labels_that_the_loss_leaves_out_where_they_end(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", source=WORDS, target=[word[::-1] for word in WORDS])
    data = load_data(str(path), options(accepts=("text-pairs",)))
    assert data.facts.kind == "text-pairs"
    batch = data.collate([data.samples[0], data.samples[1], data.samples[2]])
    assert (batch["labels"] == -100).any()
    assert bytes(data.samples[0]["labels"].tolist())[::-1].decode() == bytes(data.samples[0]["input_ids"]).decode()


def test_empty_rows_are_left_out_and_counted(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", text=["", *WORDS], label=[0, *([0, 1] * 20)])
    data = load_data(str(path), options(accepts=("labelled-text",)))
    assert "1 empty rows are left out" in data.description
    assert data.facts.classes == 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "text,label\nx,0,1\n", r"line 2: there are 3 cells, but the header has 2 columns"),
        ("a.csv", 'text,label\n"x,0\n', "so this is no CSV"),
        ("a.csv", "text,label\n", "holds no rows"),
        ("a.csv", "", "holds no rows"),
        ("a.csv", "words,label\nx,0\n", r"Its columns are: words, label\. Name one with --text-column"),
        ("a.csv", "text,points\nx,0\n", "Name one with --label-column"),
        ("a.csv", "text,label\nx,\n", "line 2: the class is ''"),
        ("a.csv", "text,label\nx,-1\n", "line 2: the class is -1, but classes are numbered from 0"),
        ("a.csv", "text,label\nx,7\n", "there are only 1 rows"),
        ("a.csv", "text,label\n,0\n", "every row of .* is empty"),
        ("a.jsonl", '{"text": "x", "label": 0}\n{"text": "y", "la', r"line 2: .* so this is no JSON"),
        ("a.jsonl", '{"text": "x", "label": 0}\n{"text": "y"}\n', "row 2: the column 'label' is missing"),
        ("a.jsonl", "3\n", "row 1: there is a int, not an object"),
        ("a.jsonl", '{"text": 3, "label": 0}\n', "the column 'text' holds 3, which is no text"),
        ("a.jsonl", '{"text": "x", "label": null}\n', "the class is None"),
        ("a.json", '{"text": "x"}', "holds a dict, not a list of rows"),
        ("a.json", "[", "so this is no JSON"),
    ],
)
def test_what_is_wrong_with_a_table_is_said_with_its_line(
    name: str, content: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UnsupportedInput, match=message):
        load_data(str(tmp_path / name), options(accepts=("labelled-text",)))


def test_a_column_that_is_not_there_gets_a_suggestion(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv")
    with pytest.raises(UnsupportedInput, match=r"Did you mean 'text'\?"):
        load_data(str(path), options(accepts=("text",), columns=Columns(text="txet")))


def test_a_table_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"text,label\ncaf\xe9,0\n")
    with pytest.raises(UnsupportedInput, match="not UTF-8 text: byte 14"):
        load_data(str(tmp_path / "a.csv"), options(accepts=("labelled-text",)))


# ------------------------------------------------------------------------------------------------ images


def pictures(root: Path, count: int = 12, names: tuple[str, ...] = ("cat", "dog")) -> Path:
    from PIL import Image

    for place, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (20 + number, 16), (100 * place, number, 0)).save(root / name / f"{number}.png")
    return root


def test_a_folder_of_images_by_class(tmp_path: Path) -> None:
    data = load_data(str(pictures(tmp_path / "pets", 30)), options(image_size=8))
    assert (data.facts.kind, data.facts.classes, data.facts.label_names) == ("images", 2, ("cat", "dog"))
    assert data.held_out is not None
    assert len(data.samples) + len(data.held_out) == 60
    image, _ = data.samples[0]
    assert image.shape == (3, 8, 8)
    assert -1 <= float(image.min()) <= float(image.max()) <= 1
    classes = {
        float(image[0].mean()) > -0.9: label for image, label in (data.samples[n] for n in range(len(data.samples)))
    }
    assert classes == {False: 0, True: 1}


def test_folders_called_train_and_val_are_the_two_parts(tmp_path: Path) -> None:
    pictures(tmp_path / "pets" / "train", 5)
    pictures(tmp_path / "pets" / "val", 3)
    data = load_data(str(tmp_path / "pets"), options(image_size=8))
    assert data.held_out is not None
    assert (len(data.samples), len(data.held_out)) == (10, 6)
    pictures(tmp_path / "pets" / "val" / "more", 1, ("x",))
    (tmp_path / "pets" / "val" / "bird").mkdir()
    with pytest.raises(UnsupportedInput, match="the class 'bird'"):
        load_data(str(tmp_path / "pets"), options(image_size=8))


def test_images_of_one_class_and_broken_ones_are_refused(tmp_path: Path) -> None:
    pictures(tmp_path / "one", 2, ("cat",))
    with pytest.raises(UnsupportedInput, match="at least two"):
        load_data(str(tmp_path / "one"), options(image_size=8))
    root = pictures(tmp_path / "pets", 3)
    file = root / "cat" / "0.png"
    file.write_bytes(file.read_bytes()[:40])
    data = load_data(str(root), options(image_size=8))
    with pytest.raises(UnsupportedInput, match=r"0\.png cannot be read as an image"):
        [data.samples[number] for number in range(len(data.samples))] + [
            (data.held_out or [])[number] for number in range(len(data.held_out or []))
        ]


def test_the_usual_size_is_imagenets(tmp_path: Path) -> None:
    data = load_data(str(pictures(tmp_path / "pets", 2)), options())
    assert data.facts.image_size == 224
    assert torch.is_tensor(data.samples[0][0])


# ------------------------------------------------------------------------------------------------ saved datasets


def test_a_saved_dataset_is_a_table_with_its_own_parts(tmp_path: Path) -> None:
    import datasets

    rows = {"text": WORDS, "label": [LABELS[n] == "pos" for n in range(len(WORDS))]}
    whole = datasets.Dataset.from_dict(rows)
    whole.save_to_disk(str(tmp_path / "one"))
    parts = datasets.DatasetDict(train=whole.select(range(30)), test=whole.select(range(30, 40)))
    parts.save_to_disk(str(tmp_path / "two"))
    one, two = (load_data(str(tmp_path / name), options(accepts=("labelled-text",))) for name in ("one", "two"))
    assert one.held_out is not None
    assert two.held_out is not None
    assert (len(one.samples), len(one.held_out)) == (36, 4)
    assert (len(two.samples), len(two.held_out)) == (30, 10)
    assert (one.facts.kind, one.facts.classes) == ("labelled-text", 2)
    assert bytes(two.held_out[0]["input_ids"].tolist()).decode() == WORDS[30]


def test_a_damaged_saved_dataset_is_refused(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_dict({"text": WORDS}).save_to_disk(str(tmp_path / "one"))
    next((tmp_path / "one").glob("*.arrow")).write_bytes(b"nothing")
    with pytest.raises(UnsupportedInput, match="cannot be read as a saved dataset"):
        load_data(str(tmp_path / "one"), options(accepts=("text",)))
    datasets.DatasetDict(other=datasets.Dataset.from_dict({"text": WORDS})).save_to_disk(str(tmp_path / "two"))
    with pytest.raises(UnsupportedInput, match="none called train"):
        load_data(str(tmp_path / "two"), options(accepts=("text",)))
