"""The house keeps its own rules: one dependency direction, one version, exact pins, true documents."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import typer.main
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import fedcompose
from fedcompose.cli import app

ROOT = Path(__file__).parent.parent
PACKAGES = ("fedcompose", "client/fedcompose_client", "coordinator/fedcompose_coordinator")
PROJECTS = [ROOT / part / "pyproject.toml" for part in ("", "client", "coordinator")]
APACHE_2_0 = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"


def pyproject(path: Path) -> dict:
    return tomllib.loads(path.read_text())["project"]


def pins() -> dict[str, Version]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    return {canonicalize_name(name): Version(version) for name, _, version in (line.partition("==") for line in lines)}


def lint_imports(root: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(str(root / part) for part in ("", "client", "coordinator"))
    command = [str(Path(sys.executable).parent / "lint-imports"), "--no-cache", "--no-logo"]
    return subprocess.run(
        command, cwd=root, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False
    )


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The three packages, to plant something in."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def test_import_contracts_hold() -> None:
    result = lint_imports(ROOT)
    assert result.returncode == 0, result.stdout
    assert "0 broken" in result.stdout


@pytest.mark.parametrize(
    ("file", "line", "contract"),
    [
        ("client/fedcompose_client/cli.py", "import fedcompose_coordinator.cli", "neither sees the other"),
        (
            "coordinator/fedcompose_coordinator/cli.py",
            "import fedcompose_client.cli",
            "neither sees the other",
        ),
        ("fedcompose/files.py", "import fedcompose_client.cli", "neither sees the other"),
        ("fedcompose/signing.py", "import torch", "Verifying needs no model code"),
        ("client/fedcompose_client/run.py", "import fedcompose_client.train", "No imports in a circle"),
        ("fedcompose/federation.py", "import fedcompose.revocations", "No imports in a circle"),
    ],
)
def test_a_planted_violation_is_reported(copy: Path, file: str, line: str, contract: str) -> None:
    """Negative control: without it a contract that checks nothing would look kept."""
    with (copy / file).open("a") as stream:
        stream.write(f"\n{line}\n")
    result = lint_imports(copy)
    assert result.returncode != 0
    assert re.search(rf"{contract} BROKEN", result.stdout), result.stdout


def test_every_command_is_listed_without_importing_torch() -> None:
    code = (
        "import sys\nfrom fedcompose.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit as end: assert not end.code, end.code\n"
        "heavy = {'torch', 'transformers', 'peft', 'trl', 'flwr', 'datasets'} & sys.modules.keys()\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    for command in ("client", "coordinator", "base", "keys", "federation", "verify", "serve", "chat", "demo"):
        assert re.search(rf"^│ {command}\b", result.stdout, re.MULTILINE), f"{command} is missing:\n{result.stdout}"


def test_the_three_distributions_have_one_version_and_ask_for_exactly_it() -> None:
    version = fedcompose.__version__
    assert {pyproject(path)["version"] for path in PROJECTS} == {version}
    own = [text for path in PROJECTS for text in requirements(path) if re.match(r"fedcompose-|fedcompose\[.*==", text)]
    assert own
    assert all(text.endswith(f"=={version}") for text in own), own


def requirements(path: Path) -> list[str]:
    project = pyproject(path)
    return [
        *project["dependencies"],
        *(text for extra in project.get("optional-dependencies", {}).values() for text in extra),
    ]


def test_every_dependency_is_pinned_to_a_version_it_accepts() -> None:
    pinned = pins()
    for path in PROJECTS:
        for requirement in map(Requirement, requirements(path)):
            name = canonicalize_name(requirement.name)
            if not name.startswith("fedcompose"):
                assert name in pinned, f"{name} is not in constraints.txt"
                assert requirement.specifier.contains(pinned[name]), f"{requirement} refuses {pinned[name]}"


def test_the_tests_have_every_optional_package() -> None:
    """A test that needs an extra is skipped where `make install` leaves it out, and `make lock` would drop its pins."""
    installed = dict(re.findall(r"-e '(\./?\w*)\[([\w,-]+)\]'", (ROOT / "Makefile").read_text()))
    for path, folder in zip(PROJECTS, (".", "./client", "./coordinator"), strict=True):
        extras = {name for name in pyproject(path)["optional-dependencies"] if name not in ("client", "coordinator")}
        assert set(installed[folder].split(",")) == extras


def test_no_pin_pulled_flower_or_cryptography_back() -> None:
    """Next to unpinned neighbours the resolver once took flwr 1.32 and cryptography 46 without a word."""
    pinned = pins()
    assert pinned["cryptography"] >= Version("50")
    assert (pinned["flwr"].major, pinned["flwr"].minor) == (1, 41)
    assert pinned["torch"] == Version("2.13.0")  # and no local part, so that a CPU build satisfies it


def test_the_licence_is_the_apache_text_unchanged_and_every_distribution_says_so() -> None:
    assert hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest() == APACHE_2_0
    assert {pyproject(path)["license"] for path in PROJECTS} == {"Apache-2.0"}


def test_the_command_reference_is_what_help_prints() -> None:
    result = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "make_cli.py"), "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr


def test_help_swallows_no_word_in_square_brackets() -> None:
    """`[compose]` in a help text is a style to the terminal's markup, and vanishes: it has to be escaped."""
    swallowed = [text for text in help_texts(typer.main.get_command(app)) if re.search(r"(?<!\\)\[[a-z#@/]", text)]
    assert swallowed == []


def help_texts(command: click.Command) -> Iterator[str]:
    yield from (each for each in (command.help, command.short_help) if each)
    yield from (each.help for each in command.params if getattr(each, "help", None))
    for child in getattr(command, "commands", {}).values():
        yield from help_texts(child)


@pytest.mark.parametrize(
    "page",
    [path.relative_to(ROOT).as_posix() for path in ROOT.glob("*.md")]
    + [path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")],
)
def test_every_link_of_the_documents_leads_to_a_file(page: str) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", (ROOT / page).read_text()):
        if not re.match(r"[a-z]+:", target):
            assert ((ROOT / page).parent / target).exists(), f"{page} links to {target}"


def test_every_claim_of_the_security_page_names_a_test_that_exists() -> None:
    text = (ROOT / "SECURITY.md").read_text()
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)
    missing = [
        f"{file}::{name}"
        for file, name in named
        if not (ROOT / file).is_file() or not re.search(rf"^def {name}\b", (ROOT / file).read_text(), re.MULTILINE)
    ]
    assert named
    assert not missing


def test_the_readme_names_every_module_and_nothing_that_is_not_there() -> None:
    tree = (ROOT / "README.md").read_text().partition("## The tree")[2]
    modules = {path.name for part in ("fedcompose", "client", "coordinator") for path in (ROOT / part).glob("**/*.py")}
    top = {path.name for part in PACKAGES for path in (ROOT / part).glob("*.py") if not path.name.startswith("__")}
    named = set(re.findall(r"\b\w+\.py\b", tree))
    assert top <= named, f"the tree lacks {top - named}"
    assert named <= modules, f"the tree names {named - modules}"
