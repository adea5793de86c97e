"""What people install: three wheels with the right contents; a site has no coordinator code."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.federation_sim import FederationSim

ROOT = Path(__file__).parent.parent
MODEL_PACKAGES = ("torch", "functorch", "transformers", "peft", "trl", "flwr", "datasets", "accelerate")


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The wheels by distribution, built offline with the pinned builder."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheels")
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
    ]
    for project in (".", "./client", "./coordinator"):
        subprocess.run([*build, "--wheel-dir", str(folder), project], cwd=ROOT, check=True)
    return {path.name.partition("-")[0]: path for path in folder.glob("*.whl")}


def modules(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def machine(folder: Path, installed: list[Path], without: tuple[str, ...]) -> list[str]:
    """A Python that sees the unpacked wheels and this environment's other packages, less `without`.

    `-S` keeps the editable installs out; a folder of links stands for site-packages.
    """
    site = folder / "site"
    site.mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        hidden = ("fedcompose", "_fedcompose", "_editable_impl", *without)
        if not entry.name.startswith(hidden) and entry.suffix != ".pth":
            (site / entry.name).symlink_to(entry)
    for wheel in installed:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
    start = f"import sys; sys.path.insert(0, {str(site)!r}); from fedcompose.cli import main; main(sys.argv[1:])"
    return [sys.executable, "-S", "-c", start]


def run(command: list[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run([*command, *arguments], env=environment, cwd="/", capture_output=True, text=True, check=False)


def test_each_wheel_holds_its_own_package_and_no_other(wheels: dict[str, Path]) -> None:
    for distribution in ("fedcompose", "fedcompose_client", "fedcompose_coordinator"):
        assert {name.partition("/")[0] for name in modules(wheels[distribution])} == {distribution}


def test_the_wheels_hold_every_file_of_the_packages(wheels: dict[str, Path]) -> None:
    """Templates, the served page and type markers are easily left out."""
    for package in (
        ROOT / "fedcompose",
        ROOT / "client/fedcompose_client",
        ROOT / "coordinator/fedcompose_coordinator",
    ):
        expected = {
            path.relative_to(package.parent).as_posix()
            for path in package.rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }
        assert expected <= modules(wheels[package.name])


def test_a_machine_with_the_library_alone_verifies_without_any_model_package(
    wheels: dict[str, Path], sim: FederationSim, tmp_path: Path
) -> None:
    python = machine(tmp_path, [wheels["fedcompose"]], MODEL_PACKAGES)
    verified = run(python, "verify", str(sim.released().path), "--root-fingerprint", sim.root.keyid)
    assert verified.returncode == 0, verified.stderr
    assert run(python, "--version").stdout.startswith("fedcompose ")
    refused = run(python, "verify", str(tmp_path))
    assert refused.returncode in (1, 2), refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_site_has_no_coordinator_code_and_is_told_how_to_get_it(wheels: dict[str, Path], tmp_path: Path) -> None:
    python = machine(tmp_path, [wheels["fedcompose"], wheels["fedcompose_client"]], ())
    assert run(python, "client", "--help").returncode == 0
    absent = run(python, "coordinator", "compose")
    assert absent.returncode == 2
    assert "pip install fedcompose-coordinator" in absent.stderr
    assert not list((tmp_path / "site").glob("fedcompose_coordinator*"))
