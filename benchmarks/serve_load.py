"""A server under load by clients who behave badly: does it stay up, forget nobody, and keep its memory?

    python benchmarks/serve_load.py RELEASE --minutes 10 --clients 64

Starts `fedcompose serve` on a free port. Each client does in turn, at random: an answer streamed or whole, forced
experts, a stream left after a few tokens, a prompt that is too long, a body that is no JSON, one that is too large, a
reader who is slow. Every answer must be of the kind that was asked for; at the end nothing may be running, and one more
answer must come. Prints one JSON document.
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
    wanted = re.findall(r"^fedcompose_requests_(running|waiting) (\S+)", text, re.MULTILINE)
    return {name: float(value) for name, value in wanted}


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
            if not any(left.values()):
                break
            await asyncio.sleep(1)
        last = await http.post(
            "/v1/chat/completions",
            json={"model": "auto", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4},
        )
        health = (await http.get("/health")).status_code
    steady = [each["mb"] for each in seen if each["at"] - began > 60 * minutes / 5]
    return {
        "clients": clients,
        "minutes": (time.monotonic() - began) / 60,
        "outcomes": dict(sorted(told.items())),
        "requests": told.total(),
        "left_over": left,
        "last_answer": last.status_code,
        "health": health,
        "memory_mb": {
            "first_steady": steady[0] if steady else None,
            "last": seen[-1]["mb"],
            "most": max(e["mb"] for e in seen),
        },
        "memory_mb_each_minute": [round(each["mb"]) for each in seen[:: round(60 / EVERY_S)]],
        "most_running": max(each.get("running", 0) for each in seen),
        "most_waiting": max(each.get("waiting", 0) for each in seen),
    }


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
    wrong = [each for each in figures["outcomes"] if "WRONG" in each or "STUCK" in each or "empty" in each]
    return 1 if wrong or figures["last_answer"] != 200 or figures["exit_status"] != 0 else 0


if __name__ == "__main__":
    sys.exit(main())
