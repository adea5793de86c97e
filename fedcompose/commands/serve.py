"""`fedcompose serve`: an OpenAI-compatible endpoint and a page around a verified release."""

from __future__ import annotations

import importlib.util
import socket
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedcompose.console import err, out
from fedcompose.errors import ConfigError, MissingError
from fedcompose.release import ReceivedRelease, VerifiedRelease, cautions, terms_of, verify_for_use

if TYPE_CHECKING:  # torch takes seconds to import
    from fedcompose.serve.engine import Engine

ADDRESS = "127.0.0.1"
GRACE_SECONDS = 3  # an answer that is being written when the server is stopped has this long

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The release.")]
Roots = Annotated[
    list[str] | None,
    typer.Option(help="A root's fingerprint, got from its owner, where this machine does not know it. Repeatable."),
]
BaseRef = Annotated[
    str | None,
    typer.Option(
        "--base", help="Where the release's base model is, if its name alone does not say: a folder or hub id."
    ),
]


def register(app: typer.Typer) -> None:
    """Add the commands of this module to `app`."""
    app.command()(serve)


def serve(
    folder: Folder,
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port to listen on; 0 takes a free one.")] = 8000,
    root_fingerprint: Roots = None,
    base: BaseRef = None,
) -> None:
    """Verify a release, load it, and answer as an OpenAI-compatible server on this machine.

    Example: fedcompose serve release
    """
    release = verify_for_use(ReceivedRelease(folder), root_fingerprint)
    require_packages("serve", "fastapi", "uvicorn", "torch", "transformers", "peft")
    import uvicorn

    with _listen(port) as listener:
        engine = load_engine(release, base)
        from fedcompose.serve.app import create_app

        _announce(engine, f"http://{ADDRESS}:{listener.getsockname()[1]}")
        config = uvicorn.Config(
            create_app(engine), log_level="warning", ws="none", timeout_graceful_shutdown=GRACE_SECONDS
        )
        with suppress(KeyboardInterrupt):  # the way to end it
            uvicorn.Server(config).run(sockets=[listener])


def require_packages(extra: str, *packages: str) -> None:
    """Raises: MissingError: `PACKAGE_MISSING`, saying how to install them, if one of them is not here."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise MissingError(
            "PACKAGE_MISSING",
            "this command needs packages that are not installed",
            got=f"no {', '.join(missing)}",
            fix=f"pip install 'fedcompose[{extra}]'",
        )


def load_engine(release: VerifiedRelease, base: str | None) -> Engine:
    """Load a verified release, saying so.

    Raises: RefusedError, MissingError: as `fedcompose.model.composed.load_release`.
    """
    from fedcompose.bases import resolve_base

    for caution in cautions(release, datetime.now(UTC)):
        err.print(f"! {caution}", markup=False, style="yellow")
    for terms in terms_of(release):
        err.print(f"To be used as its sites allow: {terms}", markup=False)
    err.print(
        f"Verified. Loading {release.composition['base']['name']} and {len(release.experts)} experts.", markup=False
    )
    from fedcompose.serve.engine import Engine

    return Engine(release, base=None if base is None else resolve_base(base))


def _listen(port: int) -> socket.socket:
    """A socket of this machine only. Taken before anything is loaded, so that a used port is known at once."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((ADDRESS, port))
    except OSError as error:
        listener.close()
        raise ConfigError(
            "PORT_UNUSABLE",
            f"cannot listen on port {port}",
            got=error.strerror,
            fix="choose another --port, or 0 for a free one",
        ) from error
    return listener


def _announce(engine: Engine, url: str) -> None:
    release = engine.release
    experts = ", ".join(f"{each.site} ({each.domain})" for each in release.experts)
    masked = release.composition.get("masked")
    if masked:
        experts += f"\nMasked    {', '.join(masked)} (was there in training, is not here)"
    question = '"messages": [{"role": "user", "content": "What is 17 + 25?"}]'
    out.print(
        f"""Verified: a release of {release.federation.name}, signed by {release.provenance.coordinator}
Experts   {experts}
Models    {", ".join(engine.models)}

Serving {url}  (a page to chat in; Ctrl-C ends)

From Python, with the openai package:

  from openai import OpenAI
  client = OpenAI(base_url="{url}/v1", api_key="none")
  answer = client.chat.completions.create(model="auto", {question.replace('"messages": ', "messages=")})
  print(answer.choices[0].message.content)

From a shell:

  curl {url}/v1/chat/completions -H "Content-Type: application/json" \\
    -d '{{"model": "auto", {question}}}'
""",
        markup=False,
    )
