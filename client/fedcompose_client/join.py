"""Be connected to the coordinator: three processes, kept going until this one ends.

    node       Flower's SuperNode; the only one that speaks to the coordinator; reads `node/` and nothing else
    executor   answers the coordinator's messages with the installed app; needs the site's folder, loopback, no network
    worker     trains and signs what the owner approved; needs the site's folder, the data and the key, no network

Each can be run by itself, as a user of its own or in a container (`join --only`).
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from datetime import datetime
from pathlib import Path
from typing import Literal, get_args

from fedcompose.errors import ConfigError
from fedcompose.files import MAX_JSON_BYTES, read_limited, write_atomic
from fedcompose.invitation import INVITATION_FILE, MAX_INVITATION_BYTES, check_newer, read_invitation
from fedcompose.keys import PASSPHRASE_FILE_VARIABLE, needs_passphrase
from fedcompose.supervision import Child, only_one, supervise
from fedcompose.trust_state import trusted_federation
from fedcompose_client.config import load_config
from fedcompose_client.node import prepare

log = logging.getLogger(__name__)

Part = Literal["node", "executor", "worker"]
PARTS: tuple[Part, ...] = get_args(Part)


def accept_invitation(site: Path, given: Path | None, now: datetime) -> Path:
    """Check the invitation, a new one or that of before, keep it, and write the SuperNode's folder from it.

    Raises: ConfigError: `INVITATION_MISSING`, and what `prepare` raises. RefusedError: `INVITATION_OLD`, and what
        `read_invitation` raises.
    """
    config, kept = load_config(site), site / INVITATION_FILE
    if given is None and not kept.exists():
        raise ConfigError(
            "INVITATION_MISSING",
            "this site has no invitation yet",
            fix="fedcompose client join INVITATION, with the file that the coordinator sent",
        )
    envelope = read_limited(given or kept, MAX_INVITATION_BYTES)
    federation = trusted_federation(read_limited(site / config.federation, MAX_JSON_BYTES), None, now)
    invitation = read_invitation(envelope, federation, now)
    if given is not None and kept.exists():
        check_newer(invitation, read_limited(kept, MAX_INVITATION_BYTES))
    folder = prepare(site, config.id, config.node_key_file, invitation, federation)
    if given is not None:
        write_atomic(kept, envelope)
    return folder


def join(site: Path, stop: threading.Event, passphrase_file: Path | None = None) -> None:
    """Keep the three processes of this site going until `stop` is set.

    Raises: ConfigError: `ALREADY_RUNNING`, `PASSPHRASE_NEEDED`.
    """
    given = passphrase_file or os.environ.get(PASSPHRASE_FILE_VARIABLE) or ""
    if not given and needs_passphrase(load_config(site).key, site):
        raise ConfigError(
            "PASSPHRASE_NEEDED",
            "the worker signs without a person, and the signing key has a passphrase",
            fix=f"name a file that holds it: --passphrase-file FILE, or {PASSPHRASE_FILE_VARIABLE}=FILE",
        )
    children = [
        Child(part, _command(site, part), {PASSPHRASE_FILE_VARIABLE: str(given) if part == "worker" else ""})
        for part in PARTS
    ]
    with only_one(site / "join.pid"):
        supervise(children, stop, _log)


def _log(part: str, what: str) -> None:
    if what == "started":
        log.info("a part of the site started", extra={"child": part})
    else:
        log.warning("a part of the site ended and is started again", extra={"child": part})


def _command(site: Path, part: Part) -> list[str]:
    return [sys.executable, "-m", "fedcompose", "client", "join", "--only", part, "--site", str(site.resolve())]
