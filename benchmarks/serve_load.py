"""A server under load by clients who behave badly: does it stay up, forget nobody, and keep its memory?

    python benchmarks/serve_load.py RELEASE --minutes 10 --clients 64

Starts `fedcompose serve` on a free port. Each client does in turn, at random: an answer streamed or whole, forced
experts, a stream left after a few tokens, a prompt that is too long, a body that is no JSON, one that is too large, a
reader who is slow. Every answer must be of the kind that was asked for; at the end nothing may be running or waiting, a
few more answers must come, and the cache must be free. Prints one JSON document; exits with 1 where any of this is not
so. Further options are `fedcompose serve`'s.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

TOKENS = (4, 8, 16, 32)
LONG = "word " * 200_000
EVERY_S = 10.0
MINUTES = (1, 2, 5, 10)  # after which memory is told


async def ask(http: httpx.AsyncClient, models: list[str], rng: random.Random) -> str:
    """One request of some kind; what came of it."""
    kind = rng.choice(["whole", "whole", "stream", "stream", "leave", "long", "malformed", "large", "slow"])
    body: dict[str, Any] = {
        "model": rng.choice(models),
        "messages": [{"role": "user", "content": f"What is {rng.randrange(100)} + {rng.randrange(100)}?"}],
        "max_tokens": rng.choice(TOKENS),
        "routing": True,
    }
    path, expected = "/v1/chat/completions", 200
    if kind == "long":
        body["messages"][0]["content"], expected = LONG, 400
    if kind == "malformed":
        reply = await http.post(
            path, content=b'{"model": "auto", "messages": [', headers={"Content-Type": "application/json"}
        )
        return judge(kind, reply.status_code, 400)
    if kind == "large":
        reply = await http.post(path, content=b"x" * (5 << 20), headers={"Content-Type": "application/json"})
        return judge(kind, reply.status_code, 413)
    if kind in ("whole", "long"):
        reply = await http.post(path, json=body)
        if reply.status_code == 200 and not reply.json()["choices"][0]["routing"]["tokens"]:
            return f"{kind}: empty"
        return judge(kind, reply.status_code, expected)
    async with http.stream("POST", path, json=body | {"stream": True}) as reply:
        if reply.status_code != 200:
            return judge(kind, reply.status_code, 200)
        text = ""
        async for line in reply.aiter_lines():
            text = line or text
            if kind == "leave" and rng.random() < 0.4:
                return "leave: left"
            if kind == "slow":
                await asyncio.sleep(0.2)
    return f"{kind}: ok" if text == "data: [DONE]" else f"{kind}: cut off"


def judge(kind: str, status: int, expected: int) -> str:
    if status == 429:
        return f"{kind}: told to wait"
    return f"{kind}: ok" if status == expected else f"{kind}: WRONG {status}"


async def client(url: str, models: list[str], seed: int, until: float, told: Counter[str]) -> None:
    rng = random.Random(seed)
    async with httpx.AsyncClient(base_url=url, timeout=300) as http:
        while time.monotonic() < until:
            try:
                outcome = await ask(http, models, rng)
            except (httpx.RemoteProtocolError, httpx.WriteError, httpx.ReadError) as error:
                outcome = f"connection: {type(error).__name__}"
            except httpx.TimeoutException:
                outcome = "STUCK"
            told[outcome] += 1
            if "wait" in outcome:
                await asyncio.sleep(1)


async def watch(url: str, pid: int, until: float, seen: list[dict[str, float]]) -> None:
    async with httpx.AsyncClient(base_url=url, timeout=60) as http:
        while time.monotonic() < until:
            seen.append({"at": time.monotonic(), "mb": resident_mb(pid), **(await gauges(http))})
            await asyncio.sleep(EVERY_S)


async def gauges(http: httpx.AsyncClient) -> dict[str, float]:
    text = (await http.get("/metrics")).text
    wanted = re.findall(r"^fedcompose_(requests_running|requests_waiting|cache_free_ratio) (\S+)", text, re.MULTILINE)
    return {name: float(value) for name, value in wanted}


async def a_few_more(http: httpx.AsyncClient) -> list[int]:
    """One answer after the other by each of the two models in memory; pages that ended late are given back in them."""
    said = []
    for model in ("auto", "base") * 2:
        body = {"model": model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
        said.append((await http.post("/v1/chat/completions", json=body)).status_code)
    return said


def resident_mb(pid: int) -> float:
    match = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    return int(match[1]) / 1024 if match else 0.0


async def load(url: str, pid: int, clients: int, minutes: float) -> dict[str, Any]:
    models = [each["id"] for each in httpx.get(f"{url}/v1/models", timeout=60).json()["data"]] + ["auto"] * 3
    told, seen = Counter[str](), list[dict[str, float]]()
    began = time.monotonic()
    until = began + 60 * minutes
    await asyncio.gather(watch(url, pid, until, seen), *(client(url, models, i, until, told) for i in range(clients)))
    async with httpx.AsyncClient(base_url=url, timeout=300) as http:
        for _ in range(60):
            left = await gauges(http)
            if not left["requests_running"] and not left["requests_waiting"]:
                break
            await asyncio.sleep(1)
        last = await a_few_more(http)
        left = await gauges(http)
        health = (await http.get("/health")).status_code
    seen.append({"at": time.monotonic(), "mb": resident_mb(pid)})
    return {
        "clients": clients,
        "minutes": (time.monotonic() - began) / 60,
        "outcomes": dict(sorted(told.items())),
        "requests": told.total(),
        "left_over": left,
        "last_answers": last,
        "health": health,
        "memory_mb": {
            **{f"minute {minute}": at(seen, began + 60 * minute) for minute in MINUTES if minute <= minutes},
            "end": seen[-1]["mb"],
            "most": max(each["mb"] for each in seen),
        },
        "least_cache_free": min(each.get("cache_free_ratio", 1) for each in seen),
        "most_running": max(each.get("requests_running", 0) for each in seen),
        "most_waiting": max(each.get("requests_waiting", 0) for each in seen),
    }


def at(seen: list[dict[str, float]], moment: float) -> float:
    """The memory seen nearest to a moment."""
    return min(seen, key=lambda each: abs(each["at"] - moment))["mb"]


def is_well(figures: dict[str, Any]) -> bool:
    left = figures["left_over"]
    return (
        not any(word in each for each in figures["outcomes"] for word in ("WRONG", "STUCK", "empty", "cut off"))
        and set(figures["last_answers"]) == {200}
        and (left["requests_running"], left["requests_waiting"]) == (0, 0)
        and left["cache_free_ratio"] > 0.99
        and (figures["health"], figures["exit_status"]) == (200, 0)
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("release")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=64)
    asked, further = parser.parse_known_args()
    server = subprocess.Popen(
        [sys.executable, "-m", "fedcompose", "serve", asked.release, "--port", "0", "--json", *further],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    assert server.stdout is not None
    try:
        announced = ""
        while not announced.rstrip().endswith("}"):
            line = server.stdout.readline()
            assert line, "the server ended before it answered"
            announced += line
        figures = asyncio.run(load(json.loads(announced)["url"], server.pid, asked.clients, asked.minutes))
        server.send_signal(signal.SIGTERM)
        figures["exit_status"] = server.wait(60)
    finally:
        server.kill()
        server.wait()
    print(json.dumps(figures, indent=2))
    return 0 if is_well(figures) else 1


if __name__ == "__main__":
    sys.exit(main())
