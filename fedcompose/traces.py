"""A trace: one completion that answered a problem correctly, as a line of JSON, read strictly.

What a trace may carry depends on where its prompt came from (its provenance class, best first):

    A  the coordinator sampled the expert on a declared generator; nothing left a site
    B  the site answered a declared generator: (generator, config, seed) and the completion
    C  the site answered a public question, which it states
    D  the question was written by a model trained on private data
    E  a completion on a private question, the question removed
    F  a private question with its completion

A site ships B, C and D; E and F only where its data was declared non-private. Text in a trace becomes a
prompt of the trainer, so nothing in it may look like the markers that separate roles in a chat, nor be a control
token of the base in use (`check_tokens`), and nothing may be invisible.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator
from typing import Annotated, Any, Literal, NoReturn

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from fedcompose.errors import RefusedError
from fedcompose.files import parse_json

TRACES_FILE = "traces.jsonl"

MAX_TRACES_BYTES = 64 << 20
MAX_TRACES = 100_000
MAX_LINE_BYTES = 64 << 10
MAX_TEXT_CHARS = 16_384  # a question or a completion; about 4,000 tokens
MAX_ANSWER_CHARS = 1024
MAX_CONFIG_BYTES = 4096

# Chat and control markers of the usual model families: ChatML, Llama 3, DeepSeek's wide bars, Llama 2, Gemma.
CONTROL_TOKEN = re.compile(
    r"<[|｜][^<>]{1,64}[|｜]>|</?s>|<(?:bos|eos|pad|unk|start_of_turn|end_of_turn)>|\[/?INST\]|<</?SYS>>",
    re.IGNORECASE,
)
# Characters that a reader does not see, or sees in another order than a model: controls, bidirectional
# overrides, zero-width marks, tags, and half characters.
HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)

ProvenanceClass = Literal["A", "B", "C", "D", "E", "F"]
PRIVATE_CLASSES: frozenset[ProvenanceClass] = frozenset({"E", "F"})

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.:/-]{0,63}$")]
Text = Annotated[str, Field(min_length=1, max_length=MAX_TEXT_CHARS)]

_NEEDS: dict[str, tuple[str, ...]] = {
    "A": ("generator", "seed"),
    "B": ("generator", "seed"),
    "C": ("question", "answer"),
    "D": ("question", "answer"),
    "E": (),
    "F": ("question", "answer"),
}


class Trace(BaseModel):
    """One verified completion; `task` scores it, and its class says where the prompt comes from."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    provenance_class: ProvenanceClass
    task: Name
    completion: Text
    generator: Name | None = None
    config: dict[str, Any] | None = None
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] | None = None
    question: Text | None = None
    answer: Annotated[str, Field(min_length=1, max_length=MAX_ANSWER_CHARS)] | None = None

    @field_validator("completion", "question", "answer")
    @classmethod
    def _plain(cls, text: str | None) -> str | None:
        if text is not None and not is_plain_text(text):
            raise ValueError("control tokens or hidden characters")
        return text

    @field_validator("config")
    @classmethod
    def _small(cls, config: dict[str, Any] | None) -> dict[str, Any] | None:
        if len(json.dumps(config)) > MAX_CONFIG_BYTES or not all(map(is_plain_text, _strings(config))):
            raise ValueError("too large or not plain")
        return config

    @model_validator(mode="after")
    def _prompt_fits_class(self) -> Trace:
        prompt = self.model_dump(exclude_none=True).keys() - {"provenance_class", "task", "completion"}
        needed = set(_NEEDS[self.provenance_class])
        optional = {"config"} if "generator" in needed else set()
        if not needed <= prompt <= needed | optional:
            raise ValueError(f"class {self.provenance_class} carries {sorted(needed)}")
        return self

    def texts(self) -> Iterator[str]:
        """Every text in this trace that may become part of a prompt."""
        yield from _strings([self.completion, self.question, self.answer, self.config])


def is_plain_text(text: str, tokens: Collection[str] = ()) -> bool:
    """Whether `text` is free of chat markers, hidden characters and `tokens`, and so may stand in a trace."""
    return (
        CONTROL_TOKEN.search(text) is None
        and HIDDEN.search(text) is None
        and not any(token in text for token in tokens)
    )


def check_tokens(traces: Iterable[Trace], tokens: Collection[str]) -> None:
    """No trace holds a control token of the base's own tokenizer, `bases.control_tokens`.

    Raises: RefusedError: `TRACES_CONTROL_TOKENS`.
    """
    for number, trace in enumerate(traces, start=1):
        if not all(is_plain_text(text, tokens) for text in trace.texts()):
            raise RefusedError(
                "TRACES_CONTROL_TOKENS",
                f"line {number} of {TRACES_FILE} holds a control token of the base's tokenizer",
                fix="drop the trace at the site; `distill` does",
            )


def _strings(value: Any) -> Iterator[str]:
    """Every text in a JSON value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, each in value.items():
            yield key
            yield from _strings(each)
    elif isinstance(value, list):
        for each in value:
            yield from _strings(each)


def encode(traces: Iterable[Trace]) -> bytes:
    """Canonical JSONL: one trace per line, sorted keys, ASCII; what `decode` accepts."""
    lines = [
        json.dumps(trace.model_dump(exclude_none=True), sort_keys=True, separators=(",", ":"), allow_nan=False) + "\n"
        for trace in traces
    ]
    return "".join(lines).encode()


def decode(data: bytes) -> list[Trace]:
    """The traces of a JSONL file somebody else wrote, all of them or none.

    Raises: RefusedError: `TRACES_INVALID`, `TRACES_CONTROL_TOKENS`, `JSON_INVALID`.
    """
    if len(data) > MAX_TRACES_BYTES:
        _refuse(f"more than {MAX_TRACES_BYTES} bytes")
    lines = data.split(b"\n")
    if lines.pop() != b"" or not 1 <= len(lines) <= MAX_TRACES:
        _refuse(f"expected 1 to {MAX_TRACES} whole lines")
    return [_decode_line(number, line) for number, line in enumerate(lines, start=1)]


def _decode_line(number: int, line: bytes) -> Trace:
    if len(line) > MAX_LINE_BYTES:
        _refuse(f"line {number} has more than {MAX_LINE_BYTES} bytes")
    document = parse_json(line, f"line {number} of {TRACES_FILE}")
    try:
        return Trace.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part)[:32] for part in first["loc"]) or "the trace"
        if "control tokens" in first["msg"]:
            raise RefusedError(
                "TRACES_CONTROL_TOKENS",
                f"line {number} of {TRACES_FILE} holds chat markers or hidden characters",
                got=f"in {where!a}",
                fix="drop the trace at the site; `distill` does",
            ) from None
        _refuse(f"line {number}, {where!a}: {first['type']}")


def _refuse(reason: str) -> NoReturn:
    raise RefusedError("TRACES_INVALID", f"{TRACES_FILE} is not acceptable", got=reason)
