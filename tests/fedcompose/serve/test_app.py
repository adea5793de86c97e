"""A real server on a free port, asked by the `openai` client and by hand."""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import openai
import pytest
import torch
from fastapi.testclient import TestClient
from openai import OpenAI

from fedcompose.errors import RefusedError
from fedcompose.model.composed import load_release
from fedcompose.model.controls import FixedRouter
from fedcompose.model.lm import load_base
from fedcompose.provenance import UseTerms
from fedcompose.release import VerifiedRelease
from fedcompose.serve.app import create_app
from fedcompose.serve.batching import engine_dead
from fedcompose.serve.engine import Engine, Settings
from fedcompose.serve.limits import Door
from fedcompose.serve.writing import Job
from tests.fedcompose.serve.serving import HELLO, served
from tests.federation_sim import FederationSim

PROMPT = "<|im_start|>user\nHello you<|im_end|>\n<|im_start|>assistant\n"
PROMPT_TOKENS = len(re.sub(r"<[|]im_\w+[|]>", "?", PROMPT))  # a byte or a special token each
TOKENS = 40


@pytest.fixture(scope="module")
def url(engine: Engine) -> Iterator[str]:
    with served(create_app(engine)) as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> OpenAI:
    return OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def composed(release: VerifiedRelease, talking_sim: FederationSim) -> tuple[Any, Any]:
    """The release loaded a second time, without a server."""
    return load_release(release, torch.float32, talking_sim.base)


def generated(model: Any, tokenizer: Any) -> str:
    """The greedy answer by transformers alone."""
    ids = tokenizer(PROMPT, add_special_tokens=False, return_tensors="pt").input_ids
    rows = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False)
    return str(tokenizer.decode(rows[0, ids.shape[1] :], skip_special_tokens=True))


def whole(client: OpenAI, model: str = "auto", **options: Any) -> Any:
    return client.chat.completions.create(model=model, messages=HELLO, max_tokens=TOKENS, **options)


def streamed(client: OpenAI, model: str = "auto", **options: Any) -> str:
    chunks = whole(client, model, stream=True, **options)
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def post(url: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{url}/v1/chat/completions", json={"model": "auto", "messages": HELLO} | body, timeout=60)


def test_the_models_are_auto_each_expert_and_the_base(client: OpenAI) -> None:
    models = {model.id: model for model in client.models.list()}

    assert list(models) == ["auto", "expert:site-a", "expert:site-b", "base"]
    assert models["expert:site-b"].model_extra["domain"] == "ordering"


def test_an_answer_streamed_or_not_is_what_generate_writes(client: OpenAI, composed: tuple[Any, Any]) -> None:
    expected = generated(*composed)
    answer = whole(client)

    assert answer.choices[0].message.content == expected
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (PROMPT_TOKENS, TOKENS)
    assert streamed(client) == expected
    assert any(ord(character) > 127 for character in expected), "a text of ASCII alone would not test the decoder"


def test_a_forced_expert_answers_as_under_a_router_that_always_chooses_it(
    client: OpenAI, composed: tuple[Any, Any]
) -> None:
    model, tokenizer = composed
    texts = []
    for row, site in enumerate(["site-a", "site-b"]):
        with model.routing.using(FixedRouter(row, 2)):
            texts.append(generated(model, tokenizer))
        answer = whole(client, f"expert:{site}", extra_body={"routing": True}).choices[0]
        assert answer.message.content == texts[-1]
        assert answer.routing["shares"][site] == 1
    assert len({*texts, generated(model, tokenizer)}) == 3, "forcing must make a difference"


def test_the_base_is_the_untouched_base(client: OpenAI, talking_sim: FederationSim) -> None:
    answer = whole(client, "base", extra_body={"routing": True}).choices[0]

    assert answer.message.content == generated(*load_base(talking_sim.base.path, torch.float32))
    assert {token["expert"] for token in answer.routing["tokens"]} == {"base"}
    assert answer.routing["shares"] == {}


def test_requests_at_the_same_time_do_not_share_their_forced_expert(client: OpenAI) -> None:
    models = ["expert:site-a", "expert:site-b", "auto", "base"]
    alone = [streamed(client, model) for model in models]
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(lambda model: streamed(client, model), models * 2))

    assert together == alone * 2


def test_routing_names_the_expert_that_most_layers_chose_for_each_token(
    client: OpenAI, composed: tuple[Any, Any]
) -> None:
    model, tokenizer = composed
    with model.routing.recording() as record:
        expected = generated(model, tokenizer)
    chosen = torch.stack([choices[:, 0, -1] for choices in record.choices])  # (tokens, layers)
    majority = ["site-a" if row.sum() * 2 <= len(row) else "site-b" for row in chosen]

    answer = whole(client, extra_body={"routing": True}).choices[0]
    routing = answer.routing

    assert "".join(token["text"] for token in routing["tokens"]) == answer.message.content == expected
    assert [token["expert"] for token in routing["tokens"]] == majority
    assert set(majority) == {"site-a", "site-b"}, "one expert alone would not test the majority"
    share = chosen.float().mean().item()
    assert routing["shares"] == pytest.approx({"site-a": 1 - share, "site-b": share})

    chunks = list(whole(client, stream=True, extra_body={"routing": True}))
    tokens = [token for chunk in chunks for token in getattr(chunk.choices[0], "routing", {}).get("tokens", [])]
    assert tokens == routing["tokens"]
    assert chunks[-1].choices[0].routing["shares"] == routing["shares"]


def test_routing_is_told_only_on_request(url: str) -> None:
    assert "routing" not in post(url, max_tokens=2).json()["choices"][0]
    assert "routing" not in post(url, max_tokens=2, stream=True).text


def test_a_stop_string_ends_the_answer_before_itself(client: OpenAI) -> None:
    full = whole(client).choices[0].message.content
    stop = full[10:13]
    answer = whole(client, stop=[stop, "never written"])

    assert answer.choices[0].message.content == full[: full.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens < TOKENS
    assert streamed(client, stop=stop) == full[: full.index(stop)]


def test_the_end_of_turn_token_ends_the_answer(client: OpenAI, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    full = whole(client).choices[0].message.content
    monkeypatch.setitem(engine.__dict__, "ends", frozenset([engine._tokenizer.convert_tokens_to_ids("j")]))
    answer = whole(client)

    assert "j" in full
    assert answer.choices[0].message.content == full.split("j")[0]
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens < TOKENS


def test_a_seed_repeats_a_sampled_answer(client: OpenAI) -> None:
    first, again, other, unseeded = (
        whole(client, temperature=1.0, **seed).choices[0].message.content
        for seed in ({"seed": 7}, {"seed": 7}, {"seed": 8}, {})
    )
    assert first == again == streamed(client, temperature=1.0, seed=7)
    assert len({first, other, unseeded}) == 3


def test_a_narrow_top_p_leaves_nothing_to_chance(client: OpenAI) -> None:
    assert len({streamed(client, temperature=1.0, top_p=1e-6, seed=seed) for seed in (7, 8)}) == 1


def test_messages_may_come_in_text_parts(client: OpenAI) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hello"}, {"type": "text", "text": " you"}]}]
    answer = client.chat.completions.create(model="auto", messages=parts, max_completion_tokens=TOKENS)

    assert answer.choices[0].message.content == whole(client).choices[0].message.content


def test_a_stream_is_events_that_end_with_done(url: str) -> None:
    reply = post(url, max_tokens=5, stream=True, stream_options={"include_usage": True})
    assert reply.headers["content-type"].startswith("text/event-stream")
    events = reply.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    documents = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]

    assert documents[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    finishes = Counter(each["choices"][0]["finish_reason"] for each in documents[:-1])
    assert finishes["length"] == 1 and set(finishes) == {"length", None}
    assert documents[-1]["choices"] == []
    assert documents[-1]["usage"]["completion_tokens"] == 5
    assert {each["object"] for each in documents} == {"chat.completion.chunk"}


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"tools": [{"type": "function"}]}, "tools", "unsupported_parameter"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "unsupported_parameter"),
        ({"response_format": {"type": "json_object"}}, "response_format.type", "invalid_value"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "invalid_value"),
        ({"n": 0}, "n", "invalid_value"),
        ({"n": 17}, "n", "invalid_value"),
        ({"top_logprobs": 21}, "top_logprobs", "invalid_value"),
        ({"routing": {"probs": True}}, "routing.probs", "unsupported_parameter"),
        ({"routing": {"pins": [{"expert": "site-a", "layers": [0]}]}}, "routing.pins.0.layers", "invalid_value"),
        ({"temperature": -1}, "temperature", "invalid_value"),
        ({"temperature": "hot"}, "temperature", "invalid_value"),
        ({"top_p": 0}, "top_p", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"max_tokens": True}, "max_tokens", "invalid_value"),
        ({"stop": ["1", "2", "3", "4", "5"]}, "stop", "invalid_value"),
        ({"stop": ""}, "stop.0", "invalid_value"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content", "invalid_value"),
        ({"messages": [{"role": "tool", "content": "secret"}]}, "messages.0.role", "invalid_value"),
        ({"routing": "yes"}, "routing", "invalid_value"),
    ],
)
def test_what_it_does_not_do_it_refuses_by_name(url: str, body: dict[str, Any], param: str, code: str) -> None:
    reply = post(url, **body)
    error = reply.json()["error"]

    assert reply.status_code == 400
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["type"], error["code"]) == ("invalid_request_error", code)
    assert error["param"] == param
    assert error["param"] in error["message"]
    assert "secret" not in reply.text


def test_null_is_the_same_as_absent(url: str) -> None:
    assert post(url, max_tokens=1, tools=None, stop=None, temperature=None).status_code == 200


@pytest.mark.parametrize("text", ['"\\ud800"', '[{"type": "text", "text": "\\ud800"}]'])
def test_half_a_character_is_refused(url: str, text: str) -> None:
    body = f'{{"model": "auto", "messages": [{{"role": "user", "content": {text}}}]}}'
    reply = httpx.post(f"{url}/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "messages.0.content.0.text")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'"x"', b"\xff", b"[" * 100_000, b"9" * 5000])
def test_a_body_that_is_no_json_object_is_refused(url: str, content: bytes) -> None:
    reply = httpx.post(
        f"{url}/v1/chat/completions", content=content, headers={"Content-Type": "application/json"}, timeout=60
    )
    assert reply.status_code == 400
    assert reply.json()["error"]["type"] == "invalid_request_error"


def test_an_unknown_model_is_not_found(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        whole(client, "gpt-5")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_what_does_not_fit_the_context_is_refused_before_it_runs(client: OpenAI, engine: Engine) -> None:
    room = engine.context - len(engine.prepare(HELLO, Settings(max_tokens=1)).prompt)
    assert engine.prepare(HELLO, Settings(max_tokens=room)).max_tokens == room
    long = [{"role": "user", "content": "x" * engine.context}]
    for messages, tokens in ((HELLO, room + 1), (long, 1), (long, None)):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model="auto", messages=messages, max_tokens=tokens)
        assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")


def test_all_prompts_are_read_in_one_thread(url: str, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else each of several threads keeps the memory of the longest prompt that it has read."""
    threads, prepare = set(), engine.prepare

    def slow(*arguments: Any) -> Any:
        threads.add(threading.get_ident())
        time.sleep(0.02)
        return prepare(*arguments)

    monkeypatch.setattr(engine, "prepare", slow)
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda _: post(url, max_tokens=1), range(8)))
    assert {reply.status_code for reply in replies} == {200}
    assert len(threads) == 1


@pytest.mark.parametrize("stream", [True, False])
def test_what_cannot_be_begun_is_refused_with_a_status_and_leaves_nothing_running(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    submit, jobs = engine.submit, []

    def once(job: Job, *heard: Any) -> Any:
        jobs.append(job)
        if len(jobs) > 1:
            raise engine_dead()
        return submit(job, *heard)

    monkeypatch.setattr(engine, "submit", once)
    http = TestClient(create_app(engine), "http://127.0.0.1")
    body = {"model": "auto", "messages": HELLO, "max_tokens": 400, "stream": stream, "n": 2}
    reply = http.post("/v1/chat/completions", json=body)
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "engine_dead")
    assert [job.cancelled for job in jobs] == [True, True]


@pytest.mark.parametrize("stream", [True, False])
def test_what_was_let_in_before_the_release_was_refused_is_not_answered(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    prepare = engine.prepare

    def slow(*given: Any) -> Job:
        job = prepare(*given)
        engine.refuse("USE_EXPIRED")
        return job

    monkeypatch.setattr(engine, "prepare", slow)
    body = {"model": "auto", "messages": HELLO, "max_tokens": 4, "stream": stream}
    reply = TestClient(create_app(engine), "http://127.0.0.1").post("/v1/chat/completions", json=body)
    engine.mask(())
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "use_expired")


def test_when_the_time_of_a_sites_terms_is_over_the_door_closes(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def judge() -> dict[str, str]:
        raise RefusedError("USE_EXPIRED", "the time is over")

    monkeypatch.setattr(engine, "close", lambda: None)
    expert = engine.release.experts[0]
    terms = UseTerms(
        purpose="tests", recipients=("hub",), expires=datetime.now(UTC) + timedelta(seconds=1), contact="me"
    )
    claims = expert.provenance.model_copy(update={"use": terms})
    experts = (replace(expert, provenance=claims), *engine.release.experts[1:])
    monkeypatch.setattr(engine, "release", replace(engine.release, experts=experts))
    door = Door()
    app = create_app(engine, door=door, judge=judge)

    async def main() -> None:
        async with app.router.lifespan_context(app):
            await asyncio.sleep(0.1)
            assert door.closed is None
            while door.closed is None:
                await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(main(), 10))
    engine.mask(())
    assert door.closed == "USE_EXPIRED"


def test_a_prompt_is_read_once_however_many_answers_it_has(
    url: str, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, prepare = [], engine.prepare
    monkeypatch.setattr(engine, "prepare", lambda *given: read.append(1) or prepare(*given))
    assert len(post(url, n=3, max_tokens=1).json()["choices"]) == 3
    assert read == [1]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_stops_its_answer(
    url: str, engine: Engine, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    futures = []
    submit = engine.submit
    monkeypatch.setattr(engine, "submit", lambda *job: futures.append(submit(*job)) or futures[-1])
    slow = engine._model.register_forward_pre_hook(lambda *_: time.sleep(0.05))
    body = {"model": "auto", "messages": HELLO, "max_tokens": 400, "stream": stream}
    try:
        with (
            httpx.Client(timeout=1.0) as http,
            http.stream("POST", f"{url}/v1/chat/completions", json=body) as reply,
        ):
            next(reply.iter_lines())
    except httpx.ReadTimeout:
        assert not stream, "the whole answer takes longer than this client waits"
    finally:
        answer = futures[0].result(timeout=60)
        slow.remove()

    assert answer.finish == "cancelled"
    assert answer.completion_tokens < 400


def test_a_page_elsewhere_cannot_reach_it_under_its_own_name(url: str) -> None:
    assert httpx.get(f"{url}/v1/models", headers={"Host": "evil.example"}).status_code == 400
    assert httpx.get(f"{url}/v1/models", headers={"Host": "[::1]:80"}).status_code == 200
    assert httpx.get(f"{url}/v1/models", headers={"Host": "localhost:80"}).status_code == 200
    body = json.dumps({"model": "auto", "messages": HELLO})
    simple = httpx.post(f"{url}/v1/chat/completions", content=body, headers={"Content-Type": "text/plain"})
    assert simple.status_code == 400  # what a foreign page may send without asking


def test_the_page_asks_nothing_of_anybody_else(url: str) -> None:
    reply = httpx.get(url)

    assert reply.headers["content-type"].startswith("text/html")
    assert "default-src 'none'; connect-src 'self'" in reply.headers["content-security-policy"]
    assert "//" not in re.sub(r"^ *//.*| // .*", "", reply.text, flags=re.MULTILINE)  # no address of any kind
    assert httpx.get(f"{url}/docs").json()["error"]["message"] == "Not Found"


def test_health_names_the_release(url: str, release: VerifiedRelease) -> None:
    assert httpx.get(f"{url}/health").json() == {"status": "ok", "release": release.dir_hash}


def test_a_failing_model_is_reported_and_the_next_answer_comes(
    engine: Engine, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory, near: Hello you")

    with monkeypatch.context() as patch:
        patch.setattr(engine, "decode", fail)
        http = TestClient(create_app(engine), "http://127.0.0.1", raise_server_exceptions=False)
        body = {"model": "auto", "messages": HELLO, "max_tokens": 3}
        reply = http.post("/v1/chat/completions", json=body)
        assert (reply.status_code, reply.json()["error"]["type"]) == (500, "server_error")
        events = http.post("/v1/chat/completions", json=body | {"stream": True}).text
        assert json.loads(events.split("\n\n")[-2].removeprefix("data: "))["error"]["type"] == "server_error"
        assert "[DONE]" not in events
        assert "Hello" not in events + reply.text
    assert post(url, max_tokens=1).status_code == 200
