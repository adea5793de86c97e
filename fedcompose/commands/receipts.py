"""`fedcompose verify-receipt`: what a server says about who wrote an answer, checked offline."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedcompose.console import AsJson, out, print_json
from fedcompose.errors import RefusedError
from fedcompose.files import dump_json, parse_json, read_limited
from fedcompose.receipt import MAX_RECEIPT_BYTES, Receipt, check_answer, check_release, verify_receipt
from fedcompose.release import ReceivedRelease, verify_release
from fedcompose.signers import MAX_PUBLIC_KEY_BYTES

MAX_ANSWER_BYTES = 64 << 20  # more than any model's context


def register(app: typer.Typer) -> None:
    """Add the commands of this module to `app`."""
    app.command(name="verify-receipt")(verify)


def verify(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The receipt, or the server's whole answer with it.")],
    key: Annotated[
        list[Path], typer.Option(help="The public key of a server that you trust, got from its owner. Repeatable.")
    ],
    answer: Annotated[Path | None, typer.Option(help="The answer's text, byte for byte, to compare with.")] = None,
    release: Annotated[Path | None, typer.Option(help="The release, verified, to compare with.")] = None,
    root_fingerprint: Annotated[
        list[str] | None,
        typer.Option(help="For --release: a root's fingerprint, where this machine does not know it. Repeatable."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check a receipt's signature and its sums, and say which sites' experts wrote the answer.

    Example: fedcompose verify-receipt answer.json --key server.pub
    """
    envelope, text, said = _open(read_limited(file, MAX_ANSWER_BYTES))
    receipt = verify_receipt(envelope, [read_limited(path, MAX_PUBLIC_KEY_BYTES) for path in key])
    if text is not None:
        check_answer(receipt, text, said)
    if answer is not None:
        check_answer(receipt, read_limited(answer, MAX_ANSWER_BYTES).decode("utf-8", "replace"))
    if release is not None:
        check_release(receipt, verify_release(ReceivedRelease(release), root_fingerprint))
    if as_json:
        print_json(receipt.model_dump(mode="json", by_alias=True))
    else:
        out.print(_words(receipt, answer is not None or text is not None, release is not None), markup=False)


def _open(data: bytes) -> tuple[bytes, str | None, dict[str, object]]:
    """The envelope in a file; and, where the file is a server's answer, its text, and its id and model."""
    document = parse_json(data, "the receipt", MAX_ANSWER_BYTES)
    if not isinstance(document, dict) or "choices" not in document:
        return data, None, {}
    choices = document["choices"]
    if not (isinstance(choices, list) and len(choices) == 1 and isinstance(choices[0], dict)):
        raise RefusedError("RECEIPT_INVALID", "the file holds several answers, or none", fix="take out one receipt")
    choice = choices[0]
    message = choice.get("message")
    text = message.get("content") if isinstance(message, dict) else choice.get("text")
    if "receipt" not in choice or not isinstance(text, str):
        raise RefusedError("RECEIPT_INVALID", "the answer came without a receipt", fix='ask with "receipt": true')
    envelope = dump_json(choice["receipt"])
    if len(envelope) > 2 * MAX_RECEIPT_BYTES:
        raise RefusedError("RECEIPT_INVALID", "the receipt is larger than any honest one")
    return envelope, text, {name: document.get(name) for name in ("id", "model")}


def _words(receipt: Receipt, answer: bool, release: bool) -> str:
    written = [(f"{each.site} ({each.domain})", each.tokens) for each in receipt.experts]
    written += [("the base alone", receipt.base_tokens), ("all experts at once", receipt.merged_tokens)]
    lines = [
        f"  {count:>7}  {count / receipt.tokens:>4.0%}  {name}" for name, count in written if count and receipt.tokens
    ]
    return "\n".join(
        [
            f"Signed by the server's key. {receipt.tokens} tokens, written {receipt.written:%Y-%m-%d %H:%M:%S} UTC:",
            *lines,
            f"Release   {receipt.release}" + (" (the one given)" if release else " (not compared with a release)"),
            f"Answer    {receipt.answer}" + (" (the one given)" if answer else " (not compared with an answer)"),
        ]
    )
