"""`fedcompose coordinator call`, `export-call` and `collect`: ask the sites.

A call is handed over by `start`, or carried by hand. With `--sites` the sites are folders on this machine: `call` and
`collect` do everything in this process, without any network.
"""

from __future__ import annotations

import secrets
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedcompose.bases import resolve_base
from fedcompose.call import MAX_CALL_BYTES, make_call, read_own_call
from fedcompose.commands.keys import PassphraseFile
from fedcompose.console import AsJson, next_steps, out, print_json
from fedcompose.contribution import KINDS, Kind
from fedcompose.document import format_time
from fedcompose.errors import ConfigError
from fedcompose.federation import Federation
from fedcompose.files import MAX_JSON_BYTES, read_limited, write_atomic
from fedcompose.keys import load_signer
from fedcompose.trust_state import trusted_federation
from fedcompose_coordinator.config import CONFIG_NAME, load_config
from fedcompose_coordinator.decisions import deciding
from fedcompose_coordinator.jobs import call_paths
from fedcompose_coordinator.start import running_pid

if TYPE_CHECKING:  # Flower takes seconds to import
    from fedcompose_coordinator.flower import Outcome, Step

LOCAL_S = 0.01  # between looking for answers of sites in this process
UNREMARKABLE = ("ACCEPTED", "NOT_READY")

Home = Annotated[Path, typer.Option(help="The coordinator's folder.")]
Sites = Annotated[list[Path] | None, typer.Option(help="A site's folder on this machine. Repeatable.")]


def register(app: typer.Typer) -> None:
    """Add the commands of this module to `app`."""
    app.command()(call)
    app.command()(collect)
    app.command("export-call")(export_call)


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
