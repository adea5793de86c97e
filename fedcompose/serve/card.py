"""What a release says about itself, for people who use it: who trained what, who vouches for it, under which terms.

Only what was verified before loading, and what no signature shows. The claims and numbers of a site are its own word.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import suppress
from datetime import datetime
from typing import Any

from fedcompose.contribution import VerifiedContribution
from fedcompose.document import format_time
from fedcompose.errors import ConfigError
from fedcompose.release import VerifiedRelease
from fedcompose.standing import cautions, newest_known
from fedcompose.tasks import generator_names, generator_task, get_task, held_out

CHECKS = (
    "the federation file is signed by roots that this server trusts",
    "the coordinator signed every file of the release",
    "each site signed its expert, and it is in the release byte for byte",
    "keys, sites and base still belong, as far as this server knows",
)


def release_card(release: VerifiedRelease, now: datetime, masked: Collection[str] = ()) -> dict[str, Any]:
    """One document for `GET /release`; `experts` in the order of the router's rows. Those of `masked` write nothing."""
    claims, federation = release.provenance, release.federation
    return {
        "release": release.dir_hash,
        "federation": {
            "id": federation.id,
            "name": federation.name,
            "version": federation.version,
            "newest_known": newest_known(release).version,
        },
        "coordinator": {"id": claims.coordinator, "keyid": release.keyid},
        "made": format_time(claims.finished),
        "method": claims.method,
        "base": dict(release.composition["base"]),
        "masked": list(release.composition.get("masked", ())),
        "experts": [{**_expert(release, expert), "masked": expert.site in masked} for expert in release.experts],
        "checked": list(CHECKS),
        "examples": list(_examples(release)),
        "cautions": [*cautions(release, now), *map(_masked, sorted(masked))],
    }


def _examples(release: VerifiedRelease) -> Iterator[str]:
    """A public question of each domain that the release was measured on, in the order of the experts."""
    known, sites = generator_names(), [expert.site for expert in release.experts]
    domains = [each for each in (release.evaluation or {}).get("domains", []) if each.get("generator") in known]
    for domain in sorted(domains, key=lambda each: sites.index(each["site"]) if each["site"] in sites else len(sites)):
        with suppress(ConfigError):  # settings that this version does not know
            (example,) = held_out(domain["generator"], domain["config"], 1)
            yield get_task(generator_task(domain["generator"])).prompt(example.question)


def _masked(site: str) -> str:
    return f"the expert of {site} was withdrawn and writes nothing here any more; the rest was trained beside it"


def _expert(release: VerifiedRelease, expert: VerifiedContribution) -> dict[str, Any]:
    claims = expert.provenance
    return {
        "site": expert.site,
        "domain": expert.domain,
        "dirHash": expert.dir_hash,
        "keyid": expert.keyid,
        "trained": format_time(claims.finished),
        "received": format_time(expert.received_on),
        "call": claims.call.id if claims.call else None,
        "lora": claims.lora.model_dump(mode="json") if claims.lora else None,
        "numbers": dict(claims.metrics),
        "terms": _terms(release, expert),
    }


def _terms(release: VerifiedRelease, expert: VerifiedContribution) -> list[str]:
    """Under which conditions a site's work is used here, in sentences."""
    may = release.federation.site(expert.site).may
    terms = [
        f"allowed in this federation: {' and '.join(may)}, for the domain {expert.domain}",
        f"offered for composing until {format_time(expert.provenance.expires)}",
        "of its records the release holds none; weights are made of them, and may reveal something about them",
    ]
    if release.federation.policy is not None:
        terms.append(f"under the federation's policy {release.federation.policy.sha256}")
    return terms
