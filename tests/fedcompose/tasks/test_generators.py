from __future__ import annotations

import hashlib
from collections import Counter

import pytest

from fedcompose.errors import ConfigError
from fedcompose.tasks import (
    GENERATORS,
    Origin,
    generate,
    generator_names,
    generator_task,
    get_task,
    held_out,
    split_of,
    training,
)

NAMES = sorted(GENERATORS)
# The digest of question, answer and solution for seeds 0, 1 and 2. Once released, a change here would change
# every prompt that a trace names by its origin: give the generator a new name instead.
GOLDEN = {
    "base_convert": "4688233e26a9f130",
    "chain_sum": "09da0173c6f1e4ed",
    "clock": "223ed3cd193dc9ef",
    "closest_choice": "9b4f4f008e271521",
    "compare_fractions": "03a8509a86a7e71b",
    "count_items": "dba2eb292e987f82",
    "duration": "7e140da3793cf9f0",
    "extreme": "4311ae1baef0d137",
    "gcd": "7bfe5066271c0b82",
    "largest_choice": "af9a99955e0899a8",
    "logic": "2a67f653449344ff",
    "modular": "9e607bc31ba8dc74",
    "multiply": "14d400bc96dfe630",
    "order_statistic": "2d9725552da4291a",
    "remainder": "39930c06055328d1",
}


@pytest.mark.parametrize("name", NAMES)
def test_the_same_origin_is_the_same_problem_everywhere(name: str) -> None:
    problems = [generate(Origin(name, {}, seed)) for seed in range(3)]
    text = "\n".join(f"{p.question}|{p.answer}|{p.solution}" for p in problems)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == GOLDEN[name], text


@pytest.mark.parametrize("name", NAMES)
def test_targets_parse_to_answers_and_no_answer_can_be_guessed(name: str) -> None:
    task = get_task(generator_task(name))
    train, test = training(name, {}, 2000), held_out(name, {}, 400)
    for example in train + test:
        assert task.parse(task.target(example)) == example.answer == task.canonical(example.answer)
        assert "\n" not in task.target(example)
    assert len({e.question for e in train}) == 2000 and len({e.question for e in test}) == 400
    assert not {e.question for e in train} & {e.question for e in test}
    share = Counter(e.answer for e in train).most_common(1)[0][1] / len(train)
    assert share < (0.55 if name == "logic" else 0.35)


@pytest.mark.parametrize("name", NAMES)
def test_worked_solutions_hold_no_false_equation(name: str) -> None:
    words = {"True": True, "False": False}
    for example in training(name, {}, 200):
        assert example.solution
        for step in example.solution.rstrip(".").split(", "):
            left, equals, right = step.partition("=")
            if equals and "h" not in right and "." not in step:
                value = eval(left, {"__builtins__": {}}, words)  # noqa: S307
                assert str(value) == right, (example.question, step)


def test_origins_carry_what_makes_the_problem_again() -> None:
    example = held_out("chain_sum", {"terms": 3}, 5)[4]
    assert example.origin is not None
    assert generate(example.origin) == example
    assert example.question.count("+") + example.question.count("-") == 2


def test_a_first_seed_moves_the_window_and_keeps_the_split() -> None:
    early, late = training("gcd", {}, 20), training("gcd", {}, 20, first_seed=1_000)
    assert early != late
    assert all(split_of(example.question) == "train" for example in early + late)


def test_about_a_fifth_of_all_questions_is_held_out() -> None:
    sides = Counter(split_of(f"question {number}") for number in range(5000))
    assert 0.17 < sides["test"] / 5000 < 0.23


def test_writing_a_default_out_changes_nothing() -> None:
    implicit, explicit = generate(Origin("gcd", {}, 7)), generate(Origin("gcd", {"max_gcd": 12}, 7))
    assert implicit.question == explicit.question


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"terms": 1}, "terms"),
        ({"terms": "4"}, "terms"),
        ({"terms": 10**9}, "terms"),
        ({"colour": 1}, "colour"),
    ],
)
def test_a_bad_config_is_refused_by_field(config: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        generate(Origin("chain_sum", config, 0))  # type: ignore[arg-type]
    assert error.value.code == "TASK_CONFIG" and said in str(error.value.got)


def test_every_allowed_bound_still_makes_problems() -> None:
    for name, config in {
        "chain_sum": {"terms": 2, "max_term": 5},
        "gcd": {"max_number": 24, "max_gcd": 2},
        "modular": {"max_factor": 4, "max_modulus": 5},
        "remainder": {"digits": 8, "max_divisor": 99},
        "multiply": {"digits": 6},
        "base_convert": {"min_bits": 20, "max_bits": 4},
        "order_statistic": {"rank": 5, "max_number": 20, "count": 10},
        "closest_choice": {"count": 10, "max_number": 20},
        "compare_fractions": {"count": 5, "max_denominator": 6},
        "count_items": {"property": "even", "count": 20, "max_number": 50},
        "logic": {"literals": 8},
        "clock": {"max_minutes": 720},
    }.items():
        for seed in range(50):
            assert generate(Origin(name, config, seed)).answer  # type: ignore[arg-type]


def test_an_exhausted_generator_says_so() -> None:
    with pytest.raises(ConfigError) as error:
        held_out("base_convert", {"min_bits": 2, "max_bits": 4}, 50)
    assert error.value.code == "TASK_EXHAUSTED"


def test_an_unknown_generator_names_the_known_ones() -> None:
    with pytest.raises(ConfigError) as error:
        generate(Origin("sudoku", {}, 0))
    assert error.value.code == "GENERATOR_UNKNOWN" and "chain_sum" in str(error.value.expected)
    assert set(NAMES) <= set(generator_names())
