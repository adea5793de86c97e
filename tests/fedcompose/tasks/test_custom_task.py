"""The example package is installed as a user would install it, and then used."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedcompose.errors import ConfigError
from fedcompose.tasks import get_task, registry

EXAMPLE = Path(__file__).parents[3] / "examples" / "custom_task"
USE = """
from fedcompose.tasks import Origin, generate, generator_names, get_task, held_out, task_names
assert "number_list" in task_names() and "number_list" not in generator_names()
assert "prime_factors" in generator_names() and "prime_factors" not in task_names()
task = get_task("number_list")
assert task.is_correct("42 = 7 * 3 * 2. Answer: 7, 3, 2", "2, 3, 7")
assert task.reward("Answer: 6, 7", "2, 3, 7") == 0.1
for example in held_out("prime_factors", {"max_number": 500}, 20):
    assert task.parse(task.target(example)) == example.answer
    assert generate(example.origin) == example
"""


@pytest.fixture(scope="module")
def site_packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the example package in it."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("site-packages")
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(EXAMPLE)], check=True)
    return folder


def test_an_installed_package_adds_a_task_and_a_generator(site_packages: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(site_packages)}
    subprocess.run([sys.executable, "-c", USE], env=environment, check=True)


def test_without_the_package_the_task_is_unknown() -> None:
    with pytest.raises(ConfigError) as error:
        get_task("number_list")
    assert error.value.code == "TASK_UNKNOWN"


def _fake_package(folder: Path, entry_point: str) -> None:
    metadata = folder / "rogue-1.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: rogue\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text(f"[{registry.ENTRY_POINTS}]\n{entry_point}\n")


@pytest.mark.parametrize(
    ("entry_point", "code"),
    [
        ("other = fedcompose.tasks.numeric:numeric", "TASK_BROKEN"),
        ("other = fedcompose.tasks.numeric:no_such", "TASK_BROKEN"),
        ("other = no_such_module:task", "TASK_BROKEN"),
    ],
)
def test_a_broken_entry_point_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entry_point: str, code: str
) -> None:
    _fake_package(tmp_path, entry_point)
    monkeypatch.syspath_prepend(str(tmp_path))
    registry._added.cache_clear()
    registry._load.cache_clear()
    try:
        with pytest.raises(ConfigError) as error:
            get_task("other")
        assert error.value.code == code
        assert get_task("numeric").name == "numeric"
    finally:
        registry._added.cache_clear()


def test_no_package_replaces_a_built_in_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fake_package(tmp_path, "numeric = fedcompose.tasks.text:exact")
    monkeypatch.syspath_prepend(str(tmp_path))
    registry._added.cache_clear()
    try:
        assert get_task("numeric") is registry.TASKS["numeric"]
    finally:
        registry._added.cache_clear()
