from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest

from fedcompose.errors import ConfigError
from fedcompose.tasks import Example, Task, get_task, render_choices, task_names

NUMERIC, CHOICE, YES_NO, EXACT = (get_task(name) for name in ("numeric", "choice", "yes_no", "exact"))


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("8+8=16, 16-1=15. Answer: 15", "15"),
        ("Answer: 3 no wait. Answer: 15.", "15"),
        ("**Answer:** 15", "15"),
        ("answer:\n15", "15"),
        ("Answer: 8+8-1=15", "15"),
        ("Answer: 15 apples", "15"),
        ("8 + 8 is 16, so 15", "15"),
        ("The total is $1,234.50.", "1234.5"),
        ("Answer: \\boxed{7}", "7"),
        ("Answer: \\frac{6}{8}", "3/4"),
        ("Answer: 007", "7"),
        ("Answer: -0", "0"),
        ("Answer: −5", "-5"),
        ("10-3=7", "7"),
        ("Answer: 50%", "50%"),
        ("no number here", None),
        ("", None),
        ("Answer:", None),
    ],
)
def test_numeric_reads_the_last_answer_and_falls_back_to_the_last_number(completion: str, answer: str | None) -> None:
    assert NUMERIC.parse(completion) == answer


def test_a_division_by_zero_is_no_number() -> None:
    assert NUMERIC.canonical("1/0") is None


@pytest.mark.parametrize(
    ("given", "gold"),
    [
        ("1,000", "1000"), ("1000.0", "1000"), ("$1000", "1000"), ("6/8", "0.75"), ("0.750", "3/4"),
        ("50%", "50"), ("50%", "0.5"),
        ("\\frac{3}{4}", "0.75"), ("2\\sqrt{2}", "\\sqrt{8}"), ("10^{3}", "1000"),
        ("\\frac{3\\pi}{4}", "0.75\\pi"), ("1 + \\sqrt{2}", "\\sqrt{2} + 1"), 
        ("5\\pi/2", "\\frac{5\\pi}{2}"),
        ("\\frac{1}{\\sqrt{2}}", "\\frac{\\sqrt2}{2}"), ("-\\frac12", "-0.5"), ("2 \\times 10^{3}", "2000"),
    ],
)  # fmt: skip
def test_equal_numbers_are_correct_however_they_are_written(given: str, gold: str) -> None:
    canonical = NUMERIC.canonical(gold)
    assert canonical is not None
    assert NUMERIC.is_correct(f"Answer: {given}", canonical)


@pytest.mark.parametrize(
    ("given", "gold"),
    [("15", "16"), ("-15", "15"), ("50", "0.5"), ("0.333", "1/3"), ("\\sqrt{2}", "1.41"), ("8+8-1", "15")],
)
def test_different_numbers_and_unevaluated_sums_are_wrong(given: str, gold: str) -> None:
    assert not NUMERIC.is_correct(f"Answer: {given}", gold)


def test_an_unevaluated_sum_is_not_even_well_formed() -> None:
    assert NUMERIC.reward("Answer: 8*2-1", "15") == 0.0


@pytest.mark.parametrize(
    "text",
    [
        "9^{9^{9^9}}", "(" * 25 + "\\pi" + ")" * 25, "(" * 6 + "\\pi" + ")" * 6,
        "\\sqrt{" * 6 + "2" + "}" * 6,
        "9" * 5000, "99999999999^{99}", "10**10**10",
        "1" * 58 + "x", "^1}" * 19 + "x",
        "\\sqrt23\\!\\sqrt{3}23 2323//\\sqrtsqrt^99",
        "()\\sqrt^{-9}", "\\frac{1}{\\frac{1}{\\frac{1}{\\sqrt{99^{99}}}}}",
    ],
)  # fmt: skip
def test_no_answer_keeps_the_scorer_busy(text: str) -> None:
    NUMERIC.is_correct("Answer: \\sqrt{3}", "\\sqrt{2}")  # the import is not what is measured
    started = time.monotonic()
    NUMERIC.is_correct(f"Answer: {text}", "\\sqrt{2}")
    assert time.monotonic() - started < 30  # unbounded ones take minutes


def test_numbers_are_compared_in_any_thread() -> None:
    results: list[bool] = []
    thread = threading.Thread(target=lambda: results.append(NUMERIC.is_correct("Answer: \\sqrt{12}", "2\\sqrt{3}")))
    thread.start()
    thread.join()
    assert results == [True]


def test_a_reward_for_a_plain_number_never_touches_sympy() -> None:
    script = (
        "import sys; from fedcompose.tasks import get_task; t = get_task('numeric')\n"
        "assert t.reward('1+1=2. Answer: 2', '2') == 1.0 and t.reward('Answer: 3/4', '0.5') == 0.1\n"
        "assert 'sympy' not in sys.modules and 'torch' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("Answer: B", "B"), ("answer: b) 71", "B"), ("Answer: (D)", "D"), ("The answer is (C).", "C"),
        ("B", "B"), ("I think it is A) 34", "A"), ("A dog is option B", "B"), ("Answer: Because", None),
        ("I am a model", None),
        ("A34 B71 B71. Answer: B", "B"),
    ],
)  # fmt: skip
def test_choice_reads_a_letter(completion: str, answer: str | None) -> None:
    assert CHOICE.parse(completion) == answer


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("Answer: yes", "yes"), ("Answer: No.", "no"), ("Answer: True", "yes"),
        ("not True=False. Answer: no", "no"),
        ("Yes, it is. No", "no"), ("It is false", "no"), ("I know nothing", None), ("Answer: maybe", None),
    ],
)  # fmt: skip
def test_yes_no_reads_words_of_truth(completion: str, answer: str | None) -> None:
    assert YES_NO.parse(completion) == answer


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("Answer: 10:35", "10:35"),
        ("The time is 10:35.", "10:35"),
        ("steps\nResult: Paris\n", "Paris"),
        ("", None),
    ],
)
def test_exact_reads_the_answer_line_or_the_last_line(completion: str, answer: str | None) -> None:
    assert EXACT.parse(completion) == answer


def test_exact_ignores_case_and_composition_only() -> None:
    assert EXACT.is_correct("Answer: caf\u0065\u0301", "Caf\u00e9")
    assert not EXACT.is_correct("Answer: cafe", "Caf\u00e9")


@pytest.mark.parametrize(
    ("task", "right", "wrong"),
    [(NUMERIC, "3", "4"), (CHOICE, "A", "B"), (YES_NO, "yes", "no"), (EXACT, "x", "y")],
)
def test_a_reward_is_one_only_when_correct_and_small_for_form_alone(task: Task, right: str, wrong: str) -> None:
    assert task.reward(f"Answer: {right}", right) == 1.0
    assert 0.0 < task.reward(f"Answer: {wrong}", right) <= 0.1
    assert task.reward("", right) == 0.0


def test_a_target_is_one_line_that_the_parser_reads_back() -> None:
    example = Example("What is 1 + 1?", "2", solution="First one.\nThen 1+1=2.")
    assert NUMERIC.target(example) == "First one. Then 1+1=2. Answer: 2"
    assert NUMERIC.target(Example("What is 1 + 1?", "2")) == "Answer: 2"
    assert NUMERIC.parse(NUMERIC.target(example)) == "2"


def test_prompts_end_with_one_short_instruction() -> None:
    assert NUMERIC.prompt("What is 1 + 1?") == "What is 1 + 1?\nEnd with 'Answer: X'."


def test_options_stand_behind_the_question_with_letters() -> None:
    assert render_choices("Which?", ["three", "four"]) == "Which? A) three B) four"


def test_an_unknown_task_names_the_known_ones() -> None:
    with pytest.raises(ConfigError) as error:
        get_task("essay")
    assert error.value.code == "TASK_UNKNOWN"
    assert all(name in str(error.value.expected) for name in ("numeric", "choice", "yes_no", "exact", "code"))
    assert {"numeric", "choice", "yes_no", "exact", "code"} <= set(task_names())
