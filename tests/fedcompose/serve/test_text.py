from __future__ import annotations

import random

from fedcompose.serve.text import TextStream


def decode(tokens: list[int]) -> str:
    """A byte-level tokenizer, whose tokens are bytes."""
    return bytes(tokens).decode("utf-8", "replace")


def told(tokens: list[int], *stops: str) -> list[tuple[str, int]]:
    """Everything that a stream tells about these tokens, numbered from 0."""
    stream: TextStream[int] = TextStream(decode, stops)
    pieces = []
    for number, token in enumerate(tokens):
        pieces += stream.push(token, number)
        if stream.stopped:
            return pieces
    return pieces + stream.flush()


def test_the_pieces_are_what_the_tokenizer_decodes_one_for_each_token() -> None:
    generator = random.Random(0)
    for _ in range(300):
        text = "".join(generator.choices("ab é€🙂\n", k=6)).encode()
        tokens = [*text, *generator.randbytes(generator.randrange(6)), *text[:-1]]
        pieces = told(tokens)
        assert "".join(text for text, _ in pieces) == decode(tokens)
        assert [number for _, number in pieces] == list(range(len(tokens)))


def test_a_character_is_never_told_in_parts() -> None:
    stream: TextStream[None] = TextStream(decode)
    told = [stream.push(token, None) for token in "a🙂€".encode()]

    assert ["".join(text for text, _ in pieces) for pieces in told] == ["a", "", "", "", "🙂", "", "", "€"]
    assert stream.flush() == []


def test_bytes_that_never_become_a_character_are_told_at_the_end() -> None:
    assert "".join(text for text, _ in told([*b"a", 0xF0, 0x9F])) == "a\ufffd"


def test_a_stop_string_and_what_follows_are_never_told() -> None:
    pieces = told(list(b"one END two"), "END")

    assert pieces == [(text, number) for number, text in enumerate("one ")]


def test_the_first_of_several_stop_strings_counts() -> None:
    assert "".join(text for text, _ in told(list(b"one, two. three"), "three", ".", ", ")) == "one"


def test_what_only_looked_like_a_stop_string_is_told_with_its_own_tokens() -> None:
    assert told(list(b"ENE!"), "END") == [(text, number) for number, text in enumerate("ENE!")]


def test_a_stop_string_can_begin_within_a_token() -> None:
    stream: TextStream[str] = TextStream(
        lambda tokens: "".join({1: "ab", 2: "cd", 3: "e"}[each] for each in tokens), ["bcde"]
    )

    assert stream.push(1, "first") == []
    assert stream.push(2, "second") == []
    assert stream.push(3, "third") == [("a", "first")]
    assert stream.stopped
