"""Which experts a person should look at before they are composed: by their weights, by triggers, by what they do.

    LOUD      changes the base much more than the others do, or one of its modules much more than its other ones
    NARROW    changes the base in little more than one direction per module
    CLONE     is nearly the expert of another site, which sent it, or one like it, earlier
    TRIGGER   answers alike whatever it is asked, once a word of the battery stands in the prompt
    MAGNET    takes most tokens of a domain that is not its own, and the domain is answered worse for it
    HARMS     the other domains are answered better without it

What is found is quarantined: its site is left out of compositions until `fedcompose coordinator add` lets it in again;
everybody else goes on. Thresholds are far from what clean experts showed (docs/log.md), of one base and few kinds of
task; with a handful of experts they are hints, not verdicts. Nothing here finds a trigger that is not near one of the
battery, a backdoor that only acts on a domain's own questions, or a site that copies what clean experts look like.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from itertools import combinations
from typing import Any

import numpy as np

from fedcompose.adapter import CONFIG_FILE, WEIGHTS_FILE, Adapter, parse_adapter
from fedcompose.contribution import VerifiedContribution
from fedcompose.intervals import Interval, mean_interval, paired_difference
from fedcompose_coordinator.weights import Statistics, similarity, statistics

SCHEMA = "fedcompose/screening/v1"
MAX_LOUD = 5.0  # times the median of the other experts; clean ones: up to 1.7
MAX_LOUDEST = 5.0  # times the median module; clean ones: up to 1.5
MAX_NARROW = 0.9  # share of energy in one direction; clean ones: up to 0.58
MAX_SIMILAR = 0.9  # |cosine|; clean ones: up to 0.49
MAX_SHARE = 0.5  # of the tokens of another domain; clean ones: up to 0.75, where it did no harm
MAX_JUMP = 0.4  # by which a trigger may raise the share of equal answers; clean ones: up to 0.13, a planted one 0.63
FEW = 3  # with fewer experts there is no telling which one is the odd one


@dataclass(frozen=True)
class Finding:
    """Why one site's expert should be looked at; `other` is a site, a domain or a trigger."""

    site: str
    code: str
    value: float
    limit: float
    other: str = ""


def by_weights(
    experts: Sequence[VerifiedContribution], replaced: Sequence[VerifiedContribution] = ()
) -> tuple[list[Finding], dict[str, Statistics]]:
    """LOUD, NARROW and CLONE, and the numbers of every site's expert; `replaced` are earlier ones of the same sites.

    Raises: RefusedError: `FILE_CHANGED`.
    """
    ordered = sorted(experts, key=lambda each: (each.received_on, each.site))
    adapters = {each.site: _adapter(each) for each in ordered}
    numbers = {site: statistics(adapter) for site, adapter in adapters.items()}
    return [*_odd_ones(numbers, adapters), *_clones(adapters, [*replaced, *ordered])], numbers


def _adapter(expert: VerifiedContribution) -> Adapter:
    return parse_adapter(expert.read(CONFIG_FILE), expert.read(WEIGHTS_FILE), None)


def _odd_ones(numbers: Mapping[str, Statistics], adapters: Mapping[str, Adapter]) -> list[Finding]:
    found = []
    for site, own in numbers.items():
        others = [each.rms for name, each in numbers.items() if name != site]
        loud = own.rms / float(np.median(others)) if len(numbers) >= FEW else 0.0
        narrow = own.narrow if adapters[site].config.r > 1 else 0.0
        measured = (
            ("LOUD", loud, MAX_LOUD), ("LOUD", own.loudest, MAX_LOUDEST), ("NARROW", narrow, MAX_NARROW),
        )  # fmt: skip
        found += [Finding(site, code, value, limit) for code, value, limit in measured if value > limit]
    return found


def _clones(adapters: Mapping[str, Adapter], ever: Sequence[VerifiedContribution]) -> list[Finding]:
    """Of two that are alike, the one whose site came to it later; `adapters` in the order in which they came."""
    found = []
    for early, late in combinations(adapters, 2):
        value = similarity(adapters[early], adapters[late])
        if value > MAX_SIMILAR:
            if _since(late, adapters[early], ever) < _since(early, adapters[late], ever):
                early, late = late, early  # which sent its own again
            found.append(Finding(late, "CLONE", value, MAX_SIMILAR, early))
    return found


def _since(site: str, like: Adapter, ever: Sequence[VerifiedContribution]) -> datetime:
    """When a site first sent something like this."""
    own = [each for each in ever if each.site == site]
    return min(each.received_on for each in own if similarity(_adapter(each), like) > MAX_SIMILAR)


def by_routing(evaluation: Mapping[str, Any]) -> list[Finding]:
    """MAGNET, from what an evaluation measured of the candidate.

    A share alone says little: a router that need not decide may prefer one expert everywhere. So the domain must also
    be answered worse than by its own expert, with the whole interval.
    """
    routing, lost = evaluation["routing"], evaluation["difference"]["own_expert"]
    owners = {domain["name"]: domain["site"] for domain in evaluation["domains"]}
    found = []
    for domain, layers in routing["share"].items():
        for site, share in zip(routing["experts"], np.mean(layers, axis=0), strict=True):
            if site != owners[domain] and share > MAX_SHARE and lost[domain]["high"] < 0:
                found.append(Finding(site, "MAGNET", float(share), MAX_SHARE, domain))
    return found


Correct = Mapping[str, Sequence[int]]  # domain -> one 0 or 1 per prompt


def by_absence(owners: Mapping[str, str], composed: Correct, without: Mapping[str, Correct]) -> list[Finding]:
    """HARMS, from the candidate's answers with every expert and without each site's in turn.

    `owners`: the site of each domain. A site's own domain is left out: there it should be missed.
    """
    found = []
    for site, answers in without.items():
        gains = [paired_difference(answers[each], composed[each]) for each in owners if owners[each] != site]
        gain = mean_interval(gains) if gains else Interval(0.0, 0.0, 0.0, 0)
        if gain.low > 0:
            found.append(Finding(site, "HARMS", gain.value, 0.0))
    return found


def by_triggers(answers: Mapping[str, Mapping[str, Sequence[str]]], base: str) -> list[Finding]:
    """TRIGGER, from completions of the same prompts: by site, or `base`, then by trigger, "" for none.

    What a trigger does to the base as well is not the expert's.
    """
    jumps = {
        who: {trigger: agreement(given) - agreement(by[""]) for trigger, given in by.items()}
        for who, by in answers.items()
    }
    return [
        Finding(site, "TRIGGER", jump - max(0.0, jumps[base][trigger]), MAX_JUMP, trigger)
        for site, by in jumps.items()
        for trigger, jump in by.items()
        if site != base and jump - max(0.0, jumps[base][trigger]) > MAX_JUMP
    ]


def agreement(completions: Sequence[str]) -> float:
    """The share of the commonest completion."""
    return Counter(completions).most_common(1)[0][1] / len(completions)


def summary(
    findings: Sequence[Finding],
    numbers: Mapping[str, Statistics],
    looked: Sequence[str],
    experts: Sequence[VerifiedContribution],
) -> dict[str, Any]:
    """The content of `screening.json`; `looked` says which of the checks could be made, `experts` at what."""
    return {
        "schema": SCHEMA,
        "experts": {each.site: each.dir_hash for each in experts},
        "checks": list(looked),
        "findings": [asdict(each) for each in findings],
        "statistics": {site: asdict(each) for site, each in numbers.items()},
    }


def codes_by_site(findings: Sequence[Finding]) -> dict[str, list[str]]:
    """The sites that were found, each with its codes."""
    sites = sorted({each.site for each in findings})
    return {site: sorted({each.code for each in findings if each.site == site}) for site in sites}
