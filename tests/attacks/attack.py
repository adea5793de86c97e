"""What an attacker holds: a copy of something signed, the means to change it, and perhaps a key of the federation.

Every kind of thing that is judged has a class here. Its `refusal()` hands the thing over as an honest run would, and
returns the code with which it was refused, after asserting that nothing of it was kept and that the reason can be
printed. Damage that a dishonest site or coordinator could do, not only a thief, is signed properly.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from fedcompose.call import Call, make_call, read_own_call
from fedcompose.errors import FedcomposeError, RefusedError
from fedcompose.files import folder_digests, write_atomic, write_json
from fedcompose.keys import FileSigner, load_signer, new_key
from fedcompose.release import ReceivedRelease, verify_release
from fedcompose.signing import SIGNATURE_FILE, STATEMENT_PAYLOAD_TYPE, Signer, sign_envelope, sign_files
from fedcompose.tensors import StoredTensor, canonical_safetensors, parse_safetensors
from fedcompose.trust_state import trusted_federation
from fedcompose_coordinator import intake
from fedcompose_coordinator.intake import Receipt
from tests.federation_sim import FederationSim

Change = Callable[[Any], Any]  # alters a JSON document in place, or returns another


@dataclass
class Folder:
    """A signed folder, and the key that it should be signed with."""

    sim: FederationSim
    folder: Path
    signer: FileSigner

    def path(self, name: str) -> Path:
        return self.folder / name

    def edit(self, name: str, change: Change) -> None:
        """Change a JSON file in place."""
        document = json.loads(self.path(name).read_bytes())
        changed = change(document)
        write_json(self.path(name), document if changed is None else changed)

    def sign(self, signer: Signer | None = None) -> None:
        """Sign the folder as it is now, with provenance about the files as they are now."""
        self.path(SIGNATURE_FILE).unlink(missing_ok=True)
        digests = folder_digests(self.folder)
        subjects = [{"name": n, "digest": {"sha256": digests[n]}} for n in sorted(digests) if n != "provenance.json"]
        self.edit("provenance.json", lambda document: document.update(subject=subjects))
        self.sign_only(signer)

    def sign_only(self, signer: Signer | None = None, leave_out: str = "", **add: str) -> None:
        """Sign the folder as it is now, perhaps not as it is."""
        self.path(SIGNATURE_FILE).unlink(missing_ok=True)
        digests = {**folder_digests(self.folder), **add}
        digests.pop(leave_out, None)
        write_atomic(self.path(SIGNATURE_FILE), sign_files("folder", digests, signer or self.signer))

    def sign_statement(self, change: Change) -> None:
        """Sign another statement about the files, with the right key."""
        bundle = json.loads(self.path(SIGNATURE_FILE).read_bytes())
        statement = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
        changed = change(statement)
        payload = json.dumps(statement if changed is None else changed).encode()
        envelope = json.loads(sign_envelope(payload, STATEMENT_PAYLOAD_TYPE, [self.signer]))
        envelope["signatures"][0]["keyid"] = ""
        self.path(SIGNATURE_FILE).write_text(json.dumps(bundle | {"dsseEnvelope": envelope}))

    def rewrite(self, name: str, change: Callable[[bytes], bytes]) -> None:
        """Change a file's bytes, which must make a difference."""
        before = self.path(name).read_bytes()
        after = change(before)
        assert after != before
        self.path(name).write_bytes(after)

    def tensors(self, change: Callable[[dict[str, StoredTensor]], Any]) -> None:
        tensors = dict(parse_safetensors(self.path("adapter_model.safetensors").read_bytes()))
        change(tensors)
        self.path("adapter_model.safetensors").write_bytes(canonical_safetensors(tensors))

    def claim(self, **parameters: Any) -> None:
        """Change what the provenance claims, and sign it."""
        self.edit("provenance.json", lambda d: claims_of(d).update(parameters))
        self.sign()

    def stranger(self) -> FileSigner:
        """A key that nobody enrolled."""
        return load_signer(new_key(self.sim.folder / "eve", "eve", "site", "clock", None).private)


def claims_of(provenance: dict[str, Any]) -> dict[str, Any]:
    claims: dict[str, Any] = provenance["predicate"]["buildDefinition"]["externalParameters"]
    return claims


class Contribution(Folder):
    """An adapter or a set of traces of site-a, about to be received by a coordinator with an empty store."""

    def refusal(self) -> str:
        before = self.stored()
        try:
            receipt = self.receive(self.folder)
        except RefusedError as error:  # the coordinator's own memory or clock is not right
            return explained(error)
        finally:
            assert self.stored() == before
        assert receipt.refusal is not None, f"the attack was {receipt.outcome}"
        assert receipt.kept is not None
        assert json.loads((receipt.kept / "reason.json").read_bytes())["code"] == receipt.refusal.code
        assert self.lines()[-1]["event"] == "refused"
        return explained(receipt.refusal)

    def admit(self) -> None:
        assert self.receive(self.folder).outcome == "admitted"
        assert self.stored()

    def receive(self, folder: Path) -> Receipt:
        """As `fedcompose coordinator receive`: under the federation file that this machine accepts."""
        sim = self.sim
        federation = trusted_federation(sim.envelope, [sim.root.keyid], sim.now)
        (receipt,) = intake.receive([folder], sim.coordinator_home, federation, sim.base, sim.now)
        return receipt

    def stored(self) -> dict[str, bytes]:
        """Every byte that the coordinator holds for admitted."""
        return {str(path): path.read_bytes() for path in self.sim.coordinator_home.glob("store/*/*")}

    def lines(self) -> list[dict[str, Any]]:
        """What the coordinator wrote down."""
        path = self.sim.coordinator_home / "ledger.jsonl"
        return [json.loads(line) for line in path.read_bytes().splitlines()]

    def another(self, call: Call | None = None) -> Path:
        """The adapter that site-a contributes next, made in a copy of its folder."""
        sites = {"site-a": self.sim.sites["site-a"]}
        if not sites["site-a"].folder.is_relative_to(self.sim.folder):
            folder = copied(sites["site-a"].folder, self.sim.folder / "site-a")
            self.sim.sites = {**self.sim.sites, "site-a": replace(sites["site-a"], folder=folder)}
        return self.sim.contribute("site-a", call=call)[0].path

    def call(self, nonce: bytes = bytes(range(32)), **options: Any) -> Call:
        """A call that this coordinator made, an hour long."""
        sim = self.sim
        options = {"want": ["adapter"], "deadline": sim.now + timedelta(hours=1), **options}
        envelope = make_call(sim.federation, sim.coordinator, sim.base.name, now=sim.now, nonce=nonce, **options)
        call = read_own_call(envelope)
        write_atomic(sim.coordinator_home / "calls" / f"{call.id}.json", envelope)
        return call


class Release(Folder):
    """A release of two sites, about to be verified by somebody who knows the root's fingerprint."""

    def refusal(self) -> str:
        return refusal_of(self.verify)

    def admit(self) -> None:
        self.verify()

    def verify(self) -> None:
        verify_release(ReceivedRelease(self.folder), [self.sim.root.keyid], self.sim.now)


def refusal_of(action: Callable[[], object]) -> str:
    """The code with which `action` was refused."""
    try:
        action()
    except RefusedError as error:
        return explained(error)
    raise AssertionError("the attack was accepted")


def explained(error: FedcomposeError) -> str:
    """The code of a refusal whose text is one that a terminal may print and a person can read."""
    text = error.diagnostics()
    assert all(line.isprintable() for line in text.split("\n")), ascii(text)
    assert len(error.what.split()) >= 3, error.what
    assert len(text) < 2000
    return error.code


def copied(source: Path, target: Path) -> Path:
    shutil.copytree(source, target, copy_function=shutil.copyfile)
    return target


def elsewhere(released: FederationSim, folder: Path) -> FederationSim:
    """The same federation with a coordinator that has nothing yet, in another folder."""
    return replace(released, folder=folder)


def an_adapter(released: FederationSim, tmp_path: Path) -> Contribution:
    site = released.sites["site-a"]
    folder = copied(site.outbox / "adapter", tmp_path / "adapter")
    return Contribution(elsewhere(released, tmp_path), folder, site.signer)


def some_traces(released: FederationSim, tmp_path: Path) -> Contribution:
    site = released.sites["site-a"]
    folder = copied(site.outbox / "traces", tmp_path / "traces")
    return Contribution(elsewhere(released, tmp_path), folder, site.signer)


def a_release(released: FederationSim, tmp_path: Path) -> Release:
    folder = copied(released.coordinator_home / "release", tmp_path / "release")
    return Release(elsewhere(released, tmp_path), folder, released.coordinator)


# --- what several tables do -----------------------------------------------------------------------

Mutation = Callable[[Any], object]
Cases = dict[str, tuple[Mutation, str]]  # by its id in the catalogue: what is done, and the code of the refusal


def with_file(name: str, data: bytes = b"x") -> Mutation:
    """A file that was not there, and that nobody signed."""
    return lambda attack: write_atomic(attack.path(name), data)


def with_signed_file(name: str, data: bytes) -> Mutation:
    """A file with another content, signed."""

    def mutate(attack: Folder) -> None:
        attack.path(name).write_bytes(data)
        attack.sign()

    return mutate


def with_tensors(change: Callable[[dict[str, StoredTensor]], Any]) -> Mutation:
    def mutate(attack: Folder) -> None:
        attack.tensors(change)
        attack.sign()

    return mutate


def tensor(shape: tuple[int, ...], value: bytes = bytes(4), dtype: str = "F32") -> StoredTensor:
    count = 1
    for size in shape:
        count *= size
    return StoredTensor(dtype, shape, memoryview(value * count))


def symlink(name: str) -> Mutation:
    """The file lies elsewhere, and a link takes its place."""

    def mutate(attack: Folder) -> None:
        moved = attack.folder.parent / "elsewhere"
        attack.path(name).rename(moved)
        attack.path(name).symlink_to(moved)

    return mutate


def hardlink(name: str) -> Mutation:
    return lambda attack: os.link(attack.path(name), attack.folder.parent / "second-name")
