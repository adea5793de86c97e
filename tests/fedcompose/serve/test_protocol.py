"""What a body may cost before it is refused, and what is asked for in vain."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from fedcompose.serve.protocol import MAX_FIELDS, MAX_PARTS, ChatRequest, TextRequest

CHAT: dict[str, Any] = {"model": "auto", "messages": [{"role": "user", "content": "Hello"}]}
TEXT: dict[str, Any] = {"model": "auto", "prompt": "Hello"}
PART = {"type": "text", "text": "x"}
MANY = 10_000


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def errors(body: dict[str, Any]) -> list[Any]:
    request = TextRequest if "prompt" in body else ChatRequest
    with pytest.raises(ValidationError) as caught:
        request.model_validate(body)
    return caught.value.errors()


@pytest.mark.parametrize(
    "body",
    [
        CHAT | {"messages": [0] * MANY},
        CHAT | {"messages": [user([0] * MANY)]},
        CHAT | {"messages": [user([0] * MAX_PARTS)] * 1000},
        CHAT | {"messages": [user([PART] * (MAX_PARTS + 1))]},
        CHAT | {"messages": [{str(number): 0 for number in range(MANY)}]},
        CHAT | {"stop": [0] * MANY},
        CHAT | {"routing": {"pins": [0] * MANY}},
        CHAT | {"routing": {"pins": [{"expert": "site-a", "layers": [""] * MANY}]}},
        CHAT | {str(number): 0 for number in range(MANY)},
        TEXT | {"prompt": [0] * MANY},
    ],
)
def test_many_wrong_items_are_few_errors(body: dict[str, Any]) -> None:
    """Each costs a kilobyte, and a body has room for millions."""
    assert len(errors(body)) <= MAX_FIELDS + 2


def test_an_unknown_field_is_refused_wherever_it_stands() -> None:
    nulls = {str(number): None for number in range(MANY)}
    for body in ({"other": 1} | CHAT, CHAT | {"other": 1}, CHAT | nulls | {"other": 1}):
        assert [error["loc"] for error in errors(body)] == [("other",)]
    assert ChatRequest.model_validate(nulls | CHAT).model == "auto"


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (CHAT | {"top_logprobs": 2}, "top_logprobs"),
        (CHAT | {"stream_options": {"include_usage": True}}, "stream_options"),
        (CHAT | {"max_tokens": 5, "max_completion_tokens": 6}, "max_completion_tokens"),
        (TEXT | {"prompt": ["Hello"] * 3, "n": 6}, "prompt"),
    ],
)
def test_what_could_not_be_heeded_is_refused_by_name(body: dict[str, Any], field: str) -> None:
    assert [error["loc"] for error in errors(body)] == [(field,)]


def test_what_wants_nothing_or_the_same_is_taken() -> None:
    body = CHAT | {"top_logprobs": 0, "stream_options": {}, "max_tokens": 5, "max_completion_tokens": 5}
    assert ChatRequest.model_validate(body).length == 5
    assert ChatRequest.model_validate(CHAT | {"stream": True, "stream_options": {"include_usage": True}}).stream
    assert len(TextRequest.model_validate(TEXT | {"prompt": ["Hello"] * 4, "n": 4}).prompt) == 4
