"""`docs/verify.sh`, which shares no code with us, and `verify_release` must come to the same verdict."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from fedcompose.amendments import revoke_keys
from fedcompose.document import format_time
from fedcompose.drafts import amend
from fedcompose.errors import RefusedError
from fedcompose.federation import Revocation
from fedcompose.federation_file import FEDERATION_TYPE
from fedcompose.files import dump_json, folder_digests, write_json
from fedcompose.keys import FileSigner, _signer
from fedcompose.release import ReceivedRelease, verify_release
from fedcompose.revocations import RevokedKey, WithdrawnRelease, next_revocations, no_revocations
from fedcompose.signing import sign_envelope, sign_files, verify_files
from fedcompose.trust_state import accept_revocations, trusted_federation
from tests.attacks import releases, terms
from tests.attacks.attack import Release
from tests.federation_sim import FederationSim, make_federation

SCRIPT = Path(__file__).parents[2] / "docs" / "verify.sh"

pytestmark = pytest.mark.skipif(
    not all(shutil.which(tool) for tool in ("bash", "openssl", "jq")), reason="needs bash, openssl and jq"
)


@pytest.fixture(scope="module")
def made(tiny_base: Path, random_experts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> FederationSim:
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDCOMPOSE_HOME", str(folder / "home"))
        sim = make_federation(folder / "federation", tiny_base, random_experts)
        sim.released()
    return sim


@pytest.fixture
def folder(made: FederationSim, tmp_path: Path) -> Path:
    """A copy of the release to tamper with."""
    return shutil.copytree(made.coordinator_home / "release", tmp_path / "release")


def by_shell(folder: Path, *roots: str) -> tuple[bool, str]:
    result = subprocess.run(["bash", str(SCRIPT), str(folder), *roots], capture_output=True, text=True, check=False)
    assert result.returncode in (0, 1), result.stderr
    return result.returncode == 0, result.stdout + result.stderr


def by_us(folder: Path, *roots: str) -> tuple[bool, str]:
    try:
        return True, verify_release(ReceivedRelease(folder), roots).dir_hash
    except RefusedError as error:
        return False, error.code


# --- what somebody does to a release --------------------------------------------------------------

Tamper = Callable[[Path, FederationSim], None]


def edited(name: str, change: Callable[[Any], object]) -> Tamper:
    """One JSON file changed."""

    def tamper(folder: Path, _: FederationSim) -> None:
        document = json.loads((folder / name).read_bytes())
        change(document)
        (folder / name).write_text(json.dumps(document))

    return tamper


def signed(*tampers: Tamper) -> Tamper:
    """The same by a dishonest coordinator, who writes provenance for it and signs."""

    def tamper(folder: Path, sim: FederationSim) -> None:
        for each in tampers:
            each(folder, sim)
        (folder / "model.sig").unlink()
        digests = folder_digests(folder)
        statement = json.loads((folder / "provenance.json").read_bytes())
        statement["subject"] = [
            {"name": name, "digest": {"sha256": digest}}
            for name, digest in digests.items()
            if name != "provenance.json"
        ]
        write_json(folder / "provenance.json", statement)
        sign(folder, sim.coordinator)

    return tamper


def sign(folder: Path, signer: FileSigner) -> None:
    (folder / "model.sig").unlink(missing_ok=True)
    (folder / "model.sig").write_bytes(sign_files("release", folder_digests(folder), signer))


def flipped(name: str, position: int = -1) -> Tamper:
    def tamper(folder: Path, _: FederationSim) -> None:
        data = bytearray((folder / name).read_bytes())
        data[position] ^= 1
        (folder / name).write_bytes(data)

    return tamper


def by_another(folder: Path, sim: FederationSim) -> None:
    """Site a's key under the whole release."""
    sign(folder, sim.sites["site-a"].signer)


def moved(folder: Path, _: FederationSim) -> None:
    (folder / "router.safetensors").rename(folder / "router.safetensor")


def linked(folder: Path, _: FederationSim) -> None:
    target = shutil.move(folder / "router.safetensors", folder.parent / "elsewhere")
    (folder / "router.safetensors").symlink_to(target)


def exchanged(folder: Path, _: FederationSim) -> None:
    """Each site's folder under the other's name."""
    a, b, aside = (folder / "ingredients" / name for name in ("site-a", "site-b", "aside"))
    a.rename(aside)
    b.rename(a)
    aside.rename(b)


def resigned(folder: Path, sim: FederationSim) -> None:
    """Site b's key under what site a made."""
    sign(folder / "ingredients" / "site-a", sim.sites["site-b"].signer)


def federated(change: Callable[[dict[str, Any], FederationSim], object]) -> Tamper:
    """Another federation file, properly signed by its root."""

    def tamper(folder: Path, sim: FederationSim) -> None:
        envelope = amend(sim.envelope, lambda document: change(document, sim) and None, sim.root, sim.now)
        (folder / "federation.json").write_bytes(envelope)

    return tamper


def renamed(payload: str) -> str:
    """The federation under another name, which nobody signed."""
    return base64.b64encode(base64.b64decode(payload).replace(b'"Test"', b'"Tent"')).decode()


def revoke_before(document: dict[str, Any], sim: FederationSim) -> None:
    revocation = Revocation(at=sim.now - timedelta(hours=1), reason="compromised")
    revoke_keys(document, [sim.sites["site-b"].signer.keyid], revocation)


def claimed(path: str, value: Any) -> Tamper:
    """Another value in the release's provenance, below `predicate`."""

    def change(statement: dict[str, Any]) -> None:
        *parents, last = [int(part) if part.isdigit() else part for part in path.split("/")]
        inner = statement["predicate"]
        for part in parents:
            inner = inner[part]
        inner[last] = value

    return edited("provenance.json", change)


def saying(**claims: Any) -> Tamper:
    """Site a itself says this of its expert, and the coordinator releases with it all the same."""

    def tamper(folder: Path, sim: FederationSim) -> None:
        attack = Release(sim, folder, sim.coordinator)
        expert = Release(sim, attack.path(releases.OURS), sim.sites["site-a"].signer)
        expert.claim(**claims)
        signed_again = verify_files(expert.path("model.sig").read_bytes(), expert.signer.public_pem)
        releases.rename_expert(attack, 0, signed_again)
        attack.sign()

    return tamper


def until_just_after(folder: Path, sim: FederationSim) -> None:
    """Terms that were good when the release was made, and are over now."""
    saying(use=terms.use(expires=format_time(sim.now + timedelta(seconds=1))))(folder, sim)


def audited(verdict: str, required: str) -> Tamper:
    return saying(audit={"verdict": verdict, "target": "twin"}, limits={"requireAudit": required})


def answering(*calls: str) -> Tamper:
    """Both experts answer a call of one name, of which each site may have been told something else."""
    return lambda folder, sim: releases.answering(Release(sim, folder, sim.coordinator), *calls)


def untouched(*_: Any) -> None:
    """No change."""


DEPENDENCIES = "buildDefinition/resolvedDependencies"
LATE = "2026-01-01T00:00:00Z"
OTHER = "urn:uuid:6b0c0000-0000-4000-8000-000000000002"

RELEASES: dict[str, tuple[Tamper, str | None]] = {
    "untouched": (untouched, None),
    "untouched, signed again": (signed(), None),
    "a later federation file": (signed(federated(lambda document, _: document.update(name="Again"))), None),
    "one bit of the router": (flipped("router.safetensors"), "FILE_CHANGED"),
    "one bit of an expert": (flipped("ingredients/site-b/adapter_model.safetensors"), "FILE_CHANGED"),
    "a stranger's root": (
        edited("federation.json", lambda envelope: envelope["signatures"][0].update(keyid="0" * 64)), "ENVELOPE_KEY"
    ),
    "the root's signature under something else": (
        edited("federation.json", lambda envelope: envelope.update(payload=renamed(envelope["payload"]))),
        "ENVELOPE_INVALID",
    ),
    "a file added": (lambda folder, _: (folder / "evaluation.json").write_text("{}") and None, "FILE_UNSIGNED"),
    "an unknown file, signed": (
        signed(lambda folder, _: (folder / "hook.py").write_text("x") and None), "FILE_UNEXPECTED"
    ),
    "a file gone": (lambda folder, _: (folder / "ingredients/site-a/adapter_config.json").unlink(), "FILE_MISSING"),
    "a file renamed": (moved, "FILE_UNEXPECTED"),
    "a link": (linked, "FILE_NOT_REGULAR"),
    "an empty folder": (lambda folder, _: (folder / "ingredients/site-c").mkdir(), "FOLDER_EMPTY"),
    "an empty README": (
        signed(lambda folder, _: (folder / "README.md").write_text("") and None), "FILE_UNEXPECTED"
    ),
    "a second signature": (
        edited("model.sig", lambda bundle: bundle["dsseEnvelope"]["signatures"].append({"sig": "", "keyid": ""})),
        "SIGNATURE_SHAPE",
    ),
    "another payload type": (
        edited("model.sig", lambda bundle: bundle["dsseEnvelope"].update(payloadType="text/plain")), "SIGNATURE_SHAPE"
    ),
    "signed by a site": (by_another, "KEY_UNKNOWN"),
    "experts exchanged": (signed(exchanged), "INGREDIENT_MISMATCH"),
    "an expert signed by another site": (signed(resigned), "SITE_MISMATCH"),
    "another expert claimed": (
        signed(claimed(f"{DEPENDENCIES}/1/digest/dirHash", "0" * 64)), "COMPOSITION_EXPERTS"
    ),
    "another sequence claimed": (
        signed(claimed(f"{DEPENDENCIES}/2/annotations/sequence", 1)), "INGREDIENT_MISMATCH"
    ),
    "another statement claimed": (
        signed(claimed(f"{DEPENDENCIES}/1/annotations/omsPayloadSha256", "0" * 64)), "INGREDIENT_MISMATCH"
    ),
    "received before its key counted": (
        signed(claimed(f"{DEPENDENCIES}/1/annotations/receivedOn", LATE)), "KEY_EXPIRED"
    ),
    "received after its site's key was stolen": (signed(federated(revoke_before)), "KEY_REVOKED"),
    "experts of two calls with one name": (answering("1" * 64, "2" * 64), "INGREDIENT_CALL"),
    "experts of one call": (answering("1" * 64, "1" * 64), None),
    "terms that hold": (saying(use=terms.use()), None),
    "terms that were over": (saying(use=terms.use(-1)), "USE_EXPIRED"),
    "terms that are over by now": (until_just_after, None),
    "terms for another coordinator": (saying(use=terms.use(recipients=["hub-2"])), "USE_RECIPIENT"),
    "an audit as good as the site asks for": (audited("warn", "warn"), None),
    "a better audit than the site asks for": (audited("pass", "warn"), None),
    "a worse audit than the site asks for": (audited("inconclusive", "warn"), "AUDIT_BELOW_LIMIT"),
    "no audit where the site asks for one": (saying(limits={"requireAudit": "pass"}), "AUDIT_BELOW_LIMIT"),
    "no privacy where the site asks for it": (
        saying(limits={"requireAudit": "none", "maxEpsilon": 8.0}), "EPSILON_ABOVE_LIMIT"
    ),
    "another federation": (
        signed(federated(lambda document, _: document.update(federation=OTHER))),
        "FEDERATION_MISMATCH",
    ),
    "a base of no federation": (
        signed(federated(lambda document, _: document["base_models"][0].update(dirHash="0" * 64))), "BASE_MISMATCH"
    ),
    "an expired federation file": (
        signed(federated(lambda document, sim: document.update(issued=LATE, expires=format_time(sim.now)))),
        "FEDERATION_EXPIRED",
    ),
    "a release from the future": (
        signed(claimed("runDetails/metadata/finishedOn", "2099-01-01T00:00:00Z")), "RELEASE_FROM_FUTURE"
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", RELEASES)
def test_both_come_to_the_same_verdict(made: FederationSim, folder: Path, what: str) -> None:
    """The untouched ones are the control."""
    tamper, code = RELEASES[what]
    tamper(folder, made)
    admitted, said = by_us(folder, made.root.keyid)
    assert (admitted, None if admitted else said) == (code is None, code)
    agreed, report = by_shell(folder, made.root.keyid)
    assert agreed == admitted, report
    if admitted:
        assert said in report and "made of 2 experts" in report


# --- what roots took back since -------------------------------------------------------------------

HOUR = timedelta(hours=1)


def revoked(signer: Callable[[FederationSim], FileSigner], since: timedelta) -> Callable[..., dict[str, Any]]:
    def listed(sim: FederationSim, _: Path) -> dict[str, Any]:
        return {"keys": [RevokedKey(keyid=signer(sim).keyid, at=sim.now + since, reason="compromised")]}

    return listed


def withdrawn(sim: FederationSim, folder: Path) -> dict[str, Any]:
    return {"releases": [WithdrawnRelease(dirHash=by_us(folder, sim.root.keyid)[1], at=sim.now)]}


LISTS: dict[str, tuple[Callable[[FederationSim, Path], dict[str, Any]], str | None]] = {
    "the release": (withdrawn, "RELEASE_WITHDRAWN"),
    "another release": (lambda sim, _: {"releases": [WithdrawnRelease(dirHash="0" * 64, at=sim.now)]}, None),
    "a site's key, since before": (revoked(lambda sim: sim.sites["site-b"].signer, -HOUR), "KEY_REVOKED"),
    "a site's key, since after": (revoked(lambda sim: sim.sites["site-b"].signer, HOUR), None),
    "the coordinator's key, since before": (revoked(lambda sim: sim.coordinator, -HOUR), "KEY_REVOKED"),
}


def a_list(sim: FederationSim, signer: FileSigner, path: Path, entries: dict[str, Any], federation: str) -> Path:
    given = {"keys": (), "releases": ()} | entries
    path.write_bytes(next_revocations(no_revocations(federation), root=signer, now=sim.now, **given))
    return path


@pytest.mark.parametrize("what", LISTS)
def test_both_hold_to_a_list_that_takes_back(
    made: FederationSim, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setenv("FEDCOMPOSE_HOME", str(tmp_path / "home"))
    entries, code = LISTS[what]
    path = a_list(made, made.root, tmp_path / "list", entries(made, folder), made.federation.id)
    trusted_federation(made.envelope, [made.root.keyid], made.now)
    accept_revocations(path.read_bytes())
    admitted, said = by_us(folder, made.root.keyid)
    assert (admitted, None if admitted else said) == (code is None, code)
    assert by_shell(folder, made.root.keyid, str(path))[0] == admitted
    assert by_shell(folder, made.root.keyid)[0], "without the list nothing is known of it"


def test_the_script_takes_no_list_of_somebody_else_and_none_instead_of_a_root(
    made: FederationSim, folder: Path, tmp_path: Path
) -> None:
    entries = {"releases": [WithdrawnRelease(dirHash="0" * 64, at=made.now)]}
    good = a_list(made, made.root, tmp_path / "good", entries, made.federation.id)
    assert by_shell(folder, made.root.keyid, str(good))[0]
    assert not by_shell(folder, str(good))[0]
    for signer, federation in ((made.coordinator, made.federation.id), (made.root, OTHER)):
        bad = a_list(made, signer, tmp_path / "bad", entries, federation)
        assert not by_shell(folder, made.root.keyid, str(bad))[0]
    changed = good.read_text().replace('"payload":"', '"payload":"e30g')
    assert changed != good.read_text()
    good.write_text(changed)
    assert not by_shell(folder, made.root.keyid, str(good))[0]


def test_both_need_the_roots_that_a_person_named(made: FederationSim, folder: Path) -> None:
    for roots in ([made.coordinator.keyid], [made.root.keyid, made.coordinator.keyid], ["0" * 64]):
        assert (by_us(folder, *roots), by_shell(folder, *roots)[0]) == ((False, "TRUST_ROOT_UNKNOWN"), False)


def test_both_take_keys_on_p384(made: FederationSim, folder: Path) -> None:
    root = _signer(ec.generate_private_key(ec.SECP384R1()))
    document = made.federation.model_dump(mode="json", by_alias=True)
    document["roots"] = [{"keyid": root.keyid, "name": "root", "public_key": root.public_pem.decode()}]
    (folder / "federation.json").write_bytes(sign_envelope(dump_json(document), FEDERATION_TYPE, [root]))
    signed()(folder, made)
    assert (by_us(folder, root.keyid)[0], by_shell(folder, root.keyid)[0]) == (True, True)


def test_the_script_needs_no_python_and_says_how_it_is_used(tmp_path: Path) -> None:
    for tool in ("bash", "sed", "cat"):
        (tmp_path / tool).symlink_to(str(shutil.which(tool)))
    result = subprocess.run(
        [str(tmp_path / "bash"), str(SCRIPT)], capture_output=True, text=True, check=False, env={"PATH": str(tmp_path)}
    )
    assert result.returncode == 2 and "docs/verify.sh RELEASE ROOT_FINGERPRINT..." in result.stderr
    assert "python" not in SCRIPT.read_text()
    assert os.access(SCRIPT, os.X_OK)
