"""The units and images in deploy/ confine each part of a site to what docs/operate.md says."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
PARTS = ("node", "executor", "worker")


def service(name: str) -> dict[str, str]:
    """The last of several settings of one name counts here; only Environment has several."""
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read(DEPLOY / "systemd" / f"fedcompose-{name}.service")
    return dict(parser["Service"])


def containers() -> dict[str, dict[str, Any]]:
    loaded: dict[str, dict[str, Any]] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    return loaded


def test_the_table_of_the_page_is_what_the_units_do() -> None:
    page = (ROOT / "docs" / "operate.md").read_text()
    users = dict(re.findall(r"^\| `client join --only (\w+)` .*\| `([\w-]+)` \|$", page, re.MULTILINE))
    assert users == {part: service(part)["User"] for part in PARTS}
    assert users["node"] not in (users["executor"], users["worker"])


def test_what_talks_to_the_outside_cannot_see_the_data() -> None:
    data = service("worker")["WorkingDirectory"]
    assert Path(data).is_relative_to(service("node")["InaccessiblePaths"])
    assert [volume.rpartition(":")[2] for volume in containers()["node"]["volumes"]] == ["/site/node"]


def test_what_sees_the_data_cannot_talk_to_the_outside() -> None:
    assert service("worker")["PrivateNetwork"] == "yes"
    assert service("executor")["IPAddressDeny"] == "any"
    assert service("executor")["IPAddressAllow"] == "localhost"
    assert containers()["worker"]["network_mode"] == "none"


@pytest.mark.parametrize("part", ["executor", "worker", "coordinator"])
def test_a_unit_trusts_what_its_user_trusts(part: str) -> None:
    """What a person typed as this user pinned the roots and fetched the base in its home."""
    home = re.search(r"useradd .*--home-dir (\S+) .* fedcompose\n", (ROOT / "docs" / "operate.md").read_text())
    text = (DEPLOY / "systemd" / f"fedcompose-{part}.service").read_text()
    assert home
    assert re.findall(r"FEDCOMPOSE_HOME=(\S+)", text) == [f"{home[1]}/.fedcompose"]


def test_only_the_worker_has_the_passphrase() -> None:
    holders = [unit.stem for unit in UNITS if "passphrase" in unit.read_text()]
    assert holders == ["fedcompose-worker"]
    assert [name for name, each in containers().items() if "secrets" in each] == ["worker"]


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_every_unit_is_confined(unit: Path) -> None:
    found = service(unit.stem.removeprefix("fedcompose-"))
    assert found["NoNewPrivileges"] == "yes"
    assert found["CapabilityBoundingSet"] == ""
    assert found["ProtectSystem"] == "strict"
    assert found["User"] != "root"


@pytest.mark.parametrize("name", ["coordinator", *PARTS])
def test_every_container_is_confined(name: str) -> None:
    found = containers()[name]
    assert found["read_only"] is True
    assert found["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in found["security_opt"]


def test_an_image_holds_one_role_at_the_pinned_versions() -> None:
    for role, other in (("client", "coordinator"), ("coordinator", "client")):
        lines = (DEPLOY / f"{role}.Dockerfile").read_text().splitlines()
        installs = [line for line in lines if "pip install" in line]
        assert any(f"./{role}" in line for line in installs)
        assert not any(f"./{other}" in line for line in installs)
        assert all("-c constraints.txt" in line for line in installs)
        assert "USER fedcompose" in lines
        copied = {word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]}
        assert copied.isdisjoint({".", other}), "keys and runs may lie in a clone"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_systemd_understands_every_line(unit: Path, tmp_path: Path) -> None:
    """With another program in the place of ours, which is not installed under /opt here."""
    copy = tmp_path / unit.name
    copy.write_text(re.sub(r"^ExecStart=\S+.*$", "ExecStart=/bin/true", unit.read_text(), flags=re.MULTILINE))
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", copy], capture_output=True, text=True, check=False)
    complaints = [line for line in done.stderr.splitlines() if unit.name in line]
    assert not complaints
