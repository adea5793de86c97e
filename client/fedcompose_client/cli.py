"""`fedcompose client`: what the owner of data does. init, train, audit, distill, review, contribute; or join."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ValidationError
from rich.progress import Progress, TaskID
from rich.table import Table

from fedcompose.call import Call, check_history, verify_call
from fedcompose.console import AsJson, next_steps, out, print_json, print_whole, progress_bars
from fedcompose.contribution import VerifiedContribution
from fedcompose.errors import ConfigError
from fedcompose.federation import Federation
from fedcompose.files import MAX_JSON_BYTES, read_limited, write_atomic
from fedcompose.parts import offer_digest
from fedcompose.settings import fill_template
from fedcompose.trust_state import trusted_federation
from fedcompose_client import commands_calls, commands_egress
from fedcompose_client.config import CONFIG_NAME, Dp, SiteConfig, load_config
from fedcompose_client.jobs import jobs, read_job, sign
from fedcompose_client.offer import outbox_parts

if TYPE_CHECKING:  # reading data takes seconds to import
    from fedcompose_client.firewall import Review

app = typer.Typer(no_args_is_help=True, help="A site: train on your own data, distill, sign a contribution.")

SPARKS = "▁▂▃▄▅▆▇█"
Site = Annotated[Path, typer.Option("--site", help="The site's folder, where site.toml is.")]
DomainName = Annotated[str, typer.Option("--domain", help="A domain of site.toml, e.g. math.")]


@app.command()
def init(
    site_id: Annotated[str, typer.Option("--id", help="The site's name in the federation.")] = "site-a",
    domain: Annotated[str, typer.Option(help="A name for the kind of problem, e.g. math.")] = "math",
    file: Annotated[Path, typer.Option(help="Your data: .jsonl, .csv or .parquet.")] = Path("train.jsonl"),
    task: Annotated[str, typer.Option(help="numeric, choice, yes_no, exact or code.")] = "numeric",
    solution: Annotated[str | None, typer.Option(help="Column with worked solutions, if there is one.")] = None,
    choices: Annotated[str | None, typer.Option(help="Column with the options of a choice task.")] = None,
    traces: Annotated[str | None, typer.Option(help="A public generator to sample traces on.")] = None,
    base: Annotated[str, typer.Option(help="Base model: alias, folder or hub id.")] = "smollm2-135m",
    site: Site = Path(),
) -> None:
    """Write a commented site.toml to adapt.

    Example: fedcompose client init --id site-a --domain math --file train.jsonl --task numeric --solution solution
    """
    path = site / CONFIG_NAME
    if path.exists():
        raise ConfigError("SITE_EXISTS", f"{path} is already there", fix="edit it, or remove it first")
    columns = [
        f'{role} = "{column}"' if column else f'# {role} = "{role}"'
        for role, column in (("solution", solution), ("choices", choices))
    ]
    source = f'[domains.{domain}.traces]\ngenerator = "{traces}"' if traces else (
        f'# [domains.{domain}.traces]\n# generator = "chain_sum"'
    )  # fmt: skip
    text = fill_template(
        "fedcompose_client", CONFIG_NAME, id=site_id, base=base, domain=domain, file=file.as_posix(), task=task,
        columns="\n".join(columns), traces=source,
    )  # fmt: skip
    write_atomic(path, text.encode())
    load_config(site)
    out.print(f"Wrote {path}", markup=False)
    next_steps(f"fedcompose client train --domain {domain}{_at(site)}")


@app.command()
def train(
    domain: DomainName,
    site: Site = Path(),
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Remove the run and all that was made of it, and start again.")
    ] = False,
    dp_epsilon: Annotated[
        float | None, typer.Option(help="Train with differential privacy, spending at most this epsilon.")
    ] = None,
    dp_delta: Annotated[
        float | None, typer.Option(help="Its delta, at most 1 / the number of units.", show_default="1e-5")
    ] = None,
    dp_unit: Annotated[
        str | None,
        typer.Option(help="Whom it protects: prompt, or user (a column in site.toml).", show_default="prompt"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Train a domain's expert; run it again after an interruption to go on.

    Example: fedcompose client train --domain math
    """
    from fedcompose_client.train import train as run_training

    dp = _dp(dp_epsilon, dp_delta, dp_unit)
    with progress_bars() as bars:
        result = run_training(site, load_config(site), domain, _stages(bars), fresh, dp)
    if as_json:
        print_json(result)
        return
    _print_accuracy(result)
    if stated := result.get("dp"):
        _print_guarantee(stated)
    out.print(f"Kept: {result['kept']}, in {site / 'runs' / domain / 'expert'}", markup=False)
    next_steps(*(f"fedcompose client {step} --domain {domain}{_at(site)}" for step in ("audit", "contribute")))


@app.command()
def audit(
    domain: DomainName,
    site: Site = Path(),
    canaries: Annotated[int, typer.Option(help="How many to plant; more show more.", min=4)] = 300,
    as_json: AsJson = False,
) -> None:
    """Measure what training keeps of single rows: train a twin with planted rows, and attack it.

    Takes about three times as long as the training. Run it again after an interruption to go on.

    Example: fedcompose client audit --domain math
    """
    from fedcompose_client.audit import audit as run_audit

    with progress_bars() as bars:
        result = run_audit(site, load_config(site), domain, _stages(bars), canaries)
    if as_json:
        print_json(result)
        return
    _print_audit(result)
    out.print(f"All numbers: {site / 'runs' / domain / 'audit' / 'audit.json'}", markup=False)
    next_steps(f"fedcompose client contribute --domain {domain}{_at(site)}")


@app.command()
def distill(domain: DomainName, site: Site = Path(), as_json: AsJson = False) -> None:
    """Sample the expert where site.toml asks for traces, keep the verified completions, and review them.

    Example: fedcompose client distill --domain math
    """
    from fedcompose_client.distill import distill as run_distillation

    config = load_config(site)
    with progress_bars() as bars:
        bar = bars.add_task("sample", total=None, note="prompts")
        result = run_distillation(site, config, domain, lambda done, of: bars.update(bar, completed=done, total=of))
    reviewed = _review(site, config, domain)
    if as_json:
        counts = {name: value for name, value in vars(result).items() if name != "path"}
        print_json({"path": str(result.path), **counts, "review": reviewed.model_dump(mode="json", by_alias=True)})
        return
    out.print(
        f"{result.sampled} completions of {result.prompts} prompts, {result.correct} correct, "
        f"{result.traces} kept in {result.path}",
        markup=False,
    )
    _print_review(reviewed, site, domain)


@app.command()
def review(
    domain: DomainName,
    site: Site = Path(),
    release: Annotated[
        str | None, typer.Option(help="Let the held traces go as well: their digest, after you have looked at them.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Judge the sampled traces by the trace firewall: which may be contributed, which are held, which stay.

    Example: fedcompose client review --domain math
    """
    reviewed = _review(site, load_config(site), domain, release)
    if as_json:
        print_json(reviewed.model_dump(mode="json", by_alias=True))
        return
    _print_review(reviewed, site, domain)


@app.command()
def gates(domain: DomainName, site: Site = Path(), as_json: AsJson = False) -> None:
    """Learn when the domain's expert should speak, to compose without traces; `contribute` then signs that as well.

    Example: fedcompose client gates --domain math
    """
    from fedcompose_client.gates import learn_gates

    with progress_bars() as bars:
        bar = bars.add_task("gates", total=None, note="")

        def step(done: int, of: int, note: str) -> None:
            bars.update(bar, completed=done, total=of, note=note)

        path = learn_gates(site, load_config(site), domain, step)
    if as_json:
        print_json({"path": str(path)})
        return
    out.print(f"Gates in {path}", markup=False)
    next_steps(f"fedcompose client contribute --domain {domain}{_at(site)}")


@app.command()
def contribute(
    domain: DomainName,
    site: Site = Path(),
    root_fingerprint: Annotated[
        list[str] | None, typer.Option(help="Fingerprint of the federation's root, the first time.")
    ] = None,
    call_id: Annotated[
        str | None, typer.Option("--call", help="The call to answer; by default the newest that is open.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Rebuild the domain's files, state where they come from, and sign them.

    Example: fedcompose client contribute --domain math
    """
    from fedcompose.bases import resolve_base
    from fedcompose.keys import load_signer
    from fedcompose_client.contribute import contribute as sign_contribution
    from fedcompose_client.firewall import check_rules

    config = load_config(site)
    settings = config.domain(domain)
    now = datetime.now(UTC)
    federation = trusted_federation(read_limited(site / config.federation, MAX_JSON_BYTES), root_fingerprint, now)
    call = _call(site, call_id, config.id, federation, now)
    if settings.traces is not None:
        check_rules(site, site / "runs" / domain, settings)
    made = sign_contribution(
        site, domain, load_signer(config.key, folder=site), federation, now, call=call, base=resolve_base(config.base),
        traces=settings.traces is not None, non_private=not settings.private, privacy=config.privacy, use=config.use,
    )  # fmt: skip
    if call is not None:  # from now on the coordinator may fetch it, unless it is held
        offer = offer_digest(outbox_parts(site / "outbox" / domain, call.want))
        sign(site, call.id, offer, datetime.now(UTC), hold=config.calls.release == "ask")
    if as_json:
        print_json([{"kind": each.kind, "path": str(each.path), "dirHash": each.dir_hash} for each in made])
        return
    _print_contributions(made)
    held = call is not None and config.calls.release == "ask"
    next_steps(
        f"fedcompose verify {site / 'outbox' / domain} --federation {site / config.federation}",
        *([f"fedcompose client preview{_at(site)}   and then release it"] if held else []),
        f"fedcompose coordinator receive {site / 'outbox' / domain}   (at the coordinator)",
    )


def _dp(epsilon: float | None, delta: float | None, unit: str | None) -> Dp | None:
    """What the options ask for; a part of a guarantee is none."""
    given = {"epsilon": epsilon, "delta": delta, "unit": unit}
    asked = {name: value for name, value in given.items() if value is not None}
    if not asked:
        return None
    try:
        return Dp.model_validate(asked)
    except ValidationError as error:
        problems = ", ".join(f"--dp-{each['loc'][0]}: {each['msg']}" for each in error.errors())
        raise ConfigError("DP_UNSOUND", "the options ask for no guarantee that there is", got=problems) from error


def _stages(bars: Progress) -> Callable[[str, int, int, str], None]:
    """One bar for each stage."""
    tasks: dict[str, TaskID] = {}

    def show(stage: str, step: int, steps: int, note: str) -> None:
        if stage not in tasks:
            tasks[stage] = bars.add_task(stage.replace("_", "-"), total=steps, note="")
        bars.update(tasks[stage], completed=step, total=steps, note=note)

    return show


def _print_guarantee(stated: Mapping[str, Any]) -> None:
    out.print(
        f"Differential privacy: epsilon {stated['epsilon']:g} at delta {stated['delta']:g}, per {stated['unit']}, "
        f"of about {stated['units']}; noise {stated['noise_multiplier']:g} times what one may change. Not counted: "
        f"{', '.join(stated['uncounted'])}. The accuracies above are of private rows and stay here.\n"
        "Compare them with the base: with epsilon 8 we saw 1,200 units teach nothing, and 11,000 very little.",
        markup=False,
    )


def _print_audit(result: Mapping[str, Any]) -> None:
    table = Table("attack", "AUC", "95 % interval", "found at 1 % false alarms", "AUC, overfitted", box=None)
    for name, found in result["twin"]["attacks"].items():
        area, hits = found["auc"], found["tpr_0.01"]
        control = result["overfitted"]["attacks"][name]["auc"]["value"]
        seen = f"{hits['value']:.0%} ({hits['low']:.0%} – {hits['high']:.0%})" if hits else "too few canaries"
        interval = f"{area['low']:.2f} – {area['high']:.2f}"
        table.add_row(name, f"{area['value']:.2f}", interval, seen, f"{control:.2f}")
    out.print(table)
    bound = result["epsilon"]
    out.print(f"Epsilon is at least {bound['low']:.2f}; this audit could have shown {bound['cap']:.2f} at most.")
    out.print(f"The overfitted twin by the same thresholds: {result['overfitted_verdict']}")
    out.print(f"Verdict: {result['verdict']}", style="bold")
    for reason in result["reasons"]:
        out.print(f"  {reason}", markup=False)


def _review(site: Path, config: SiteConfig, domain: str, release: str | None = None) -> Review:
    from fedcompose_client import firewall
    from fedcompose_client.own_rows import dp_of

    run = site / "runs" / domain
    opened = firewall.open_firewall(site, config.domain(domain), dp_of(run))
    return firewall.review(run, firewall.read_sampled(run), opened, release)


def _print_review(reviewed: Review, site: Path, domain: str) -> None:
    run = site / "runs" / domain
    out.print(f"{reviewed.passed} traces may be contributed: {run / 'traces.jsonl'}", markup=False)
    for reason, count in sorted(reviewed.reasons.items()):
        out.print(f"  {count:>6} stopped by {reason}", markup=False)
    if reviewed.identifiers_too_short:
        out.print(f"{reviewed.identifiers_too_short} identifiers are too short to be looked for", markup=False)
    if reviewed.held and not reviewed.released:
        out.print(f"Held, to look at: {run / 'held.jsonl'}", markup=False)
        next_steps(f"fedcompose client review --domain {domain}{_at(site)} --release {reviewed.held}")
    next_steps(f"fedcompose client contribute --domain {domain}{_at(site)}")


def _call(site: Path, call_id: str | None, site_id: str, federation: Federation, now: datetime) -> Call | None:
    """The call of this id; without one the newest call to this site that is open and was not refused.

    A call that does not verify stops everything.
    """
    if call_id is not None:
        return verify_call(read_job(site, call_id).envelope, federation, site_id, now)
    kept = jobs(site)
    check_history(job.call for job in kept)
    still_open = [job for job in kept if job.call.deadline > now and job.state != "refused"]
    calls = [verify_call(job.envelope, federation, site_id, now) for job in still_open]
    return max(calls, key=lambda call: call.id, default=None)


def _at(site: Path) -> str:
    """How a next command says which site it means."""
    return "" if site == Path() else f" --site {shlex.quote(str(site))}"


def _print_accuracy(result: dict[str, Any]) -> None:
    table = Table("", "accuracy", "95 % interval", "n", box=None)
    for name, label in (("base", "base"), ("warmup", "warm-up"), ("rlvr", "RLVR")):
        if entry := result["accuracy"].get(name):
            interval = f"{entry['low']:.3f} – {entry['high']:.3f}"
            table.add_row(label, f"{entry['value']:.3f}", interval, str(entry["n"]))
    out.print(table)
    if rewards := result["rewards"]:
        out.print(f"Reward {rewards[0]:.2f} {_sparkline(rewards)} {rewards[-1]:.2f}")


def _sparkline(values: Sequence[float], width: int = 40) -> str:
    """Values as small bars, averaged into at most `width` of them."""
    count = min(width, len(values))
    edges = [index * len(values) // count for index in range(count + 1)]
    means = [sum(values[low:high]) / (high - low) for low, high in itertools.pairwise(edges)]
    low, span = min(means), (max(means) - min(means)) or 1.0
    return "".join(SPARKS[round((mean - low) / span * (len(SPARKS) - 1))] for mean in means)


def _print_contributions(made: Sequence[VerifiedContribution]) -> None:
    table = Table("signed", "kind", "size", "digest", box=None)
    for each in made:
        size = sum(path.stat().st_size for path in each.path.iterdir())
        table.add_row(str(each.path), each.kind, f"{size / 1e6:.2f} MB", each.dir_hash[:16])
    print_whole(table)


commands_egress.register(app)  # after the commands above, for --help lists them in this order
commands_calls.register(app)
