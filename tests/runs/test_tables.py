"""Files of examples: every kind gives the same rows, and what cannot be read says why in a line."""

from __future__ import annotations

import json

import pytest

from adamezo import finetune
from adamezo.finetune import read_table

ROWS = [
    {"text": "fun, not dull", "label": "good"},
    {"text": 'a "plot"\nin two lines', "label": "bad"},
    {"text": "naïve \u2028 film", "label": "good"},
]


def write(folder, kind, rows=ROWS):
    import pandas

    frame, path = pandas.DataFrame(rows), folder / f"data.{kind}"
    if kind == "csv":
        frame.to_csv(path, index=False)
    elif kind == "tsv":
        frame.to_csv(path, index=False, sep="\t")
    elif kind == "jsonl":
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        path.write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    elif kind == "parquet":
        pytest.importorskip("pyarrow")
        frame.to_parquet(path)
    else:
        datasets = pytest.importorskip("datasets")
        path = folder / "saved"
        datasets.Dataset.from_list(rows).save_to_disk(str(path))
    return path


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet", "datasets"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, kind):
    table = read_table(write(tmp_path, kind))
    assert table.columns == ["text", "label"]
    assert table.rows == ROWS
    assert finetune.read_examples(write(tmp_path, kind)) == [
        finetune.Example(row["text"], row["label"]) for row in ROWS
    ]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "datasets"])
def test_lists_in_rows_are_lists(tmp_path, kind):
    rows = [{"choices": ["a", "b"], "messages": [{"role": "user", "content": "x"}]}]
    assert read_table(write(tmp_path, kind, rows)).rows == rows


def test_the_lines_of_a_text_file_are_rows(tmp_path):
    path = tmp_path / "data.txt"
    path.write_text("one\n\ntwo\n")
    table = read_table(path)
    assert table.texts("text", "text-column") == ["one", "two"]
    assert table.at(1) == f"{path}, line 3"


def test_parts_and_names_of_labels_of_a_saved_dataset(tmp_path):
    datasets = pytest.importorskip("datasets")
    label = datasets.ClassLabel(names=["bad", "good"])
    features = datasets.Features({"text": datasets.Value("string"), "label": label})
    part = datasets.Dataset.from_dict({"text": ["x", "y"], "label": [1, 0]}, features=features)
    datasets.DatasetDict({"train": part, "rest": part.select([0])}).save_to_disk(tmp_path / "d")
    assert [row["label"] for row in read_table(tmp_path / "d").rows] == ["good", "bad"]
    assert len(read_table(tmp_path / "d", part="rest").rows) == 1
    with pytest.raises(ValueError, match=r"parts \['train', 'rest'\], expected one named 'dev'"):
        read_table(tmp_path / "d", part="dev")


BAD = {
    "other encoding": ("csv", "text,label\nnaïve,good\n".encode("latin-1"), "it is not utf-8"),
    "semicolons": (
        "csv",
        b"text;label\na film;good\n",
        "it looks separated by ';': see --separator",
    ),
    "another column": ("csv", b"review,label\na,b\n", "'text', or name the column with --text-col"),
    "a field too many": ("csv", b"text,label\na,b\nc,d,e\n", "put texts that hold ',' in quotes"),
    "an open quote": ("csv", b'text,label\n"a,b\nc,d\n', "a quote is left open"),
    "one always too many": ("csv", b"text,label\na,b,c\nd,e,f\n", "more fields than the first"),
    "an empty file": ("csv", b"", r"columns \[\], expected one named 'text': it is empty"),
    "no rows": ("tsv", b"text\tlabel\n", "no rows, expected at least two"),
    "an empty label": ("csv", b"text,label\na,b\nc,\n", "line 3: the label is empty"),
    "after a text of two lines": ("csv", b'text,label\n"a\nb",c\n"",d\n', "line 4: the text is"),
    "no JSON": ("jsonl", b'{"text": "a", "label": "b"}\n{"text": \n', "line 2: not JSON"),
    "JSON, and no objects": ("jsonl", b"[1, 2]\n", "line 1: expected an object in each line"),
    "an empty JSONL": ("jsonl", b"\n", r"columns \[\], expected one named 'text': it is empty"),
    "a number": ("jsonl", b'{"text": 3, "label": "b"}\n', "line 1: got 3 as 'text', expected a"),
    "a row without text": ("jsonl", b'{"text":"a","label":1}\n{"label":2}\n', "line 2: got "),
    "another kind": ("xlsx", b"PK", "file ending in '.xlsx', expected .csv, .tsv, .jsonl"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_file_that_cannot_be_read_says_why_in_a_line(tmp_path, case):
    kind, content, message = BAD[case]
    path = tmp_path / f"data.{kind}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as raised:
        finetune.read_examples(path)
    assert "\n" not in str(raised.value)


def test_a_file_in_another_encoding_or_with_another_separator_is_read(tmp_path):
    path = tmp_path / "data.csv"
    path.write_text("text;label\nnaïve, fun;good\n", encoding="utf-16")
    (found,) = finetune.read_examples(path, separator=";", encoding="utf-16")
    assert found == ("naïve, fun", "good")
    with pytest.raises(ValueError, match="--encoding: got 'nonsense', expected one that Python"):
        read_table(path, encoding="nonsense")


@pytest.mark.parametrize(("label", "word"), [(1, "1"), (True, "True"), ("a b", "a b")])
def test_labels_may_be_numbers(tmp_path, label, word):
    rows = [{"text": "a", "label": label}, {"text": "b", "label": label}]
    path = write(tmp_path, "jsonl", rows)
    assert [example.label for example in finetune.read_examples(path)] == [word, word]


def test_a_folder_or_file_that_is_none(tmp_path):
    pytest.importorskip("datasets")
    with pytest.raises(ValueError, match="expected one that save_to_disk of datasets has written"):
        read_table(tmp_path)
    with pytest.raises(FileNotFoundError, match="expected a file on this machine"):
        read_table(tmp_path / "none.csv")
