"""A site's own file becomes examples, and examples become three splits that share no question.

Reading happens offline, with nothing cached outside a temporary folder. No error ever quotes a row: it
gives row numbers, counting from 1 without a header line.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from fedcompose.errors import ConfigError
from fedcompose.tasks import Example, Task, get_task, render_choices
from fedcompose.tasks.choice import LETTERS

ROLES = ("question", "answer", "solution", "choices")
FORMATS = (".jsonl", ".json", ".csv", ".parquet")
MIN_TRAIN = 8  # distinct questions left to train on after both held-out splits
ROWS_NAMED = 10  # row numbers listed in an error
_CALCULATOR = re.compile(r"<<[^<>]*>>")
_FINAL_MARK = "####"

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Splits:
    """Three lists that share no question: to learn from, to choose by, to report."""

    train: list[Example]
    validation: list[Example]
    test: list[Example]


def read_examples(path: Path, task: str, columns: Mapping[str, str]) -> list[Example]:
    """Every row of a JSONL, CSV or Parquet file as an example of `task`.

    `columns` names the file's column for `question` and `answer`, and where there are such for `solution`
    (worked steps) and `choices` (a list of options).

    Raises: ConfigError: `DATA_NOT_FOUND`, `DATA_FORMAT`, `DATA_UNREADABLE`, `DATA_EMPTY`, `DATA_COLUMN`,
    `DATA_ROWS`, `DATA_ANSWERS`, `TASK_UNKNOWN`.
    """
    scorer = get_task(task)
    rows = read_rows(path, columns.values())
    _check_columns(path, rows[0], columns)
    named: list[Row] = [{role: row[column] for role, column in columns.items()} for row in rows]
    named = [_without_marks(row) for row in named] if task == "numeric" else named
    questions, answers = [_question(row) for row in named], [_answer(row, scorer) for row in named]
    _refuse_rows(path, questions, "DATA_ROWS", "have no question, or no list of options")
    _refuse_rows(path, answers, "DATA_ANSWERS", f"have an answer that task {task!a} cannot check")
    return [
        Example(question, answer, str(row.get("solution") or "").strip() or None)
        for question, answer, row in zip(questions, answers, named, strict=True)
        if question and answer
    ]


def read_column(path: Path, column: str) -> list[str]:
    """One more column of the file, as text, row by row as `read_examples` gives them.

    Raises: ConfigError: `DATA_COLUMN`, `DATA_ROWS`, and what `read_examples` raises for a file.
    """
    rows = read_rows(path, [column])
    require_columns(path, rows[0], [column])
    values = ["" if row[column] is None else str(row[column]).strip() for row in rows]
    _refuse_rows(path, values, "DATA_ROWS", f"have nothing in column {column!a}")
    return values


def split(
    examples: Sequence[Example], seed: int, validation_count: int, test_count: int,
    owners: Mapping[int, str] | None = None,
) -> Splits:  # fmt: skip
    """The same three splits for the same questions, in whatever order the rows stand.

    Questions that differ only in case and spaces count as one and stay together; the held-out splits take one
    row for each question, the training split takes all. One question more in the file changes the training split
    by at most one question. With `owners`, by `id` of an example, all this holds of people instead of questions.

    Raises: ConfigError: `DATA_TOO_FEW`.
    """
    groups: dict[str, list[Example]] = {}
    for example in examples:
        key = same_question(example.question) if owners is None else owners[id(example)]
        groups.setdefault(key, []).append(example)
    needed = validation_count + test_count + MIN_TRAIN
    if len(groups) < needed:
        raise ConfigError(
            "DATA_TOO_FEW", "the file has too few distinct questions for its splits",
            expected=f"{test_count} for test, {validation_count} for validation, {MIN_TRAIN} to train on",
            got=f"{len(groups)} in {len(examples)} rows", fix="add rows, or lower the counts in site.toml",
        )  # fmt: skip
    order = sorted(groups, key=lambda question: hashlib.sha256(f"{seed}:{question}".encode()).digest())
    test, validation = order[:test_count], order[test_count : test_count + validation_count]
    return Splits(
        train=[example for key in order[test_count + validation_count :] for example in groups[key]],
        validation=[groups[key][0] for key in validation],
        test=[groups[key][0] for key in test],
    )


def same_question(question: str) -> str:
    """The form in which questions that count as one are equal."""
    return " ".join(question.casefold().split())


def read_rows(path: Path, text_columns: Collection[str]) -> list[dict[str, Any]]:
    """The file's rows with all their columns, read by `datasets` for its suffix.

    Raises: ConfigError: `DATA_NOT_FOUND`, `DATA_FORMAT`, `DATA_UNREADABLE`, `DATA_EMPTY`.
    """
    if path.suffix not in FORMATS:
        raise ConfigError("DATA_FORMAT", f"cannot tell how to read {path}", expected=", ".join(FORMATS))
    if not path.is_file():
        raise ConfigError("DATA_NOT_FOUND", f"there is no file {path}", fix="correct the path in site.toml")
    if path.stat().st_size == 0:
        raise ConfigError("DATA_EMPTY", f"{path} is empty")
    try:
        rows = _load(path, text_columns)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            "DATA_UNREADABLE", f"cannot read {path} as {path.suffix[1:]}",
            got=_first_bad_line(path) or type(error).__name__,
            fix="save it again as UTF-8 JSON lines, CSV with a header line, or Parquet",
        ) from None  # fmt: skip  # the cause may quote a row
    if not rows:
        raise ConfigError("DATA_EMPTY", f"{path} has no rows")
    return rows


def require_columns(path: Path, row: Row, columns: Iterable[str]) -> None:
    """Raise `DATA_COLUMN` when the file lacks one of the columns that site.toml names."""
    missing = [column for column in columns if column not in row]
    if missing:
        raise ConfigError(
            "DATA_COLUMN", f"{path} has no column {', '.join(map(ascii, missing))}",
            got=f"columns {', '.join(map(ascii, row))}", fix="correct the domain's columns in site.toml",
        )  # fmt: skip


def _load(path: Path, text_columns: Collection[str]) -> list[dict[str, Any]]:
    """The rows by `datasets`; of a CSV file, `text_columns` are kept as they are written (`007`, `NA`)."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # its messages may quote rows
    with tempfile.TemporaryDirectory(prefix="fedcompose-data-") as cache:
        options: dict[str, Any] = {"cache_dir": cache, "keep_in_memory": True}
        try:
            if path.suffix == ".parquet":
                rows = datasets.Dataset.from_parquet(str(path), **options).to_list()
            elif path.suffix == ".csv":
                as_text = {"converters": dict.fromkeys(text_columns, str), "keep_default_na": False}
                rows = datasets.Dataset.from_csv(str(path), **as_text, **options).to_list()
            else:
                rows = datasets.Dataset.from_json(str(path), **options).to_list()
        except datasets.exceptions.DatasetsError as error:
            raise ValueError("datasets could not read the file") from error
        except ValueError as error:
            if "corresponds to no data" not in str(error):  # its words for a file without rows
                raise
            rows = []
    return cast(list[dict[str, Any]], rows)


def _first_bad_line(path: Path) -> str | None:
    """Where a JSON lines file breaks."""
    if path.suffix != ".jsonl":
        return None
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            json.loads(line or b"{}")
        except ValueError:
            return f"line {number} is not JSON"
    return None


def _check_columns(path: Path, row: Row, columns: Mapping[str, str]) -> None:
    unknown = [role for role in columns if role not in ROLES]
    if unknown or not {"question", "answer"} <= set(columns):
        raise ConfigError(
            "DATA_COLUMN", "columns must name question and answer, and may name solution and choices",
            got=", ".join(sorted(columns)) or "none", fix="correct the domain's columns in site.toml",
        )  # fmt: skip
    require_columns(path, row, columns.values())


def _without_marks(row: Row) -> Row:
    """GSM8K's habits undone: `<<48/2=24>>` in steps, and an answer column with steps, `####`, answer."""
    steps, mark, answer = str(row["answer"]).rpartition(_FINAL_MARK)
    solution = str(row.get("solution") or (steps if mark else ""))
    cleaned = _CALCULATOR.sub("", solution).partition(_FINAL_MARK)[0]
    return {**row, "answer": answer if mark else row["answer"], "solution": cleaned}


def _refuse_rows(path: Path, found: Sequence[str | None], code: str, what: str) -> None:
    """Raise `code` when a row has nothing, naming the rows and never what they hold."""
    numbers = [number for number, text in enumerate(found, start=1) if not text]
    if numbers:
        more = ", …" if len(numbers) > ROWS_NAMED else ""
        raise ConfigError(
            code, f"{len(numbers)} of {len(found)} rows of {path} {what}",
            got=f"rows {', '.join(map(str, numbers[:ROWS_NAMED]))}{more}",
            fix="correct or drop these rows, or choose another task or column in site.toml",
        )  # fmt: skip


def _question(row: Row) -> str | None:
    """The question with its options, None where the row has none."""
    question = row["question"]
    if not isinstance(question, str) or not question.strip():
        return None
    if "choices" not in row:
        return question.strip()
    options = _options(row)
    return render_choices(question.strip(), [text for _, text in options]) if options else None


def _options(row: Row) -> list[tuple[str, str]]:
    """(label, text) of each option, from a list, a `{"text": […], "label": […]}`, or either as JSON text."""
    given: Any = row["choices"]
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError:
            return []
    labels: Any = LETTERS
    if isinstance(given, dict):
        given, labels = given.get("text"), given.get("label")
    if not isinstance(given, list) or not isinstance(labels, list | str):
        return []
    options = [(str(label), str(text)) for label, text in zip(labels, given, strict=False)]
    return options if 2 <= len(given) == len(options) else []


def _answer(row: Row, scorer: Task) -> str | None:
    """The canonical answer; with options, the letter, also where the file gives a label or the text."""
    raw = row["answer"]
    text = "\n".join(map(str, raw)) if isinstance(raw, list) else "" if raw is None else str(raw)
    text = text.strip()
    if "choices" not in row:
        return scorer.canonical(text)
    options = _options(row)
    for letter, option in zip(LETTERS, options, strict=False):
        if text in option:
            return letter
    letter_given = scorer.canonical(text)
    return letter_given if letter_given and letter_given in LETTERS[: len(options)] else None
