"""`fedcompose chat`: talk to a verified release in the terminal, and see which expert wrote which words."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from queue import SimpleQueue
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from fedcompose.commands.serve import BaseRef, Folder, Roots, load_engine, require_packages
from fedcompose.console import AsJson, err, out, print_json
from fedcompose.errors import ConfigError
from fedcompose.release import ReceivedRelease, VerifiedRelease
from fedcompose.standing import verify_for_use

if TYPE_CHECKING:  # torch takes seconds to import
    from fedcompose.serve.engine import Engine, Settings
    from fedcompose.serve.writing import Answer, Token

# Okabe and Ito's colours, which colour-blind people can tell apart; those first that show on black and on white.
# Source: https://jfly.uni-koeln.de/color/
COLOURS = ("#56b4e9", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#0072b2", "#f0e442")
MARKS = ("", " underline", " bold", " italic")  # for more experts than colours


def register(app: typer.Typer) -> None:
    """Add the commands of this module to `app`."""
    app.command()(chat)


def chat(
    folder: Folder,
    prompt: Annotated[str | None, typer.Option(help="Answer this once and exit.")] = None,
    model: Annotated[str, typer.Option(help="Who answers: auto, expert:SITE or base.")] = "auto",
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of an answer at most.")] = None,
    root_fingerprint: Roots = None,
    base: BaseRef = None,
    as_json: AsJson = False,
) -> None:
    """Verify a release, load it, and chat; the colour of a word says which expert wrote most of it.

    Example: fedcompose chat release --prompt "What is 17 + 25?"
    """
    if as_json and prompt is None:
        raise ConfigError("PROMPT_MISSING", "--json answers one prompt", fix="give --prompt TEXT")
    release = verify_for_use(ReceivedRelease(folder), root_fingerprint)
    require_packages("model", "torch", "transformers", "peft")
    engine = load_engine(release, base, bfloat16=True)  # nobody else is being answered
    from fedcompose.serve.engine import Settings

    settings = Settings(model=model, max_tokens=max_tokens)
    try:
        if prompt is not None:
            _answer_once(engine, prompt, settings, as_json)
        else:
            _converse(engine, settings)
    finally:
        engine.close()


def words(tokens: Iterable[Token]) -> Iterator[tuple[str, str]]:
    """Each word with the space around it and the expert that wrote most of its characters, once it is complete."""
    word, votes = "", Counter[str]()
    for token in tokens:
        for part in re.findall(r"\s+|\S+", token.text):
            if word.strip() and word[-1].isspace() and not part.isspace():
                yield word, votes.most_common(1)[0][0]
                word, votes = "", Counter()
            word += part
            votes[token.expert] += len(part.strip())
    if word:
        yield word, votes.most_common(1)[0][0]


def styles(experts: Sequence[str]) -> dict[str, str]:
    """A rich style for each expert."""
    return {
        name: COLOURS[row % len(COLOURS)] + MARKS[row // len(COLOURS) % len(MARKS)] for row, name in enumerate(experts)
    }


def _answer_once(engine: Engine, prompt: str, settings: Settings, as_json: bool) -> None:
    messages = [{"role": "user", "content": prompt}]
    if not as_json:
        _show_legend(engine.release)
        _answer(engine, messages, settings)
        return
    from fedcompose.serve.replies import tokens_json, usage

    job = engine.prepare(messages, settings)
    try:
        answer = engine.submit(job).result()
    finally:
        job.cancel()  # Ctrl-C must not wait for the rest of the answer
    print_json(
        {
            "model": settings.model,
            "text": answer.text,
            "finish_reason": answer.finish,
            "tokens": tokens_json(answer.tokens),
            "shares": answer.shares,
            "usage": usage([answer]),
        }
    )


def _converse(engine: Engine, settings: Settings) -> None:
    _show_legend(engine.release)
    out.print("Ctrl-C stops an answer, Ctrl-D ends.\n")
    messages: list[dict[str, str]] = []
    while (said := _ask()) is not None:
        messages.append({"role": "user", "content": said})
        try:
            answer = _answer(engine, messages, settings)
        except ConfigError as error:
            if error.code != "CONTEXT_LENGTH_EXCEEDED":
                raise
            err.print(f"{error.diagnostics()}\nThe conversation starts afresh.", style="yellow", markup=False)
            messages = []
        else:
            messages.append({"role": "assistant", "content": answer.text})


def _ask() -> str | None:
    """What the person says next, None at the end."""
    try:
        while not (said := out.input("[bold]> [/bold]").strip()):
            pass
    except (EOFError, KeyboardInterrupt):
        out.print()
        return None
    return said


def _answer(engine: Engine, messages: Sequence[Mapping[str, str]], settings: Settings) -> Answer:
    """Write an answer as it is made, and below it who spoke."""
    job = engine.prepare(messages, settings)
    tokens: SimpleQueue[Token | None] = SimpleQueue()
    answer = engine.submit(job, tokens.put)
    answer.add_done_callback(lambda _: tokens.put(None))
    try:
        _write(iter(tokens.get, None), styles(engine.experts))
    except KeyboardInterrupt:
        job.cancel()
    out.print("\n")
    _show_shares(engine.release, answer.result())
    return answer.result()


def _write(tokens: Iterator[Token], style: Mapping[str, str]) -> None:
    """Coloured words; where there are no colours, the name stands wherever the expert changes."""
    before = None
    for word, expert in words(tokens):
        if out.color_system is None and expert != before:
            out.print(f"[{expert}] ", end="", markup=False)
        out.print(Text(_safe(word), style=style.get(expert, "")), end="")
        before = expert


def _safe(text: str) -> str:
    """Without characters that a terminal obeys rather than shows."""
    return "".join(each if each.isprintable() or each in "\n\t\u200d" else "\ufffd" for each in text)


def _show_legend(release: VerifiedRelease) -> None:
    legend = Text("Experts: ")
    for expert, style in zip(release.experts, styles([each.site for each in release.experts]).values(), strict=True):
        legend.append(f"{expert.site} ({expert.domain})", style).append("  ")
    out.print(legend)


def _show_shares(release: VerifiedRelease, answer: Answer) -> None:
    line = Text().append(f"{answer.completion_tokens} tokens", "dim")
    style = styles([each.site for each in release.experts])
    for name, share in sorted(answer.shares.items(), key=lambda each: -each[1]):
        line.append(" · ").append(f"{name} {share:.0%}", style[name])
    out.print(line)
    out.print()
