"""The first day of docs/operate.md, typed by the example, with a tiny base and few steps: real SuperNodes, keys, TLS.

Afterwards nothing is left running, and no row of the sites' data stands anywhere outside the site that it is of.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from fedcompose.cli import COMMANDS, ROLES, app
from fedcompose.leftovers import leftovers, processes
from tests.tiny import make_knowing_base

ROOT = Path(__file__).parents[2]
ANSWERS = {"count_items": "Answer: 5", "logic": "Answer: yes", "chain_sum": "Answer: 9"}
SHORTER = {
    "validation_count": 10, "test_count": 10, "warm_up_steps": 1, "steps": 2, "prompts_per_step": 2,
    "samples_per_prompt": 2, "max_new_tokens": 12, "batch": 4, "prompts_per_domain": 10,
}  # fmt: skip
CANARY = "kestrel-4471"  # in a question of each site


@pytest.fixture
def example() -> ModuleType:
    path = ROOT / "examples" / "three_organisations" / "run.py"
    spec = importlib.util.spec_from_file_location("three_organisations", path)
    assert spec is not None and spec.loader is not None
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)  # where its dataclasses look for it
    spec.loader.exec_module(module)
    return module


def plant_canaries(folder: Path) -> None:
    """In the question of every other row, so that training meets some."""
    for path in folder.glob("*/problems.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row in rows[::2]:
            row["question"] += f" {CANARY}"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def files_with(text: str, folder: Path) -> set[str]:
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and "bases" not in path.parts and text.encode() in path.read_bytes()
    }


@pytest.mark.slow
def test_the_first_day_ends_with_a_verified_release(tmp_path: Path, private_home: Path, example: ModuleType) -> None:
    make_knowing_base(private_home / "bases" / "smollm2-135m", ANSWERS)
    folder = tmp_path / "day"
    with example.morning(folder, SHORTER) as day:
        plant_canaries(folder)
        for tags, text in example.blocks():
            example.play(day, tags, text)
        found = example.run(day, "clinic", "fedcompose verify release --json")
    assert json.loads(found)["verified"]
    experts = {path.name for path in (folder / "clinic" / "release").rglob("adapter_model.safetensors")}
    assert experts
    assert not leftovers(folder, processes())
    assert files_with(CANARY, folder) == {f"{site}/problems.jsonl" for site in example.DOMAINS}


def test_every_command_of_the_page_exists() -> None:
    """Also those that the first day does not type; with their options."""
    text = (ROOT / "docs" / "operate.md").read_text()
    units = "\n".join(path.read_text() for path in (ROOT / "deploy").rglob("*") if path.is_file())
    commands = re.findall(rf"fedcompose ((?:{'|'.join(COMMANDS + ROLES)}) [^`\n|&;)]*)", text + units)
    assert len(commands) > 40
    unknown = [command for command in commands if not is_command(command)]
    assert not unknown


def is_command(line: str) -> bool:
    import typer.main

    node = typer.main.get_command(app)
    words = line.split()
    while words and words[0] in getattr(node, "commands", {}):
        node = node.commands[words.pop(0)]
    options = {option for parameter in node.params for option in parameter.opts} | {"--help"}
    used = [word.partition("=")[0] for word in words if word.startswith("--")]
    return (not hasattr(node, "commands") and set(used) <= options) or used == ["--help"]


def test_a_command_that_is_not_there_is_noticed() -> None:
    assert is_command("coordinator compose --home x")
    assert not is_command("coordinator conduct")
    assert not is_command("coordinator compose --loudly")
