"""`fedcompose coordinator invite`, `start`, `call`, `status`, `stop`: be reachable, ask the sites, see what they do.

With `--sites` the sites are folders on this machine: `call` and `collect` do everything in this process, without any
network. `export-call` is for a call that is carried by hand.
"""

from __future__ import annotations

import secrets
import time
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.live import Live
from rich.table import Table

from fedcompose import logs
from fedcompose.bases import resolve_base
from fedcompose.call import MAX_CALL_BYTES, make_call, read_own_call
from fedcompose.commands.keys import PassphraseFile
from fedcompose.console import AsJson, err, next_steps, out, print_json, print_whole
from fedcompose.contribution import KINDS, Kind
from fedcompose.errors import ConfigError
from fedcompose.federation import Federation, format_time
from fedcompose.files import MAX_JSON_BYTES, read_limited, write_atomic
from fedcompose.invitation import INVITATION_FILE, make_invitation
from fedcompose.keys import load_signer
from fedcompose.supervision import stop_on_signals
from fedcompose.trust_state import trusted_federation
from fedcompose_coordinator.config import CONFIG_NAME, load_config
from fedcompose_coordinator.decisions import deciding
from fedcompose_coordinator.home import federation_of
from fedcompose_coordinator.jobs import call_paths
from fedcompose_coordinator.start import running_pid
from fedcompose_coordinator.status import SiteStatus, read_status
from fedcompose_coordinator.tls import CA_FILE, TLS, certificate_fits, make_certificates

if TYPE_CHECKING:  # Flower takes seconds to import
    from fedcompose_coordinator.flower import Outcome, Step

WATCH_EVERY_S = 2.0
LOCAL_S = 0.01  # between looking for answers of sites in this process
UNREMARKABLE = ("ACCEPTED", "NOT_READY")

Home = Annotated[Path, typer.Option(help="The coordinator's folder.")]
Fingerprints = Annotated[
    list[str] | None, typer.Option("--root-fingerprint", help="Fingerprint of the federation's root, the first time.")
]
Sites = Annotated[list[Path] | None, typer.Option(help="A site's folder on this machine. Repeatable.")]


def register(app: typer.Typer) -> None:
    """Add the commands of this module to `app`."""
    for command in (invite, start, stop, status, call, collect):
        app.command()(command)
    app.command("export-call")(export_call)


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
    from fedcompose_coordinator import start as running

    config, _ = federation_of(home, root_fingerprint)
    if not certificate_fits(home, config.listen.names, datetime.now(UTC), timedelta(0)):
        raise ConfigError(
            "TLS_MISSING",
            "there is no certificate for the names in coordinator.toml, or it has ended",
            fix="fedcompose coordinator invite, and send the new invitation to the sites",
        )
    if not background:
        logs.configure("start")
        running.keep_going(home, stop_on_signals())
        return
    pid = running.start_in_background(home)
    if as_json:
        print_json({"pid": pid, "address": config.listen.address, "log": str(home / running.LOG_FILE)})
        return
    out.print(f"Process {pid} listens on {config.listen.host} port {config.listen.port}", markup=False)
    out.print(f"Its log: {home / running.LOG_FILE}", markup=False)
    next_steps("fedcompose coordinator call", "fedcompose coordinator status --watch")


def stop(home: Home = Path(), as_json: AsJson = False) -> None:
    """End the coordinator that `start` keeps going. Whatever it was doing goes on with the next start.

    Example: fedcompose coordinator stop
    """
    from fedcompose_coordinator.start import stop_running

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


def export_call(
    to: Annotated[Path, typer.Option("--out", help="Where to put it, say on a stick.")],
    home: Home = Path(),
    as_json: AsJson = False,
) -> None:
    """Write the newest call, which is signed, to a file that is carried to the sites by hand.

    Example: fedcompose coordinator export-call --out /media/stick/call.json
    """
    calls = call_paths(home)
    if not calls:
        raise ConfigError("CALL_MISSING", f"there is no call in {home / 'calls'}", fix="fedcompose coordinator call")
    write_atomic(to, read_limited(calls[-1], MAX_CALL_BYTES))
    if as_json:
        print_json({"path": str(to), "call": calls[-1].stem})
        return
    out.print(f"Wrote {to}", markup=False)
    next_steps(f"fedcompose client import-call {to.name}   (at each site)", "fedcompose coordinator receive DIR ...")


def call(
    want: Annotated[list[str] | None, typer.Option(help="adapter or traces. Repeatable; both by default.")] = None,
    days: Annotated[int, typer.Option(min=1, max=365, help="Until the deadline.")] = 14,
    sites: Sites = None,
    home: Home = Path(),
    passphrase_file: PassphraseFile = None,
    as_json: AsJson = False,
) -> None:
    """Ask every site of the federation to contribute: write a signed call, which `start` hands to the sites.

    With --sites it is handed to those folders at once.

    Example: fedcompose coordinator call --days 7
    """
    now = datetime.now(UTC)
    config = load_config(home)
    federation = trusted_federation(read_limited(home / config.federation, MAX_JSON_BYTES), None, now)
    signer = load_signer(config.key, passphrase_file, folder=home)
    base = _agreed_base(federation, config.base)
    kinds = [_kind(name) for name in want] if want else list(KINDS)
    with deciding(home, now) as decisions:
        envelope = make_call(
            federation, signer, base, kinds, deadline=now + timedelta(days=days), now=now,
            nonce=secrets.token_bytes(32), lora=config.call, ledger=decisions.head,
        )  # fmt: skip
        made = read_own_call(envelope)
        path = home / "calls" / f"{made.id}.json"
        decisions.record("called", call=made.id, sha256=made.digest)
        write_atomic(path, envelope)
    if not as_json:
        called = ", ".join(f"{site.id} ({site.domain})" for site in made.sites)
        out.print(f"{path}: {called}, until {format_time(made.deadline)}", markup=False)
    outcomes = _take_step("call", home, sites, as_json) if sites else []
    if as_json:
        print_json({"call": str(path), "id": made.id, "sites": [asdict(outcome) for outcome in outcomes]})
    elif not sites:
        running = running_pid(home) is not None
        next_steps(
            "fedcompose coordinator status --watch" if running else "fedcompose coordinator start",
            "fedcompose coordinator export-call --out FILE   (to be carried by hand)",
        )
    else:
        next_steps("the sites train and contribute; then: fedcompose coordinator collect --sites DIR ...")
    _exit(outcomes)


def collect(sites: Sites = None, home: Home = Path(), as_json: AsJson = False) -> None:
    """Fetch what the sites signed for the newest call; those that are not ready say how far they are.

    Example: fedcompose coordinator collect --sites ../sites/math --sites ../sites/logic
    """
    if not sites:
        raise ConfigError(
            "SITES_MISSING", "no site was named", fix="--sites DIR; `fedcompose coordinator start` fetches by itself"
        )
    outcomes = _take_step("collect", home, sites, as_json)
    folders = [folder for outcome in outcomes for folder in outcome.folders]
    if as_json:
        print_json({"folders": folders, "sites": [asdict(outcome) for outcome in outcomes]})
    elif folders:
        next_steps(f"fedcompose coordinator receive {' '.join(folders)}")
    _exit(outcomes)


def _take_step(step: Step, home: Path, sites: list[Path], as_json: bool) -> list[Outcome]:
    """Run the ServerApp against sites on this machine, telling of each site as it answers."""
    from fedcompose_coordinator.flower import make_server_app
    from fedcompose_coordinator.local_grid import run_locally, site_apps

    outcomes: list[Outcome] = []

    def report(outcome: Outcome) -> None:
        outcomes.append(outcome)
        if not as_json:
            out.print(_line(outcome), markup=False)

    run_locally(make_server_app(home, step, report, node_timeout_s=0, hear_every_s=LOCAL_S), site_apps(sites))
    return sorted(outcomes, key=lambda outcome: outcome.site)


def _line(outcome: Outcome) -> str:
    text = f"  {outcome.site} ({outcome.domain}): {outcome.code}"
    status = outcome.status
    if status is None or status.state == "ready":
        return "\n".join([text, *(f"    {folder}" for folder in outcome.folders)])
    text += f", {status.state}"
    if status.step >= 0 and status.steps >= 0:
        text += f", step {status.step} of {status.steps}"
    return text + (f", about {status.eta_s} s left" if status.eta_s >= 0 else "")


def _exit(outcomes: list[Outcome]) -> None:
    """Status 1 when a site refused or could not be asked."""
    if any(outcome.code not in UNREMARKABLE for outcome in outcomes):
        raise typer.Exit(1)


def _kind(name: str) -> Kind:
    for kind in KINDS:
        if kind == name:
            return kind
    raise ConfigError("CALL_INPUT", f"a site cannot contribute {name!a}", expected=" or ".join(KINDS))


def _agreed_base(federation: Federation, ref: str) -> str:
    """The federation's name for the coordinator's own base, known by its digest."""
    digest = resolve_base(ref).digest
    for base in federation.base_models:
        if base.dir_hash == digest:
            return base.name
    raise ConfigError(
        "CALL_INPUT",
        f"the federation does not build on the base {ref!a}",
        expected=", ".join(f"{base.name} ({base.dir_hash})" for base in federation.base_models),
        got=digest,
        fix=f"correct `base` in {CONFIG_NAME}, or ask the federation's roots to add this base",
    )
