"""`fedcompose coordinator invite`, `start`, `status`, `stop`: be reachable for sites, and see how far they are."""

from __future__ import annotations

import time
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import typer
from rich.live import Live
from rich.table import Table

from fedcompose import logs
from fedcompose.commands.keys import PassphraseFile
from fedcompose.console import AsJson, err, next_steps, out, print_json, print_whole
from fedcompose.errors import ConfigError
from fedcompose.files import write_atomic
from fedcompose.invitation import INVITATION_FILE, make_invitation
from fedcompose.keys import load_signer
from fedcompose.supervision import stop_on_signals
from fedcompose_coordinator.home import federation_of
from fedcompose_coordinator.start import LOG_FILE, keep_going, running_pid, start_in_background, stop_running
from fedcompose_coordinator.status import SiteStatus, read_status
from fedcompose_coordinator.tls import CA_FILE, TLS, certificate_fits, make_certificates

WATCH_EVERY_S = 2.0

Home = Annotated[Path, typer.Option(help="The coordinator's folder.")]
Fingerprints = Annotated[
    list[str] | None, typer.Option("--root-fingerprint", help="Fingerprint of the federation's root, the first time.")
]


def register(app: typer.Typer) -> None:
    """Add the commands of this module to `app`."""
    for command in (invite, start, status, stop):
        app.command()(command)


def invite(
    to: Annotated[Path | None, typer.Option("--out", help="Another place than invitation.json of your folder.")] = None,
    home: Home = Path(),
    passphrase_file: PassphraseFile = None,
    root_fingerprint: Fingerprints = None,
    as_json: AsJson = False,
) -> None:
    """Sign an invitation: where this coordinator listens, and how sites recognise it. Send it to all of them.

    A certificate that does not fit the names in coordinator.toml, or will soon end, is made anew.

    Example: fedcompose coordinator invite --out invitation.json
    """
    now = datetime.now(UTC)
    config, federation = federation_of(home, root_fingerprint)
    listen = config.listen
    signer = load_signer(config.key, passphrase_file, folder=home)
    is_new = not certificate_fits(home, listen.names, now)
    if is_new:
        make_certificates(home, listen.names, now)
    path = to or home / INVITATION_FILE
    write_atomic(path, make_invitation(federation, signer, listen.address, (home / TLS / CA_FILE).read_bytes(), now))
    if as_json:
        print_json({"path": str(path), "address": listen.address, "new_certificate": is_new})
        return
    out.print(f"Wrote {path}: {listen.address}", markup=False)
    if is_new and running_pid(home) is not None:
        next_steps("fedcompose coordinator stop", "fedcompose coordinator start   (with the new certificate)")
    else:
        next_steps("fedcompose coordinator start", f"fedcompose client join {path.name}   (at each site)")


def start(
    background: Annotated[
        bool, typer.Option("--background", help="Return when sites can connect; `stop` ends it.")
    ] = False,
    home: Home = Path(),
    root_fingerprint: Fingerprints = None,
    as_json: AsJson = False,
) -> None:
    """Listen for the sites; hand over calls, fetch what was signed, and take it in as `receive` does.

    In front it runs until it is ended (Ctrl-C) and writes its log to standard error.

    Example: fedcompose coordinator start --background
    """
    config, _ = federation_of(home, root_fingerprint)
    if not certificate_fits(home, config.listen.names, datetime.now(UTC), timedelta(0)):
        raise ConfigError(
            "TLS_MISSING",
            "there is no certificate for the names in coordinator.toml, or it has ended",
            fix="fedcompose coordinator invite, and send the new invitation to the sites",
        )
    if not background:
        logs.configure("start")
        keep_going(home, stop_on_signals())
        return
    pid = start_in_background(home)
    if as_json:
        print_json({"pid": pid, "address": config.listen.address, "log": str(home / LOG_FILE)})
        return
    out.print(f"Process {pid} listens on {config.listen.host} port {config.listen.port}", markup=False)
    out.print(f"Its log: {home / LOG_FILE}", markup=False)
    next_steps("fedcompose coordinator call", "fedcompose coordinator status --watch")


def stop(home: Home = Path(), as_json: AsJson = False) -> None:
    """End the coordinator that `start` keeps going. Whatever it was doing goes on with the next start.

    Example: fedcompose coordinator stop
    """
    pid = stop_running(home)
    if as_json:
        print_json({"stopped": pid})
    else:
        out.print("It was not running" if pid is None else f"Ended process {pid}", markup=False)


def status(
    watch: Annotated[bool, typer.Option("--watch", help="Show it anew until every site is at an end.")] = False,
    home: Home = Path(),
    as_json: AsJson = False,
) -> None:
    """Show how far each site is with the newest call.

    Example: fedcompose coordinator status --watch
    """
    sites = read_status(home, datetime.now(UTC))
    if watch:
        with Live(_table(sites), console=err, auto_refresh=False) as live:
            while not all(site.is_at_an_end for site in sites):
                time.sleep(WATCH_EVERY_S)
                sites = read_status(home, datetime.now(UTC))
                live.update(_table(sites), refresh=True)
    if as_json:
        print_json({"call": sites[0].call if sites else None, "sites": [asdict(site) for site in sites]})
        return
    if not sites:
        next_steps("fedcompose coordinator call")
        return
    print_whole(_table(sites))
    if all(site.is_at_an_end for site in sites):
        next_steps("fedcompose coordinator compose")


def _table(sites: list[SiteStatus]) -> Table:
    now = datetime.now(UTC)
    table = Table("site", "domain", "state", "bytes", "last seen", box=None)
    for site in sites:
        size = f"{max(site.bytes, 0)} of {site.total}" if site.total >= 0 else ""
        table.add_row(site.site, site.domain, site.said(), size, site.seen(now))
    return table
