"""`fedcompose serve`: an OpenAI-compatible endpoint and a page around a verified release."""

from __future__ import annotations

import importlib.util
import socket
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from fedcompose.bases import cache_dir
from fedcompose.console import err, out, print_json
from fedcompose.errors import ConfigError, MissingError
from fedcompose.keys import load_signer
from fedcompose.logs import configure
from fedcompose.receipt import server_key
from fedcompose.release import ReceivedRelease, VerifiedRelease
from fedcompose.standing import cautions, terms_of, verify_for_use

if TYPE_CHECKING:  # torch takes seconds to import
    from fedcompose.serve.engine import Engine

ADDRESS = "127.0.0.1"
DRAIN_SECONDS = 30  # an answer that is being written when the server is stopped has this long

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The release.")]
Roots = Annotated[
    list[str] | None,
    typer.Option(help="A root's fingerprint, got from its owner, where this machine does not know it. Repeatable."),
]
Bfloat16 = Annotated[
    bool,
    typer.Option(
        "--bfloat16",
        help="If it is faster here. It takes a gigabyte more in time, and answers may depend on who else is answered.",
    ),
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
    host: Annotated[str, typer.Option(help="The address to listen on; beyond this machine only with keys.")] = ADDRESS,
    api_key_file: Annotated[
        Path | None, typer.Option(help="Who may ask: a name and a key on each line; readable by its owner only.")
    ] = None,
    requests_per_minute: Annotated[
        int | None, typer.Option(min=1, help="Of each key; more are told to wait. Without, only room limits them.")
    ] = None,
    receipt_key: Annotated[
        str | None, typer.Option(help="The key that signs receipts; without, one that this machine makes for itself.")
    ] = None,
    bfloat16: Bfloat16 = False,
    device_map: Annotated[
        Literal["auto"] | None,
        typer.Option(help="Spread a model that one GPU cannot hold over all; it then answers one request at a time."),
    ] = None,
    root_fingerprint: Roots = None,
    base: BaseRef = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="For machines: announce and log as JSON, without anybody's words.")
    ] = False,
) -> None:
    """Verify a release, load it, and answer as an OpenAI-compatible server.

    SIGHUP judges the release anew and masks the experts of sites that were withdrawn since, as it does by itself when
    the time of a site's terms is over; SIGTERM lets the answers under way be finished.

    Example: fedcompose serve release
    """
    from fedcompose.serve.limits import Door, read_api_keys
    from fedcompose.serve.operations import Judge, check_exposure

    door = Door(keys=read_api_keys(api_key_file) if api_key_file else {}, per_minute=requests_per_minute)
    check_exposure(host, has_keys=bool(door.keys))
    release = verify_for_use(ReceivedRelease(folder), root_fingerprint)
    require_packages("serve", "fastapi", "uvicorn", "prometheus_client", "torch", "transformers", "peft")
    signer = load_signer(receipt_key) if receipt_key else server_key(cache_dir().parent / "server")
    if as_json:
        configure("serve")
    with _listen(host, port) as listener:
        engine = load_engine(release, base, bfloat16, spread=device_map is not None)
        from fedcompose.serve.app import create_app

        listener.listen()  # from now on whoever comes waits, and is not turned away
        address = f"[{host}]" if ":" in host else host
        _announce(engine, f"http://{address}:{listener.getsockname()[1]}", as_json)
        _run(create_app(engine, signer, door, Judge(release, root_fingerprint)), listener, as_json)


def _run(app: Any, listener: socket.socket, as_json: bool) -> None:
    """Until `SIGINT` or `SIGTERM`, and until what is being answered then is finished."""
    import uvicorn

    from fedcompose.serve.operations import end_quietly_on_terminate

    logged: dict[str, Any] = {"log_config": None} if as_json else {"log_level": "warning"}
    end_quietly_on_terminate()
    config = uvicorn.Config(app, ws="none", timeout_graceful_shutdown=DRAIN_SECONDS, access_log=False, **logged)
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


def load_engine(release: VerifiedRelease, base: str | None, bfloat16: bool, spread: bool = False) -> Engine:
    """Load a verified release, saying so; in float32, or in bfloat16 if that is allowed and a probe finds it faster.

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
    import torch

    from fedcompose.serve.engine import Engine

    chosen = None if base is None else resolve_base(base)
    return Engine(release, chosen, None if bfloat16 else torch.float32, spread=spread)


def _listen(host: str, port: int) -> socket.socket:
    """Taken before anything is loaded, so that a used port is known at once.

    Where the system can, it gives up a connection whose reader has taken nothing for a while: closing alone would keep
    what was not taken for ever.
    """
    from fedcompose.serve.limits import STALLED_SECONDS

    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(STALLED_SECONDS * 1000))
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ConfigError(
            "PORT_UNUSABLE",
            f"cannot listen on port {port} of {host!a}",
            got=error.strerror,
            fix="choose another --port, or 0 for a free one, and a --host of this machine",
        ) from error
    return listener


def _announce(engine: Engine, url: str, as_json: bool) -> None:
    release = engine.release
    if as_json:
        print_json({"url": url, "release": release.dir_hash, "models": engine.models})
        return
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
