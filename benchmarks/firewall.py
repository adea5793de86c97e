"""How many harmless traces the firewall stops: solutions of problems that nobody trained on, in the style of GSM8K.

    python benchmarks/firewall.py GSM8K_FOLDER [--scanners]

The folder holds `train.jsonl` with columns for question, answer and solution. A third of it plays a site's private
rows, another third the background, and the solutions of the last third are the traces. To see that it stops anything,
the private rows' own solutions follow, as traces. Nothing of the file is printed.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from pathlib import Path

from fedcompose.tasks import Example
from fedcompose.traces import Trace, is_plain_text
from fedcompose_client.config import TraceSource
from fedcompose_client.data import read_examples
from fedcompose_client.firewall import Firewall, make_firewall
from fedcompose_client.personal import SCANNERS, Identifiers

COLUMNS = ("question", "answer", "solution")
SCANNED = 500  # traces that the slower scanners look at


def main(folder: Path, scanners: bool) -> None:
    examples = read_examples(folder / "train.jsonl", "numeric", {each: each for each in COLUMNS})
    texts = [[each.question, each.solution or ""] for each in examples]
    private, background, shown = texts[::3], texts[1::3], examples[2::3]
    traces, copies = as_traces(shown), as_traces(examples[::3])
    source = TraceSource(questions="public", public=Path("x"), sha256="0" * 64)
    questions = {"See above."}  # so that no phrase of a question is its trace's own
    for name, public in (("no background", []), ("background", [text for row in background for text in row])):
        wall = make_firewall(source, private[::2], private[1::2], public, questions, Identifiers.of([], ()))
        report(name, wall, traces)
    report("copies of private rows", wall, copies)
    if scanners:
        looking = make_firewall(
            source, private[::2], private[1::2], [], questions, Identifiers.of([], ()),
            [make() for make in SCANNERS.values()],
        )  # fmt: skip
        report("scanners", looking, traces[:SCANNED])


def as_traces(examples: list[Example]) -> list[Trace]:
    return [
        Trace(provenance_class="C", task="numeric", question="See above.", answer=each.answer,
              completion=f"{each.solution}\nAnswer: {each.answer}")
        for each in examples if is_plain_text(f"{each.question} {each.solution}")
    ]  # fmt: skip


def report(name: str, wall: Firewall, traces: list[Trace]) -> None:
    started = time.perf_counter()
    found = [wall.reasons(trace) for trace in traces]
    blocked = sum("blocked" in each.values() for each in found)
    held = sum(bool(each) and "blocked" not in each.values() for each in found)
    counted = {
        "setting": name, "traces": len(traces), "blocked": blocked, "held": held,
        "reasons": dict(Counter(reason for each in found for reason in each)), "repeated": wall.repeated(traces),
        "seconds": round(time.perf_counter() - started, 1),
    }  # fmt: skip
    print(json.dumps(counted))


if __name__ == "__main__":
    main(Path(sys.argv[1]), "--scanners" in sys.argv[2:])
