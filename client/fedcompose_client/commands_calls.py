"""`fedcompose client calls`, `approve`, `refuse`, `work`, `join`, and the two that carry files by hand."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from fedcompose import logs
from fedcompose.call import MAX_CALL_BYTES
from fedcompose.commands.keys import PassphraseFile
from fedcompose.console import AsJson, next_steps, out, print_json, print_whole
from fedcompose.document import format_time
from fedcompose.errors import ConfigError
from fedcompose.files import read_limited
from fedcompose.supervision import stop_on_signals
from fedcompose_client.config import load_config
from fedcompose_client.jobs import Decision, Job, decide, jobs
from fedcompose_client.join import PARTS, Part, accept_invitation
from fedcompose_client.join import join as keep_joined
from fedcompose_client.node import FOLDER
from fedcompose_client.node import run as run_node

Site = Annotated[Path, typer.Option("--site", help="The site's folder, where site.toml is.")]
CallId = Annotated[
    str | None, typer.Argument(metavar="CALL", help="The call's id; may be left out if only one call is asked.")
]


def register(app: typer.Typer) -> None:
    """Add the commands of this module to `app`."""
    for command in (calls, approve, refuse, work, join, export):
        app.command()(command)
    app.command("import-call")(import_call)


def calls(site: Site = Path(), as_json: AsJson = False) -> None:
    """List the coordinator's calls, and what has become of each.

    Example: fedcompose client calls
    """
    listed = jobs(site)
    if as_json:
        print_json([_as_dict(job) for job in listed])
        return
    table = Table("call", "state", "wants", "until", box=None)
    for job in listed:
        table.add_row(job.call.id, job.state, ", ".join(job.call.want), format_time(job.call.deadline))
    print_whole(table)
    if any(job.state == "asked" for job in listed):
        next_steps("fedcompose client approve CALL   or   fedcompose client refuse CALL")
    if any(job.held for job in listed):
        next_steps("fedcompose client preview")


def approve(call: CallId = None, site: Site = Path(), as_json: AsJson = False) -> None:
    """Let the worker train, sign and offer a contribution to this call. A call that failed is tried again.

    Example: fedcompose client approve
    """
    _decide(site, call, "approved", as_json)
    if not as_json:
        next_steps("fedcompose client work   unless `fedcompose client join` runs, which does it")


def refuse(call: CallId = None, site: Site = Path(), as_json: AsJson = False) -> None:
    """Do nothing for this call. Work in progress ends, and what was offered is offered no more.

    Example: fedcompose client refuse
    """
    _decide(site, call, "refused", as_json)


def work(
    site: Site = Path(),
    once: Annotated[bool, typer.Option("--once", help="End when no approved call is left.")] = False,
    passphrase_file: PassphraseFile = None,
) -> None:
    """Do the work of approved calls: train, distill, contribute. Run it again after an interruption to go on.

    Example: fedcompose client work --once
    """
    from fedcompose_client.worker import work as do_work

    do_work(site, stop_on_signals(), once=once, passphrase_file=passphrase_file)


def join(
    invitation: Annotated[
        Path | None, typer.Argument(help="The file that the coordinator sent; only needed the first time.")
    ] = None,
    site: Site = Path(),
    only: Annotated[str | None, typer.Option(metavar="PART", help="Run one part only: node, executor, worker.")] = None,
    prepare: Annotated[
        bool, typer.Option("--prepare", help="Check the invitation, write node/, and start nothing.")
    ] = False,
    passphrase_file: PassphraseFile = None,
) -> None:
    """Stay connected to the coordinator: hear its calls, do what you approve, hand over what was signed.

    It runs until it is ended (Ctrl-C), and leaves nothing running behind. What a
    call may set going, site.toml says (calls.decide): by default it asks you.

    Example: fedcompose client join invitation.json
    """
    if only is not None:
        _run_part(_part(only), site, passphrase_file)
        return
    folder = accept_invitation(site, invitation, datetime.now(UTC))
    if prepare:
        out.print(f"Wrote {folder}", markup=False)
        next_steps("fedcompose client join")
        return
    logs.configure("join")
    keep_joined(site, stop_on_signals(), passphrase_file)


def import_call(
    file: Annotated[Path, typer.Argument(help="A signed call that was brought by hand.")],
    site: Site = Path(),
    as_json: AsJson = False,
) -> None:
    """Take in a call that came on a stick or by mail, checked as if it had come over the network.

    Example: fedcompose client import-call call.json
    """
    from fedcompose_client.flower import accept_call

    job = accept_call(site, read_limited(file, MAX_CALL_BYTES), datetime.now(UTC))
    _show(job, as_json)
    if not as_json and job.state == "asked":
        next_steps(f"fedcompose client approve {job.call.id}", "fedcompose client work --once")


def export(
    domain: Annotated[str, typer.Argument(help="A domain of site.toml.")],
    folder: Annotated[Path, typer.Option("--out", help="Where to put it, say on a stick.")],
    site: Site = Path(),
    as_json: AsJson = False,
) -> None:
    """Copy what was signed for a domain into a folder, to be carried to the coordinator by hand.

    Example: fedcompose client export math --out /media/stick
    """
    from fedcompose_client.offer import export as copy_signed

    written = copy_signed(site, domain, folder / load_config(site).id / domain, datetime.now(UTC))
    if as_json:
        print_json({"path": str(written)})
        return
    out.print(f"Wrote {written}", markup=False)
    next_steps(f"fedcompose coordinator receive {written}   (at the coordinator)")


def _run_part(part: Part, site: Path, passphrase_file: Path | None) -> None:
    """Be one of the parts that `join` keeps going."""
    if part == "node":
        run_node(site / FOLDER)
    elif part == "executor":
        from fedcompose_client.executor import run as run_executor
        from fedcompose_client.flower import make_app

        logs.configure("executor")
        run_executor(site / FOLDER, make_app(site))
    else:
        from fedcompose_client.worker import work as do_work

        logs.configure("worker")
        do_work(site, stop_on_signals(), once=False, passphrase_file=passphrase_file)


def _part(name: str) -> Part:
    for part in PARTS:
        if part == name:
            return part
    raise ConfigError("PART_UNKNOWN", f"a site has no part {name!a}", expected=", ".join(PARTS))


def _decide(site: Path, call: str | None, decision: Decision, as_json: bool) -> None:
    _show(decide(site, call or _only_asked(site), decision, datetime.now(UTC)), as_json)


def _only_asked(site: Path) -> str:
    """The one call that waits for a decision.

    Raises: ConfigError: `CALL_AMBIGUOUS`.
    """
    asked = [job.call.id for job in jobs(site) if job.state == "asked"]
    if len(asked) != 1:
        raise ConfigError(
            "CALL_AMBIGUOUS",
            f"{len(asked)} calls wait for a decision",
            expected="one, or the id of the call that is meant",
            got=", ".join(asked) or None,
            fix="fedcompose client calls",
        )
    return asked[0]


def _show(job: Job, as_json: bool) -> None:
    if as_json:
        print_json(_as_dict(job))
    else:
        out.print(f"{job.call.id}: {job.state}", markup=False)


def _as_dict(job: Job) -> dict[str, Any]:
    call = job.call
    return {
        "call": call.id,
        "state": job.state,
        "coordinator": call.coordinator,
        "want": list(call.want),
        "deadline": format_time(call.deadline),
        "events": [{"event": entry.event, "at": format_time(entry.at)} for entry in job.events],
    }
