"""`fedcompose bench serve`: how fast a release answers on this machine, beside other ways to answer."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.table import Table

from fedcompose.commands.serve import BaseRef, Bfloat16, Folder, Roots, load_engine, require_packages
from fedcompose.console import AsJson, print_json, print_whole, progress_bars
from fedcompose.release import ReceivedRelease
from fedcompose.standing import verify_for_use

TOGETHER = (1, 8, 32)

bench_app = typer.Typer(help="Measure on this machine.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add the commands of this module to `app`."""
    app.add_typer(bench_app, name="bench")


@bench_app.command("serve")
def serve(
    folder: Folder,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of each answer.")] = 32,
    requests: Annotated[int, typer.Option(min=1, help="Requests at each number of requests at a time.")] = 32,
    against: Annotated[
        list[str] | None,
        typer.Option(metavar="MODEL@URL", help="Another OpenAI server to measure too, say vLLM's. Repeatable."),
    ] = None,
    bfloat16: Bfloat16 = False,
    root_fingerprint: Roots = None,
    base: BaseRef = None,
    as_json: AsJson = False,
) -> None:
    """Measure throughput and waiting times at 1, 8 and 32 requests at a time, beside static batches.

    Example: fedcompose bench serve release
    """
    release = verify_for_use(ReceivedRelease(folder), root_fingerprint)
    require_packages("serve", "torch", "transformers", "peft")
    engine = load_engine(release, base, bfloat16)
    from fedcompose.bases import resolve_base
    from fedcompose.model.composed import load_release
    from fedcompose.serve.bench import Timing, measure_engine, measure_static, measure_url, questions

    plain = load_release(release, engine.dtype, None if base is None else resolve_base(base))
    prompts, found = questions(requests), list[Timing]()
    others = [each.partition("@") for each in against or ()]
    with progress_bars() as bars:
        bar = bars.add_task("measured", total=len(TOGETHER) * (2 + len(others)), note="")
        measure_engine(engine, prompts[:1], 1, 2)  # the first call is slower than all others
        for together in TOGETHER:
            found.append(measure_engine(engine, prompts, together, tokens))
            bars.advance(bar)
            found.append(measure_static(*plain, prompts, together, tokens))
            bars.advance(bar)
            for model, _, url in others:
                found.append(measure_url(url.rstrip("/"), None, model, prompts, together, tokens))
                bars.advance(bar)
    engine.close()
    if as_json:
        print_json([each.as_dict() for each in found])
    else:
        print_whole(_table(found))


def _table(found: list[Any]) -> Table:
    table = Table("at a time", "by", "tokens/s", "first token", "95 %", "next token", "95 %", "CPU s", box=None)
    for each in found:
        waits = (each.first_token_s, each.first_token_p95_s, each.next_token_s, each.next_token_p95_s)
        cpu = "" if each.cpu_seconds is None else f"{each.cpu_seconds:.1f}"
        table.add_row(
            str(each.together), each.how, f"{each.tokens_per_second:.1f}", *(f"{1000 * s:.0f} ms" for s in waits), cpu
        )
    return table
