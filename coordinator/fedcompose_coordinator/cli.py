"""`fedcompose coordinator`: init, invite, start, call, receive, screen, compose, evaluate, release and report, in that
order; ledger; later remove and add."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from fedcompose.bases import Base
from fedcompose.commands.keys import PassphraseFile
from fedcompose.console import AsJson, next_steps, out, print_json, print_whole, progress_bars
from fedcompose.contribution import VerifiedContribution
from fedcompose.errors import ConfigError, RefusedError
from fedcompose.explanations import EXPLANATIONS
from fedcompose.files import dir_hash, folder_digests, sha256_file, write_atomic
from fedcompose.keys import load_signer
from fedcompose.settings import fill_template, read_settings
from fedcompose_coordinator import commands_flower, commands_ledger, commands_running
from fedcompose_coordinator.approvals import read_rule
from fedcompose_coordinator.commands_evaluate import evaluate, report
from fedcompose_coordinator.commands_screen import screen
from fedcompose_coordinator.config import CONFIG_NAME, Compose, CoordinatorConfig, load_config
from fedcompose_coordinator.decisions import deciding
from fedcompose_coordinator.home import ATTENTION_ONLY, CANDIDATE, federation_of, members_of, open_home, received_from
from fedcompose_coordinator.methods import METHODS, Recipe
from fedcompose_coordinator.tls import TLS, make_certificates

if TYPE_CHECKING:  # torch takes seconds to import
    from fedcompose_coordinator.intake import Receipt

app = typer.Typer(no_args_is_help=True, help="The coordinator: verify what sites ship, compose, evaluate, release.")
Home = Annotated[Path, typer.Option("--home", help="The coordinator's folder, where coordinator.toml is.")]
Fingerprints = Annotated[
    list[str] | None, typer.Option("--root-fingerprint", help="Fingerprint of the federation's root, the first time.")
]


@app.command()
def init(
    coordinator_id: Annotated[str, typer.Option("--id", help="Your name in the federation.")] = "hub",
    base: Annotated[str, typer.Option(help="Base model: alias, folder or hub id.")] = "smollm2-135m",
    listen: Annotated[str, typer.Option(help="HOST:PORT on which sites reach this machine.")] = "127.0.0.1:9443",
    home: Home = Path(),
) -> None:
    """Write a commented coordinator.toml to adapt, and a TLS certificate for the host on which sites reach you.

    Example: fedcompose coordinator init --id hub --listen hub.example.org:9443
    """
    path = home / CONFIG_NAME
    if path.exists():
        raise ConfigError("COORDINATOR_EXISTS", f"{path} is already there", fix="edit it, or remove it first")
    address, _, port = listen.rpartition(":")
    name = address.strip("[]")
    host = name if _is_address(name) else "0.0.0.0"  # noqa: S104 - a DNS name may be of any of this machine's addresses
    text = fill_template(
        "fedcompose_coordinator", CONFIG_NAME, id=coordinator_id, base=base, host=host, name=name, port=port
    )
    write_atomic(path, text.encode())
    make_certificates(home, load_config(home).listen.names, datetime.now(UTC))
    out.print(f"Wrote {path} and {home / TLS}", markup=False)
    next_steps(
        f"fedcompose keys new {coordinator_id} --role coordinator",
        "fedcompose coordinator invite",
        "fedcompose coordinator receive DIR ...   (what came by hand)",
    )


commands_running.register(app)
commands_flower.register(app)
app.add_typer(commands_ledger.app, name="ledger")


@app.command()
def receive(
    folders: Annotated[list[Path] | None, typer.Argument(help="Signed folders, or folders that hold some.")] = None,
    approve: Annotated[
        str | None, typer.Option(help="Approve what waits under this digest, or its first characters, instead.")
    ] = None,
    by: Annotated[str | None, typer.Option(help="With --approve: your name among the approvers.")] = None,
    key: Annotated[str | None, typer.Option(help="With --approve: your key.")] = None,
    passphrase_file: PassphraseFile = None,
    home: Home = Path(),
    root_fingerprint: Fingerprints = None,
    as_json: AsJson = False,
) -> None:
    """Verify contributions in quarantine and admit them, or refuse them with a code.

    Where coordinator.toml asks for approvals, what passed waits until enough approvers have signed for it.

    Example: fedcompose coordinator receive inbox/
    """
    from fedcompose_coordinator import intake

    config, federation, base = open_home(home, root_fingerprint)
    rule, now = read_rule(home, config.approvals, config.approvers), datetime.now(UTC)
    if approve is not None and by is not None and key is not None and not folders:
        signer = load_signer(key, passphrase_file)
        receipts = [intake.approve(home, federation, approve, by, signer, rule, now)]
    elif folders and approve is None and by is None and key is None:
        receipts = intake.receive(folders, home, federation, base, now, rule)
    else:
        raise ConfigError(
            "RECEIVE_WHAT",
            "it is not clear what to do",
            expected="folders to receive, or --approve DIGEST --by NAME --key KEY",
        )
    if as_json:
        print_json([_as_json(receipt) for receipt in receipts])
    else:
        _print_receipts(receipts)
    if any(receipt.refusal for receipt in receipts):
        raise typer.Exit(RefusedError.exit_status)
    if not as_json:
        waits = [each.contribution.dir_hash for each in receipts if each.outcome == "waiting" and each.contribution]
        next_steps(
            *(f"fedcompose coordinator receive --approve {digest[:16]} --by NAME --key KEY" for digest in waits),
            "fedcompose coordinator compose",
        )


@app.command()
def compose(
    method: Annotated[
        str | None, typer.Option(help=f"How: {', '.join(METHODS)}. By default the one in the settings.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Another seed than the one in the settings.")] = None,
    settings: Annotated[
        Path | None, typer.Option("--config", help="A file with the settings of \\[compose], to use instead of these.")
    ] = None,
    home: Home = Path(),
    attention_only: Annotated[
        bool, typer.Option("--attention-only", help="Train the control: the attention LoRA without any expert.")
    ] = False,
    to: Annotated[Path | None, typer.Option("--out", help="Another folder than candidate/, to compare.")] = None,
    as_json: AsJson = False,
) -> None:
    """Make a router over the admitted experts, which stay as they are.

    Example: fedcompose coordinator compose --method guided
    """
    config, federation, base = open_home(home)
    wanted = read_settings(settings, Compose, "fedcompose coordinator init") if settings else config.compose
    if seed is not None:
        wanted = wanted.model_copy(update={"seed": seed})
    target = to or home / (ATTENTION_ONLY if attention_only else CANDIDATE)
    admitted = members_of(home, federation)
    made = _compose(config, wanted, wanted.recipe(method), admitted, base, target, experts=not attention_only)
    if to is None:
        _record_composed(home, target, made)
    _say_composed(made, target, as_json)


@app.command()
def remove(
    site: Annotated[str, typer.Option(help="The site that leaves.")],
    level: Annotated[
        str, typer.Option(help="mask: take its expert out at once. recompose: make the candidate as if it never came.")
    ],
    home: Home = Path(),
    as_json: AsJson = False,
) -> None:
    """Leave a site out of the candidate and of all that are composed from now on.

    Example: fedcompose coordinator remove --site clinic --level mask
    """
    from fedcompose_coordinator.membership import LEVELS, forget_evaluation, leave_out, mask

    if level not in LEVELS:
        raise ConfigError("LEVEL_UNKNOWN", f"there is no level {level!a}", expected=" or ".join(LEVELS))
    if level == "recompose":
        _recompose(home, lambda received: leave_out(home, site, received, datetime.now(UTC)), as_json)
        return
    _, federation = federation_of(home)
    made = mask(home / CANDIDATE, site)
    leave_out(home, site, received_from(home, federation), datetime.now(UTC))
    forget_evaluation(home)
    _record_composed(home, home / CANDIDATE, made)
    _say_composed(made, home / CANDIDATE, as_json)


@app.command()
def add(
    site: Annotated[str, typer.Option(help="A site whose expert was received, or that was removed before.")],
    home: Home = Path(),
    as_json: AsJson = False,
) -> None:
    """Make the candidate again, by the same recipe, with one more site.

    Example: fedcompose coordinator add --site school
    """
    from fedcompose_coordinator.membership import let_in

    _recompose(home, lambda received: let_in(home, site, received), as_json)


app.command()(evaluate)
app.command()(screen)


@app.command()
def release(home: Home = Path(), passphrase_file: PassphraseFile = None, as_json: AsJson = False) -> None:
    """Sign the candidate and its ingredients as one folder that anyone can verify.

    With SOURCE_DATE_EPOCH in the environment that is the time of the release, and the same inputs give the same bytes.

    Example: fedcompose coordinator release
    """
    from fedcompose_coordinator.publish import release as publish

    config, federation, _ = open_home(home)
    signer = load_signer(config.key, passphrase_file, folder=home)
    made = publish(home, signer, federation, home / CANDIDATE, members_of(home, federation), _release_time())
    if as_json:
        print_json({"path": str(made.path), "dirHash": made.dir_hash})
        return
    out.print(f"Signed release {made.dir_hash[:16]} in {made.path}", markup=False)
    next_steps(f"fedcompose verify {made.path}", f"fedcompose serve {made.path}")


app.command()(report)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _release_time() -> datetime:
    """Now, or what the environment says, as builds have it that others can repeat."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH", "")
    return datetime.fromtimestamp(int(epoch), UTC) if epoch.isdecimal() else datetime.now(UTC)


def _compose(
    config: CoordinatorConfig,
    wanted: Compose,
    recipe: Recipe,
    admitted: Sequence[VerifiedContribution],
    base: Base,
    target: Path,
    experts: bool = True,
) -> dict[str, Any]:
    """Gather the lessons that the recipe needs and follow it, with progress on the screen."""
    from fedcompose_coordinator.compose import compose as follow
    from fedcompose_coordinator.mixed import mixed_lessons
    from fedcompose_coordinator.sampled import all_lessons

    with progress_bars() as bars:
        sampling = bars.add_task("sample", total=None, visible=False, note="")

        def sampled(site: str, count: int) -> None:
            bars.update(sampling, advance=count, visible=True, note=site)

        taught_by = [each for each in admitted if each.kind == "adapter" or recipe.settings.learn_from == "traces"]
        lessons = all_lessons(config, wanted, taught_by, base, sampled) if recipe.needs_lessons or not experts else []
        if recipe.made in ("trained", "sampled"):
            lessons += mixed_lessons(lessons, wanted.mixed_lessons, wanted.seed)
        bar = bars.add_task("compose", total=None, note="")

        def step(done: int, of: int, note: str) -> None:
            bars.update(bar, completed=done, total=of, note=note)

        return follow(admitted, lessons, base, recipe, wanted.seed, target, experts=experts, on_step=step)


def _recompose(home: Path, change: Callable[[Sequence[VerifiedContribution]], None], as_json: bool) -> None:
    """Change who takes part, then make the candidate again by its own recipe."""
    from fedcompose_coordinator.membership import forget_evaluation, same_recipe

    config, federation, base = open_home(home)
    recipe, seed = same_recipe(home / CANDIDATE)
    change(received_from(home, federation))
    wanted = config.compose.model_copy(update={"seed": seed})
    made = _compose(config, wanted, recipe, members_of(home, federation), base, home / CANDIDATE)
    forget_evaluation(home)
    _record_composed(home, home / CANDIDATE, made)
    _say_composed(made, home / CANDIDATE, as_json)


def _say_composed(composition: dict[str, Any], target: Path, as_json: bool) -> None:
    if as_json:
        print_json(composition)
        return
    lessons = sum(composition["training"].get("lessons", {}).values())
    taught = f" with {lessons} lessons" if lessons else ""
    count, method = len(composition["experts"]), composition["method"]
    out.print(f"Composed {count} experts by {method}{taught} in {target}", markup=False)
    if composition.get("masked"):
        out.print(f"Masked {', '.join(composition['masked'])}: trained with, then taken out", markup=False)
    next_steps("fedcompose coordinator evaluate")


def _record_composed(home: Path, candidate: Path, composition: dict[str, Any]) -> None:
    with deciding(home, datetime.now(UTC)) as decisions:
        decisions.record(
            "composed", candidate=dir_hash(folder_digests(candidate)),
            composition=sha256_file(candidate / "composition.json"),
            experts=[expert["dirHash"] for expert in composition["experts"]],
        )  # fmt: skip


def _as_json(receipt: Receipt) -> dict[str, Any]:
    return {
        "folder": str(receipt.source),
        "outcome": receipt.outcome,
        "digest": receipt.contribution.dir_hash if receipt.contribution else None,
        "error": receipt.refusal.as_dict() if receipt.refusal else None,
    }


def _print_receipts(receipts: Sequence[Receipt]) -> None:
    table = Table("outcome", "site", "kind", "digest", "folder", box=None)
    for receipt in receipts:
        made = receipt.contribution
        known = (made.site, made.kind, made.dir_hash[:16]) if made else ("", "", "")
        table.add_row(receipt.refusal.code if receipt.refusal else receipt.outcome, *known, Text(str(receipt.source)))
    print_whole(table)
    for receipt in receipts:
        if receipt.refusal:
            out.print(f"{receipt.refusal.diagnostics()}\n  kept in   {receipt.kept}", markup=False)
            out.print(EXPLANATIONS.get(receipt.refusal.code, ""), markup=False)
