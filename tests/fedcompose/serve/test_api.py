"""The breadth of the API, by the `openai` client, synchronous and not, and by hand."""

from __future__ import annotations

import asyncio
import base64
import json
import math
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
from fastapi.testclient import TestClient
from openai import AsyncOpenAI, OpenAI

from fedcompose.cli import main
from fedcompose.receipt import server_key, verify_receipt
from fedcompose.release import VerifiedRelease
from fedcompose.serve.app import create_app
from fedcompose.serve.engine import Engine, Settings
from tests.fedcompose.serve.serving import HELLO, served

TOKENS = 16


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("server")
    return server_key(folder), folder / "server.pub"


@pytest.fixture(scope="module")
def url(engine: Engine, key: Any) -> Any:
    with served(create_app(engine, key[0])) as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> OpenAI:
    return OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def chat(client: OpenAI, model: str = "auto", **options: Any) -> Any:
    return client.chat.completions.create(model=model, messages=HELLO, max_tokens=TOKENS, **options)


def events(text: str) -> list[Any]:
    *documents, done, end = text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    return [json.loads(each.removeprefix("data: ")) for each in documents]


def test_the_asynchronous_client_hears_the_same(client: OpenAI, url: str) -> None:
    async def heard() -> tuple[str, list[str]]:
        async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as other:

            async def one(model: str) -> str:
                chunks = await other.chat.completions.create(
                    model=model, messages=HELLO, max_tokens=TOKENS, stream=True
                )
                return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])

            whole = await other.chat.completions.create(model="auto", messages=HELLO, max_tokens=TOKENS)
            return whole.choices[0].message.content or "", list(await asyncio.gather(*map(one, ["auto", "site-a"] * 3)))

    alone = [chat(client, model).choices[0].message.content for model in ("auto", "site-a")]
    assert asyncio.run(heard()) == (alone[0], alone * 3)


def test_logprobs_are_the_models_own(client: OpenAI, engine: Engine) -> None:
    answer = chat(client, logprobs=True, top_logprobs=3)
    told = answer.choices[0].logprobs.content
    prompt = engine.prepare(HELLO, Settings()).prompt
    pieces = engine.submit(engine.prepare(HELLO, Settings(max_tokens=TOKENS))).result().tokens
    ids = [*prompt, *(token.chosen.id for token in pieces)]

    from fedcompose.model.composed import load_release

    model, _ = load_release(engine.release, torch.float32, engine._base)
    with torch.no_grad():
        logprobs = model(torch.tensor([ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    expected = [float(row[token.chosen.id]) for row, token in zip(logprobs, pieces, strict=True)]

    assert "".join(each.token for each in told) == answer.choices[0].message.content
    assert [each.logprob for each in told] == pytest.approx(expected, abs=1e-4)
    assert all(bytes(each.bytes).decode() == each.token for each in told)
    for each in told:
        assert [top.logprob for top in each.top_logprobs] == sorted(
            (t.logprob for t in each.top_logprobs), reverse=True
        )
        assert len(each.top_logprobs) == 3 and each.top_logprobs[0].logprob == pytest.approx(each.logprob)
    chunks = list(chat(client, logprobs=True, stream=True))
    parts = [chunk.choices[0].logprobs for chunk in chunks]
    streamed = [each.logprob for part in parts if part for each in part.content]
    assert streamed == pytest.approx(expected, abs=1e-4)


def test_a_temperature_does_not_change_what_the_model_found_likely(client: OpenAI) -> None:
    warm = chat(client, logprobs=True, temperature=2.0, seed=3).choices[0].logprobs.content[0]
    cold = chat(client, logprobs=True, top_logprobs=20).choices[0].logprobs.content[0]
    likely = {each.token: each.logprob for each in cold.top_logprobs}
    assert warm.token not in likely or warm.logprob == pytest.approx(likely[warm.token], abs=1e-4)
    assert math.fsum(map(math.exp, likely.values())) <= 1


def test_n_answers_differ_and_a_seed_repeats_them_all(client: OpenAI) -> None:
    first, again = (chat(client, n=3, temperature=1.0, seed=11) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]

    assert [choice.index for choice in first.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert texts == [choice.message.content for choice in again.choices]
    assert first.usage.completion_tokens == 3 * TOKENS
    assert first.usage.prompt_tokens == chat(client).usage.prompt_tokens
    streamed = ["", "", ""]
    for chunk in chat(client, n=3, temperature=1.0, seed=11, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts


def test_completions_continue_a_text_as_it_is(client: OpenAI, engine: Engine) -> None:
    prompt = "Hello you"
    expected = engine.submit(engine.prepare_text(prompt, Settings(max_tokens=TOKENS))).result().text
    answer = client.completions.create(model="auto", prompt=prompt, max_tokens=TOKENS, logprobs=2)
    chunks = client.completions.create(model="auto", prompt=prompt, max_tokens=TOKENS, stream=True)

    assert answer.choices[0].text == expected == "".join(chunk.choices[0].text for chunk in chunks)
    assert expected != chat(client).choices[0].message.content
    logprobs = answer.choices[0].logprobs
    assert "".join(logprobs.tokens) == expected
    assert logprobs.text_offset == [len("".join(logprobs.tokens[:at])) for at in range(len(logprobs.tokens))]
    assert len(logprobs.token_logprobs) == TOKENS

    several = client.completions.create(model="auto", prompt=[prompt, "Else"], n=2, max_tokens=4)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert several.choices[0].text == several.choices[1].text == expected[: len(several.choices[0].text)]
    assert several.usage.completion_tokens == 16
    assert several.usage.prompt_tokens == len("Hello you") + len("Else")


def test_a_stop_string_ends_a_completion(client: OpenAI) -> None:
    full = client.completions.create(model="auto", prompt="Hello", max_tokens=TOKENS).choices[0].text
    cut = client.completions.create(model="auto", prompt="Hello", max_tokens=TOKENS, stop=[full[5:7]]).choices[0]
    assert (cut.text, cut.finish_reason) == (full[: full.index(full[5:7])], "stop")


def test_a_model_can_be_looked_up(client: OpenAI) -> None:
    assert client.models.retrieve("expert:site-a").model_extra["site"] == "site-a"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-5")


@pytest.mark.parametrize("stream", [False, True])
def test_routes_are_told_by_layer_and_summed_up(client: OpenAI, url: str, stream: bool) -> None:
    body = {"model": "auto", "messages": HELLO, "max_tokens": TOKENS, "routing": True, "return_routed_experts": True}
    reply = httpx.post(f"{url}/v1/chat/completions", json=body | {"stream": stream}, timeout=60)
    choices = [each["choices"][0] for each in events(reply.text)] if stream else reply.json()["choices"]
    tokens = [token for choice in choices for token in choice.get("routing", {}).get("tokens", [])]
    last = choices[-1]

    array = np.frombuffer(base64.b64decode(last["routed_experts"]), "<i4").reshape(TOKENS, 2, 1)
    assert array[:, :, 0].tolist() == [token["layers"] for token in tokens]
    summary = last["routing_summary"]
    assert summary["experts"] == ["site-a", "site-b"]
    assert summary["share"] == pytest.approx([(array == row).mean() for row in (0, 1)])
    assert summary["layers"] == 2
    assert summary["switches_per_token"] == pytest.approx((array[1:] != array[:-1]).sum() / (TOKENS - 1))
    assert summary["switches_per_token"] > 0


@pytest.mark.parametrize(
    ("routing", "rows"),
    [
        ({"force": "site-b"}, {(1, 1)}),
        ({"pins": [{"expert": "site-b", "layers": [0, 0]}, {"expert": "site-a", "layers": [1, 1]}]}, {(1, 0)}),
        ({"force": "site-a", "pins": [{"expert": "site-b", "layers": [1, 1]}]}, {(0, 1)}),
    ],
)
def test_an_expert_can_be_forced_everywhere_or_in_some_layers(client: OpenAI, routing: Any, rows: Any) -> None:
    choice = chat(client, extra_body={"routing": routing}).choices[0]
    assert {tuple(token["layers"]) for token in choice.routing["tokens"]} == rows


@pytest.mark.parametrize("routing", [{"force": "nobody"}, {"pins": [{"expert": "site-a", "layers": [0, 9]}]}])
def test_a_wish_that_cannot_be_names_the_field(client: OpenAI, routing: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, extra_body={"routing": routing})
    assert (caught.value.param, caught.value.code) == ("routing", "pin_invalid")


@pytest.mark.parametrize("model", ["auto", "expert:site-a", "base"])
def test_a_receipt_counts_every_token_and_verifies_offline(
    model: str, url: str, key: Any, release: VerifiedRelease, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    body = {"model": model, "messages": HELLO, "max_tokens": TOKENS, "receipt": True, "routing": True}
    reply = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
    choice = reply.json()["choices"][0]
    receipt = verify_receipt(json.dumps(choice["receipt"]).encode(), [key[0].public_pem])

    wrote = [token["expert"] for token in choice["routing"]["tokens"]]
    assert {each.site: each.tokens for each in receipt.experts} == {
        site: wrote.count(site) for site in ("site-a", "site-b")
    }
    assert receipt.base_tokens == wrote.count("base")
    assert receipt.tokens == reply.json()["usage"]["completion_tokens"] == TOKENS
    assert (receipt.release, receipt.model, receipt.id) == (release.dir_hash, model, reply.json()["id"])

    (tmp_path / "answer.json").write_bytes(reply.content)
    assert not _verify(tmp_path / "answer.json", "--key", str(key[1]))
    printed = capsys.readouterr().out
    assert f"{TOKENS} tokens" in printed and "(the one given)" in printed


def test_a_forged_receipt_or_another_answer_is_refused(
    url: str, key: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    body = {"model": "auto", "messages": HELLO, "max_tokens": TOKENS, "receipt": True}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()
    receipt = answer["choices"][0]["receipt"]
    payload = json.loads(base64.b64decode(receipt["payload"]))
    moved = {**payload, "experts": [{**each, "tokens": TOKENS - each["tokens"]} for each in payload["experts"]]}
    forged = {**receipt, "payload": base64.b64encode(json.dumps(moved).encode()).decode()}
    other = json.loads(json.dumps(answer))
    other["choices"][0]["message"]["content"] += "!"
    stranger = server_key(tmp_path / "stranger")
    cases = [
        (forged, key[1], "ENVELOPE_INVALID"),
        (receipt, tmp_path / "stranger" / "server.pub", "ENVELOPE_KEY"),
        (other, key[1], "RECEIPT_OTHER_ANSWER"),
        ({**answer, "id": "chatcmpl-other"}, key[1], "RECEIPT_OTHER_ANSWER"),  # the same words, said elsewhere
        ({**answer, "model": "base"}, key[1], "RECEIPT_OTHER_ANSWER"),
        ({**answer, "choices": []}, key[1], "RECEIPT_INVALID"),
    ]
    assert stranger.keyid != key[0].keyid
    for document, public, code in cases:
        (tmp_path / "receipt.json").write_text(json.dumps(document))
        assert _verify(tmp_path / "receipt.json", "--key", str(public)) == 1
        assert capsys.readouterr().err.startswith(code)


def test_a_server_without_a_key_says_that_it_signs_nothing(engine: Engine) -> None:
    http = TestClient(create_app(engine), "http://127.0.0.1")
    reply = http.post("/v1/chat/completions", json={"model": "auto", "messages": HELLO, "receipt": True})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "receipt")


def _verify(*arguments: Any) -> int:
    with pytest.raises(SystemExit) as end:
        main(["verify-receipt", *map(str, arguments)])
    return int(end.value.code or 0)
