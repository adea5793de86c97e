from __future__ import annotations

from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import pytest

from fedcompose import traces
from fedcompose.contribution import VerifiedContribution
from fedcompose.errors import ConfigError
from fedcompose.files import folder_digests
from fedcompose.model.lm import load_base
from fedcompose.tasks import Origin, generate, generator_task, get_task, held_out, training
from fedcompose.traces import Trace
from fedcompose_coordinator import lessons as step
from fedcompose_coordinator.lessons import Lesson, Row, encode, lesson_of, lessons_of, micro_batches, plan_batches

GENERATOR = "gcd"


def _trace(origin: Origin, completion: str) -> Trace:
    return Trace(
        provenance_class="B", task=generator_task(origin.name), completion=completion, generator=origin.name,
        config=dict(origin.config), seed=origin.seed,
    )  # fmt: skip


def _origin(split: str) -> Origin:
    example = (training if split == "train" else held_out)(GENERATOR, {}, 1)[0]
    assert example.origin is not None
    return example.origin


def test_a_trace_becomes_the_prompt_its_generator_makes_and_its_completion() -> None:
    origin = _origin("train")
    example, task = generate(origin), get_task(generator_task(GENERATOR))

    lesson = lesson_of(_trace(origin, f"Answer: {example.answer}"), "numbers")

    assert lesson == Lesson("numbers", task.prompt(example.question), f"Answer: {example.answer}")


def test_a_wrong_answer_teaches_nothing() -> None:
    origin = _origin("train")

    assert lesson_of(_trace(origin, f"Answer: {int(generate(origin).answer) + 1}"), "numbers") is None


def test_a_prompt_of_the_test_split_teaches_nothing() -> None:
    origin = _origin("test")

    assert lesson_of(_trace(origin, f"Answer: {generate(origin).answer}"), "numbers") is None


def test_a_stated_question_is_checked_against_its_stated_answer() -> None:
    def trace(completion: str) -> Trace:
        return Trace(
            provenance_class="C", task="numeric", completion=completion, question="How many legs has a horse?",
            answer="4",
        )  # fmt: skip

    lesson = lesson_of(trace("Answer: 4"), "animals")

    assert lesson is not None and "horse" in lesson.prompt
    assert lesson_of(trace("Answer: 5"), "animals") is None


def test_a_trace_of_settings_that_do_not_exist_teaches_nothing_and_stops_nothing() -> None:
    for origin in (Origin(GENERATOR, {"no_such_setting": 1}, 0), Origin("no-such-generator", {}, 0)):
        trace = _trace(_origin("train"), "Answer: 1")
        strange = trace.model_copy(update={"generator": origin.name, "config": dict(origin.config)})

        assert lesson_of(strange, "numbers") is None


def test_lessons_come_from_the_trace_sets_among_what_was_admitted(tmp_path: Path) -> None:
    origin = _origin("train")
    trace = _trace(origin, f"Answer: {generate(origin).answer}")
    (tmp_path / traces.TRACES_FILE).write_bytes(traces.encode([trace]))
    digests = folder_digests(tmp_path)
    admitted = VerifiedContribution(
        path=tmp_path, kind="traces", site="site-a", domain="numbers", dir_hash="", keyid="", payload_sha256="",
        provenance=cast("Any", None), digests=digests, received_on=datetime.now(UTC),
    )  # fmt: skip

    assert lessons_of([admitted]) == [lesson_of(trace, "numbers")]
    assert lessons_of([replace(admitted, kind="adapter")]) == []


@pytest.fixture(scope="module")
def tokenizer(tiny_base: Path) -> Any:
    return load_base(tiny_base)[1]


def test_a_lesson_is_the_chat_prompt_then_the_completion_then_the_end_of_turn(tokenizer: Any) -> None:
    row = encode(tokenizer, [Lesson("b", "hi", "ho")], ["a", "b"][1:])[0]

    assert tokenizer.decode(row.ids[: row.prompt]).endswith("<|im_start|>assistant\n")
    assert tokenizer.decode(row.ids[row.prompt :]) == "ho<|im_end|>"


def test_a_lesson_that_is_too_long_is_left_out_and_a_domain_without_any_is_an_error(tokenizer: Any) -> None:
    short, long = Lesson("a", "hi", "ho"), Lesson("a", "hi", "ho" * step.MAX_LESSON_TOKENS)

    assert len(encode(tokenizer, [short, long], ["a"])) == 1
    with pytest.raises(ConfigError) as error:
        encode(tokenizer, [short, Lesson("b", "hi", long.completion)], ["a", "b"])
    assert error.value.code == "COMPOSE_NO_LESSONS" and "b" in str(error.value.got)


def _rows(*counts: int) -> list[Row]:
    return [Row(domain, tuple(range(4 + n)), 2) for domain, count in enumerate(counts) for n in range(count)]


def test_every_step_holds_equally_many_of_each_domain() -> None:
    for batch in plan_batches(_rows(3, 40, 7), batch=10, steps=9, seed=0):
        assert Counter(row.domain for row in batch) == {0: 3, 1: 3, 2: 3}


def test_all_of_a_domain_comes_before_any_of_it_comes_again() -> None:
    plan = plan_batches(_rows(8), batch=4, steps=6, seed=0)

    seen = [row for batch in plan for row in batch]
    assert all(len(set(seen[start : start + 8])) == 8 for start in (0, 8, 16))
    assert seen[:8] != seen[8:16]


def test_a_plan_repeats_with_its_seed_and_only_with_it() -> None:
    plans = [plan_batches(_rows(9, 9), batch=4, steps=5, seed=seed) for seed in (0, 0, 1)]

    assert plans[0] == plans[1] != plans[2]


def test_micro_batches_keep_every_row_and_both_limits() -> None:
    rows = _rows(60)
    parts = micro_batches(rows, max_tokens=200)

    assert sorted(len(row.ids) for part in parts for row in part) == sorted(len(row.ids) for row in rows)
    for part in parts:
        lengths = [len(row.ids) for row in part]
        assert max(lengths) * len(lengths) <= 200 and max(lengths) <= step.MAX_SPREAD * min(lengths)
    assert len(micro_batches([Row(0, (1,) * 500, 1)], max_tokens=200)) == 1
