"""`fedcompose export`: parts of a verified release in forms that other programs read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedcompose.commands.serve import BaseRef, Folder, Roots, require_packages
from fedcompose.console import AsJson, out, print_json
from fedcompose.errors import ConfigError
from fedcompose.release import ReceivedRelease, VerifiedRelease
from fedcompose.standing import verify_for_use


def register(app: typer.Typer) -> None:
    """Add the commands of this module to `app`."""
    app.command("export")(export)


def export(
    folder: Folder,
    target: Annotated[Path, typer.Option("--out", help="Where to write: a folder, or a file for a route table.")],
    merged: Annotated[
        bool, typer.Option("--merged", help="One --expert merged into the base: an ordinary model folder.")
    ] = False,
    peft: Annotated[
        bool, typer.Option("--peft", help="Every expert as the PEFT folder that its site signed, byte for byte.")
    ] = False,
    route_table: Annotated[
        bool, typer.Option("--route-table", help="Words that speak for each expert, to choose one for a whole prompt.")
    ] = False,
    vllm: Annotated[
        bool, typer.Option("--vllm", help="The whole composition, for vLLM with fedcompose installed beside it.")
    ] = False,
    expert: Annotated[str | None, typer.Option(help="The site whose expert is merged.")] = None,
    root_fingerprint: Roots = None,
    base: BaseRef = None,
    as_json: AsJson = False,
) -> None:
    """Verify a release and write parts of it for other programs. What is written is not signed by anybody.

    Example: fedcompose export release --merged --expert clinic --out clinic-merged
    """
    if [merged, peft, route_table, vllm].count(True) != 1 or merged != (expert is not None):
        raise ConfigError(
            "EXPORT_KIND",
            "it is not clear what to export",
            expected="one of --merged with --expert SITE, --peft, --route-table, --vllm",
        )
    release = verify_for_use(ReceivedRelease(folder), root_fingerprint)
    if expert is not None:
        _merged(release, expert, base, target)
        said = f"The base with {expert}'s expert merged; transformers, vLLM and others load this folder."
    elif vllm:
        _vllm(release, base, target)
        said = "The whole composition; where fedcompose is installed beside vLLM: vllm serve FOLDER"
    elif peft:
        said = "PEFT folders, with the sites' own bytes: " + _peft(release, target)
    else:
        said = "Words and scores: the prompt's words are looked up, and the expert with the highest sum is asked.\n"
        said += _table(release, target)
    if as_json:
        print_json({"out": str(target)})
    else:
        out.print(f"{said}\nWritten to {target}, not signed by anybody.", markup=False)


def _merged(release: VerifiedRelease, expert: str, base: str | None, target: Path) -> None:
    require_packages("model", "torch", "transformers", "peft")
    from fedcompose.bases import resolve_base
    from fedcompose.model.merged import export_merged

    export_merged(release, expert, resolve_base(base or release.composition["base"]["name"]), target)


def _vllm(release: VerifiedRelease, base: str | None, target: Path) -> None:
    require_packages("model", "torch", "transformers", "peft")
    from fedcompose.bases import resolve_base
    from fedcompose.model.for_vllm import export_vllm

    export_vllm(release, resolve_base(base or release.composition["base"]["name"]), target)


def _peft(release: VerifiedRelease, target: Path) -> str:
    from fedcompose.export import export_adapters

    return ", ".join(export_adapters(release, target))


def _table(release: VerifiedRelease, target: Path) -> str:
    from fedcompose.export import export_route_table

    accuracy = export_route_table(release, target)["accuracy"]
    return "Right on prompts not seen: " + ", ".join(
        f"{site} {each['right']} of {each['of']}" for site, each in accuracy.items()
    )
