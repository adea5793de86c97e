from __future__ import annotations

import sys

import pytest

from fedcompose.errors import ConfigError, MissingError
from fedcompose.tasks import JSON, Origin, generate, generator_task, get_task, held_out


@pytest.fixture
def gym() -> None:
    pytest.importorskip("reasoning_gym")


@pytest.mark.usefixtures("gym")
def test_a_seed_addresses_one_problem_that_its_task_can_check() -> None:
    first, again, other = (generate(Origin("reasoning_gym:gcd", {}, seed)) for seed in (3, 3, 4))
    assert first == again and first.question != other.question
    task = get_task(generator_task("reasoning_gym:gcd"))
    assert task.name == "numeric"
    assert task.parse(task.target(first)) == first.answer


@pytest.mark.usefixtures("gym")
def test_text_answers_are_scored_as_exact_text() -> None:
    assert generator_task("reasoning_gym:caesar_cipher") == "exact"
    assert len(held_out("reasoning_gym:caesar_cipher", {}, 5)) == 5


@pytest.mark.usefixtures("gym")
def test_numbers_in_a_config_change_the_problem() -> None:
    large = generate(Origin("reasoning_gym:chain_sum", {"min_terms": 6, "max_terms": 6}, 0))
    assert large.question.count("+") + large.question.count("-") >= 5


@pytest.mark.usefixtures("gym")
@pytest.mark.parametrize(
    ("dataset", "config"),
    [
        # basic_arithmetic passes its operators to eval, spell_backward opens its data_file
        ("basic_arithmetic", {"operators": ["+", "__import__('os').abort()"]}),
        ("spell_backward", {"data_file": "/etc/passwd"}),
        ("chain_sum", {"max_terms": 10**9}),
        ("chain_sum", {"seed": 3}),
        ("chain_sum", {"size": 3}),
        ("chain_sum", {"min_terms": -1}),
        ("chain_sum", {"colour": 1}),
    ],
)
def test_a_config_from_elsewhere_can_neither_name_files_nor_code(dataset: str, config: dict[str, JSON]) -> None:
    with pytest.raises(ConfigError) as error:
        generate(Origin(f"reasoning_gym:{dataset}", config, 0))
    assert error.value.code == "TASK_CONFIG"


@pytest.mark.usefixtures("gym")
def test_a_completion_is_never_evaluated() -> None:
    example = generate(Origin("reasoning_gym:string_insertion", {}, 0))
    task = get_task(generator_task("reasoning_gym:string_insertion"))
    attack = "Answer: [__import__('sys').modules.setdefault('fedcompose_was_evaluated', 1)]"
    assert not task.is_correct(attack, example.answer)
    assert "fedcompose_was_evaluated" not in sys.modules


@pytest.mark.usefixtures("gym")
def test_a_dataset_without_reference_answers_is_refused() -> None:
    with pytest.raises(ConfigError) as error:
        generate(Origin("reasoning_gym:graph_color", {}, 0))
    assert error.value.code == "TASK_NO_ANSWER"


@pytest.mark.usefixtures("gym")
def test_an_unknown_dataset_is_refused() -> None:
    with pytest.raises(ConfigError) as error:
        generate(Origin("reasoning_gym:no_such", {}, 0))
    assert error.value.code == "GENERATOR_UNKNOWN"


def test_without_the_extra_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", None)
    with pytest.raises(MissingError) as error:
        generate(Origin("reasoning_gym:gcd", {}, 0))
    assert error.value.code == "PACKAGE_MISSING"
    assert "pip install 'fedcompose[reasoning-gym]'" in error.value.diagnostics()
