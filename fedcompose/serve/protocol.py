"""The wire format of requests: OpenAI's completions, as far as this server does them, and who is to speak.

A request that asks for anything else is refused by the name of the field; nothing is silently ignored. Fields that
could be asked for without wanting anything (a penalty of 0, a response format of text) are taken at that value only.
Ours are `routing`, which tells and can decide who speaks, `return_routed_experts` and `receipt`; see `replies.py`.
"""

from __future__ import annotations

from itertools import islice
from typing import Annotated, Any, Literal, LiteralString

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from fedcompose.serve.engine import Pin, Settings

MAX_FIELDS = 64  # that are looked at, more than any object here has: each unknown one costs an error
MAX_MESSAGES = 1000
MAX_PARTS = 64  # of a message
MAX_CONTENT_CHARACTERS = 1 << 20
MAX_STOPS = 4  # OpenAI's limit too
MAX_CHOICES = 16  # answers to one request, of all its prompts together
MAX_PINS = 256
MAX_TOP_LOGPROBS = 20  # OpenAI's limits too, here and for completions
MAX_TEXT_LOGPROBS = 5

Count = Annotated[int, Field(ge=1)]
Name = Annotated[str, Field(max_length=256)]
Text = Annotated[str, Field(max_length=MAX_CONTENT_CHARACTERS)]
Stop = Annotated[str, Field(min_length=1, max_length=256)]
# One string or several: made several before the check, so that errors name one field and not two readings of it. Of
# every list the length is checked before its items, and the first bad item ends it: a body could hold millions.
Stops = Annotated[
    list[Stop],
    FailFast(),
    Field(max_length=MAX_STOPS),
    BeforeValidator(lambda given: [given] if isinstance(given, str) else given),
]
Zero = Annotated[float, Field(ge=0, le=0)]
Layer = Annotated[int, Field(ge=0)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, value: Any) -> Any:
        if isinstance(value, dict):
            return dict(islice(((key, each) for key, each in value.items() if each is not None), MAX_FIELDS))
        return value


def _in_vain(why: LiteralString) -> PydanticCustomError:
    return PydanticCustomError("in_vain", why)


class TextPart(_Part):
    """A piece of a message."""

    type: Literal["text"]
    text: Text


class Message(_Part):
    """One turn."""

    role: Literal["system", "user", "assistant"]
    content: Annotated[
        list[TextPart],
        FailFast(),
        Field(max_length=MAX_PARTS),
        BeforeValidator(lambda given: [{"type": "text", "text": given}] if isinstance(given, str) else given),
    ]

    def plain(self) -> dict[str, str]:
        """For a chat template."""
        return {"role": self.role, "content": "".join(part.text for part in self.content)}


class StreamOptions(_Part):
    """`include_usage`: one more chunk at the end of a stream, with the number of tokens."""

    include_usage: bool = False


class ResponseFormat(_Part):
    """Text, as always."""

    type: Literal["text"]


class PinnedLayers(_Part):
    """An expert for the layers from the first to the last of the two."""

    expert: Name
    layers: Annotated[list[Layer], Field(min_length=2, max_length=2)]


class Routing(_Part):
    """Tell who speaks; and `force` one expert everywhere, or `pins` for some layers."""

    force: Name | None = None
    pins: Annotated[list[PinnedLayers], FailFast(), Field(max_length=MAX_PINS)] = []


def _routing(given: Any) -> Any:
    return {} if given is True else None if given is False else given


class _Request(_Part):
    """What both endpoints take. Without a temperature the answer is greedy, as in the evaluation."""

    model: Name
    max_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 1.0
    stop: Stops = []
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    routing: Annotated[Routing | None, BeforeValidator(_routing)] = None
    return_routed_experts: bool = False
    receipt: bool = False
    user: Name | None = None  # who asks, for the caller's own books; it changes nothing and is not kept
    frequency_penalty: Zero = 0.0
    presence_penalty: Zero = 0.0

    @field_validator("stream_options")
    @classmethod
    def _of_a_stream(cls, value: StreamOptions, info: ValidationInfo) -> StreamOptions:
        if value.include_usage and not info.data.get("stream"):
            raise _in_vain("ask for stream too: without, the usage is always told")
        return value

    @property
    def likely(self) -> int | None:
        """How many likely tokens to tell besides each chosen one; None where no probabilities are asked for."""
        raise NotImplementedError

    @property
    def length(self) -> int | None:
        return self.max_tokens

    def settings(self) -> Settings:
        routing = self.routing or Routing()
        return Settings(
            model=self.model,
            max_tokens=self.length,
            temperature=self.temperature,
            top_p=self.top_p,
            stop=tuple(self.stop),
            seed=self.seed,
            logprobs=self.likely,
            force=routing.force,
            pins=tuple(Pin(each.expert, *each.layers) for each in routing.pins),
        )


class ChatRequest(_Request):
    """What `/v1/chat/completions` takes."""

    messages: Annotated[list[Message], FailFast(), Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Count | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] = 0
    response_format: ResponseFormat = ResponseFormat(type="text")

    @field_validator("max_completion_tokens")
    @classmethod
    def _one_length(cls, value: int, info: ValidationInfo) -> int:
        if info.data.get("max_tokens") not in (None, value):
            raise _in_vain("max_tokens asks for another number: send one of the two")
        return value

    @field_validator("top_logprobs")
    @classmethod
    def _beside_logprobs(cls, value: int, info: ValidationInfo) -> int:
        if value and not info.data.get("logprobs"):
            raise _in_vain("ask for logprobs too: without, none are told")
        return value

    @property
    def likely(self) -> int | None:
        return self.top_logprobs if self.logprobs else None

    @property
    def length(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class TextRequest(_Request):
    """What `/v1/completions` takes; `logprobs` is a number there."""

    prompt: Annotated[
        list[Annotated[Text, Field(min_length=1)]],
        FailFast(),
        Field(min_length=1, max_length=MAX_CHOICES),
        BeforeValidator(lambda given: [given] if isinstance(given, str) else given),
    ]
    logprobs: Annotated[int, Field(ge=0, le=MAX_TEXT_LOGPROBS)] | None = None
    echo: Literal[False] = False

    @field_validator("prompt")
    @classmethod
    def _few_answers(cls, value: list[str], info: ValidationInfo) -> list[str]:
        if len(value) * info.data.get("n", 1) > MAX_CHOICES:
            raise PydanticCustomError("too_many", "at most {most} answers to one request", {"most": MAX_CHOICES})
        return value

    @property
    def likely(self) -> int | None:
        return self.logprobs
