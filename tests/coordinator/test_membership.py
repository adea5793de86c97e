from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from fedcompose.commands.chain import release_chain
from fedcompose.errors import ConfigError, RefusedError
from fedcompose.files import folder_digests, read_json, write_atomic, write_json
from fedcompose.model.composed import load_release
from fedcompose.tensors import parse_safetensors
from fedcompose.trust_state import trusted_federation
from fedcompose_coordinator.cli import app
from fedcompose_coordinator.compose import compose
from fedcompose_coordinator.lessons import Lesson
from fedcompose_coordinator.membership import leave_out, let_in, mask, members, same_recipe
from fedcompose_coordinator.methods import recipe
from tests.federation_sim import FederationSim, make_federation

THREE = {"site-a": "clock", "site-b": "ordering", "site-c": "counting"}
SMALL = {"steps": 2, "batch": 3, "selections": 2}


@pytest.fixture
def three(tmp_path: Path, tiny_base: Path, random_experts: dict[str, Path], sim: FederationSim) -> FederationSim:
    """Three sites, all received."""
    made = make_federation(tmp_path / "three", tiny_base, random_experts, THREE)
    for site in made.sites:
        made.contribute(site)
    made.receive()
    return made


def _compose(sim: FederationSim, method: str, out: Path, sites: set[str] | None = None) -> dict[str, str]:
    """Digests of a candidate over the members, or over `sites`, with lessons of their domains."""
    admitted = members(sim.coordinator_home, sim.admitted())
    used = [each for each in admitted if sites is None or each.site in sites]
    domains = sorted({each.domain for each in used})
    lessons = [Lesson(domain, f"{domain} {n}", f"Answer: {n}") for domain in domains for n in range(4)]
    router = {"top_k": 1} if method == "remix" else None  # two of two would be no choice
    compose(used, lessons, sim.base, recipe(method, SMALL, router), 0, out)
    return {name: digest for name, digest in folder_digests(out).items() if name != "training.jsonl"}


@pytest.mark.parametrize("method", ["hard", "remix", "lora-mixer", "ridge", "arrow", "uniform", "ties"])
def test_without_a_removed_site_the_candidate_is_as_if_it_had_never_been_there(
    method: str, three: FederationSim, tmp_path: Path
) -> None:
    home, candidate = three.coordinator_home, three.coordinator_home / "candidate"
    with_all = _compose(three, method, candidate)
    never = _compose(three, method, tmp_path / "never", sites={"site-a", "site-c"})

    leave_out(home, "site-b", three.admitted(), three.now)
    assert _compose(three, method, candidate) == never != with_all

    let_in(home, "site-b", three.admitted())
    assert _compose(three, method, candidate) == with_all


def test_a_candidate_knows_the_recipe_it_was_made_by(three: FederationSim, tmp_path: Path) -> None:
    for method, router in (("guided", {"sharing": "model"}), ("lora-mixer", None), ("centroid", None)):
        wanted = recipe(method, SMALL if method != "centroid" else None, router)
        lessons = [Lesson(domain, "hi", "ho") for domain in THREE.values()]
        compose(three.admitted(), lessons, three.base, wanted, 3, tmp_path / method)
        assert same_recipe(tmp_path / method) == (wanted, 3)


def test_masking_takes_out_one_row_and_one_expert_and_says_so(three: FederationSim) -> None:
    candidate = three.compose()
    before = parse_safetensors((candidate / "router.safetensors").read_bytes())["weights.0"].float32()

    made = mask(candidate, "site-b")

    after = parse_safetensors((candidate / "router.safetensors").read_bytes())["weights.0"].float32()
    np.testing.assert_array_equal(after, before[[0, 2]])
    assert [expert["site"] for expert in made["experts"]] == ["site-a", "site-c"] and made["masked"] == ["site-b"]
    release = three.release()
    assert not (release.path / "ingredients" / "site-b").exists()
    assert ("masked", "site-b") in [link[:2] for link in release_chain(release, (), "at composition").links]
    assert mask(candidate, "site-a")["masked"] == ["site-a", "site-b"]


@pytest.mark.parametrize("method", ["remix", "lora-mixer", "ridge", "prompt"])
def test_what_is_left_after_masking_loads(method: str, three: FederationSim) -> None:
    """ReMix then has as many experts as it samples: useless to train, right to use."""
    candidate = three.coordinator_home / "candidate"
    lessons = [Lesson(domain, "hi", "ho") for domain in THREE.values()]
    compose(three.admitted(), lessons, three.base, recipe(method, SMALL), 0, candidate)

    mask(candidate, "site-b")

    model, _ = load_release(three.release(), base=three.base)
    scorer = model.router.scorer
    assert {len(tensor) for tensor in (*scorer.weights, *getattr(scorer, "biases", ()))} == {2}
    if method != "prompt":
        assert model(torch.tensor([[3, 4, 5]])).logits.isfinite().all()


def test_who_is_masked_is_not_in_the_release(three: FederationSim) -> None:
    """Negative control: a release that says a site was taken out, and still has it, is refused."""
    candidate = three.compose()
    write_json(candidate / "composition.json", {**read_json(candidate / "composition.json"), "masked": ["site-b"]})
    with pytest.raises(RefusedError) as refusal:
        three.release()
    assert refusal.value.code == "COMPOSITION_EXPERTS"


def test_masking_says_when_it_cannot(three: FederationSim, tmp_path: Path) -> None:
    _compose(three, "uniform", tmp_path / "uniform")
    _compose(three, "dare", tmp_path / "dare")
    _compose(three, "hard", tmp_path / "alone", sites={"site-a"})
    for name, site, code in (
        ("uniform", "site-a", "MASK_UNSUPPORTED"),
        ("dare", "site-a", "MASK_UNSUPPORTED"),
        ("alone", "site-a", "COMPOSE_NO_EXPERTS"),
        ("alone", "site-b", "SITE_NOT_COMPOSED"),
        ("nothing", "site-a", "CANDIDATE_MISSING"),
    ):
        with pytest.raises(ConfigError) as error:
            mask(tmp_path / name, site)
        assert error.value.code == code


def test_a_site_that_sent_nothing_is_neither_removed_nor_added(three: FederationSim) -> None:
    for change in (
        lambda: leave_out(three.coordinator_home, "site-z", three.admitted(), three.now),
        lambda: let_in(three.coordinator_home, "site-z", three.admitted()),
    ):
        with pytest.raises(ConfigError) as error:
            change()
        assert error.value.code == "SITE_NOT_ADMITTED"
    write_atomic(three.coordinator_home / "removed.json", b"{}")
    with pytest.raises(ConfigError) as error:
        members(three.coordinator_home, three.admitted())
    assert error.value.code == "REMOVED_INVALID"


@pytest.fixture
def home(three: FederationSim) -> Path:
    """The coordinator's folder with settings, its root of trust known."""
    trusted_federation(three.envelope, [three.root.keyid], three.now)
    settings = f'id = "hub"\nbase = "{three.base.path}"\nkey = "keys/hub.key"\n[compose]\nmethod = "arrow"\n'
    write_atomic(three.coordinator_home / "coordinator.toml", settings.encode())
    return three.coordinator_home


def test_commands_remove_a_site_at_once_or_thoroughly_and_add_it_again(home: Path) -> None:
    def run(*arguments: str) -> list[str]:
        result = CliRunner().invoke(app, [*arguments, "--home", str(home), "--json"])
        assert result.exit_code == 0, result.output
        composition = json.loads(result.stdout)
        assert composition == read_json(home / "candidate" / "composition.json")
        return [expert["site"] for expert in composition["experts"]] + composition.get("masked", [])

    assert run("compose") == ["site-a", "site-b", "site-c"]
    write_json(home / "evaluation.json", {"accuracy": {}})
    assert run("remove", "--site", "site-b", "--level", "mask") == ["site-a", "site-c", "site-b"]
    assert not (home / "evaluation.json").exists()
    assert run("compose") == ["site-a", "site-c"]
    assert run("remove", "--site", "site-c", "--level", "recompose") == ["site-a"]
    assert run("add", "--site", "site-b") == ["site-a", "site-b"]
    assert run("add", "--site", "site-c") == ["site-a", "site-b", "site-c"]


def test_masking_loads_no_model_and_takes_under_a_second(home: Path) -> None:
    assert CliRunner().invoke(app, ["compose", "--home", str(home)]).exit_code == 0
    code = (
        "import sys, time\nfrom fedcompose_coordinator.cli import app\nstart = time.process_time()\n"
        "try: app(sys.argv[1:])\nexcept SystemExit as end: assert not end.code\n"
        "sys.exit('torch' in sys.modules or time.process_time() - start > 1)"
    )
    command = [sys.executable, "-c", code, "remove", "--site", "site-b", "--level", "mask", "--home", str(home)]
    assert subprocess.run(command, check=False).returncode == 0


def test_there_are_two_levels(home: Path) -> None:
    result = CliRunner().invoke(app, ["remove", "--site", "site-a", "--level", "gently", "--home", str(home)])
    assert isinstance(result.exception, ConfigError) and result.exception.code == "LEVEL_UNKNOWN"
