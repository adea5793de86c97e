from __future__ import annotations

import random

import numpy as np
import pytest

from fedcompose_client.overlap import all_runs, excess_p, repeated_rows, runs, shares_a_run, words


def test_case_accents_and_punctuation_make_no_difference() -> None:
    assert words("Café — NAÏVE, (x²)!") == words("cafe naive x2") == ["cafe", "naive", "x2"]
    assert words("Sørensen Łukasz Đorđe Ærø Weiß") == words("Sorensen Lukasz Dorde Aero Weiss")
    assert words("病人姓名") == ["病", "人", "姓", "名"] and words("김철수는") == ["김", "철", "수", "는"]


def test_marks_that_are_not_seen_do_not_split_words() -> None:
    row = "the patient was admitted at night after falling from a ladder"
    typeset = "the pa\u00adtient was ad\u200bmit\u200cted at ni\u200dght af\u2060ter fall\u00ading from a lad\u00adder"
    assert words(typeset) == words(row) and shares_a_run(runs(typeset, 8), all_runs([row], 8))
    assert words("the pa tient") != words("the patient")


def test_a_run_is_the_same_wherever_it_stands_and_another_order_is_another_run() -> None:
    text = "the quick brown fox jumps over the lazy dog"
    assert np.isin(runs("quick brown fox", 3), runs(text, 3)).all()
    assert not shares_a_run(runs("fox brown quick", 3), np.sort(runs(text, 3)))
    assert len(runs("two words", 3)) == 0 and not shares_a_run(runs("two words", 3), all_runs([text], 3))


def test_a_copied_passage_is_found_and_other_text_of_the_same_words_is_not() -> None:
    rng = random.Random(0)
    vocabulary = [f"w{n}" for n in range(500)]
    documents = [" ".join(rng.choices(vocabulary, k=200)) for _ in range(200)]
    index = all_runs(documents, 8)
    copies = [" ".join(document.split()[50:75]) for document in documents]
    others = [" ".join(rng.choices(vocabulary, k=200)) for _ in range(200)]
    assert all(shares_a_run(runs(copy, 8), index) for copy in copies)
    assert not any(shares_a_run(runs(other, 8), index) for other in others)


def test_public_runs_are_not_counted_as_repeated() -> None:
    rows = [["please answer the question in one word only"], ["my aunt keeps seven grey geese behind her house"]]
    shown = all_runs([text for row in rows for text in row], 8)
    public = all_runs(["Please answer the question in one word only"], 8)
    assert repeated_rows(rows, shown, public, 8) == 1
    assert repeated_rows(rows, shown, np.empty(0, np.uint64), 8) == 2


@pytest.mark.parametrize(
    ("table", "p"),
    [((8, 10, 1, 10), 0.0027), ((0, 10, 0, 10), 1.0), ((5, 5, 0, 5), 1 / 252), ((2, 10, 2, 10), 0.709)],
)
def test_the_exact_test_gives_fishers_numbers(table: tuple[int, int, int, int], p: float) -> None:
    assert excess_p(*table) == pytest.approx(p, abs=5e-4)
