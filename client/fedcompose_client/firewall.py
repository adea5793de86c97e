"""Step 4, the trace firewall: which traces may leave this site, and which stay.

Input: `sampled.jsonl`, the site's own rows. Output, in `runs/<domain>/`: `traces.jsonl`, what may be contributed,
bound to the review by its digest in `review.json`; `held.jsonl`, what a person may look at and let go by its digest.

    blocked   a class that site.toml does not ask for; a question or an answer that is not what its class says;
              13 words in a row of a private row; an identifier; a mail address, card, account or secret
    held      8 words in a row of a private row; a word or number of an identifier; a phone number, date, URL or
              IP address; everything, where trained rows are repeated more often than rows kept out of training
    passed    the rest

Phrases that are public are nobody's: those of the trace's own question, of the declared generator's problems, and of
the background file. The firewall stops regurgitation. It is no proof that traces reveal nothing: a paraphrase passes,
and so does whatever a short or unlisted text says. Reasons and counts stay here, for they depend on private data too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedcompose.document import Digest
from fedcompose.errors import ConfigError, RefusedError
from fedcompose.files import (
    dir_hash,
    dump_json,
    read_json,
    read_limited,
    sha256_file,
    sha256_hex,
    write_atomic,
    write_json,
)
from fedcompose.rederive import rederive
from fedcompose.tasks import Example, generator_task, get_task, training
from fedcompose.traces import MAX_TRACES_BYTES, TRACES_FILE, ProvenanceClass, Trace, decode, encode
from fedcompose_client.config import Domain, Dp, TraceSource
from fedcompose_client.data import read_examples, read_rows, require_columns
from fedcompose_client.overlap import Runs, all_runs, excess_p, repeated_rows, runs, shares_a_run, words
from fedcompose_client.own_rows import OwnRows, own_rows
from fedcompose_client.personal import SCANNERS, Identifiers, Scanner, blocked_patterns, doubtful_patterns

SAMPLED_FILE, REVIEW_FILE, HELD_FILE = "sampled.jsonl", "review.json", "held.jsonl"
BLOCK_WORDS, HOLD_WORDS = 13, 8  # in a row; with 8, 10 % edited copies were still found, with 25 many were not
MAX_P = 0.05  # below it, trained rows are repeated more often than chance explains
BACKGROUND_PROBLEMS = 2000  # of the declared generator
BACKGROUND_SEED = 3_000_000  # apart from the seeds that sites and coordinator sample on
MAX_BACKGROUND_BYTES = 256 << 20
CLASSES: Mapping[str, ProvenanceClass] = {"generator": "B", "public": "C", "own": "F"}

Row = Sequence[str]  # the texts of one private row, of every column
Verdict = Literal["passed", "held", "blocked"]


class Review(BaseModel):
    """What `review.json` says; it does not leave the site."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    schema_: Literal["fedcompose/review/v1"] = Field("fedcompose/review/v1", alias="schema")
    traces: Digest | None  # SHA-256 of traces.jsonl, None where nothing passed
    held: Digest | None  # of held.jsonl
    passed: Annotated[int, Field(ge=0)]
    reasons: dict[str, int]  # reason -> traces that it stopped; one may have several
    repeated: Annotated[list[int], Field(min_length=4, max_length=4)]  # trained rows hit, of; kept-out rows hit, of
    p: float
    released: bool = False  # whether a person let the held ones go
    identifiers_too_short: int = 0
    rules: Digest | None = None  # what they were judged by; `rules_digest`


@dataclass(frozen=True)
class Firewall:
    """What a trace is compared with."""

    source: TraceSource
    train: Sequence[Row]
    held_out: Sequence[Row]
    public: Mapping[int, Runs]  # by number of words
    public_questions: Collection[str]
    identifiers: Identifiers
    scanners: Sequence[Scanner] = ()
    secret: Mapping[int, Runs] = field(default_factory=dict)
    rules: str | None = None

    def reasons(self, trace: Trace) -> dict[str, Verdict]:
        """Why this trace should stay; nothing where it may leave."""
        found: dict[str, Verdict] = {}
        example = self._problem(trace)
        if example is None:
            found["class"] = "blocked"
        if trace.provenance_class != "F":
            found |= self._overlap(trace.completion, example.question if example else "")
        return found | self._personal("\n".join(trace.texts()))

    def _problem(self, trace: Trace) -> Example | None:
        """The problem that the trace answers, if it is of the one source that this site wants."""
        wanted, made_by = self.source, (trace.generator, trace.config or {})
        if trace.provenance_class != CLASSES[wanted.questions]:
            return None
        if wanted.questions == "generator" and made_by != (wanted.generator, wanted.config):
            return None
        if wanted.questions == "public" and trace.question not in self.public_questions:
            return None
        return rederive(trace)

    def _overlap(self, completion: str, question: str) -> dict[str, Verdict]:
        shared = {
            n: shares_a_run(np.setdiff1d(runs(completion, n), runs(question, n)), self.secret[n]) for n in self.secret
        }
        if shared[BLOCK_WORDS]:
            return {"overlap": "blocked"}
        return {"short_overlap": "held"} if shared[HOLD_WORDS] else {}

    def _personal(self, text: str) -> dict[str, Verdict]:
        found: dict[str, Verdict] = dict.fromkeys(doubtful_patterns(text), "held")
        found |= dict.fromkeys(blocked_patterns(text), "blocked")
        if self.identifiers.names(text):
            found["identifier"] = "blocked"
        elif self.identifiers.mentions(text):
            found["part_of_identifier"] = "held"
        for scan in self.scanners:
            found |= {name: "blocked" if certain else "held" for name, certain in scan(text).items()}
        return found

    def repeated(self, traces: Iterable[Trace]) -> list[int]:
        """How many trained rows share a run with the traces, of how many; the same of rows kept out of training."""
        shown = all_runs((trace.completion for trace in traces), HOLD_WORDS)
        public = self.public[HOLD_WORDS]
        return [
            count
            for rows in (self.train, self.held_out)
            for count in (repeated_rows(rows, shown, public, HOLD_WORDS), len(rows))
        ]


def open_firewall(site: Path, domain: Domain, dp: Dp | None = None) -> Firewall:
    """The firewall of a domain, from its settings and its own file; `dp` of the run whose traces it judges.

    Raises: ConfigError: `TRACES_OFF`, `PUBLIC_CHANGED`, and those of reading. MissingError: `PACKAGE_MISSING`.
    """
    source = trace_source(domain)
    rows = read_rows(site / domain.file, [*domain.columns.named().values(), *domain.identifiers])
    require_columns(site / domain.file, rows[0], domain.identifiers)
    train, held_out = _by_split([_texts(row) for row in rows], own_rows(site, domain, dp))
    problems = public_problems(site, domain)
    public = list(_public_texts(site, source, problems))
    vocabulary = {word for text in public for word in words(text)}
    values = [text for row in rows for column in domain.identifiers for text in _as_written(row[column])]
    made = make_firewall(
        source, train, held_out, public, {each.question for each in problems}, Identifiers.of(values, vocabulary),
        [SCANNERS[name]() for name in source.scanners],
    )  # fmt: skip
    return replace(made, rules=rules_digest(site, domain))


def make_firewall(
    source: TraceSource,
    train: Sequence[Row],
    held_out: Sequence[Row],
    public: Sequence[str],
    public_questions: Collection[str],
    identifiers: Identifiers,
    scanners: Sequence[Scanner] = (),
) -> Firewall:
    """With the private runs of words counted once."""
    known = {n: all_runs(public, n) for n in (BLOCK_WORDS, HOLD_WORDS)}
    private = [text for rows in (train, held_out) for row in rows for text in row]
    secret = {n: np.setdiff1d(all_runs(private, n), known[n]) for n in known}
    return Firewall(source, train, held_out, known, public_questions, identifiers, scanners, secret)


def review(run: Path, traces: Sequence[Trace], firewall: Firewall, release: str | None = None) -> Review:
    """Judge every trace and write what passed, what is held, and `review.json`.

    `release` is the SHA-256 of the held traces, from a person who looked at them.

    Raises: ConfigError: `HELD_OTHER` when other traces are held than those.
    """
    found = [firewall.reasons(trace) for trace in traces]
    kept = [(trace, why) for trace, why in zip(traces, found, strict=True) if "blocked" not in why.values()]
    repeated = firewall.repeated(trace for trace, _ in kept)
    p = excess_p(*repeated)
    held = [trace for trace, why in kept if why or p < MAX_P]
    digest = sha256_hex(encode(held)) if held else None
    if release is not None and release != digest:
        raise ConfigError(
            "HELD_OTHER", "other traces are held than those that were looked at", expected=digest or "none",
            got=release[:64],
        )  # fmt: skip
    passed = [trace for trace, _ in kept] if release else [trace for trace, why in kept if not why and p >= MAX_P]
    reasons = Counter(name for why in found for name in why)
    reasons += Counter({"repeats_training": len(held) if p < MAX_P else 0})
    _write(run / HELD_FILE, held)
    return write_passed(
        run, passed, held=digest, reasons=dict(reasons), repeated=repeated, p=p, released=release is not None,
        identifiers_too_short=firewall.identifiers.too_short, rules=firewall.rules,
    )  # fmt: skip


def write_passed(
    run: Path,
    passed: Sequence[Trace],
    *,
    held: str | None = None,
    reasons: Mapping[str, int] | None = None,
    repeated: Sequence[int] = (0, 0, 0, 0),
    p: float = 1.0,
    released: bool = False,
    identifiers_too_short: int = 0,
    rules: str | None = None,
) -> Review:
    """Write `traces.jsonl` and the `review.json` that vouches for it."""
    made = Review(
        traces=_write(run / TRACES_FILE, passed), held=held, passed=len(passed), reasons=dict(reasons or {}),
        repeated=list(repeated), p=p, released=released, identifiers_too_short=identifiers_too_short, rules=rules,
    )  # fmt: skip
    write_json(run / REVIEW_FILE, made.model_dump(mode="json", by_alias=True))
    return made


def read_sampled(run: Path) -> list[Trace]:
    """The traces that `distill` left for review.

    Raises: ConfigError: `TRACES_NONE`.
    """
    if not (run / SAMPLED_FILE).is_file():
        raise ConfigError("TRACES_NONE", f"no traces were sampled in {run}", fix="fedcompose client distill")
    return decode(read_limited(run / SAMPLED_FILE, MAX_TRACES_BYTES))


def read_passed(run: Path) -> bytes:
    """The trace file that the firewall let through.

    Raises: RefusedError: `TRACES_UNREVIEWED` for any other.
    """
    data = read_limited(run / TRACES_FILE, MAX_TRACES_BYTES)
    try:
        reviewed = Review.model_validate(read_json(run / REVIEW_FILE)) if (run / REVIEW_FILE).is_file() else None
    except ValidationError:
        reviewed = None
    if reviewed is None or reviewed.traces != sha256_hex(data):
        raise RefusedError(
            "TRACES_UNREVIEWED", "these are not the traces that the firewall let through",
            fix="fedcompose client review",
        )  # fmt: skip
    return data


def rules_digest(site: Path, domain: Domain) -> str:
    """Names what traces of a domain are judged by: the settings that say so, and the files that they name."""
    settings = domain.model_dump(mode="json", include={"traces", "identifiers", "columns", "private", "user"})
    source = domain.traces
    files = [domain.file, *((source.background, source.public) if source else ())]
    digests = {str(name): sha256_file(site / name) for name in files if name}
    return dir_hash({**digests, "/settings": sha256_hex(dump_json(settings))})


def check_rules(site: Path, run: Path, domain: Domain) -> None:
    """What passed, passed by the rules of today.

    Raises: RefusedError: `TRACES_UNREVIEWED`.
    """
    path = run / REVIEW_FILE
    if path.is_file() and read_json(path).get("rules") != rules_digest(site, domain):
        raise RefusedError(
            "TRACES_UNREVIEWED", "site.toml or the data have changed since the firewall judged these traces",
            fix="fedcompose client review",
        )  # fmt: skip


def trace_source(domain: Domain) -> TraceSource:
    """Where the domain's traces come from.

    Raises: ConfigError: `TRACES_OFF`, `TRACES_PRIVATE`.
    """
    if domain.traces is None:
        raise ConfigError(
            "TRACES_OFF", "site.toml asks for no traces of this domain",
            expected="a section [domains.NAME.traces], if any are to leave",
            fix="contribute the adapter alone: the coordinator can sample the expert itself",
        )  # fmt: skip
    if domain.traces.questions == "own" and domain.private:
        raise ConfigError(
            "TRACES_PRIVATE", "traces of the domain's own questions would show private data",
            expected='questions = "generator", or "public"', fix="private = false, if the data may be shown to anyone",
        )  # fmt: skip
    return domain.traces


def public_problems(site: Path, domain: Domain) -> list[Example]:
    """The problems of the public file that site.toml names, none without one.

    Raises: ConfigError: `PUBLIC_CHANGED`, and those of reading.
    """
    source = domain.traces
    if source is None or source.public is None:
        return []
    path = site / source.public
    found = sha256_hex(read_limited(path, MAX_BACKGROUND_BYTES))
    if found != source.sha256:
        raise ConfigError(
            "PUBLIC_CHANGED", f"{path} is not the file that site.toml names", expected=str(source.sha256), got=found
        )
    columns = {"question": domain.columns.question, "answer": domain.columns.answer}
    return read_examples(path, domain.task, columns)


def _public_texts(site: Path, source: TraceSource, problems: Iterable[Example]) -> Iterator[str]:
    """What is nobody's secret: the declared questions, and the background file line by line."""
    if source.generator:
        task = get_task(generator_task(source.generator))
        for example in _background_problems(source):
            yield task.prompt(example.question)
            yield task.target(example)
    yield from (example.question for example in problems)
    if source.background:
        data = read_limited(site / source.background, MAX_BACKGROUND_BYTES)
        yield from data.decode("utf-8", "replace").splitlines()


def _background_problems(source: TraceSource) -> list[Example]:
    """As many problems as the generator has, up to the limit."""
    count = BACKGROUND_PROBLEMS
    while count:
        try:
            return training(str(source.generator), source.config, count, BACKGROUND_SEED)
        except ConfigError as error:
            if error.code != "TASK_EXHAUSTED":
                raise
            count //= 4
    return []


def _by_split(rows: Sequence[Row], own: OwnRows) -> tuple[list[Row], list[Row]]:
    """(rows that were trained on, rows kept out)."""
    trained = {id(example) for example in own.splits.train}
    sides = [id(example) in trained for example in own.examples]
    return (
        [row for row, inside in zip(rows, sides, strict=True) if inside],
        [row for row, inside in zip(rows, sides, strict=True) if not inside],
    )


def _texts(row: Mapping[str, object]) -> list[str]:
    """Every column of a row as text, columns nobody named included."""
    return [str(value) for value in row.values() if value is not None]


def _as_written(value: object) -> Iterator[str]:
    """How a value may stand in the file: reading makes a time of a date, and a fraction of a number."""
    if isinstance(value, datetime):
        yield value.date().isoformat()
    if value is not None:
        yield str(int(value) if isinstance(value, float) and value.is_integer() else value)


def _write(path: Path, traces: Sequence[Trace]) -> str | None:
    """The traces as a file and its SHA-256; no file where there are none."""
    if not traces:
        path.unlink(missing_ok=True)
        return None
    data = encode(traces)
    write_atomic(path, data)
    return sha256_hex(data)
