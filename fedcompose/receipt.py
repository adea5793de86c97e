"""A receipt: a server's signed word on who wrote an answer, checked offline and without a model stack.

It counts the tokens that each site's expert wrote, names release, base and experts by their digests, and binds all of
that to one answer by the answer's SHA-256. It is a DSSE envelope, signed by the server's own key. Whoever trusts that
server learns who wrote the answer; whoever does not learns only that the key's holder says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fedcompose.composition import ROUTER_FILE
from fedcompose.document import Digest, Time, Title
from fedcompose.errors import RefusedError
from fedcompose.federation import FederationId
from fedcompose.files import dump_json, parse_json, sha256_hex, write_atomic
from fedcompose.keys import Identifier, load_signer
from fedcompose.release import VerifiedRelease
from fedcompose.signing import Signer, keyid_of, sign_envelope, verify_envelope

RECEIPT_TYPE = "application/vnd.fedcompose.receipt.v1+json"
MAX_RECEIPT_BYTES = 1 << 20  # of a release with 512 experts, with room to spare
KEY_NAME = "server.key"

Count = Annotated[int, Field(ge=0, lt=1 << 53)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Share(_Part):
    """An expert of the release and how many tokens of the answer it wrote."""

    site: Identifier
    domain: Identifier
    dir_hash: Digest = Field(alias="dirHash")
    tokens: Count


class Receipt(_Part):
    """What the server says. `base_tokens` were written without any expert, `merged_tokens` by all experts at once."""

    schema_: Literal["fedcompose/receipt/v1"] = Field(alias="schema")
    id: Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9-]+\z")]
    written: Time
    model: Title
    federation: FederationId
    release: Digest
    router: Digest
    base: Digest
    experts: Annotated[tuple[Share, ...], Field(strict=False, min_length=1, max_length=512)]
    base_tokens: Count = Field(alias="baseTokens")
    merged_tokens: Count = Field(alias="mergedTokens")
    tokens: Count
    answer: Digest

    @model_validator(mode="after")
    def _adds_up(self) -> Receipt:
        if sum(each.tokens for each in self.experts) + self.base_tokens + self.merged_tokens != self.tokens:
            raise ValueError("the tokens of the experts are not those of the answer")
        return self


def make_receipt(
    release: VerifiedRelease, answer_id: str, model: str, text: str, counts: Mapping[str, int], now: datetime
) -> Receipt:
    """The receipt of one answer; `counts` are tokens by site, and by `base` or `merged`.

    Raises: ValueError: when somebody is counted who is not in the release.
    """
    known = {expert.site for expert in release.experts}
    if strangers := counts.keys() - known - {"base", "merged"}:
        raise ValueError(f"{len(strangers)} writers are not in the release")
    experts = [
        {"site": each.site, "domain": each.domain, "dirHash": each.dir_hash, "tokens": counts.get(each.site, 0)}
        for each in release.experts
    ]
    return Receipt.model_validate(
        {
            "schema": "fedcompose/receipt/v1",
            "id": answer_id,
            "written": now.replace(microsecond=0),
            "model": model,
            "federation": release.federation.id,
            "release": release.dir_hash,
            "router": release.digests[ROUTER_FILE],
            "base": release.composition["base"]["dirHash"],
            "experts": experts,
            "baseTokens": counts.get("base", 0) if "base" not in known else 0,
            "mergedTokens": counts.get("merged", 0) if "merged" not in known else 0,
            "tokens": sum(counts.values()),
            "answer": sha256_hex(text.encode()),
        }
    )


def sign_receipt(receipt: Receipt, signer: Signer) -> bytes:
    """The envelope."""
    return sign_envelope(dump_json(receipt.model_dump(mode="json", by_alias=True)), RECEIPT_TYPE, [signer])


def verify_receipt(envelope: bytes, public_pems: Sequence[bytes]) -> Receipt:
    """The receipt that one of these keys signed.

    Raises: RefusedError: `RECEIPT_INVALID`, or an `ENVELOPE_*` or `KEY_UNUSABLE` code.
    """
    signed = verify_envelope(envelope, RECEIPT_TYPE, {keyid_of(pem): pem for pem in public_pems})
    try:
        return Receipt.model_validate(parse_json(signed.payload, "the receipt", MAX_RECEIPT_BYTES))
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise RefusedError("RECEIPT_INVALID", "this is no receipt", got=f"{where} {first['msg']}".strip()) from error


def check_answer(receipt: Receipt, text: str, said: Mapping[str, object] | None = None) -> None:
    """The receipt is about these words; `said` is the `id` and `model` of the whole answer, where that is there.

    Raises: RefusedError: `RECEIPT_OTHER_ANSWER`.
    """
    for name, value in (said or {}).items():
        if value != getattr(receipt, name):
            raise RefusedError("RECEIPT_OTHER_ANSWER", f"the receipt was written for an answer with another {name}")
    if sha256_hex(text.encode()) != receipt.answer:
        raise RefusedError("RECEIPT_OTHER_ANSWER", "the receipt belongs to another answer")


def check_release(receipt: Receipt, release: VerifiedRelease) -> None:
    """The release is the one that the receipt names, with the same experts.

    Raises: RefusedError: `RECEIPT_OTHER_RELEASE`.
    """
    named = [(each.site, each.dir_hash) for each in receipt.experts]
    if receipt.release != release.dir_hash or named != [(each.site, each.dir_hash) for each in release.experts]:
        raise RefusedError(
            "RECEIPT_OTHER_RELEASE", "the receipt is about another release",
            expected=release.dir_hash, got=receipt.release,
        )  # fmt: skip


def server_key(folder: Path) -> Signer:
    """The key of this machine's server, made when there is none; `server.pub` beside it is for those who verify."""
    path = folder / KEY_NAME
    if not path.exists():
        key = ec.generate_private_key(ec.SECP256R1())
        pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        write_atomic(path, pem, mode=0o600)
    signer = load_signer(path)
    write_atomic(path.with_suffix(".pub"), signer.public_pem)
    return signer


def document(envelope: bytes) -> Any:
    """A signed receipt as a JSON value, to go into a larger document."""
    return parse_json(envelope, "the receipt", MAX_RECEIPT_BYTES)
