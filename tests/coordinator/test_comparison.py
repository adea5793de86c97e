"""What is composed and asked for a comparison, and what its rows say."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from fedcompose.errors import ConfigError
from fedcompose.files import write_json
from fedcompose_coordinator.comparison import Wanted, candidates, make_run, parameters, summarise
from fedcompose_coordinator.evaluation import Parts
from fedcompose_coordinator.grid import Method
from fedcompose_coordinator.methods import DEFAULT_METHOD
from fedcompose_coordinator.names import compared, title
from fedcompose_coordinator.questions import MIXED
from fedcompose_coordinator.results import BEGIN, END, markdown, replace_tables
from tests.coordinator.sample_report import SEEDS, sample_asked, sample_comparison, sample_runs

DOMAINS = ("clock", "chain_sum", "logic")


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return sample_comparison(tmp_path_factory.mktemp("cells"), 120)


def make_candidates(home: Path, names: list[str], seed: int = 0) -> Parts:
    """Folders as `compose` leaves them; `ties` has no router, only `hard` and the control have an attention LoRA."""
    for wanted in candidates(names, [seed]):
        folder = home / wanted.folder
        (folder / "attention").mkdir(parents=True)
        if wanted.method in ("hard", "attention_only"):
            save_file({"a": np.zeros((4, 8), np.float32)}, folder / "attention" / "adapter_model.safetensors")
        else:
            (folder / "attention").rmdir()
        save_file({"weight": np.zeros((2, 8), np.float32)}, folder / "router.safetensors")
        router = None if wanted.method == "ties" else {"decides": "block"}
        write_json(folder / "composition.json", {"method": wanted.method, "router": router, "experts": []})
        write_json(
            home / wanted.usage_file, {"inputs": "", "usage": {"seconds": 2.0, "cpu_seconds": 1.0, "peak_bytes": 5}}
        )
    return Parts("base", {"bank": "1", "lab": "2"}, home / Wanted(names[0], seed).folder)


def test_controls_are_always_composed_and_nothing_twice() -> None:
    found = candidates(["hard", "uniform", "prompt", "hard"], [4, 5])
    assert [(each.method, each.seed) for each in found] == [
        (name, seed) for seed in (4, 5) for name in ("hard", "prompt", "attention_only")
    ]
    assert found[0].arguments == ["--method", "hard", "--seed", "4"]
    assert found[2].arguments == ["--attention-only", "--method", DEFAULT_METHOD, "--seed", "4"]


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        candidates(["hard", "magic"], [0])
    assert caught.value.code == "METHOD_UNKNOWN"


def test_every_router_is_measured_with_and_without_an_attention_lora(tmp_path: Path) -> None:
    parts = make_candidates(tmp_path, ["hard", "arrow", "ties"])
    run = make_run(tmp_path, parts, ["hard", "arrow", "ties"], 0)
    assert set(run.methods) == {
        "hard", "hard-off", "arrow", "arrow-on", "ties", "prompt", "prompt-on", "attention_only", "base",
        *(name + ending for name in ("random_router", "uniform", "oracle") for ending in ("", "-on")),
        "expert:bank", "expert:lab",
    }  # fmt: skip
    attention = tmp_path / Wanted("hard", 0).folder
    assert {name for name, each in run.methods.items() if each.attention == attention} == {
        "hard", "arrow-on", "prompt-on", "random_router-on", "uniform-on", "oracle-on"
    }  # fmt: skip
    assert run.methods["arrow"].digest != run.methods["arrow-on"].digest
    assert len({each.digest for name, each in run.methods.items() if not name.startswith("uniform")}) > 10
    assert run.sites == ["bank", "lab"] and run.usage["hard"]["peak_bytes"] == 5


def test_what_runs_share_is_measured_once(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, make_candidates(tmp_path, ["hard"], seed), ["hard"], seed) for seed in (0, 1)]
    asked = sample_asked(20)
    cells = asked.cells(runs)
    assert len({cell.fingerprint for cell in cells}) == len(cells)
    single = {cell.method.digest for cell in cells if cell.method.router.startswith("expert:")}
    assert len([cell for cell in cells if cell.method.digest in single]) == len(single) * len(asked.sets)
    assert {cell.method.seed for cell in cells if cell.method.router == "random"} == {0, 1}


def test_mixed_prompts_have_room_for_two_answers() -> None:
    asked = sample_asked(20)
    method = Method("none", "digest")
    assert asked.cell(method, asked.mixed).max_new_tokens == 2 * asked.cell(method, asked.domains[0]).max_new_tokens


def test_accuracy_is_the_mean_over_seeds_and_domains(comparison: dict[str, Any]) -> None:
    row = comparison["methods"]["hard"]
    assert comparison["seeds"] == list(SEEDS)
    for domain in DOMAINS:
        cell = row["accuracy"][domain]
        assert cell["value"] == pytest.approx(np.mean(cell["seeds"])) and cell["low"] < cell["value"] < cell["high"]
    assert row["accuracy_mean"]["value"] == pytest.approx(np.mean([row["accuracy"][d]["value"] for d in DOMAINS]))
    assert row["accuracy_mean"]["n"] == 360


def test_differences_are_between_the_same_things(comparison: dict[str, Any]) -> None:
    methods = comparison["methods"]
    gap = methods["soft"]["first_minus"]["mean"]["value"]
    assert gap == pytest.approx(methods["hard"]["accuracy_mean"]["value"] - methods["soft"]["accuracy_mean"]["value"])
    gap = methods["prompt"]["minus"]["oracle"]["sets"][MIXED]["value"]
    wanted = methods["prompt"]["mixed"]["correct"]["value"] - methods["oracle"]["mixed"]["correct"]["value"]
    assert gap == pytest.approx(wanted)
    assert methods["hard"]["first_minus"] is None and "base" not in methods["base"]["minus"]


def test_own_experts_keep_everything_and_the_base_nothing(comparison: dict[str, Any]) -> None:
    kept = {name: row["retention_mean"]["value"] for name, row in comparison["methods"].items()}
    assert kept["oracle"] == 1 and kept["base"] == 0 and 0 < kept["hard"] < 1


def test_routing_is_told_only_where_somebody_chooses(comparison: dict[str, Any]) -> None:
    routing = {name: row["routing"] for name, row in comparison["methods"].items()}
    assert routing["hard"]["own_share_mean"] == pytest.approx(0.62)
    assert routing["hard"]["distinct"] == pytest.approx(1 + 2 * 0.38)
    assert routing["uniform"] is None and routing["base"] is None and routing["best_single"] is None


def test_costs_are_counted(tmp_path: Path) -> None:
    run = make_run(tmp_path, make_candidates(tmp_path, ["hard"]), ["hard"], 0)
    assert parameters(run.methods["hard"]) == {"router": 16, "attention": 32}
    assert parameters(run.methods["hard-off"]) == {"router": 16, "attention": 0}
    assert parameters(run.methods["expert:bank"]) == {"router": 0, "attention": 0}


def test_a_comparison_that_is_not_finished_has_no_summary(tmp_path: Path) -> None:
    asked = sample_asked(20)
    runs = sample_runs(asked, tmp_path, seeds=(0,))
    next((tmp_path / "cells").iterdir()).unlink()
    with pytest.raises(ConfigError) as caught:
        summarise(runs, asked)
    assert caught.value.code == "EVALUATION_INCOMPLETE"


def test_one_seed_will_do_and_the_same_cells_give_the_same_bytes(tmp_path: Path) -> None:
    asked = sample_asked(20)
    runs = sample_runs(asked, tmp_path, seeds=(7,))
    first, again = summarise(runs, asked), summarise(runs, asked)
    assert json.dumps(first, allow_nan=False) == json.dumps(again) and first["seeds"] == [7]


def test_without_two_domains_nothing_is_mixed(tmp_path: Path) -> None:
    asked = sample_asked(20)
    one = replace(asked, domains=asked.domains[:1], mixed=replace(asked.mixed, domains=asked.domains[:1]))
    found = summarise(sample_runs(one, tmp_path, seeds=(0,)), one)
    assert found["methods"]["hard"]["mixed"] is None and "both of two" not in markdown(found)


def test_variants_stand_under_their_method_and_controls_at_the_end(comparison: dict[str, Any]) -> None:
    names = compared(comparison["methods"], "hard")
    assert (
        names[:3] == ["hard", "hard-off", "soft"] and names[-1] == "base" and len(names) == len(comparison["methods"])
    )
    assert title("hard-off") == "hard, without attention LoRA"
    assert title("prompt-on", "hard") == "prompt, with the attention LoRA of hard"


def test_the_tables_name_every_method_and_can_be_made_anew_in_a_page(comparison: dict[str, Any]) -> None:
    tables = markdown(comparison)
    for name in comparison["methods"]:
        assert f"| {title(name, 'hard')} |" in tables or f"| **{title(name, 'hard')}** |" in tables
    page = replace_tables(f"# Results\n{BEGIN}\nold\n{END}\nrest\n", comparison)
    assert page.startswith("# Results\n") and page.endswith("rest\n") and "old" not in page and tables in page
    assert replace_tables(page, comparison) == page
    with pytest.raises(ValueError, match="results: begin"):
        replace_tables("# no marks", comparison)
