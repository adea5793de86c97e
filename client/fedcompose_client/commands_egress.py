"""`fedcompose client preview`, `release` and `ledger`: what would leave this site, what may, and what has left."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from fedcompose.console import AsJson, next_steps, out, print_json, print_whole
from fedcompose.delivery import MAX_RECEIPT_BYTES, read_receipt
from fedcompose.document import format_time
from fedcompose.errors import ConfigError, RefusedError
from fedcompose.files import MAX_JSON_BYTES, read_limited
from fedcompose.trust_state import trusted_federation
from fedcompose_client.config import load_config
from fedcompose_client.egress_ledger import LEDGER_FILE, Departures, departures, keep_receipt
from fedcompose_client.jobs import Job, jobs, read_job
from fedcompose_client.jobs import release as release_offer

Site = Annotated[Path, typer.Option("--site", help="The site's folder, where site.toml is.")]
ledger = typer.Typer(no_args_is_help=True, help="What has left this site.")


def register(app: typer.Typer) -> None:
    """Add the commands of this module to `app`."""
    app.command()(preview)
    app.command()(release)
    ledger.command("show")(show)
    ledger.command("verify")(verify)
    ledger.command("keep")(keep)
    app.add_typer(ledger, name="ledger")


def preview(
    call: Annotated[
        str | None, typer.Argument(metavar="CALL", help="The call's id; by default the newest with something signed.")
    ] = None,
    site: Site = Path(),
    as_json: AsJson = False,
) -> None:
    """Show everything that leaves, or would leave, for a call: each file, each number, the first traces.

    Besides, only short answers leave: this site's name and version, the state of a
    call in one word, its step and the time left, and codes. `client ledger show` lists them.

    Example: fedcompose client preview
    """
    from fedcompose_client.preview import describe_offer

    job = read_job(site, call) if call else _newest(site)
    domain = job.call.domain_of(load_config(site).id)
    shown = {"call": job.call.id, "state": job.state} | describe_offer(site / "outbox" / domain, job.call.want)
    if as_json:
        print_json(shown)
        return
    _print_preview(shown)
    if job.held:
        next_steps(f"fedcompose client release {job.held}", f"fedcompose client refuse {job.call.id}")


def release(
    digest: Annotated[str, typer.Argument(help="The digest that `client preview` shows.")],
    site: Site = Path(),
    as_json: AsJson = False,
) -> None:
    """Let the coordinator fetch exactly what has this digest; whatever is signed later is held again.

    Example: fedcompose client release 5d0c...
    """
    job = release_offer(site, digest, datetime.now(UTC))
    if as_json:
        print_json({"call": job.call.id, "state": job.state, "offer": job.offer})
        return
    out.print(f"{job.call.id}: {job.state}", markup=False)


def show(site: Site = Path(), as_json: AsJson = False) -> None:
    """List what has left, by kind; with --json every line.

    Example: fedcompose client ledger show
    """
    found = departures(site, None)
    if as_json:
        print_json([_line(entry) for entry in found.entries])
        return
    _print_totals(found)
    next_steps("fedcompose client ledger verify")


def verify(site: Site = Path(), as_json: AsJson = False) -> None:
    """Check that no line was changed, removed or moved, and that the coordinator's receipts agree with the lines.

    Example: fedcompose client ledger verify
    """
    federation = trusted_federation(
        read_limited(site / load_config(site).federation, MAX_JSON_BYTES), None, datetime.now(UTC)
    )
    found = departures(site, federation)
    if as_json:
        print_json({"head": found.head.model_dump(), "totals": found.totals, "receipts": len(found.receipts)})
        return
    _print_totals(found)
    out.print(f"The chain holds: {found.head.entries} lines, head {found.head.head}", markup=False)
    for receipt in found.receipts:
        out.print(
            f"Coordinator {receipt.coordinator} signed for {receipt.bytes} bytes of call {receipt.call}, "
            f"at line {receipt.ledger.entries}", markup=False,
        )  # fmt: skip
    if not found.receipts:
        out.print("No receipt is kept here, so a ledger whose end was cut off would look the same.", markup=False)


def keep(
    file: Annotated[Path, typer.Argument(help="A receipt of the coordinator's, from its folder receipts/.")],
    site: Site = Path(),
    as_json: AsJson = False,
) -> None:
    """Keep a receipt that came by hand, say because the line was cut before it came over the network.

    Example: fedcompose client ledger keep receipt.json
    """
    config, envelope = load_config(site), read_limited(file, MAX_RECEIPT_BYTES)
    federation = trusted_federation(read_limited(site / config.federation, MAX_JSON_BYTES), None, datetime.now(UTC))
    receipt = read_receipt(envelope, federation)
    if receipt.site != config.id:
        raise RefusedError("DELIVERY_INVALID", "the receipt is for another site", expected=config.id, got=receipt.site)
    keep_receipt(site, envelope, receipt)
    if as_json:
        print_json({"call": receipt.call, "bytes": receipt.bytes})
        return
    next_steps("fedcompose client ledger verify")


def _newest(site: Path) -> Job:
    signed = [job for job in jobs(site) if job.held or job.offer]
    if not signed:
        raise ConfigError(
            "PREVIEW_NOTHING", "nothing is signed for any call", fix="fedcompose client work --once, or contribute"
        )
    return signed[-1]


def _print_preview(shown: Mapping[str, Any]) -> None:
    table = Table("file", "bytes", "SHA-256", box=None)
    for file in shown["files"]:
        table.add_row(file["name"], f"{file['size']:,}", file["sha256"])
    print_whole(table)
    for kind, claims in shown["claims"].items():
        out.print(f"\n{kind}, as signed:", markup=False)
        for name, value in claims.items():
            out.print(f"  {name}: {value}", markup=False)
    for trace in shown["traces"]["first"]:
        out.print(f"\n  {trace}", markup=False)
    if shown["traces"]["count"]:
        out.print(
            f"\n{shown['traces']['count']} traces in all; the rest is in the outbox's traces.jsonl.", markup=False
        )
    total = f"{shown['bytes']:,} bytes in {len(shown['files'])} files"
    out.print(f"\n{total} for call {shown['call']}, {shown['state']}; digest {shown['offer']}", markup=False)


def _print_totals(found: Departures) -> None:
    table = Table("what left", "objects", "bytes", box=None)
    for kind, (count, size) in found.totals.items():
        table.add_row(kind, f"{count:,}", f"{size:,}")
    print_whole(table)
    if not found.entries:
        out.print(f"Nothing has left: {LEDGER_FILE} is empty.", markup=False)


def _line(entry: Any) -> dict[str, Any]:
    return {"n": entry.n, "at": format_time(entry.at), "what": entry.event, **entry.fields}
