"""Two questions of different domains in one prompt: who is asked what, and how two answers are read."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations

import pytest

from fedcompose.tasks import get_task
from fedcompose_coordinator.lessons import Lesson
from fedcompose_coordinator.mixed import MixedQuestions, mixed_lessons, mixed_prompt, split_answers
from fedcompose_coordinator.questions import MIXED, Domain

DOMAINS = (
    Domain("sums", "bank", "chain_sum", {}, 20),
    Domain("truth", "archive", "logic", {}, 20),
    Domain("letters", "clinic", "largest_choice", {}, 20),
)
ASKED = MixedQuestions(DOMAINS, 24)


def answered(*, first: bool, second: bool) -> list[str]:
    """A completion for every prompt in which the given questions are answered rightly."""
    found = []
    for one_domain, one, other_domain, other in ASKED.pairs:
        right = [one_domain.task.target(one), other_domain.task.target(other)]
        found.append(
            "\n".join(text if good else "Answer: 987654" for text, good in zip(right, (first, second), strict=True))
        )
    return found


def test_every_ordered_pair_of_domains_is_asked_equally_often() -> None:
    pairs = [(one.name, other.name) for one, _, other, _ in ASKED.pairs]
    assert {pair: pairs.count(pair) for pair in pairs} == dict.fromkeys(permutations([d.name for d in DOMAINS], 2), 4)
    questions = [(one.question, other.question) for _, one, _, other in ASKED.pairs]
    assert len(set(questions)) == 24


def test_the_oracle_is_told_the_domain_of_the_first_question() -> None:
    for prompt, (first, one, _, other) in zip(ASKED.prompts(), ASKED.pairs, strict=True):
        assert prompt.site == first.site
        assert prompt.text.index(one.question) < prompt.text.index(other.question)


@pytest.mark.parametrize(("first", "second"), [(True, True), (True, False), (False, True), (False, False)])
def test_both_must_be_right_and_each_is_marked(first: bool, second: bool) -> None:
    marks = ASKED.mark(answered(first=first, second=second))
    assert marks["first"] == [int(first)] * 24 and marks["second"] == [int(second)] * 24
    assert marks["correct"] == [int(first and second)] * 24 and marks["answered"] == [1] * 24


def test_answers_in_the_wrong_order_are_wrong() -> None:
    swapped = ["\n".join(reversed(text.splitlines())) for text in answered(first=True, second=True)]
    assert not any(ASKED.mark(swapped)["correct"])


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("3+4=7. Answer: 7\nyes, since. Answer: yes", ("Answer: 7", "Answer: yes")),
        ("1. Answer: 7 2. Answer: yes", ("Answer: 7 2.", "Answer: yes")),
        ("**Answer 2:** yes\n**Answer 1:** 7", ("Answer: ** 7", "Answer: ** yes")),
        ("Answer: 7\nwait.\nAnswer: 8\nAnswer: yes", ("Answer: 7", "Answer: yes")),
        ("Answer 2: yes", (None, "Answer: yes")),
        ("Answer: 7", ("Answer: 7", None)),
        ("7 and yes", (None, None)),
        ("", (None, None)),
    ],
)
def test_two_answers_are_read_in_order_or_by_number(completion: str, expected: tuple[str | None, str | None]) -> None:
    assert split_answers(completion) == expected


def test_what_was_split_is_what_a_task_can_read() -> None:
    one, two = split_answers("**Answer 1:** 7\n**Answer 2:** yes")
    assert one and two
    assert get_task("numeric").is_correct(one, "7") and get_task("yes_no").is_correct(two, "yes")


def test_one_answer_for_two_questions_is_no_answer() -> None:
    only = [text.splitlines()[0] for text in answered(first=True, second=True)]
    marks = ASKED.mark(only)
    assert marks["first"] == [1] * 24 and not any(marks["second"]) and not any(marks["answered"])


def test_a_single_domain_and_tasks_without_answer_lines_cannot_be_mixed() -> None:
    assert MixedQuestions(DOMAINS[:1], 24).prompts() == []


def test_lessons_of_two_domains_teach_what_mixed_prompts_ask() -> None:
    lessons = [
        Lesson(domain.name, domain.task.prompt(example.question), domain.task.target(example))
        for domain in DOMAINS for example in domain.examples[:5]
    ]  # fmt: skip
    found = mixed_lessons(lessons, 24, seed=0)
    assert found == mixed_lessons(lessons, 24, seed=0) != mixed_lessons(lessons, 24, seed=1)
    assert {lesson.domain for lesson in found} == {MIXED}
    made = {mixed_prompt(a.question, b.question): [one.task.target(a), two.task.target(b)] for one, two in
            permutations(DOMAINS, 2) for a in one.examples[:5] for b in two.examples[:5]}  # fmt: skip
    assert all(lesson.completion.splitlines() == made[lesson.prompt] for lesson in found)
    assert all(None not in split_answers(lesson.completion) for lesson in found)


def test_lessons_without_an_answer_line_or_of_one_domain_are_not_joined() -> None:
    silent = [Lesson(name, "What?\nEnd with 'Answer: X'.", "I do not know.") for name in ("a", "b")]
    assert mixed_lessons(silent, 5, 0) == []
    spoken = [Lesson("a", "What?\nEnd with 'Answer: X'.", "Answer: 1") for _ in range(3)]
    assert mixed_lessons(spoken, 5, 0) == []


def test_other_questions_are_another_set() -> None:
    other = replace(ASKED, domains=(replace(DOMAINS[0], count=21), *DOMAINS[1:]))
    assert other.identity() != ASKED.identity() == MixedQuestions(DOMAINS, 24).identity()
