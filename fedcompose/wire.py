"""What a site and the coordinator say to each other over Flower, and the names of Flower that both roles use.

Six actions, no others: `describe` (who are you), `call` (here is what the coordinator asks for), `status` (how far
are you), `offer` (which files did you sign), `fetch` (give me these bytes of them), `receipt` (I have them, and
signed that). None has an effect that a second one of the same kind would change, so a message that was lost is sent
again. A contribution is one stream: its files in a fixed order, one after the other. The coordinator asks for a
window of the stream of one offer; both sides compute from `plan` which bytes of which files that is, so that a
reply can only hold what was asked for, memory does not grow with the size of an adapter, and a transfer goes on at
the byte where it was cut.

Everything decoded here is hostile: names come from closed lists, numbers have limits, and nothing is a path.
What the bytes mean is for intake to check; here they only have to be the bytes that were announced.

Flower reads its switches when it is imported, so they are set here, before the import below. Both roles take
Flower's names from this module for that reason.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from fedcompose.contribution import REQUIRED, Kind
from fedcompose.errors import RefusedError
from fedcompose.ledger import Head
from fedcompose.parts import Part, Slice, offer_digest, part_limits, plan, stream_bytes

FLOWER_ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",  # else a SuperLink would fetch packages
}


def flower_environment() -> dict[str, str]:
    """The switches every process that runs Flower needs: no telemetry, no update check, a private home."""
    home = Path(os.environ.get("FEDCOMPOSE_HOME") or Path.home() / ".fedcompose")
    return {**FLOWER_ENVIRONMENT, "FLWR_HOME": os.environ.get("FLWR_HOME") or str(home / "flower")}


os.environ.update(flower_environment())

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, Metadata, RecordDict  # noqa: E402
from flwr.clientapp import ClientApp  # noqa: E402
from flwr.common.constant import ErrorCode  # noqa: E402
from flwr.proto.node_pb2 import NodeInfo  # noqa: E402
from flwr.serverapp import Grid, ServerApp  # noqa: E402
from flwr.supercore.run import Run  # noqa: E402
from flwr.supercore.task_identity import TaskIdentity  # noqa: E402

# ErrorCode, NodeInfo, Run and TaskIdentity are internals of Flower 1.41. Others are used in two places only: the
# client's node.py and executor.py, and the coordinator's superlink.py.
__all__ = [
    "Array",
    "ArrayRecord",
    "ClientApp",
    "ConfigRecord",
    "Context",
    "Error",
    "ErrorCode",
    "Grid",
    "Message",
    "Metadata",
    "NodeInfo",
    "Part",
    "RecordDict",
    "Run",
    "ServerApp",
    "Slice",
    "TaskIdentity",
    "offer_digest",
    "part_limits",
    "plan",
    "stream_bytes",
]  # fmt: skip

PROTOCOL = 1  # what these messages say; a coordinator asks for it before anything else
Action = Literal["describe", "call", "status", "offer", "fetch", "receipt"]
ACTIONS: tuple[Action, ...] = get_args(Action)
State = Literal["asked", "refused", "approved", "training", "trained", "held", "ready", "failed"]
STATES: tuple[State, ...] = get_args(State)

MAX_STREAM_BYTES = 16 * 1024**3
WINDOW_BYTES = 32 * 1024**2  # per reply; Flower holds a message about four times over on its way
MAX_TEXT_CHARS = 256
MAX_STEPS = 10**9
MAX_ETA_S = 366 * 24 * 3600
MAX_PROTOCOL = 1 << 16
MAX_ENTRIES = (1 << 53) - 1
NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")  # of a site, a domain or a call: never a path
VERSION = re.compile(r"[0-9A-Za-z][0-9A-Za-z.+-]{0,40}")
CODE = re.compile(r"[A-Z][A-Z0-9_]{2,63}")
SHA256 = re.compile(r"[0-9a-f]{64}")
RAW = "fedcompose.raw"  # Flower's `stype`: these are bytes, not a serialised array
ACCEPTED = "ACCEPTED"
NOT_READY = "NOT_READY"  # there is no whole signed contribution yet; `status` says how far it is
OFFER_CHANGED = "OFFER_CHANGED"  # what is offered now is not what was asked for: begin anew with `offer`


@dataclass(frozen=True)
class Description:
    """Who answers, and which messages it understands."""

    protocol: int
    version: str
    site: str


@dataclass(frozen=True)
class Status:
    """How far a site is with one call; `eta_s` and the steps are -1 where it does not know."""

    state: State
    step: int = -1
    steps: int = -1
    eta_s: int = -1


def message_type(action: Action) -> str:
    """Flower's name of an action; all are queries, for none changes a model."""
    return f"query.{action}"


# Requests and answers -----------------------------------------------------------------------------


def request(**fields: str | int | bytes) -> RecordDict:
    return RecordDict({"request": ConfigRecord(dict(fields))})


def read_request(content: RecordDict) -> Mapping[str, Any]:
    return _typed(content.get("request"), ConfigRecord, "a request")


def answer(code: str, **fields: Any) -> RecordDict:
    """An answer carries a code from a closed list, numbers and agreed names; never the text of an error."""
    return RecordDict({"answer": ConfigRecord({"code": code, **fields})})


def read_answer(content: RecordDict) -> Mapping[str, Any]:
    """The fields of an accepting answer.

    Raises: RefusedError: the site's own code when it refused, `MESSAGE_INVALID` when its answer makes no sense.
    """
    fields = _typed(content.get("answer"), ConfigRecord, "an answer")
    code = text(fields, "code", CODE)
    if code != ACCEPTED:
        raise RefusedError(code, "the site refused", fix="its operator finds the reason in the site's own log")
    return fields


def status_answer(status: Status) -> RecordDict:
    return answer(ACCEPTED, **asdict(status))


def read_status(content: RecordDict) -> Status:
    fields = read_answer(content)
    state = _typed(fields.get("state"), str, "a state")
    _require(state in STATES, "a known state")
    return Status(
        state,  # type: ignore[arg-type]
        step=integer(fields, "step", -1, MAX_STEPS),
        steps=integer(fields, "steps", -1, MAX_STEPS),
        eta_s=integer(fields, "eta_s", -1, MAX_ETA_S),
    )


def description_answer(description: Description) -> RecordDict:
    return answer(ACCEPTED, **asdict(description))


def read_description(content: RecordDict) -> Description:
    fields = read_answer(content)
    protocol = integer(fields, "protocol", 1, MAX_PROTOCOL)
    return Description(protocol, text(fields, "version", VERSION), text(fields, "site", NAME))


def offer_answer(parts: Sequence[Part]) -> RecordDict:
    """The list of all files of a contribution."""
    return answer(
        ACCEPTED,
        names=[part.name for part in parts],
        sizes=[part.size for part in parts],
        sha256=[part.sha256 for part in parts],
    )


def read_offer(content: RecordDict, kinds: Sequence[Kind]) -> list[Part]:
    """The announced files.

    Raises: RefusedError: the site's own code, or `MESSAGE_INVALID` for anything else than was agreed: unknown,
        missing or repeated names, sizes over the limit.
    """
    return _read_parts(read_answer(content), kinds)


def window_answer(slices: Mapping[str, bytes]) -> RecordDict:
    """The bytes that were asked for, by the name of their file."""
    content = answer(ACCEPTED)
    arrays = {name: Array("uint8", (len(data),), RAW, data) for name, data in slices.items()}
    content["parts"] = ArrayRecord(arrays)
    return content


def read_window(content: RecordDict, parts: Sequence[Part], start: int, length: int) -> list[tuple[Slice, bytes]]:
    """Exactly the bytes asked for of these files.

    Raises: RefusedError: the site's own code, or `MESSAGE_INVALID` for other slices than `plan` gives, and for arrays
        that are not raw bytes.
    """
    read_answer(content)
    slices = plan(parts, start, length)
    arrays = _typed(content.get("parts"), ArrayRecord, "an array record")
    _require(len(arrays) == len(slices), "the files asked for")
    return [(piece, _raw_bytes(arrays.get(piece.part.name), piece.length)) for piece in slices]


def with_head(content: RecordDict, head: Head) -> RecordDict:
    """The answer with the head of the site's egress ledger, which already tells of this answer."""
    fields = _typed(content.get("answer"), ConfigRecord, "an answer")
    fields["entries"], fields["head"] = head.entries, head.head
    return content


def read_head(content: RecordDict) -> Head | None:
    """The head of the site's egress ledger, if the answer carries one.

    Raises: RefusedError: `MESSAGE_INVALID`, or the site's own code.
    """
    fields = read_answer(content)
    if "head" not in fields:
        return None
    return Head(entries=integer(fields, "entries", 1, MAX_ENTRIES), head=text(fields, "head", SHA256))


def _read_parts(fields: Mapping[str, Any], kinds: Sequence[Kind]) -> list[Part]:
    names, sizes, digests = (
        _typed(fields.get(name), list, f"a list of {name}") for name in ("names", "sizes", "sha256")
    )
    _require(0 < len(names) == len(sizes) == len(digests), "three lists of one length")
    limits = part_limits(kinds)
    _require(names == [name for name in limits if name in names], "known names in the agreed order")
    _require(all(_is_size(size, limits[name]) for name, size in zip(names, sizes, strict=True)), "sizes within limits")
    _require(all(isinstance(digest, str) and SHA256.fullmatch(digest) for digest in digests), "SHA-256 digests")
    for kind in [kind for kind in kinds if any(name.startswith(f"{kind}/") for name in names)]:
        _require({f"{kind}/{name}" for name in REQUIRED[kind]} <= set(names), "every file of a kind")
    return [Part(*row) for row in zip(names, sizes, digests, strict=True)]


def _is_size(value: object, limit: int) -> bool:
    return type(value) is int and 0 <= value <= limit


def _raw_bytes(value: object, length: int) -> bytes:
    array = _typed(value, Array, "an array")
    _require((array.dtype, array.stype) == ("uint8", RAW), "raw bytes")
    _require(tuple(array.shape) == (length,) and len(array.data) == length, "as many bytes as asked for")
    return array.data


# Fields -------------------------------------------------------------------------------------------

Value = TypeVar("Value")


def text(fields: Mapping[str, Any], name: str, pattern: re.Pattern[str]) -> str:
    """A short text that matches `pattern` whole."""
    value = _typed(fields.get(name), str, f"text in {name}")
    _require(len(value) <= MAX_TEXT_CHARS and pattern.fullmatch(value) is not None, f"a proper {name}")
    return value


def integer(fields: Mapping[str, Any], name: str, low: int, high: int) -> int:
    value = fields.get(name)
    _require(type(value) is int and low <= value <= high, f"{name} from {low} to {high}")
    return int(value)  # type: ignore[arg-type]


def raw(fields: Mapping[str, Any], name: str, max_bytes: int) -> bytes:
    value = _typed(fields.get(name), bytes, f"bytes in {name}")
    _require(len(value) <= max_bytes, f"at most {max_bytes} bytes in {name}")
    return value


def _typed(value: object, of: type[Value], expected: str) -> Value:
    if not isinstance(value, of):
        _require(False, expected)
    return value  # type: ignore[return-value]


def _require(holds: bool, expected: str) -> None:
    if not holds:
        raise RefusedError("MESSAGE_INVALID", "a message is not of the agreed form", expected=expected)
