"""LiteLLM, a second client, hears from our server what the first one hears.

It lives in an environment of its own, named by FEDCOMPOSE_LITELLM_PYTHON:
`make interop-litellm` makes it and runs this.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from openai import OpenAI

from fedcompose.serve.app import create_app
from fedcompose.serve.engine import Engine
from tests.fedcompose.serve.serving import HELLO, served
from tests.federation_sim import ATTENTION, SITES, make_federation
from tests.tiny_experts import make_tiny_expert

PYTHON = os.environ.get("FEDCOMPOSE_LITELLM_PYTHON")
TOKENS = 24
ASK = """
import asyncio, json, sys
import litellm

to, messages, tokens = {"api_base": sys.argv[1] + "/v1", "api_key": "none"}, json.loads(sys.argv[2]), int(sys.argv[3])
asked = {**to, "messages": messages, "max_tokens": tokens, "temperature": 0, "num_retries": 0}


def error_of(**changed):
    try:
        litellm.completion(**asked | changed)
    except Exception as error:
        return type(error).__name__


async def asynchronous():
    chunks = await litellm.acompletion(model="openai/auto", stream=True, **asked)
    return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])


whole = litellm.completion(model="openai/auto", **asked)
chunks = list(litellm.completion(model="openai/auto", stream=True, stream_options={"include_usage": True}, **asked))
forced = litellm.completion(model="openai/expert:site-b", extra_body={"routing": True}, **asked)
print("HEARD", json.dumps({
    "whole": whole.choices[0].message.content,
    "finish": whole.choices[0].finish_reason,
    "streamed": "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices),
    "asynchronous": asyncio.run(asynchronous()),
    "usage": [whole.usage.completion_tokens, chunks[-1].usage.completion_tokens],
    "forced": forced.choices[0].message.content,
    "unknown": error_of(model="openai/nobody"),
    "unsupported": error_of(model="openai/auto", extra_body={"tools_of_mine": []}),
    "too long": error_of(model="openai/auto", max_tokens=100_000),
}))
"""

pytestmark = pytest.mark.skipif(PYTHON is None, reason="FEDCOMPOSE_LITELLM_PYTHON is not set: `make interop-litellm`")


def heard(url: str, folder: Path) -> dict[str, Any]:
    script = folder / "ask.py"
    script.write_text(ASK)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    quiet = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_TELEMETRY": "False"}  # else it asks the network
    result = subprocess.run(
        [str(PYTHON), str(script), url, json.dumps(HELLO), str(TOKENS)],
        capture_output=True, text=True, check=False, env=environment | quiet,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("HEARD ")]
    found: dict[str, Any] = json.loads(line.removeprefix("HEARD "))
    return found


def test_litellm_hears_what_openais_own_client_hears(tiny_base: Path, tmp_path: Path) -> None:
    experts = {site: make_tiny_expert(tiny_base, tmp_path / site, seed) for seed, site in enumerate(SITES)}
    experts["attention"] = make_tiny_expert(tiny_base, tmp_path / "attention", seed=3, target_modules=ATTENTION)
    sim = make_federation(tmp_path / "federation", tiny_base, experts)
    engine = Engine(sim.released(), sim.base, torch.float32)
    try:
        with served(create_app(engine)) as url:
            client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
            said = {}
            for model in ("auto", "expert:site-b"):
                said[model] = client.chat.completions.create(model=model, messages=HELLO, max_tokens=TOKENS)  # type: ignore[arg-type]
            found = heard(url, tmp_path)
    finally:
        engine.close()
    auto = said["auto"]
    assert auto.usage is not None
    assert {found["whole"], found["streamed"], found["asynchronous"]} == {auto.choices[0].message.content}
    assert found["finish"] == auto.choices[0].finish_reason
    assert set(found["usage"]) == {auto.usage.completion_tokens}
    assert found["forced"] == said["expert:site-b"].choices[0].message.content != found["whole"]
    assert found["unknown"] == "NotFoundError"
    assert found["unsupported"] == "BadRequestError"
    assert found["too long"] == "BadRequestError"
