from __future__ import annotations

import csv
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fedcompose.errors import ConfigError
from fedcompose.tasks import Example
from fedcompose_client.data import Splits, read_examples, split

PLAIN = {"question": "question", "answer": "answer"}
WORKED = {**PLAIN, "solution": "solution"}
CHOICES = {**PLAIN, "choices": "choices"}
CANARY = "canary-7f3a"


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sums(count: int) -> list[dict[str, Any]]:
    return [
        {"question": f"What is {n} + 1?", "answer": str(n + 1), "solution": f"{n}+1={n + 1}."} for n in range(count)
    ]


def refusal(path: Path, task: str = "numeric", columns: dict[str, str] = PLAIN) -> ConfigError:
    with pytest.raises(ConfigError) as error:
        read_examples(path, task, columns)
    assert CANARY not in error.value.diagnostics()
    assert error.value.__cause__ is None, "a cause may quote a row"
    return error.value


def test_reads_the_same_rows_from_every_format(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = sums(5)
    jsonl = write_jsonl(tmp_path / "a.jsonl", rows)
    (tmp_path / "a.json").write_text(json.dumps(rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    with (tmp_path / "a.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    expected = [Example(row["question"], row["answer"], row["solution"]) for row in rows]
    for path in (jsonl, tmp_path / "a.json", tmp_path / "a.parquet", tmp_path / "a.csv"):
        assert read_examples(path, "numeric", WORKED) == expected


def test_columns_may_have_any_name_and_others_are_ignored(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"id": CANARY, "Frage": "1 + 1?", "Antwort": 2}])
    assert read_examples(path, "numeric", {"question": "Frage", "answer": "Antwort"}) == [Example("1 + 1?", "2")]


def test_csv_text_stays_as_written(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('question,answer\n"What, then?",NA\nWhich code?,007\n')
    assert [example.answer for example in read_examples(path, "exact", PLAIN)] == ["NA", "007"]


def test_answers_are_kept_in_canonical_form(tmp_path: Path) -> None:
    rows = [{"question": f"q{n}", "answer": answer} for n, answer in enumerate(["1,000", "$5.50", "6/8", "72.0"])]
    examples = read_examples(write_jsonl(tmp_path / "a.jsonl", rows), "numeric", PLAIN)
    assert [example.answer for example in examples] == ["1000", "5.5", "3/4", "72"]


def test_json_truth_values_are_yes_and_no(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"question": "a", "answer": True}, {"question": "b", "answer": False}])
    assert [example.answer for example in read_examples(path, "yes_no", PLAIN)] == ["yes", "no"]


def test_calculator_marks_and_final_answers_leave_the_solution(tmp_path: Path) -> None:
    worked = "He sold 48/2 = <<48/2=24>>24 clips.\nIn all 48+24 = <<48+24=72>>72.\n#### 72"
    path = write_jsonl(tmp_path / "a.jsonl", [{"question": "q", "answer": worked}])
    [example] = read_examples(path, "numeric", PLAIN)
    assert example.answer == "72"
    assert example.solution == "He sold 48/2 = 24 clips.\nIn all 48+24 = 72."


@pytest.mark.parametrize("answer", ["B", "b", "(B)", "seven"])
def test_choice_answers_may_be_letters_or_the_option_itself(tmp_path: Path, answer: str) -> None:
    row = {"question": "Which?", "choices": ["three", "seven"], "answer": answer}
    [example] = read_examples(write_jsonl(tmp_path / "a.jsonl", [row]), "choice", CHOICES)
    assert example == Example("Which? A) three B) seven", "B")


def test_choice_labels_of_the_file_become_letters(tmp_path: Path) -> None:
    row = {"question": "Which?", "choices": {"text": ["x", "y", "z"], "label": ["1", "2", "3"]}, "answer": "3"}
    [example] = read_examples(write_jsonl(tmp_path / "a.jsonl", [row]), "choice", CHOICES)
    assert example.answer == "C"


def test_choices_in_csv_are_json_text(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('question,choices,answer\nWhich?,"[""x"", ""y""]",A\n')
    assert read_examples(path, "choice", CHOICES) == [Example("Which? A) x B) y", "A")]


def test_unit_tests_may_be_a_list(tmp_path: Path) -> None:
    rows = [
        {
            "question": "Double x.",
            "answer": ["assert f(1) == 2", "assert f(2) == 4"],
            "solution": "def f(x): return 2*x",
        }
    ]
    [example] = read_examples(write_jsonl(tmp_path / "a.jsonl", rows), "code", WORKED)
    assert example.answer == "assert f(1) == 2\nassert f(2) == 4"


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none.jsonl").code == "DATA_NOT_FOUND"
    (tmp_path / "folder.jsonl").mkdir()
    assert refusal(tmp_path / "folder.jsonl").code == "DATA_NOT_FOUND"


def test_an_unknown_format_is_refused(tmp_path: Path) -> None:
    error = refusal(tmp_path / "data.xlsx")
    assert error.code == "DATA_FORMAT" and ".parquet" in str(error.expected)


@pytest.mark.parametrize(
    ("name", "data"),
    [("a.jsonl", b""), ("b.csv", b""), ("c.csv", b"question,answer\n"), ("d.jsonl", b"\n\n"), ("e.json", b"[]")],
)
def test_an_empty_file_is_refused(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    assert refusal(tmp_path / name).code == "DATA_EMPTY"


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", f'{{"question": "{CANARY}", "answer": 1}}\n{{"question": "{CANARY}" "answer"\n'.encode()),
        ("b.jsonl", b"\xff\xfe\x00" + CANARY.encode()),
        ("c.csv", f"question,answer\n{CANARY},1\n{CANARY},1,2,3\n".encode()),
        ("d.csv", b"\xff\xfe\x00\x01" + CANARY.encode()),
        ("e.parquet", CANARY.encode() * 10),
    ],
)
def test_an_unreadable_file_is_refused_without_quoting_it(
    tmp_path: Path, name: str, data: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_bytes(data)
    assert refusal(tmp_path / name).code == "DATA_UNREADABLE"
    assert CANARY not in "".join(capfd.readouterr())


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"question": "q", "answer": 1}\n{"question"\n')
    assert refusal(tmp_path / "a.jsonl").got == "line 2 is not JSON"


def test_a_missing_column_lists_those_there_are(tmp_path: Path) -> None:
    error = refusal(write_jsonl(tmp_path / "a.jsonl", [{"prompt": CANARY, "label": "1"}]))
    assert error.code == "DATA_COLUMN"
    assert "'question'" in error.what and "'prompt'" in str(error.got) and "'label'" in str(error.got)


def test_answers_no_parser_accepts_are_counted_by_row_and_never_quoted(tmp_path: Path) -> None:
    rows = [{"question": f"q{n}", "answer": CANARY if n % 2 else n} for n in range(40)] + [
        {"question": "q", "answer": None}
    ]
    error = refusal(write_jsonl(tmp_path / "a.jsonl", rows))
    assert error.code == "DATA_ANSWERS" and "21 of 41 rows" in error.what
    assert str(error.got) == "rows 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, …"


@pytest.mark.parametrize("answer", ["C", "maybe", "three seven"])
def test_an_answer_outside_the_options_is_refused(tmp_path: Path, answer: str) -> None:
    row = {"question": "Which?", "choices": ["three", "seven"], "answer": answer}
    assert refusal(write_jsonl(tmp_path / "a.jsonl", [row]), "choice", CHOICES).code == "DATA_ANSWERS"


@pytest.mark.parametrize("row", [{"question": "  "}, {"question": None}, {"question": 5}])
def test_a_row_without_a_question_is_refused(tmp_path: Path, row: dict[str, Any]) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{**row, "answer": "1"}])
    error = refusal(path)
    assert error.code == "DATA_ROWS" and error.got == "rows 1"


def test_too_few_rows_say_how_many_are_needed() -> None:
    examples = [Example(f"q{n}", "1") for n in range(20)]
    with pytest.raises(ConfigError) as error:
        split(examples, 0, validation_count=10, test_count=10)
    assert error.value.code == "DATA_TOO_FEW" and "20 in 20 rows" in str(error.value.got)
    assert split(examples, 0, validation_count=5, test_count=7)


def test_splits_depend_on_the_questions_and_the_seed_alone() -> None:
    examples = [Example(f"q{n}", str(n)) for n in range(100)]
    shuffled = random.Random(1).sample(examples, len(examples))
    assert split(examples, 0, 20, 30) == split(shuffled, 0, 20, 30)
    assert split(examples, 0, 20, 30) != split(examples, 1, 20, 30)


@pytest.mark.parametrize("of_people", [False, True])
def test_one_unit_more_changes_the_training_rows_by_one_unit(of_people: bool) -> None:
    """What differential privacy calls neighbours; wherever the one more lands, and however many rows it has."""

    def trained(first: int) -> set[str]:
        rows = [Example(f"q{unit}" if not of_people else f"q{unit}.{row}", str(row))
                for unit in range(first, 60) for row in range(1 + unit % 3)]  # fmt: skip
        owners = {id(row): row.question.partition(".")[0] for row in rows} if of_people else None
        return {row.question.partition(".")[0] for row in split(rows, 0, 15, 20, owners).train}

    landed = set()
    for first in range(1, 12):
        fewer, more = trained(first), trained(first - 1)
        assert len(more) == len(fewer) + 1 and fewer < more
        landed.add(f"q{first - 1}" in more)
    assert landed == {True, False}, "some of those added are trained on, and some push another one out of the tests"


def test_no_question_stands_in_two_splits() -> None:
    rows = [
        Example(f"{spaces}What  IS {n}?" if n % 2 else f"what is {n}?", str(n))
        for n in range(60)
        for spaces in ("", " ")
    ]
    splits: Splits = split(rows, 3, 10, 20)
    sides = [
        {" ".join(e.question.lower().split()) for e in side} for side in (splits.train, splits.validation, splits.test)
    ]
    assert [len(side) for side in sides] == [30, 10, 20]
    assert sum(len(side) for side in sides) == len(set.union(*sides))
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (60, 10, 20)


def test_reading_needs_no_network_and_leaves_nothing_behind(tmp_path: Path) -> None:
    home, scratch = tmp_path / "home", tmp_path / "scratch"
    home.mkdir()
    scratch.mkdir()
    path = write_jsonl(tmp_path / "a.jsonl", sums(10))
    script = (
        "import socket, sys; from pathlib import Path\n"
        "def refuse(*a, **k): raise SystemExit('network')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "from fedcompose_client.data import read_examples\n"
        "assert len(read_examples(Path(sys.argv[1]), 'numeric', {'question': 'question', 'answer': 'answer'})) == 10\n"
    )
    environment = {**os.environ, "HOME": str(home), "TMPDIR": str(scratch)}
    subprocess.run([sys.executable, "-c", script, str(path)], env=environment, check=True)
    assert [p for p in home.rglob("*") if p.is_file()] == []
    assert list(scratch.iterdir()) == []
