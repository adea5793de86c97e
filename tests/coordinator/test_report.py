"""The page people look at: complete, self-contained, equal to its JSON, and deaf to what sites might smuggle in."""

from __future__ import annotations

import copy
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fedcompose_coordinator.evaluation import summarise
from fedcompose_coordinator.headline import FORMS
from fedcompose_coordinator.markup import Markup, h
from fedcompose_coordinator.report import build_report, describe_release, write_report
from fedcompose_coordinator.report_page import comparison_page, page
from tests.coordinator.sample_report import (
    sample_comparison,
    sample_plan,
    sample_provenance,
    sample_sizes,
    sample_training,
    write_cells,
)
from tests.federation_sim import FederationSim

VOID = {"meta", "br", "hr", "img", "input", "link"}
HOSTILE = '"><script>alert(1)</script><img src=https://evil.example/x onerror=y>\u202e\x1b[31m'


class Page(HTMLParser):
    """Parses strictly: every element is closed in order; keeps elements and the numbers with their text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.numbers: list[tuple[str, float, str]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "data":
            values = dict(attrs)
            self.numbers.append((str(values["data-at"]), float(str(values["value"])), ""))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.open and self.open[-1] == "data":
            pointer, value, text = self.numbers.pop()
            self.numbers.append((pointer, value, text + data))


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("cells")
    plan = sample_plan()
    write_cells(plan, folder)
    return summarise(plan, folder)


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return sample_comparison(tmp_path_factory.mktemp("compared"), 60)


@pytest.fixture
def report(evaluation: dict[str, Any]) -> dict[str, Any]:
    return build_report(evaluation, sample_training(), sample_sizes(), sample_provenance())


def resolve(report: Any, pointer: str) -> Any:
    for part in pointer.removeprefix("/").split("/"):
        key = part.replace("~1", "/").replace("~0", "~")
        report = report[int(key)] if isinstance(report, list) else report[key]
    return report


def test_writes_both_files_and_the_keys_that_others_rely_on(evaluation: dict[str, Any], tmp_path: Path) -> None:
    write_report(evaluation, sample_training(), sample_sizes(), sample_provenance(), tmp_path)
    found = json.loads((tmp_path / "report.json").read_text())
    assert {"value", "low", "high", "n"} == set(found["accuracy"]["composed"]["clock"])
    assert found["retention"].keys() == {"clock", "chain_sum", "logic"}
    assert (tmp_path / "report.html").read_text() == page(found)


def test_equal_input_gives_equal_bytes(evaluation: dict[str, Any], tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_report(evaluation, sample_training(), sample_sizes(), sample_provenance(), tmp_path / name)
    assert (tmp_path / "a/report.html").read_bytes() == (tmp_path / "b/report.html").read_bytes()


def test_the_page_is_well_formed_and_has_every_section(report: dict[str, Any]) -> None:
    parsed = Page(page(report))
    sections = [attributes["id"] for tag, attributes in parsed.elements if tag == "section"]
    assert sections == [
        "summary", "accuracy", "differences", "routing", "training", "sizes", "provenance", "next", "notes",
    ]  # fmt: skip


def test_every_number_on_the_page_is_the_one_in_the_json(report: dict[str, Any]) -> None:
    parsed = Page(page(report))
    assert len(parsed.numbers) > 200
    for pointer, value, text in parsed.numbers:
        assert value == resolve(report, pointer), pointer
        assert text in {form(value) for form in FORMS.values()}, pointer


def test_a_comparison_is_a_section_and_a_page_of_its_own(report: dict[str, Any], comparison: dict[str, Any]) -> None:
    for text, found in ((page({**report, "comparison": comparison}), {"comparison": comparison}), (
        comparison_page(comparison), comparison,
    )):  # fmt: skip
        parsed = Page(text)
        numbers = [each for each in parsed.numbers if "/methods/" in each[0]]
        shown = {pointer.split("/methods/")[1].split("/")[0] for pointer, _, _ in numbers}
        assert shown == set(comparison["methods"]) and len(numbers) > 500
        for pointer, value, written in numbers:
            assert value == resolve(found, pointer) and written in {form(value) for form in FORMS.values()}, pointer
        assert "both right in" in parsed.text and "in 5 of them" in parsed.text
        assert re.search(r"Hard is clearly better .* than the base", parsed.text)


def test_a_changed_number_would_be_noticed(report: dict[str, Any]) -> None:
    parsed = Page(page(report))
    report["accuracy"]["composed"]["clock"]["value"] += 0.01
    assert any(value != resolve(report, pointer) for pointer, value, _ in parsed.numbers)


def test_every_method_and_domain_is_shown(report: dict[str, Any]) -> None:
    shown = {pointer for pointer, _, _ in Page(page(report)).numbers}
    for method, row in report["accuracy"].items():
        for domain in row:
            assert f"/accuracy/{method}/{domain}/value" in shown


def test_nothing_is_fetched_and_nothing_runs(report: dict[str, Any]) -> None:
    parsed = Page(page(report))
    names = {tag for tag, _ in parsed.elements}
    assert not names & {"script", "link", "img", "iframe", "object", "embed", "base", "image", "use", "form"}
    for _, attributes in parsed.elements:
        assert not {"src", "href", "srcset", "action"} & set(attributes)
        assert not any(name.startswith("on") for name in attributes)
    assert not re.search(r"https?:|url\(|@import", page(report))


def poison(value: Any) -> Any:
    """The same structure with every piece of text, key or value, replaced or extended by an attack."""
    if isinstance(value, dict):
        return {key: poison(item) for key, item in value.items()}
    if isinstance(value, list):
        return [poison(item) for item in value]
    return HOSTILE if isinstance(value, str) else value


@pytest.mark.parametrize(
    ("never", "same", "said"), [(0, 0, "every expert had a part in each"), (7, 6, "7 times an expert had no part")]
)
def test_the_reach_of_an_expert_is_told_as_it_was_found(
    evaluation: dict[str, Any], never: int, same: int, said: str
) -> None:
    counts = {"sequences": 12, "never_asked": never, "same_without": same, "tokens": 480, "same_tokens": 478}
    text = Page(page(build_report({**evaluation, "blast_radius": counts}, {}, {}, {}))).text
    assert said in text and "478 of 480 next tokens" in text and ("in 6 of them" in text) == bool(same)


def test_text_of_sites_cannot_become_markup(evaluation: dict[str, Any], comparison: dict[str, Any]) -> None:
    training = {HOSTILE: poison(sample_training()["bank"])}
    sizes = {"sites": {HOSTILE: {"adapter": 1, "traces": 2}}, "release": {HOSTILE: 3}}
    hostile = copy.deepcopy(evaluation)
    hostile["domains"][0]["name"] = HOSTILE
    for table in ("accuracy", "difference"):
        for row in hostile[table].values():
            row[HOSTILE] = row.pop("clock")
    for table in ("majority", "retention", "retention_interval"):
        hostile[table][HOSTILE] = hostile[table].pop("clock")
    hostile["routing"]["share"][HOSTILE] = hostile["routing"]["share"].pop("clock")
    compared = {**comparison, "methods": {**comparison["methods"], f"expert:{HOSTILE}": comparison["methods"]["base"]}}
    text = page(build_report(hostile, training, sizes, poison(sample_provenance()), compared))
    parsed = Page(text)
    assert {"script", "img"}.isdisjoint(tag for tag, _ in parsed.elements)
    assert not any(name.startswith("on") for _, attributes in parsed.elements for name in attributes)
    assert "<script>alert(1)" in parsed.text, "the attack must be shown as text, or it did not arrive"
    assert "\u202e" not in text and "\x1b" not in text


def test_the_escaping_test_can_fail() -> None:
    assert "<script>" in h("p", Markup(HOSTILE))
    assert "<script>" not in h("p", HOSTILE) and "<script>" not in h("p", title=HOSTILE)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rewards", [0.5, float("nan"), float("inf"), "0.7", -1, 7, None, True]),
        ("rewards", "0.5"),
        ("validation", [[0, 0.5], ["x", 0.5], [1], None, [2, 9]]),
        ("accuracy", {"base": {"value": 0.5, "low": 0.6, "high": 0.7, "n": 10}, "rlvr": "<b>", "warmup": {}}),
        ("accuracy", None),
        ("seconds", {"a": 1}),
        ("kept", "<script>"),
        ("domain", 7),
    ],
)
def test_numbers_of_sites_that_make_no_sense_are_left_out(evaluation: dict[str, Any], field: str, value: Any) -> None:
    training = sample_training()
    training["bank"][field] = value
    report = build_report(evaluation, training, sample_sizes(), sample_provenance())
    json.dumps(report, allow_nan=False)
    Page(page(report))
    log = report["training"]["bank"]
    expected = {"rewards": [0.5] if isinstance(value, list) else [], "validation": [[0.0, 0.5]], "domain": ""}
    assert log[field] == expected.get(field, log[field])
    if field == "accuracy":
        assert log["accuracy"] == {"base": None, "warmup": None, "rlvr": None}


@pytest.mark.parametrize("part", ["training", "sizes", "provenance"])
def test_missing_parts_are_left_out(evaluation: dict[str, Any], part: str) -> None:
    given: dict[str, Any] = {
        "training": sample_training(), "sizes": sample_sizes(), "provenance": sample_provenance(),
    }  # fmt: skip
    given[part] = {}
    parsed = Page(page(build_report(evaluation, **given)))
    sections = {attributes["id"] for tag, attributes in parsed.elements if tag == "section"}
    assert part not in sections and "accuracy" in sections


def test_an_empty_report_is_still_a_page() -> None:
    report = build_report({}, {}, {}, {})
    assert report["headline"] == []
    Page(page(report))


def test_a_run_without_the_attention_control_says_nothing_about_it(tmp_path: Path) -> None:
    plan = sample_plan(60)
    write_cells(plan, tmp_path)
    methods = {name: method for name, method in plan.methods.items() if name != "attention_only"}
    lesser = type(plan)(methods, plan.domains, plan.max_new_tokens)
    report = build_report(summarise(lesser, tmp_path), {}, {}, {})
    assert "attention_only" not in report["accuracy"]
    assert "Attention LoRA alone" not in page(report)


def interval(value: float, low: float, high: float) -> dict[str, float]:
    return {"value": value, "low": low, "high": high, "n": 100}


def test_the_headline_claims_only_what_the_intervals_allow(evaluation: dict[str, Any]) -> None:
    given = {**evaluation, "difference_mean": {
        "base": interval(0.4, 0.3, 0.5), "uniform": interval(0.02, -0.01, 0.05),
        "own_expert": interval(-0.05, -0.08, -0.01),
    }}  # fmt: skip
    sentence = build_report(given, {}, {}, {})["headline"][-1].replace("\u00a0", " ")
    assert sentence == (
        "It is clearly better (95 % interval above zero) than the base (+40.0 points); it is clearly worse than "
        "each domain's own expert (−5.0); no difference could be shown to the uniform merge "
        "(+2.0, interval −1.0 to +5.0)."
    )


def test_the_headline_admits_when_there_is_nothing_to_keep(evaluation: dict[str, Any]) -> None:
    given = {**evaluation, "retention": {"clock": None, "logic": None}, "retention_mean": None}
    assert "no gain to keep" in build_report(given, {}, {}, {})["headline"][1]
    given = {**evaluation, "retention": {**evaluation["retention"], "logic": None}}
    assert "logic left out" in build_report(given, {}, {}, {})["headline"][1]


def test_rlvr_gain_is_reported_with_its_doubt(report: dict[str, Any]) -> None:
    gain = report["rlvr_gain"]["archive"]
    assert gain["value"] == pytest.approx(0.035) and gain["low"] < 0 < gain["high"]
    assert "a clear gain" in page(report)


def test_a_verified_release_describes_itself(sim: FederationSim, evaluation: dict[str, Any]) -> None:
    release = sim.released()
    sizes, provenance = describe_release(release, sim.admitted(), sim.base.path)
    report = build_report(evaluation, {}, sizes, provenance)
    shown = Page(page(report)).text
    rows = report["provenance"]["contributions"]
    assert {(row["site"], row["kind"]) for row in rows} == {
        (site, kind) for site in ("site-a", "site-b") for kind in ("adapter", "traces")
    }
    assert all(row["keyid"] in shown and row["dirHash"] in shown for row in rows)
    assert release.dir_hash in shown and sim.root.keyid in shown and "Licence" not in shown
    folder = next(each.path for each in sim.admitted() if each.site == "site-a" and each.kind == "adapter")
    shipped = sum(path.stat().st_size for path in folder.iterdir())
    assert report["sizes"]["sites"]["site-a"]["adapter"] == shipped
    traces = next(row for row in rows if row["kind"] == "traces")
    assert traces["records"] and f"fedcompose verify release --root-fingerprint {sim.root.keyid}" in shown


def test_bytes_that_left_a_site_add_up(report: dict[str, Any]) -> None:
    for parts in report["sizes"]["sites"].values():
        assert parts["total"] == parts["adapter"] + parts["traces"] > 0
    assert report["sizes"]["release_total"] == sum(report["sizes"]["release"].values())
