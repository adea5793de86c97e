"""`fedcompose coordinator`: init, call, collect, receive, compose, evaluate, release, report, in that order; ledger."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from fedcompose.bases import Base, resolve_base
from fedcompose.commands.keys import PassphraseFile
from fedcompose.console import AsJson, accuracy_table, next_steps, out, print_json, print_whole, progress_bars
from fedcompose.contribution import VerifiedContribution
from fedcompose.errors import ConfigError, RefusedError
from fedcompose.explanations import EXPLANATIONS
from fedcompose.federation import Federation
from fedcompose.files import (
    MAX_JSON_BYTES,
    dir_hash,
    folder_digests,
    read_json,
    read_limited,
    sha256_file,
    write_atomic,
)
from fedcompose.keys import load_signer
from fedcompose.settings import fill_template
from fedcompose.trust_state import trusted_federation
from fedcompose_coordinator import commands_flower, commands_ledger
from fedcompose_coordinator.approvals import read_rule
from fedcompose_coordinator.config import CONFIG_NAME, CoordinatorConfig, load_config
from fedcompose_coordinator.decisions import deciding

if TYPE_CHECKING:  # torch takes seconds to import
    from fedcompose_coordinator.intake import Receipt
    from fedcompose_coordinator.lessons import Lesson

CANDIDATE = "candidate"
ATTENTION_ONLY = "control-attention-only"

app = typer.Typer(no_args_is_help=True, help="The coordinator: verify what sites ship, compose, evaluate, release.")
Home = Annotated[Path, typer.Option("--home", help="The coordinator's folder, where coordinator.toml is.")]
Fingerprints = Annotated[
    list[str] | None, typer.Option("--root-fingerprint", help="Fingerprint of the federation's root, the first time.")
]


@app.command()
def init(
    coordinator_id: Annotated[str, typer.Option("--id", help="Your name in the federation.")] = "hub",
    base: Annotated[str, typer.Option(help="Base model: alias, folder or hub id.")] = "smollm2-135m",
    home: Home = Path(),
) -> None:
    """Write a commented coordinator.toml to adapt.

    Example: fedcompose coordinator init --id hub
    """
    path = home / CONFIG_NAME
    if path.exists():
        raise ConfigError("COORDINATOR_EXISTS", f"{path} is already there", fix="edit it, or remove it first")
    write_atomic(path, fill_template("fedcompose_coordinator", CONFIG_NAME, id=coordinator_id, base=base).encode())
    load_config(home)
    out.print(f"Wrote {path}", markup=False)
    next_steps(f"fedcompose keys new {coordinator_id} --role coordinator", "fedcompose coordinator receive DIR ...")


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

    config, federation, base = _open(home, root_fingerprint)
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
    home: Home = Path(),
    attention_only: Annotated[
        bool, typer.Option("--attention-only", help="Train the control: the attention LoRA without any expert.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train the router and the attention LoRA over the admitted experts.

    Example: fedcompose coordinator compose
    """
    from fedcompose_coordinator.compose import ComposeSettings
    from fedcompose_coordinator.compose import compose as train_router

    config, federation, base = _open(home, None)
    admitted = _admitted(home, federation)
    wanted = config.compose
    settings = ComposeSettings(
        steps=wanted.steps, batch=wanted.batch, router_lr=wanted.router_lr, attention_lr=wanted.attention_lr,
        attention_rank=wanted.attention_rank, attention_alpha=2 * wanted.attention_rank,
    )  # fmt: skip
    target = home / (ATTENTION_ONLY if attention_only else CANDIDATE)
    with progress_bars() as bars:
        lessons = _lessons(config, admitted, base, bars)
        bar = bars.add_task("compose", total=settings.steps, note="")

        def show(step: int, steps: int, note: str) -> None:
            bars.update(bar, completed=step, total=steps, note=note)

        composition = train_router(
            admitted, lessons, base, settings, wanted.seed, target, experts=not attention_only, on_step=show
        )
    with deciding(home, datetime.now(UTC)) as decisions:
        decisions.record(
            "composed", candidate=dir_hash(folder_digests(target)),
            composition=sha256_file(target / "composition.json"),
            experts=[expert["dirHash"] for expert in composition["experts"]],
        )  # fmt: skip
    if as_json:
        print_json(composition)
        return
    out.print(f"Composed {len(composition['experts'])} experts from {len(lessons)} traces in {target}", markup=False)
    next_steps("fedcompose coordinator evaluate")


@app.command()
def evaluate(
    home: Home = Path(),
    worker: Annotated[bool, typer.Option("--worker", hidden=True)] = False,
    as_json: AsJson = False,
) -> None:
    """Measure base, experts, candidate and controls on the same held-out prompts.

    Example: fedcompose coordinator evaluate
    """
    from fedcompose_coordinator.bench import greedy_answers, open_bench
    from fedcompose_coordinator.evaluation import CELLS_FOLDER, Domain, finished, make_plan, measure
    from fedcompose_coordinator.evaluation import evaluate as measure_all

    config, federation, base = _open(home, None)
    admitted = _admitted(home, federation)
    control = home / ATTENTION_ONLY if (home / ATTENTION_ONLY).is_dir() else None
    wanted = config.evaluate
    plan = make_plan(
        home / CANDIDATE, admitted, [Domain(name, d.site, d.generator, d.config) for name, d in config.domains.items()],
        base, per_domain=wanted.prompts_per_domain, max_new_tokens=wanted.max_new_tokens, attention_only=control,
        seed=config.compose.seed,
    )  # fmt: skip

    def bench() -> Any:
        return open_bench(home / CANDIDATE, admitted, base, control)

    if worker:
        measure(plan, home / CELLS_FOLDER, bench, greedy_answers)
        return
    with progress_bars() as bars:
        bar = bars.add_task("evaluate", total=len(plan.cells()), completed=finished(plan, home / CELLS_FOLDER), note="")
        evaluation = measure_all(
            plan, home, bench, greedy_answers, processes=wanted.processes,
            workers=[sys.executable, "-m", "fedcompose", "coordinator", "evaluate", "--home", str(home), "--worker"],
            on_cell=lambda done, of: bars.update(bar, completed=done, total=of),
        )  # fmt: skip
    if as_json:
        print_json(evaluation)
        return
    out.print(accuracy_table(evaluation["accuracy"]))
    next_steps("fedcompose coordinator release")


@app.command()
def release(home: Home = Path(), passphrase_file: PassphraseFile = None, as_json: AsJson = False) -> None:
    """Sign the candidate and its ingredients as one folder that anyone can verify.

    Example: fedcompose coordinator release
    """
    from fedcompose_coordinator.publish import release as publish

    config, federation, _ = _open(home, None)
    signer = load_signer(config.key, passphrase_file, folder=home)
    made = publish(home, signer, federation, home / CANDIDATE, _admitted(home, federation), datetime.now(UTC))
    if as_json:
        print_json({"path": str(made.path), "dirHash": made.dir_hash})
        return
    out.print(f"Signed release {made.dir_hash[:16]} in {made.path}", markup=False)
    next_steps(f"fedcompose verify {made.path}", f"fedcompose serve {made.path}")


@app.command()
def report(
    home: Home = Path(),
    training: Annotated[
        list[Path] | None, typer.Option(help="A site's runs/DOMAIN/result.json, where its owner shares it. Repeatable.")
    ] = None,
    to: Annotated[Path | None, typer.Option("--out", help="Folder for report.html and report.json.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write report.html, to look at, and report.json with the same numbers.

    Example: fedcompose coordinator report --out .
    """
    from fedcompose.release import ReceivedRelease, verify_release
    from fedcompose_coordinator.report import describe_release, training_logs, write_report

    _, federation, base = _open(home, None)
    made = verify_release(ReceivedRelease(home / "release"))
    sizes, provenance = describe_release(made, _admitted(home, federation), base.path)
    folder = to or home
    evaluation = read_json(home / "evaluation.json")
    written = write_report(evaluation, training_logs(training or []), sizes, provenance, folder)
    if as_json:
        print_json(written)
        return
    out.print(accuracy_table(evaluation["accuracy"]))
    out.print(f"Report {folder / 'report.html'}", markup=False)


def _open(home: Path, fingerprints: list[str] | None) -> tuple[CoordinatorConfig, Federation, Base]:
    """Settings, trusted federation, and the base, which must be one of the federation's.

    The ledger and the clock are looked at first, so that nothing begins that could not be written down at its end.
    """
    config, now = load_config(home), datetime.now(UTC)
    envelope = read_limited(home / config.federation, MAX_JSON_BYTES)
    federation = trusted_federation(envelope, fingerprints, now)
    with deciding(home, now):
        pass
    base = resolve_base(config.base)
    known = {entry.dir_hash: entry.name for entry in federation.base_models}
    if base.digest not in known:
        raise RefusedError(
            "BASE_MISMATCH",
            f"{config.base} is not a base of federation {federation.name!a}",
            expected=", ".join(f"{name} {digest[:16]}" for digest, name in known.items()),
            got=base.digest[:16],
            fix="pull the same base with the same library versions, or have the roots list this one",
        )
    return config, federation, Base(known[base.digest], base.path, base.digest)


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


def _admitted(home: Path, federation: Federation) -> list[VerifiedContribution]:
    from fedcompose_coordinator.intake import admitted

    return admitted(home, federation)


def _lessons(
    config: CoordinatorConfig, admitted: Sequence[VerifiedContribution], base: Base, bars: Any
) -> list[Lesson]:
    """The sites' traces; where a site shipped none, its expert sampled on the domain's declared generator."""
    from fedcompose_coordinator.lessons import lessons_of
    from fedcompose_coordinator.sampled import sample_lessons

    lessons = lessons_of(admitted)
    covered = {lesson.domain for lesson in lessons}
    for expert in admitted:
        declared = config.domains.get(expert.domain)
        if expert.kind == "adapter" and expert.domain not in covered and declared:
            bar = bars.add_task(f"sample {expert.site}", total=config.compose.sampled_prompts, note="")
            lessons += sample_lessons(
                expert, declared, base, config.compose, config.evaluate.max_new_tokens,
                partial(bars.advance, bar),
            )  # fmt: skip
    return lessons
