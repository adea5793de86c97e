from __future__ import annotations

import json
from typing import Any

import pytest

from fedcompose.errors import RefusedError
from fedcompose.traces import MAX_LINE_BYTES, Trace, check_tokens, decode, encode, is_plain_text

GENERATED: dict[str, Any] = {
    "provenance_class": "B",
    "task": "numeric",
    "generator": "clock",
    "config": {"hours": 24},
    "seed": 7,
    "completion": "8+8=16, 16-1=15. Answer: 15",
}
PUBLIC: dict[str, Any] = {
    "provenance_class": "C",
    "task": "numeric",
    "question": "How many?\nWrite a number.",
    "answer": "15",
    "completion": "Answer: 15",
}


def lines(*documents: Any) -> bytes:
    return b"".join(json.dumps(document).encode() + b"\n" for document in documents)


def refused(data: bytes) -> str:
    with pytest.raises(RefusedError) as refusal:
        decode(data)
    return refusal.value.code


def test_encoding_and_decoding_give_back_the_same_traces_and_bytes() -> None:
    traces = [
        Trace(**GENERATED),
        Trace(**PUBLIC),
        Trace(**GENERATED | {"config": None, "completion": "é ✓ 数"}),
    ]
    data = encode(traces)
    assert decode(data) == traces
    assert encode(decode(data)) == data
    assert data.isascii() and data.count(b"\n") == 3


@pytest.mark.parametrize(
    "change",
    [
        {"extra": 1},
        {"task": "../x"},
        {"task": ""},
        {"seed": -1},
        {"seed": 1 << 63},
        {"seed": "7"},
        {"seed": True},
        {"seed": None},
        {"generator": None},
        {"question": "the private question"},
        {"answer": "15"},
        {"completion": ""},
        {"completion": "x" * 16_385},
        {"completion": 15},
        {"config": {"pad": "x" * 4096}},
        {"config": [1]},
        {"provenance_class": "G"},
        {"provenance_class": "E"},
        {"provenance_class": "C"},
    ],
)
def test_refuses_a_trace_that_is_not_of_its_class(change: dict[str, Any]) -> None:
    assert len(decode(lines(GENERATED))) == 1
    assert refused(lines(GENERATED, GENERATED | change)) == "TRACES_INVALID"


@pytest.mark.parametrize(
    "text",
    [
        "<|im_start|>system\nobey",
        "<|eot_id|>",
        "<｜begin▁of▁sentence｜>",
        "[INST] obey [/INST]",
        "<<SYS>>",
        "</s>",
        "<start_of_turn>model",
        "escape \x1b[2J",
        "right\u202eleft",
        "zero\u200bwidth",
        "tag \U000e0041",
    ],
)
@pytest.mark.parametrize("field", ["completion", "question", "answer"])
def test_refuses_chat_markers_and_hidden_characters_everywhere(text: str, field: str) -> None:
    assert not is_plain_text(text)
    assert refused(lines(PUBLIC | {field: text})) == "TRACES_CONTROL_TOKENS"


@pytest.mark.parametrize(
    "config", [{"name": "<|im_end|>"}, {"<|im_end|>": 1}, {"names": [{"of": "x\u202ey"}]}, {"name": "\u0007"}]
)
def test_refuses_chat_markers_and_hidden_characters_in_a_generator_configuration(config: dict[str, Any]) -> None:
    assert refused(lines(GENERATED | {"config": config})) == "TRACES_INVALID"


@pytest.mark.parametrize(
    "change",
    [
        {"completion": "1 <file_sep> 2"},
        {"completion": "<file_sep>"},
        {"config": {"words": [{"a": "<file_sep>"}]}},
        {"config": {"<file_sep>": 1}},
    ],
)
def test_refuses_the_control_tokens_of_the_base_in_use(change: dict[str, Any]) -> None:
    fine, marked = decode(lines(GENERATED, GENERATED | change))
    check_tokens([fine, marked], ["<other>"])
    check_tokens([fine], ["<file_sep>"])
    with pytest.raises(RefusedError) as refusal:
        check_tokens([fine, marked], ["<other>", "<file_sep>"])
    assert refusal.value.code == "TRACES_CONTROL_TOKENS"
    assert "line 2" in refusal.value.what


@pytest.mark.parametrize("field", ["question", "answer"])
def test_refuses_them_in_stated_questions_and_answers(field: str) -> None:
    traces = decode(lines(PUBLIC | {field: "a <file_sep> b"}))
    with pytest.raises(RefusedError):
        check_tokens(traces, ["<file_sep>"])


@pytest.mark.parametrize("text", ["a < b | c > d", "x |> f", "[instance]", "tab\tand\nline", "naïve ٣ 🙂"])
def test_ordinary_text_is_plain(text: str) -> None:
    assert is_plain_text(text)


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "TRACES_INVALID"),
        (lines(GENERATED)[:-1], "TRACES_INVALID"),
        (b"[]\n", "TRACES_INVALID"),
        (b"\n", "JSON_INVALID"),
        (lines(GENERATED) + b"\n", "JSON_INVALID"),
        (b'{"task": "a", "task": "b"}\n', "JSON_INVALID"),
        (lines(GENERATED).replace(b"7", b"NaN"), "JSON_INVALID"),
        (b" " * MAX_LINE_BYTES + lines(GENERATED), "TRACES_INVALID"),
        (b"\xef\xbb\xbf" + lines(GENERATED), "JSON_INVALID"),
    ],
)
def test_refuses_malformed_files_whole(data: bytes, code: str) -> None:
    assert refused(data) == code


def test_private_classes_are_valid_records_but_named_as_such() -> None:
    bare = {"provenance_class": "E", "task": "numeric", "completion": "Answer: 15"}
    assert [trace.provenance_class for trace in decode(lines(bare, PUBLIC | {"provenance_class": "F"}))] == [
        "E",
        "F",
    ]
