"""Tables of examples: files of every usual kind, read by pandas or datasets into rows by column."""

from __future__ import annotations

import csv
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KINDS = ".csv, .tsv, .jsonl, .ndjson, .parquet, .txt, or a folder that datasets has saved"


@dataclass
class Table:
    """Rows of a file, and where each of them stands in it, for messages."""

    path: str
    columns: list[str]
    rows: list[dict[str, Any]]
    line_of: Callable[[int], str]
    """The place of a row, by its number from 0, in words."""

    def column(self, name: str, option: str) -> list[Any]:
        """The values of a column.

        Raises:
            ValueError: there is no such column; the message names the option that chooses it.
        """
        if name not in self.columns:
            hint = f", or name the column with --{option}"
            if not self.columns:
                hint = ": it is empty"
            elif len(self.columns) == 1:
                marks = [mark for mark in ";\t|" if mark in self.columns[0]]
                hint = f"; it looks separated by {marks[0]!r}: see --separator" if marks else hint
            raise ValueError(
                f"{self.path}: got the columns {self.columns}, expected one named {name!r}{hint}"
            )
        return [row.get(name) for row in self.rows]

    def texts(self, name: str, option: str) -> list[str]:
        """The same of a column of texts, none of them empty, without spaces around them."""
        texts = []
        for number, value in enumerate(self.column(name, option)):
            if not isinstance(value, str):
                raise ValueError(
                    f"{self.at(number)}: got {value!r} as {name!r}, expected a text; mend the row, "
                    f"or name another column with --{option}"
                )
            if not value.strip():
                raise ValueError(f"{self.at(number)}: the {name} is empty; remove the row")
            texts.append(value.strip())
        if not texts:
            raise ValueError(f"{self.path}: no rows, expected at least two")
        return texts

    def at(self, number: int) -> str:
        """The file and the place of a row, by its number from 0."""
        return f"{self.path}, {self.line_of(number)}"


def read_table(
    path: str | Path, *, separator: str | None = None, encoding: str = "utf-8", part: str = ""
) -> Table:
    """Reads a file, by the ending of its name, or a folder that datasets has saved.

    Args:
        path: of the file or folder.
        separator: of the columns of a .csv file, if not a comma.
        encoding: of a text file. A byte-order mark is taken away.
        part: of a saved dataset with several, such as "train", which is taken if none is named.

    Raises:
        ValueError, OSError: it cannot be read; the message says why and what to do.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        return _of_datasets(path, part)
    kind = path.suffix.lower()
    if not path.is_file():
        raise FileNotFoundError(f"--data: got {str(path)!r}, expected a file on this machine")
    if kind == ".parquet":
        return _of_parquet(path)
    if encoding.lower().replace("_", "-") in ("utf-8", "utf8"):
        encoding = "utf-8-sig"
    try:
        if kind in (".jsonl", ".ndjson"):
            return _of_json_lines(path, encoding)
        if kind == ".txt":
            lines = path.read_text(encoding=encoding).split("\n")
            numbers = [i for i, line in enumerate(lines) if line.strip()]
            rows = [{"text": lines[i]} for i in numbers]
            return Table(str(path), ["text"], rows, lambda row: f"line {numbers[row] + 1}")
        if kind in (".csv", ".tsv"):
            return _of_csv(path, separator or ("\t" if kind == ".tsv" else ","), encoding)
    except UnicodeError as error:
        raise ValueError(
            f"{path}: it is not {encoding.removesuffix('-sig')} ({error}); save it as UTF-8, or "
            "name its encoding, for example --encoding latin-1 or utf-16"
        ) from None
    except LookupError:
        raise ValueError(
            f"--encoding: got {encoding!r}, expected one that Python knows, such as latin-1"
        ) from None
    raise ValueError(f"{path}: got a file ending in {kind!r}, expected {KINDS}")


def _pandas() -> Any:
    try:
        import pandas
    except ImportError as error:
        raise ImportError("reading data needs pandas: pip install 'adamezo[cli]'") from error
    return pandas


def _of_csv(path: Path, separator: str, encoding: str) -> Table:
    pandas = _pandas()
    columns: list[str] = []
    rows: list[dict[str, Any]] = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pandas.errors.ParserWarning)  # of a row that is too long
            frame = pandas.read_csv(
                path, sep=separator, encoding=encoding, dtype=str, na_filter=False, index_col=False
            )
        columns, rows = list(frame.columns), frame.to_dict("records")
    except pandas.errors.EmptyDataError:
        pass
    except (pandas.errors.ParserError, pandas.errors.ParserWarning) as error:
        raise ValueError(
            f"{path}: a row has more fields than the first line names columns, or a quote is left "
            f"open ({' '.join(str(error).split())}); put texts that hold {separator!r} in quotes"
        ) from None

    def line_of(row: int) -> str:  # read once more: only messages ask
        with open(path, newline="", encoding=encoding) as file:
            reader = csv.reader(file, delimiter=separator)
            ends = (reader.line_num for fields in reader if fields)
            return f"line {[*ends][row + 1]}"

    return Table(str(path), columns, rows, line_of)


def _of_json_lines(path: Path, encoding: str) -> Table:
    pandas = _pandas()
    lines = path.read_text(encoding=encoding).split("\n")
    numbers = [i for i, line in enumerate(lines) if line.strip()]
    if not numbers:
        return Table(str(path), [], [], str)
    try:
        frame = pandas.read_json(path, lines=True, dtype=False, encoding=encoding)
        if not all(isinstance(name, str) for name in frame.columns):
            raise ValueError("rows without names of columns")
    except ValueError as error:
        raise _not_lines_of_json(path, lines, error) from None
    rows = frame.to_dict("records")
    return Table(str(path), list(frame.columns), rows, lambda row: f"line {numbers[row] + 1}")


def _not_lines_of_json(path: Path, lines: list[str], error: ValueError) -> ValueError:
    """The error that names the first line that is no object."""
    for number, line in enumerate(lines, start=1):
        try:
            found = json.loads(line) if line.strip() else {}
        except json.JSONDecodeError as reason:
            return ValueError(f"{path}, line {number}: not JSON ({reason})")
        if not isinstance(found, dict):
            return ValueError(
                f"{path}, line {number}: expected an object in each line, such as "
                '{"text": "a film", "label": "good"}'
            )
    return ValueError(f"{path}: not lines of JSON ({error})")


def _of_parquet(path: Path) -> Table:
    try:
        frame = _pandas().read_parquet(path, engine="pyarrow")
    except ImportError as error:
        raise ImportError("a .parquet file needs pyarrow: pip install 'adamezo[cli]'") from error
    except (ValueError, OSError) as error:  # pyarrow's errors are of these kinds
        raise ValueError(f"{path}: not a Parquet file ({error})") from None
    return Table(str(path), list(frame.columns), _plain(frame), _by_number)


def _plain(frame: Any) -> list[dict[str, Any]]:
    """Rows of a frame, with lists in the place of arrays."""

    def plain(value: Any) -> Any:
        value = value.tolist() if hasattr(value, "tolist") else value
        return [plain(v) for v in value] if isinstance(value, list) else value

    return [{name: plain(v) for name, v in row.items()} for row in frame.to_dict("records")]


def _by_number(row: int) -> str:
    return f"row {row + 1}"


def _of_datasets(path: Path, part: str) -> Table:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"{path}: a folder of a dataset needs datasets: pip install 'adamezo[cli]'"
        ) from error
    try:
        found = datasets.load_from_disk(str(path))
    except FileNotFoundError:
        raise ValueError(
            f"{path}: got a folder, expected one that save_to_disk of datasets has written, or a "
            f"file: {KINDS}"
        ) from None
    if isinstance(found, datasets.DatasetDict):
        part = part or "train"
        if part not in found:
            raise ValueError(
                f"{path}: got the parts {list(found)}, expected one named {part!r}; choose with "
                "--split"
            )
        found = found[part]
    rows = found.to_list()
    for name, feature in found.features.items():
        if isinstance(feature, datasets.ClassLabel):
            for row in rows:
                row[name] = None if row[name] is None else feature.int2str(row[name])
    return Table(str(path), found.column_names, rows, _by_number)
