"""The wire format: OpenAI's chat completions, as far as this server does them, and who wrote what.

A request that asks for anything else is refused by the name of the field; nothing is silently ignored. Our one
addition is `routing: true`, after which choices carry `routing`: per token its text, the expert that most
layers chose and the share of layers that agree, and at the end each expert's share of all decisions.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from fedcompose.serve.engine import Answer, Settings, Token

MAX_MESSAGES = 1000
MAX_CONTENT_CHARACTERS = 1 << 20
MAX_STOPS = 4  # OpenAI's limit too

Count = Annotated[int, Field(ge=1)]
Text = Annotated[str, Field(max_length=MAX_CONTENT_CHARACTERS)]
Stop = Annotated[str, Field(min_length=1, max_length=256)]
# One string or several: made several before the check, so that errors name one field and not two readings of it.
Stops = Annotated[
    list[Stop], BeforeValidator(lambda given: [given] if isinstance(given, str) else given), Field(max_length=MAX_STOPS)
]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: each for key, each in value.items() if each is not None}
        return value


class TextPart(_Part):
    """A piece of a message."""

    type: Literal["text"]
    text: Text


class Message(_Part):
    """One turn."""

    role: Literal["system", "user", "assistant"]
    content: Annotated[
        list[TextPart],
        BeforeValidator(lambda given: [{"type": "text", "text": given}] if isinstance(given, str) else given),
    ]

    def plain(self) -> dict[str, str]:
        """For a chat template."""
        return {"role": self.role, "content": "".join(part.text for part in self.content)}


class StreamOptions(_Part):
    """`include_usage`: one more chunk at the end of a stream, with the number of tokens."""

    include_usage: bool = False


class ChatRequest(_Part):
    """What `/v1/chat/completions` takes. Without a temperature the answer is greedy, as in the evaluation."""

    model: str = Field(max_length=256)
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 1.0
    stop: Stops = []
    n: Literal[1] = 1
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    routing: bool = False

    def settings(self) -> Settings:
        return Settings(
            model=self.model,
            max_tokens=self.max_completion_tokens or self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            stop=tuple(self.stop),
            seed=self.seed,
        )


@dataclass(frozen=True)
class Reply:
    """The documents that answer one request."""

    model: str
    routing: bool
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def completion(self, answer: Answer) -> dict[str, Any]:
        """The whole answer at once."""
        message = {"role": "assistant", "content": answer.text}
        choice = {"index": 0, "message": message, "finish_reason": answer.finish, "logprobs": None}
        if self.routing:
            choice["routing"] = {"tokens": tokens_json(answer.tokens), "shares": answer.shares}
        return {**self._head("chat.completion"), "choices": [choice], "usage": usage(answer)}

    def opening(self) -> str:
        return self._chunk({"role": "assistant", "content": ""})

    def token(self, token: Token) -> str:
        return self._chunk({"content": token.text}, {"tokens": tokens_json([token])})

    def closing(self, answer: Answer, include_usage: bool) -> str:
        """The end of a stream."""
        events = self._chunk({}, {"tokens": [], "shares": answer.shares}, answer.finish)
        if include_usage:
            events += event({**self._head("chat.completion.chunk"), "choices": [], "usage": usage(answer)})
        return events + "data: [DONE]\n\n"

    def _chunk(self, delta: dict[str, str], routing: Any = None, finish: str | None = None) -> str:
        choice: dict[str, Any] = {"index": 0, "delta": delta, "finish_reason": finish}
        if self.routing and routing is not None:
            choice["routing"] = routing
        return event({**self._head("chat.completion.chunk"), "choices": [choice]})

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def event(document: Mapping[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(document)}\n\n"


def usage(answer: Answer) -> dict[str, int]:
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
        "total_tokens": answer.prompt_tokens + answer.completion_tokens,
    }


def tokens_json(tokens: Sequence[Token]) -> list[dict[str, Any]]:
    """Who wrote what."""
    return [{"text": token.text, "expert": token.expert, "agreement": round(token.agreement, 3)} for token in tokens]


def error_document(kind: str, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """OpenAI's shape for every error."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
