"""The door before the application: each limit refuses with its status, and lets in what is within it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedcompose.errors import ConfigError
from fedcompose.serve import limits
from fedcompose.serve.limits import Door, Gate, TurnedAwayError, read_api_keys

KEY = "k" * 24


def keys_file(folder: Path, text: str, mode: int = 0o600) -> Path:
    path = folder / "keys"
    path.write_text(text)
    path.chmod(mode)
    return path


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """An application that says how much it was sent."""
    size, more = 0, True
    while more:
        message = await receive()
        size, more = size + len(message["body"]), message["more_body"]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": str(size).encode()})


def pieces(*parts: bytes) -> list[dict[str, Any]]:
    return [
        {"type": "http.request", "body": part, "more_body": index + 1 < len(parts)} for index, part in enumerate(parts)
    ]


def ask(
    door: Door,
    body: list[dict[str, Any]] | None = None,
    path: str = "/v1/chat/completions",
    app: Any = echo,
    method: str = "POST",
    **headers: str,
) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of what comes back; messages of the body are handed out and then nothing more."""
    sent: list[Any] = []
    waiting: Iterator[Any] = iter(body if body is not None else pieces(b"{}"))

    async def receive() -> Any:
        for message in waiting:
            return message
        await asyncio.sleep(3600)

    async def send(message: Any) -> None:
        sent.append(message)

    headers = {"host": "localhost:8000"} | headers
    encoded = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "path": path, "method": method, "headers": encoded}
    asyncio.run(Gate(app, door)(scope, receive, send))
    start = sent[0] if sent else {"status": 0, "headers": []}
    found = {name.decode(): value.decode() for name, value in start["headers"]}
    return start["status"], found, b"".join(each.get("body", b"") for each in sent[1:])


def test_without_limits_a_request_arrives_whole_and_gives_its_place_back() -> None:
    door = Door()
    assert ask(door, pieces(b"12", b"345")) == (200, {}, b"5")
    assert door.in_flight == 0


@pytest.mark.parametrize(
    ("host", "known"),
    [
        *((host, True) for host in ("localhost", "LOCALHOST:80", "127.0.0.1:8000", "127.5.5.5", "[::1]:8000", "[::1]")),
        *((host, False) for host in ("evil.example", "localhost.evil.example:80", "127.0.0.1.evil.example")),
        *((host, False) for host in ("192.168.1.5", "[::1", "[", "")),
    ],
)
@pytest.mark.parametrize("path", ["/", "/v1/models"])
def test_without_keys_it_answers_to_names_of_this_machine_only(host: str, known: bool, path: str) -> None:
    status, _, body = ask(Door(), host=host, path=path, method="GET")
    assert status == (200 if known else 400)
    assert known or json.loads(body)["error"]["code"] == "host_unknown"


def test_a_key_is_wanted_where_there_are_keys_and_only_a_known_one_will_do(tmp_path: Path) -> None:
    door = Door(keys=read_api_keys(keys_file(tmp_path, f"# who\nme {KEY}\nyou {'z' * 24}\n")))
    status, headers, body = ask(door)
    assert (status, headers["www-authenticate"]) == (401, "Bearer")
    assert json.loads(body)["error"]["code"] == "invalid_api_key"
    for wrong in ("", "Bearer ", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", "Bearer me", "Bearer \u00e9"):
        assert ask(door, authorization=wrong)[0] == 401
        assert ask(door, authorization=wrong, path="/metrics", method="GET")[0] == 401
    assert ask(door, authorization=f"Bearer {KEY}")[0] == 200
    assert door.who(f"Bearer {'z' * 24}") == "you"
    assert ask(door, path="/health", method="GET")[0] == 200


@pytest.mark.parametrize("path", ["/v1/models/", "//", "/health/../v1/models", "/HEALTH", "/healthx", "/release"])
def test_no_spelling_of_a_path_needs_no_key(path: str, tmp_path: Path) -> None:
    door = Door(keys=read_api_keys(keys_file(tmp_path, f"me {KEY}")))
    assert ask(door, path=path, method="GET")[0] == 401


@pytest.mark.parametrize(
    ("text", "mode"),
    [
        ("", 0o600),
        ("# nobody\n", 0o600),
        ("me short\n", 0o600),
        (f"me {KEY} more\n", 0o600),
        (f"me {KEY}\nme {KEY}\n", 0o600),
        (f"me {KEY}\n", 0o640),
        (f"me {KEY}\n", 0o604),
    ],
)
def test_a_file_of_keys_that_is_unclear_or_open_is_refused_without_quoting_it(
    tmp_path: Path, text: str, mode: int
) -> None:
    with pytest.raises(ConfigError) as caught:
        read_api_keys(keys_file(tmp_path, text, mode))
    assert caught.value.code == "API_KEYS_INVALID"
    assert KEY not in caught.value.diagnostics()


def test_a_body_too_large_is_refused_by_what_it_says_and_by_what_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "LINGER_BYTES", 20)
    door = Door(max_body=10)
    assert ask(door, pieces(b"1" * 10))[2] == b"10"
    assert ask(door, pieces(b"1"), content_length="31")[0] == 413
    assert ask(door, pieces(b"1"), content_length="9" * 5000)[0] == 413
    status, _, body = ask(door, pieces(b"1" * 6, b"1" * 5, b"1" * 1000), content_length="6")
    assert (status, json.loads(body)["error"]["code"]) == (413, "body_too_large")
    rest = pieces(b"1" * 6, b"1" * 5, b"1" * 5)
    unread = iter(rest)
    assert ask(door, unread, content_length="16")[0] == 413  # type: ignore[arg-type]
    assert next(unread, None) is None, "whoever is still sending would not hear the refusal"
    endless = iter(pieces(*[b"1" * 5] * 100))
    assert ask(door, endless)[0] == 413  # type: ignore[arg-type]
    assert len(list(endless)) > 90
    assert door.in_flight == 0


def test_a_body_that_does_not_come_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BODY_SECONDS", 0.05)
    door = Door()
    unfinished = [{"type": "http.request", "body": b"1", "more_body": True}]
    assert ask(door, unfinished)[0] == 408
    assert ask(door, [{"type": "http.disconnect"}])[0] == 0
    assert door.in_flight == 0


def test_who_comes_too_often_is_told_when_to_come_again() -> None:
    now = [0.0]
    door = Door(per_minute=60, clock=lambda: now[0])
    assert [ask(door)[0] for _ in range(10)] == [200] * 10
    status, headers, _ = ask(door)
    assert (status, headers["retry-after"]) == (429, "1")
    now[0] += 1
    assert [ask(door)[0] for _ in range(2)] == [200, 429]
    door.enter("somebody else")  # has a pace of their own
    now[0] += 3600
    assert [ask(door)[0] for _ in range(11)] == [200] * 10 + [429]


def test_places_are_few_and_taken_until_the_answer_has_left() -> None:
    door = Door(max_in_flight=1)

    async def nested(scope: Any, receive: Any, send: Any) -> None:
        with pytest.raises(TurnedAwayError) as caught:
            door.enter("me")
        assert (caught.value.status, caught.value.code) == (429, "server_busy")
        await echo(scope, receive, send)

    assert ask(door, app=nested)[0] == 200
    assert ask(door)[0] == 200


def test_an_application_that_fails_gives_its_place_back() -> None:
    door = Door(max_in_flight=1)

    async def fail(*_: Any) -> None:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        ask(door, app=fail)
    assert ask(door)[0] == 200


def test_a_reader_who_stalls_loses_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "STALLED_SECONDS", 0.05)
    door = Door()

    async def main() -> None:
        async def receive() -> Any:
            return pieces(b"{}")[0]

        async def send(message: Any) -> None:
            await asyncio.sleep(3600)

        scope = {"type": "http", "path": "/v1/x", "method": "POST", "headers": [(b"host", b"localhost")]}
        await asyncio.wait_for(Gate(echo, door)(scope, receive, send), 5)

    asyncio.run(main())
    assert door.in_flight == 0


def test_a_closed_door_says_why_and_still_tells_its_health() -> None:
    door = Door(closed="KEY_REVOKED")
    status, headers, body = ask(door)
    assert status == 503 and "retry-after" in headers
    assert json.loads(body)["error"]["code"] == "key_revoked"
    assert ask(door, path="/health", method="GET")[0] == 200


def test_every_answer_is_counted_with_its_status() -> None:
    seen: list[tuple[str, int]] = []
    door = Door(max_body=1, seen=lambda path, status: seen.append((path, status)))
    ask(door)
    ask(door, path="/health", method="GET")
    assert seen == [("/v1/chat/completions", 413), ("/health", 200)]
