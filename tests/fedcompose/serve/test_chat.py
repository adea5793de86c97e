from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fedcompose.cli import main
from fedcompose.commands import chat
from fedcompose.commands.chat import _safe, styles, words
from fedcompose.console import out
from fedcompose.serve.engine import Engine, Settings
from fedcompose.serve.sampling import Chosen
from fedcompose.serve.writing import Token
from tests.federation_sim import FederationSim

HELLO = [{"role": "user", "content": "Hello you"}]


@pytest.fixture
def arguments(talking_sim: FederationSim, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(out, "_color_system", None)
    monkeypatch.setattr("fedcompose.model.lm.fast_dtype", lambda: torch.float32)  # as the engine it is compared with
    release = talking_sim.coordinator_home / "release"
    trust = ["--root-fingerprint", talking_sim.root.keyid, "--base", str(talking_sim.base.path)]
    return ["chat", str(release), *trust, "--max-tokens", "40"]


def run(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    return int(end.value.code or 0)


def spoken(*pieces: tuple[str, str]) -> Iterator[Token]:
    return (Token(text, expert, 1.0, (0,), Chosen(0)) for text, expert in pieces)


def test_a_word_belongs_to_the_expert_that_wrote_most_of_it() -> None:
    tokens = spoken(("It", "a"), (" i", "a"), ("nterest", "b"), ("ing. ", "a"), ("\n", "b"), ("So", "b"))

    assert list(words(tokens)) == [("It ", "a"), ("interesting. \n", "b"), ("So", "b")]


def test_the_words_joined_are_the_text_and_come_as_soon_as_they_are_complete() -> None:
    tokens = spoken((" \n", "a"), ("", "b"), ("one two", "b"), (" ", "a"), ("three", "a"))
    arriving = words(tokens)

    assert next(arriving) == (" \none ", "b")
    assert next(tokens).text == " "  # nothing further was taken
    assert "".join(word for word, _ in arriving) == "twothree"


def test_an_answer_cannot_send_commands_to_the_terminal() -> None:
    assert _safe("a\x1b[2J\x9b1m\u202eb\r\n\té 👩\u200d🔬") == "a\ufffd[2J\ufffd1m\ufffdb\ufffd\n\té 👩\u200d🔬"


def test_every_expert_looks_different() -> None:
    names = [f"site-{number}" for number in range(20)]
    assert len(set(styles(names).values())) == 20


def test_a_prompt_is_answered_once_with_names_and_shares(
    arguments: list[str], engine: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = engine.submit(engine.prepare(HELLO, Settings(max_tokens=40))).result()

    assert run([*arguments, "--prompt", "Hello you"]) == 0
    text = capsys.readouterr().out

    assert "Experts: site-a (clock)  site-b (ordering)" in text
    site_a, site_b = expected.shares.values()
    assert f"40 tokens · site-b {site_b:.0%} · site-a {site_a:.0%}" in text
    assert _safe(expected.text) in re.sub(r"\[site-[ab]\] ", "", text)
    assert re.findall(r"\[(site-[ab])\] ", text) == changes([expert for _, expert in words(expected.tokens)])


def changes(experts: list[str]) -> list[str]:
    return [each for before, each in zip([None, *experts], experts, strict=False) if each != before]


def test_json_is_one_document_with_every_token(
    arguments: list[str], engine: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = engine.submit(engine.prepare(HELLO, Settings("expert:site-a", max_tokens=40))).result()

    assert run([*arguments, "--prompt", "Hello you", "--model", "expert:site-a", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)

    assert document["text"] == expected.text == "".join(token["text"] for token in document["tokens"])
    assert document["shares"] == {"site-a": 1.0, "site-b": 0.0}
    assert document["usage"]["completion_tokens"] == 40


def test_a_conversation_remembers_until_it_no_longer_fits(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = iter(["Hello you", "", "Hello you", "x" * 600])
    prompts: list[int] = []
    prepare = Engine.prepare

    def noted(self: Engine, *conversation: object) -> object:
        job = prepare(self, *conversation)  # type: ignore[arg-type]
        prompts.append(len(job.prompt))
        return job

    def said(*_: object) -> str:
        if (line := next(lines, None)) is None:
            raise EOFError
        return line

    monkeypatch.setattr(Engine, "prepare", noted)
    monkeypatch.setattr(chat.out, "input", said)
    assert run(arguments) == 0
    printed = capsys.readouterr()

    assert prompts[1] > prompts[0] + 40  # both questions and the answer between them
    assert len(prompts) == 2
    assert len(re.findall(r"\d+ tokens · site", printed.out)) == 2
    assert "CONTEXT_LENGTH_EXCEEDED" in printed.err and "starts afresh" in printed.err
    assert "xxx" not in printed.err


@pytest.mark.parametrize(
    ("options", "code"),
    [(["--json"], "PROMPT_MISSING"), (["--prompt", "x", "--model", "expert:nobody"], "MODEL_NOT_FOUND")],
)
def test_a_wrong_option_is_a_usage_error(
    arguments: list[str], options: list[str], code: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*arguments, *options]) == 2
    assert code in capsys.readouterr().err


def test_the_help_shows_an_example(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["chat", "--help"]) == 0
    assert "Example: fedcompose chat release" in capsys.readouterr().out
