"""A federation for transport tests: real keys, a real federation file, random bytes in the sites' outboxes.

sim = FlowerSim(tmp_path)    # site-a (math) and site-b (logic)
sim.call()                   # a signed call in the coordinator's calls/
sim.run("call")              # now the sites have accepted it
sim.fill_outbox("site-a")    # as if site-a had trained and signed
sim.run("collect")
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from fedcompose.bases import resolve_base
from fedcompose.call import make_call, read_own_call
from fedcompose.contribution import KINDS, REQUIRED, Kind
from fedcompose.drafts import create_federation, enrol
from fedcompose.files import write_atomic
from fedcompose.keys import FileSigner, load_signer, new_key
from fedcompose.parts import offer_digest
from fedcompose.trust_state import trusted_federation
from fedcompose.wire import RecordDict, request
from fedcompose_client.flower import make_app
from fedcompose_client.jobs import jobs, record
from fedcompose_client.offer import outbox_parts
from fedcompose_coordinator.flower import Outcome, make_server_app
from fedcompose_coordinator.local_grid import run_locally

FEDERATION = "urn:uuid:00000000-0000-4000-8000-000000000001"
SITES = {"site-a": "math", "site-b": "logic"}


class FlowerSim:
    def __init__(
        self,
        root: Path,
        sites: Mapping[str, str] = SITES,
        federation_id: str = FEDERATION,
        base: Path | None = None,
    ) -> None:
        self.now = datetime.now(UTC)
        self.home = root / "coordinator"
        self.sites = dict(sites)
        self.base = base or self._make_base(root / "base")
        keys = root / "keys"
        self.root_signer = load_signer(new_key(keys, "root", "root", None, None).private)
        envelope = create_federation(
            "test",
            self.root_signer,
            "root",
            {"base": resolve_base(self.base).digest},
            federation_id,
            self.now,
        )
        self.signer, envelope = self._member(keys, "hub", "coordinator", None, envelope)
        for site, domain in sites.items():
            _, envelope = self._member(keys, site, "site", domain, envelope)
            self._make_site(root, site, domain)
        lines = ['id = "hub"', f'base = "{self.base}"', f'key = "{keys / "hub.key"}"']
        write_atomic(self.home / "coordinator.toml", "\n".join(lines).encode())
        for folder in (self.home, *map(self.folder, sites)):
            write_atomic(folder / "federation.json", envelope)
        self.federation = trusted_federation(envelope, [self.root_signer.keyid], self.now)

    def folder(self, site: str) -> Path:
        return self.home.parent / "sites" / site

    def site_signer(self, site: str) -> FileSigner:
        return load_signer(self.home.parent / "keys" / f"{site}.key")

    def call(self, **changes: Any) -> bytes:
        """A call in the coordinator's folder."""
        options: dict[str, Any] = {
            "want": ["adapter", "traces"],
            "deadline": self.now + timedelta(days=7),
            "now": self.now,
            "nonce": bytes(range(32)),
        }
        envelope = make_call(self.federation, self.signer, "base", **(options | changes))
        write_atomic(self.home / "calls" / f"{read_own_call(envelope).id}.json", envelope)
        return envelope

    def fill_outbox(self, site: str, size: int = 3000, kinds: Sequence[Kind] = KINDS) -> None:
        """Random bytes under the names of a contribution; transport does not look into them."""
        source = random.Random(site)
        for kind in kinds:
            for name, limit in REQUIRED[kind].items():
                data = source.randbytes(source.randrange(min(size, limit)))
                write_atomic(self.outbox(site) / kind / name, data)
        self.sign(site)

    def sign(self, site: str) -> None:
        """Offer what lies in the outbox for the newest call that the site has accepted, if there is one."""
        kept = jobs(self.folder(site))
        if kept:
            offer = offer_digest(outbox_parts(self.outbox(site), kept[-1].call.want))
            record(self.folder(site), kept[-1].call.id, "signed", self.now, offer=offer)

    def outbox(self, site: str) -> Path:
        return self.folder(site) / "outbox" / self.sites[site]

    def inbox(self, site: str) -> Path:
        return self.home / "inbox" / site / self.sites[site]

    def run(self, step: Any, *, apps: list[Any] | None = None, **options: Any) -> dict[str, Outcome]:
        """One step over all sites, in this process; outcomes by site."""
        outcomes: list[Outcome] = []
        server = make_server_app(self.home, step, outcomes.append, node_timeout_s=0, hear_every_s=0.002, **options)
        run_locally(server, apps or [make_app(self.folder(site)) for site in self.sites])
        return {outcome.site: outcome for outcome in outcomes}

    def request(self, site: str, **changes: Any) -> RecordDict:
        """What a coordinator sends about the newest call."""
        call = read_own_call(self.newest_call())
        fields = {"call_id": call.id, "nonce": call.nonce, "domain": self.sites[site]}
        return request(**(fields | changes))

    def newest_call(self) -> bytes:
        """The signed bytes of the newest call of the coordinator."""
        return max((self.home / "calls").glob("*.json")).read_bytes()

    def _member(
        self, keys: Path, name: str, role: Any, domain: str | None, envelope: bytes
    ) -> tuple[FileSigner, bytes]:
        key = new_key(keys, name, role, domain, None)
        signer, enrolment = load_signer(key.private), key.enrolment.read_bytes()
        return signer, enrol(envelope, enrolment, self.root_signer, self.now)

    def _make_base(self, folder: Path) -> Path:
        """Enough of a base to have a digest."""
        write_atomic(folder / "config.json", b"{}")
        write_atomic(folder / "model.safetensors", b"weights")
        return folder

    def _make_site(self, root: Path, site: str, domain: str) -> None:
        lines = [
            f'id = "{site}"',
            f'base = "{self.base}"',
            f'key = "{root / "keys" / site}.key"',
            f'node_key = "{root / "keys" / site}.node.key"',
            f"[domains.{domain}]",
            'file = "data.jsonl"',
            'task = "numeric"',
        ]
        write_atomic(root / "sites" / site / "site.toml", "\n".join(lines).encode())


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
