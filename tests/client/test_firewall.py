"""The trace firewall over planted identifiers, copied rows and secrets; each guard also seen to fail without."""

from __future__ import annotations

import csv
import json
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from fedcompose.errors import ConfigError, MissingError, RefusedError
from fedcompose.files import sha256_hex
from fedcompose.tasks import training
from fedcompose.traces import Trace, decode, encode
from fedcompose_client import personal
from fedcompose_client.config import Domain, Dp, SiteConfig, TraceSource
from fedcompose_client.firewall import (
    HELD_FILE,
    Firewall,
    check_rules,
    make_firewall,
    open_firewall,
    read_sampled,
    review,
    trace_source,
)
from fedcompose_client.personal import Identifiers, blocked_patterns, doubtful_patterns

SOURCE = TraceSource(generator="clock")
SYLLABLES = ("ba", "do", "fi", "ge", "ka", "lu", "me", "no", "pi", "ra", "so", "tu", "ve", "wi", "xa", "zo")
PROSE = (
    "The patient was admitted at night after falling from a ladder and remained under observation for three days",
    "Two of the seven invoices from the northern branch were paid late because the courier lost a whole mail bag",
)


def say(text: str, seed: int = 0) -> Trace:
    """A right answer on the declared generator, with something said before it."""
    problem = training("clock", {}, 1, seed * 100)[0]
    assert problem.origin is not None
    return Trace(
        provenance_class="B", task="exact", generator="clock", seed=problem.origin.seed,
        completion=f"{text} Answer: {problem.answer}",
    )  # fmt: skip


def wall(
    train: Sequence[str] = PROSE, held_out: Sequence[str] = (), public: Sequence[str] = (), known: Sequence[str] = ()
) -> Firewall:
    rows = [[text] for text in train]
    return make_firewall(SOURCE, rows, [[text] for text in held_out], public, (), Identifiers.of(known, set()))


# Identifiers --------------------------------------------------------------------------------------


def person(rng: random.Random, number: int) -> dict[str, str]:
    """A record whose every value is one of a kind."""
    first, last = ("".join(rng.choices(SYLLABLES, k=3)).title() for _ in range(2))
    return {
        "name": f"{first} {last}{SYLLABLES[number % 16]}", "record": f"MRN-{100000 + number}",
        "mail": f"{first}.{number}@clinic.example.org".lower(), "account": f"AC{number:04}-{rng.randrange(10**6):06}",
    }  # fmt: skip


SPELLINGS: tuple[Callable[[str], str], ...] = (
    str, str.upper, str.lower, lambda value: value.replace("-", " "), lambda value: value.replace("-", ""),
    lambda value: " ".join(value.split()[::-1]), lambda value: f"({value}),",
)  # fmt: skip


def test_of_a_thousand_planted_identifiers_none_leaves(tmp_path: Path) -> None:
    """In every way they may be spelled; and of as many clean traces, none stays."""
    rng = random.Random(0)
    records = [person(rng, number) for number in range(250)]
    planted = [value for record in records for value in record.values()]
    assert len(set(planted)) == 1000
    leaky = [say(f"Now {SPELLINGS[n % 7](value)} waits.", n) for n, value in enumerate(planted)]
    clean = [say(f"Minutes first: step {n}, then hours.", n) for n in range(1000)]
    firewall = wall(known=planted)

    reviewed = review(tmp_path, [*leaky, *clean], firewall)

    shipped = (tmp_path / "traces.jsonl").read_bytes()
    assert decode(shipped) == clean and reviewed.passed == 1000
    folded = "".join(each for each in shipped.decode().casefold() if each.isalnum())
    assert not [value for value in planted if "".join(filter(str.isalnum, value.casefold())) in folded]
    assert review(tmp_path, leaky, wall()).passed > 500  # without the dictionary they would have left


def test_a_name_is_found_in_another_order_and_its_parts_are_held() -> None:
    firewall = wall(known=["Anna Marie Lindqvist", "MRN-0042", "Al"])
    assert firewall.reasons(say("It was lindqvist, anna marie who said so.")) == {"identifier": "blocked"}
    assert firewall.reasons(say("Ask for Mrs. LINDQVIST at the door.")) == {"part_of_identifier": "held"}
    assert firewall.reasons(say("Her file is mrn0042.")) == {"identifier": "blocked"}
    assert firewall.reasons(say("The file is mrn00421, and Alan is well.")) == {}
    assert firewall.identifiers.too_short == 1


@pytest.mark.parametrize(
    ("known", "text", "verdict"),
    [
        ("12345678", "see MRN12345678", "blocked"),
        ("12345678", "see MRN912345678 or 1234 and 5679", None),
        ("MRN-12345678", "see 12345678, or No12345678", "held"),
        ("MRN12345678", "see 12345678", "held"),
        ("MRN-123-45-678", "see 12345678", "held"),
        ("MRN-12345678", "16 - 3 = 13, 1234 * 5678 = 7006652, and 123456789 is more", None),
        ("Ward 7, bed 2000", "2000 - 7 = 1993", None),
        ("Jens Sørensen", "ask Jens Sorensen, or jens soerensen", "blocked"),
        ("Anna Müller", "ask anna mueller", "blocked"),
        ("Anna Mueller", "ask Anna M\u00fcller", "blocked"),
        ("Anna Mueller", "ask Anna Mu\u0308ller", "blocked"),
        ("Anna Müller", "Mueller said it", "held"),
        ("Anna Müller", "the mule is true blue", None),
        ("Anna Lindqvist", "ask Anna Lind\u00adqvist", "blocked"),
        ("王小明", "今天王小明来了", "blocked"),
        ("王小明", "今天小王来了,明天也来", None),
        ("김철수", "김철수는 왔다", "blocked"),
        ("김철수", "철수는 김치를 먹었다", None),
    ],
)
def test_identifiers_are_found_as_people_write_them(known: str, text: str, verdict: str | None) -> None:
    found = wall(known=[known]).reasons(say(text))
    assert found.get("identifier", found.get("part_of_identifier")) == verdict


def test_only_identifiers_that_are_too_short_for_their_script_are_counted() -> None:
    assert Identifiers.of(["Al", "王", "王明", "A王", "Noel", "", "123"], set()).too_short == 4


# Overlap ------------------------------------------------------------------------------------------


def test_thirteen_words_of_a_private_row_are_blocked_and_eight_are_held() -> None:
    firewall, private = wall(), PROSE[0].split()
    assert firewall.reasons(say(" ".join(private[2:15]))) == {"overlap": "blocked"}
    assert firewall.reasons(say(" ".join(private[2:10]))) == {"short_overlap": "held"}
    assert firewall.reasons(say(" ".join(private[2:9]))) == {}
    assert wall(train=()).reasons(say(PROSE[0])) == {}


def test_public_phrases_and_the_traces_own_question_are_nobodys_secret() -> None:
    question = training("clock", {}, 1)[0].question
    assert wall(train=[PROSE[0]], public=[PROSE[0]]).reasons(say(PROSE[0])) == {}
    own = wall(train=[f"{question} now and again then tell me"])
    assert own.reasons(say(question)) == {}
    assert own.reasons(say(f"{question} now and again then tell me")) != {}


def test_rows_that_are_repeated_more_than_rows_kept_out_hold_everything(tmp_path: Path) -> None:
    rng = random.Random(1)
    rows = [" ".join(rng.choices(SYLLABLES, k=12)) for _ in range(60)]
    memorised = [say(" ".join(row.split()[:8]), n) for n, row in enumerate(rows[:20])]
    clean = [say(f"clean {n}", 100 + n) for n in range(3)]
    told = review(tmp_path, [*memorised, *clean], wall(rows[:40], rows[40:]))
    assert told.p < 0.01 and told.repeated == [20, 40, 0, 20] and told.passed == 0
    assert told.reasons["repeats_training"] == 23
    fair = review(tmp_path, [*memorised, *clean], wall(rows[10:40], rows[:10] + rows[40:]))
    assert fair.p > 0.05 and fair.passed == 3  # as often in rows that nobody trained on: shared phrases


# Personal data and secrets ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "blocked", "held"),
    [
        ("write to jane.roe+x@clinic.example.org today", {"email"}, set()),
        ("the card 4111 1111 1111 1111 was used", {"card"}, set()),
        ("the number 4111 1111 1111 1112 was used", set(), set()),
        ("pay to DE89 3704 0044 0532 0130 00 now", {"iban"}, set()),
        ("pay to DE88 3704 0044 0532 0130 00 now", set(), set()),
        ("her number is 078-05-1120 as said", {"ssn"}, set()),
        ("AKIAIOSFODNN7EXAMPLE opens it", {"secret"}, set()),
        ("-----BEGIN RSA PRIVATE KEY-----", {"secret"}, set()),
        ("call +49 170 1234567 or (415) 555-0132", set(), {"phone"}),
        ("born 1987-03-02, or 02.03.1987", set(), {"date"}),
        ("see https://intranet.example/x", set(), {"url"}),
        ("host 10.20.30.40 is down", set(), {"address"}),
        ("16 - 3 - 4 = 9, 9 * 2 = 18; 3/4 of 2000 is 1500.5, and 555-12 is 543", set(), set()),
        ("card is 4111 1111 1111 1111.", {"card"}, set()),
        ("pay with 4111 1111 1111 1111 12/27", {"card"}, set()),
        ("it is 4111111111111111 123, or order 2024 4111-1111-1111-1111", {"card"}, set()),
        ("IBAN: DE89 3704 0044 0532 0130 00 BIC: COBADEFFXXX", {"iban"}, set()),
        ("IBAN:DE89-3704-0044-0532-0130-00.", {"iban"}, set()),
        ("4111\u00a01111\u202f1111\u20091111, or +49\u00a0170\u00a01234567", {"card"}, {"phone"}),
        ("4111 1111\u200b 1111 1111", {"card"}, set()),
        ("078\u201105\u20111120, born 02\u201103\u20111987 or 1987\u201303\u201302", {"ssn"}, {"date"}),
        ("IP 10.0.0.1.", set(), {"address"}),
        ("version 1.2.3.4.5 of 2.4111111111111111, 41111111111111114 and 4111111111111111.5", set(), set()),
        (" ".join(map(str, range(2000, 2030))), set(), set()),
        ("2½ of 1000, 5000 6000 7000 8000, 4503599627370497 and 2000 - 1500 - 20 = 480.", set(), set()),
        ("AB12 CATS AND DOGS WENT OUT, BY ROUTE DE87 3704 0044 0532 0130 00 BIC", set(), set()),
        ("35+120-45-20 = 90, and 35 +120 1234 is odd, (7)+4912345678", set(), set()),
    ],
)  # fmt: skip
def test_patterns(text: str, blocked: set[str], held: set[str]) -> None:
    assert set(blocked_patterns(text)) == blocked
    assert set(doubtful_patterns(text)) == held


def test_a_scanner_that_is_not_installed_stops_the_review(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "presidio_analyzer", None)
    with pytest.raises(MissingError) as error:
        personal.presidio()
    assert error.value.code == "PACKAGE_MISSING" and "pii" in str(error.value.fix)


def test_what_a_scanner_is_certain_of_is_blocked_and_the_rest_held() -> None:
    firewall = replace(wall(), scanners=[lambda text: {"iban_code": True, "url": False} if "x" in text else {}])
    assert firewall.reasons(say("x")) == {"iban_code": "blocked", "url": "held"}
    assert firewall.reasons(say("y")) == {}


# A child, because an audit hook stays where it is: it notes whoever asks for an address or connects, and stops it.
SCAN = """
import sys
asked = []
def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "socket.sendmsg"):
        asked.append(arguments[1:])
        raise OSError("no network here")
sys.addaudithook(watch)
from fedcompose_client import personal
presidio, secrets = personal.presidio(), personal.detect_secrets()
import spacy.util, tldextract.tldextract
assert spacy.util.get_installed_models() == []
MAIL = "mail jane.roe@clinic.example.org now"
assert presidio(MAIL)["email_address"]
assert presidio("IBAN DE89 3704 0044 0532 0130 00")["iban_code"]
assert presidio("She has 16 - 3 - 4 = 9 eggs, then 9 * 2 = 18") == {}
assert secrets("key ghp_" + "a" * 36) and secrets("the sum is 18") == {}
assert asked == [], asked
tldextract.tldextract.TLD_EXTRACTOR = tldextract.TLDExtract(cache_dir=None)
presidio(MAIL)
assert asked, "the control: as the package comes, it asks the network, and the hook sees it"
"""


def test_presidio_and_detect_secrets_find_what_they_know_without_a_network() -> None:
    pytest.importorskip("presidio_analyzer")
    done = subprocess.run([sys.executable, "-c", SCAN], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# What may pass at all -----------------------------------------------------------------------------


def test_only_the_declared_generator_its_settings_and_right_answers_pass() -> None:
    good, firewall = say("Well."), wall()
    assert firewall.reasons(good) == {}
    for change in (
        {"completion": "Answer: 99:99"}, {"config": {"max_minutes": 60}}, {"generator": "duration", "task": "numeric"},
        {"provenance_class": "C", "generator": None, "seed": None, "question": "q", "answer": "a"},
        {"provenance_class": "E", "generator": None, "seed": None},
    ):  # fmt: skip
        assert firewall.reasons(good.model_copy(update=change))["class"] == "blocked"


def test_held_traces_are_let_go_by_the_digest_of_what_was_looked_at(tmp_path: Path) -> None:
    traces = [say("Fine."), say("On 1987-03-02, that is.", 1), say("Mail a@b.example now.", 2)]
    first = review(tmp_path, traces, wall())
    assert (first.passed, first.reasons) == (1, {"date": 1, "email": 1})
    assert decode((tmp_path / HELD_FILE).read_bytes()) == traces[1:2]
    with pytest.raises(ConfigError) as error:
        review(tmp_path, traces, wall(), release="0" * 64)
    assert error.value.code == "HELD_OTHER"
    again = review(tmp_path, traces, wall(), release=first.held)
    assert again.released and decode((tmp_path / "traces.jsonl").read_bytes()) == traces[:2]


def test_where_nothing_passes_no_file_is_left_of_an_earlier_review(tmp_path: Path) -> None:
    review(tmp_path, [say("Fine.")], wall())
    assert review(tmp_path, [say("Mail a@b.example now.")], wall()).passed == 0
    assert not (tmp_path / "traces.jsonl").exists() and not (tmp_path / HELD_FILE).exists()


# From site.toml -----------------------------------------------------------------------------------


def domain(**settings: object) -> Domain:
    training = {"validation_count": 10, "test_count": 10}
    given = {"file": "rows.jsonl", "task": "exact", "training": training, **settings}
    return SiteConfig.model_validate({"id": "s", "base": "b", "key": "k", "domains": {"d": given}}).domain("d")


@pytest.fixture
def site(tmp_path: Path) -> Path:
    rows = [
        {"question": f"Why is sheep {n} grey?", "answer": "wool", "keeper": f"Keeper Nr{n:05}", "note": PROSE[n % 2]}
        for n in range(60)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def test_traces_are_off_unless_site_toml_asks_for_them(site: Path) -> None:
    for private in (True, False):
        with pytest.raises(ConfigError) as error:
            open_firewall(site, domain(private=private))
        assert error.value.code == "TRACES_OFF"
    with pytest.raises(ConfigError) as error:
        trace_source(domain(traces={"questions": "own"}))
    assert error.value.code == "TRACES_PRIVATE"
    assert trace_source(domain(traces={"questions": "own"}, private=False)).questions == "own"


@pytest.mark.parametrize("traces", [{}, {"questions": "public"}, {"questions": "own", "generator": "clock"}])
def test_a_source_of_traces_names_its_questions(traces: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"questions|generator"):
        domain(traces=traces)


def test_every_column_of_the_file_counts_and_the_declared_ones_as_identifiers(site: Path) -> None:
    firewall = open_firewall(site, domain(traces={"generator": "clock"}, identifiers=["keeper"]))
    assert (len(firewall.train), len(firewall.held_out)) == (40, 20)
    assert firewall.reasons(say(PROSE[1])) == {"overlap": "blocked"}
    assert firewall.reasons(say("Ask keeper nr00007 why.")) == {"identifier": "blocked"}
    assert firewall.reasons(say("Ask somebody else why.")) == {}


def refused_rules(site: Path, wanted: Domain) -> str:
    with pytest.raises(RefusedError) as refusal:
        check_rules(site, site, wanted)
    return refusal.value.code


def test_what_passed_has_to_be_judged_again_once_the_rules_or_the_rows_are_others(site: Path) -> None:
    ruled = domain(traces={"generator": "clock"})
    review(site, [say("Ask somebody else why.")], open_firewall(site, ruled))
    check_rules(site, site, ruled)
    stricter = domain(traces={"generator": "clock"}, identifiers=["keeper"])
    assert refused_rules(site, stricter) == "TRACES_UNREVIEWED"
    with (site / "rows.jsonl").open("a") as rows:
        rows.write("\n" + json.dumps({"question": "And who else?", "answer": "wool", "keeper": "Somebody Else"}))
    assert refused_rules(site, ruled) == "TRACES_UNREVIEWED"
    review(site, [say("Ask nobody why.")], open_firewall(site, ruled))
    check_rules(site, site, ruled)


def write_rows(path: Path, rows: Sequence[dict[str, object]]) -> None:
    """In the format that the suffix says, as others' tools write it."""
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    elif path.suffix == ".csv":
        with path.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("\n".join(json.dumps(row, default=str) for row in rows))


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_identifiers_are_looked_for_as_they_stand_in_the_file(tmp_path: Path, suffix: str) -> None:
    born = datetime(1970, 3, 12)
    rows: list[dict[str, object]] = [
        {"question": f"Why is sheep {n} grey?", "answer": "wool", "record": f"00{123400 + n}",
         "phone": f"0{30_440_000 + n}",
         "born": born + timedelta(n) if suffix == ".parquet" else str(born.date() + timedelta(n)),
         "case": None if n == 9 else float(7_700_000 + n) if suffix == ".parquet" else 7_700_000 + n}
        for n in range(60)
    ]  # fmt: skip
    write_rows(tmp_path / f"rows{suffix}", rows)
    columns = ["record", "phone", "born", "case"]
    firewall = open_firewall(tmp_path, domain(file=f"rows{suffix}", traces={"generator": "clock"}, identifiers=columns))
    for told in ("record 00123456", "call 030 440 017", "born on 1970-03-15", "case 7700003"):
        assert firewall.reasons(say(told))["identifier"] == "blocked"
    assert firewall.reasons(say("record 00123999, case 7800000.5, 1234 + 56 = 1290")) == {}
    assert firewall.reasons(say("born on 1980-03-15")) == {"date": "held"}


@pytest.mark.parametrize("column", ["keepr", "Keeper"])
def test_an_identifier_column_that_the_file_lacks_is_refused(site: Path, column: str) -> None:
    with pytest.raises(ConfigError) as error:
        open_firewall(site, domain(traces={"generator": "clock"}, identifiers=[column]))
    assert error.value.code == "DATA_COLUMN" and column in error.value.what and "'keeper'" in str(error.value.got)


def test_rows_count_as_trained_on_as_the_run_split_them_also_by_user(site: Path) -> None:
    """Every keeper has two rows; a run by user trains on both or on none, one by question need not."""
    rows = [
        {"question": f"Why is sheep {n} grey?", "answer": "wool", "keeper": f"Keeper Nr{n // 2:05}"} for n in range(120)
    ]
    (site / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    wanted = domain(traces={"generator": "clock"}, user="keeper")
    firewall = open_firewall(site, wanted, Dp(epsilon=8, unit="user"))
    keepers = [{row[-1] for row in side} for side in (firewall.train, firewall.held_out)]
    assert (len(firewall.train), len(firewall.held_out)) == (80, 40) and not keepers[0] & keepers[1]
    by_question = open_firewall(site, wanted)
    assert {row[-1] for row in by_question.train} & {row[-1] for row in by_question.held_out}


def test_the_generators_own_words_and_the_background_are_public(site: Path) -> None:
    rows = [{"question": each.question, "answer": each.answer} for each in training("clock", {}, 60)]
    (site / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (site / "public.txt").write_text(f"{PROSE[0]}\n")
    firewall = open_firewall(site, domain(traces={"generator": "clock", "background": "public.txt"}))
    assert firewall.reasons(say("What time is minutes after?")) == {}
    assert firewall.reasons(say(PROSE[0])) == {}


def test_public_questions_are_those_of_the_pinned_file(site: Path) -> None:
    data = b'{"question": "Is a whale a fish?", "answer": "no"}\n'
    (site / "public.jsonl").write_bytes(data)
    traces = {"questions": "public", "public": "public.jsonl", "sha256": sha256_hex(data)}
    firewall = open_firewall(site, domain(traces=traces))
    trace = Trace(
        provenance_class="C", task="exact", question="Is a whale a fish?", answer="no", completion="Answer: no"
    )  # fmt: skip
    assert firewall.reasons(trace) == {}
    assert "class" in firewall.reasons(trace.model_copy(update={"question": "Is Ann a fish?"}))
    (site / "public.jsonl").write_bytes(data * 2)
    with pytest.raises(ConfigError) as error:
        open_firewall(site, domain(traces=traces))
    assert error.value.code == "PUBLIC_CHANGED"


def test_what_was_sampled_is_read_strictly(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        read_sampled(tmp_path)
    assert error.value.code == "TRACES_NONE"
    (tmp_path / "sampled.jsonl").write_bytes(encode([say("Fine.")]))
    assert read_sampled(tmp_path) == [say("Fine.")]
