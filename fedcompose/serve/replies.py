"""The wire format of answers: OpenAI's documents, and who wrote what.

Beside OpenAI's fields a choice carries, on request:

routing                per token its text, the expert that most layers chose, the share of layers that agree and each
                       layer's choice, a row of the experts in `routing_summary`; at the end each expert's share of
                       all decisions
routing_summary        at the end: the experts by row, their shares, how many layers decide, and in how many of them the
                       choice changes from one token to the next
routed_experts         at the end: the choices as base64 of little-endian int32, tokens × layers × 1, as SGLang has them
receipt                at the end: who wrote how many tokens, signed; see `fedcompose.receipt`
"""

from __future__ import annotations

import base64
import json
import struct
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from fedcompose.serve.protocol import ChatRequest, TextRequest
from fedcompose.serve.writing import Answer, Token

Request = ChatRequest | TextRequest
Document = dict[str, Any]


@dataclass(frozen=True)
class Reply:
    """The documents that answer one request. `decode` turns tokens into text, `sign` an answer into its receipt."""

    asked: Request
    experts: Sequence[str]
    decode: Callable[[list[int]], str]
    sign: Callable[[str, str, Answer], Any]
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))
    _offsets: Counter[int] = field(default_factory=Counter)  # how many characters of each choice were told

    @property
    def chat(self) -> bool:
        return isinstance(self.asked, ChatRequest)

    @property
    def name(self) -> str:
        return f"{'chatcmpl' if self.chat else 'cmpl'}-{self.id}"

    def whole(self, answers: Sequence[Answer]) -> Document:
        """All answers at once."""
        choices = []
        for index, answer in enumerate(answers):
            said = {"message": {"role": "assistant", "content": answer.text}} if self.chat else {"text": answer.text}
            routing = {"tokens": tokens_json(answer.tokens), "shares": answer.shares}
            choices.append(
                {
                    **self._choice(index, said, answer.tokens, routing),
                    "finish_reason": finish_reason(answer),
                    **self._closing(answer),
                }
            )
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self._head(kind), "choices": choices, "usage": usage(answers, self.asked.n)}

    def opening(self, index: int) -> str:
        """The beginning of a choice in a stream; completions have none."""
        return self._chunk(self._choice(index, {"delta": {"role": "assistant", "content": ""}})) if self.chat else ""

    def token(self, index: int, token: Token) -> str:
        """A token in a stream, if there is anything to tell about it."""
        if not (token.text or self.asked.routing or self.asked.likely is not None):
            return ""
        said: Document = {"delta": {"content": token.text}} if self.chat else {"text": token.text}
        return self._chunk(self._choice(index, said, [token], {"tokens": tokens_json([token])}))

    def closing(self, index: int, answer: Answer) -> str:
        """The end of a choice in a stream."""
        said: Document = {"delta": {}} if self.chat else {"text": ""}
        choice = self._choice(index, said, [], {"tokens": [], "shares": answer.shares})
        return self._chunk({**choice, "finish_reason": finish_reason(answer), **self._closing(answer)})

    def ending(self, answers: Sequence[Answer]) -> str:
        """The end of a stream."""
        told = ""
        if self.asked.stream_options.include_usage:
            told = event({**self._head(self._chunk_kind), "choices": [], "usage": usage(answers, self.asked.n)})
        return told + "data: [DONE]\n\n"

    def _choice(self, index: int, said: Document, tokens: Sequence[Token] = (), routing: Any = None) -> Document:
        choice = {"index": index, **said, "finish_reason": None, "logprobs": None}
        if self.asked.likely is not None and tokens:
            choice["logprobs"] = self._chat_logprobs(tokens) if self.chat else self._text_logprobs(index, tokens)
        if self.asked.routing is not None and routing is not None:
            choice["routing"] = routing
        return choice

    def _closing(self, answer: Answer) -> Document:
        """What can be said once an answer is whole."""
        told: Document = {}
        if self.asked.routing is not None:
            told["routing_summary"] = summary(answer, self.experts)
        if self.asked.return_routed_experts:
            told["routed_experts"] = routed_experts(answer.tokens)
        if self.asked.receipt:
            told["receipt"] = self.sign(self.name, self.asked.model, answer)
        return told

    def _chat_logprobs(self, tokens: Sequence[Token]) -> Document:
        def one(text: str, logprob: float | None) -> Document:
            return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

        content = [
            {
                **one(token.text, token.chosen.logprob),
                "top_logprobs": [one(self.decode([other]), logprob) for other, logprob in token.chosen.top],
            }
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def _text_logprobs(self, index: int, tokens: Sequence[Token]) -> Document:
        offsets = []
        for token in tokens:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(token.text)
        tops = [{self.decode([other]): logprob for other, logprob in token.chosen.top} for token in tokens]
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [token.chosen.logprob for token in tokens],
            "top_logprobs": tops if self.asked.likely else None,
            "text_offset": offsets,
        }

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _chunk(self, choice: Document) -> str:
        return event({**self._head(self._chunk_kind), "choices": [choice]})

    def _head(self, kind: str) -> Document:
        return {"id": self.name, "object": kind, "created": self.created, "model": self.asked.model}


def event(document: Mapping[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(document)}\n\n"


def usage(answers: Sequence[Answer], n: int = 1) -> dict[str, int]:
    """A prompt counts once, however many answers it has."""
    prompts = sum(answer.prompt_tokens for answer in answers[::n])
    completions = sum(answer.completion_tokens for answer in answers)
    return {"prompt_tokens": prompts, "completion_tokens": completions, "total_tokens": prompts + completions}


def finish_reason(answer: Answer) -> str:
    """OpenAI knows no cancelled answers; the server's own end cuts one short."""
    return "length" if answer.finish == "cancelled" else answer.finish


def tokens_json(tokens: Sequence[Token]) -> list[Document]:
    """Who wrote what."""
    return [
        {
            "text": token.text,
            "expert": token.expert,
            "agreement": round(token.agreement, 3),
            "layers": list(token.layers),
        }
        for token in tokens
    ]


def summary(answer: Answer, experts: Sequence[str]) -> Document:
    """An answer's routing in a few numbers."""
    routes = [token.layers for token in answer.tokens]
    changes = [sum(a != b for a, b in zip(*each, strict=True)) for each in pairwise(routes)]
    return {
        "experts": list(experts),
        "share": [answer.shares.get(name, 0.0) for name in experts],
        "layers": len(routes[0]) if routes else 0,
        "switches_per_token": sum(changes) / len(changes) if changes else 0.0,
    }


def routed_experts(tokens: Sequence[Token]) -> str:
    """Each layer's choice for each token that was told."""
    rows = [row for token in tokens for row in token.layers]
    return base64.b64encode(struct.pack(f"<{len(rows)}i", *rows)).decode()


def error_document(kind: str, message: str, param: str | None = None, code: str | None = None) -> Document:
    """OpenAI's shape for every error."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
