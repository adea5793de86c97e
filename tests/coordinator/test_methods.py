from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from fedcompose.bases import Base
from fedcompose.contribution import VerifiedContribution
from fedcompose.errors import ConfigError
from fedcompose.files import folder_digests, read_json
from fedcompose.model.composed import assemble
from fedcompose.routing import RouterConfig
from fedcompose_coordinator.compose import compose
from fedcompose_coordinator.config import Compose
from fedcompose_coordinator.lessons import Lesson
from fedcompose_coordinator.methods import METHODS, recipe
from tests.coordinator.letters import with_gates

SMALL = {"steps": 2, "batch": 4, "selections": 2}
DRAWS = ("gumbel", "remix", "lorahub", "dare")  # whatever uses random numbers
IDS = torch.randint(3, 250, (2, 9), generator=torch.Generator().manual_seed(8))


def _make(
    method: str, contributions: list[VerifiedContribution], lessons: list[Lesson], base: Base, out: Path
) -> dict[str, object]:
    if method == "lorahub":
        pytest.importorskip("nevergrad")
    router = {"top_k": 1} if method == "remix" else None  # of two experts it would always take both
    if method == "phatgoose-sites":
        contributions = [with_gates(each, out.parent / each.path.name) for each in contributions]
    return compose(contributions, lessons, base, recipe(method, SMALL, router), 0, out)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_makes_a_candidate_that_loads(
    method: str, contributions: list[VerifiedContribution], lessons: list[Lesson], base: Base, tmp_path: Path
) -> None:
    composition = _make(method, contributions, lessons, base, tmp_path / "candidate")

    assert composition["method"] == method and read_json(tmp_path / "candidate/composition.json") == composition
    assert [expert["site"] for expert in composition["experts"]] == [each.site for each in contributions]  # type: ignore[attr-defined]
    if METHODS[method].made == "merged":
        assert composition["router"] is None and (tmp_path / "candidate/merged").is_dir()
        return
    config = RouterConfig.model_validate(composition["router"])
    model, _ = assemble(base, [each.path for each in contributions], tmp_path / "candidate", config)
    if config.granularity == "token":
        assert model(IDS).logits.isfinite().all()


@pytest.mark.parametrize("method", DRAWS)
def test_a_method_that_draws_repeats_with_its_seed_whatever_was_drawn_before(
    method: str, contributions: list[VerifiedContribution], lessons: list[Lesson], base: Base, tmp_path: Path
) -> None:
    digests = []
    for name in ("one", "two"):
        torch.rand(len(digests) + 1)
        _make(method, contributions, lessons, base, tmp_path / name)
        digests.append({file: d for file, d in folder_digests(tmp_path / name).items() if file != "training.jsonl"})
    assert digests[0] == digests[1]


def test_settings_that_are_for_all_methods_leave_each_what_it_is() -> None:
    """`learn_from = "traces"` of the template once made `guided-sampled` learn from traces, without a word."""
    assert Compose(method="guided", learn_from="traces").recipe().settings.learn_from == "traces"
    assert Compose(method="guided-sampled", learn_from="traces").recipe().settings.learn_from == "sampled"


def test_a_method_can_be_changed_in_parts_but_not_into_one_that_cannot_learn() -> None:
    changed = recipe("hard", {"steps": 7}, {"sharing": "layer"})
    assert changed.router == RouterConfig(sharing="layer") and changed.settings.steps == 7
    for method, router, code in (
        ("top2", {"top_k": 1}, "ROUTER_DEAD"),
        ("gumbel", {"normalise": True}, "ROUTER_DEAD"),
        ("ties", {"sharing": "layer"}, "ROUTER_INVALID"),
        ("hardest", {}, "METHOD_UNKNOWN"),
        ("hard", {"scorer": "arrow", "sharing": "layer"}, "ROUTER_INVALID"),
        ("remix", {"estimator": "top_k", "scale": "unit"}, "ROUTER_INVALID"),
        ("top2", {"estimator": "sampled", "normalise": False}, "ROUTER_INVALID"),
        ("ridge", {"bias": False}, "ROUTER_INVALID"),
    ):
        with pytest.raises(ConfigError) as error:
            recipe(method, router=router)
        assert error.value.code == code


def test_what_is_not_set_is_the_method_s_own_and_the_router_s_parts_stay_with_their_method() -> None:
    wanted = Compose(method="hard", steps=7, router={"sharing": "layer"})
    assert wanted.recipe().router == RouterConfig(sharing="layer") and wanted.recipe().settings.attention_rank == 2
    remix = wanted.recipe("remix")
    assert remix.settings.steps == 7 and remix.attention_rank == 0 and remix.router == METHODS["remix"].router
    assert Compose(attention_rank=4).recipe("remix").attention_rank == 4


def test_the_table_is_read_without_torch() -> None:
    modules = "fedcompose_coordinator.methods, fedcompose_coordinator.membership"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_page_about_composing_tells_of_every_method_and_its_settings_are_real() -> None:
    page = (Path(__file__).parents[2] / "docs" / "composing.md").read_text()
    rows = dict(re.findall(r"^\| `([a-z0-9-]+)` \| ([^|]+) \|", page, re.MULTILINE))
    assert rows == {name: method.says for name, method in METHODS.items()}
    example = tomllib.loads(page.partition("```toml")[2].partition("```")[0])
    assert Compose(**example).recipe().router == RouterConfig(sharing="layer")
