"""Parts of a release in forms that other programs read, as far as no model has to be loaded for it.

    adapters      each site's expert as the PEFT folder that it signed, byte for byte, and the attention LoRA
    route table   which expert suits a whole prompt, for servers that take one adapter per request

An ordinary server cannot route token by token, so neither is what was composed and evaluated. Signatures cover the
release, not what is made of it: `ORIGIN_FILE` says where to look.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedcompose.adapter import CONFIG_FILE, WEIGHTS_FILE
from fedcompose.composition import ATTENTION_FOLDER
from fedcompose.errors import ConfigError
from fedcompose.files import new_folder, write_json
from fedcompose.release import VerifiedRelease
from fedcompose.tasks import generator_names, generator_task, get_task, held_out, training

ORIGIN_FILE = "origin.json"
EXPERTS_FOLDER = "experts"
ROUTE_TABLE_SCHEMA = "fedcompose/route-table/v1"
LEARNED_PER_EXPERT = 300  # prompts of its domain's public generator
TRIED_PER_EXPERT = 200  # others, that the table did not see
DIGITS = 4  # after the point; sums of them do not tip over

_WORD = re.compile(r"[^\W\d_]+|\d|[^\w\s]")


def origin(release: VerifiedRelease) -> dict[str, Any]:
    """What to hold next to anything made of a release."""
    return {
        "release": release.dir_hash,
        "federation": release.federation.id,
        "coordinator": release.provenance.coordinator,
        "base": dict(release.composition["base"]),
        "experts": [{"site": e.site, "domain": e.domain, "dirHash": e.dir_hash} for e in release.experts],
        "signed": False,
    }


def export_adapters(release: VerifiedRelease, target: Path) -> list[str]:
    """A folder for each expert, and one for the attention LoRA; their names.

    Raises: RefusedError: `FILE_CHANGED`.
    """
    with new_folder(target) as folder:
        for expert in release.experts:
            _copy_adapter(expert.read, folder / EXPERTS_FOLDER / expert.site)
        if release.composition["attention"] is not None:
            _copy_adapter(lambda name: release.read(f"{ATTENTION_FOLDER}/{name}"), folder / ATTENTION_FOLDER)
        write_json(folder / ORIGIN_FILE, origin(release))
        return sorted(str(path.parent.relative_to(folder)) for path in folder.rglob(CONFIG_FILE))


def export_route_table(release: VerifiedRelease, target: Path) -> dict[str, Any]:
    """Learn the table from public prompts, try it on others, write it; the table.

    Raises: ConfigError: `ROUTE_TABLE_NO_PROMPTS`.
    """
    domains = _domains(release)
    scores = learn([list(_prompts(training, domain, LEARNED_PER_EXPERT)) for domain in domains.values()])
    accuracy = {}
    for row, (site, domain) in enumerate(domains.items()):
        tried = list(_prompts(held_out, domain, TRIED_PER_EXPERT))
        accuracy[site] = {"right": sum(choose(scores, each) == row for each in tried), "of": len(tried)}
    table = {
        "schema": ROUTE_TABLE_SCHEMA,
        "origin": origin(release),
        "words": _WORD.pattern,
        "experts": list(domains),
        "scores": scores,
        "accuracy": accuracy,
    }
    write_json(target, table)
    return table


def learn(prompts: Sequence[Sequence[str]]) -> dict[str, list[float]]:
    """For each word, how much it speaks for each group of prompts: the logarithm of its share, add-one smoothed."""
    counts = [Counter(word for prompt in group for word in words(prompt)) for group in prompts]
    vocabulary = sorted(set().union(*counts))
    totals = [count.total() + len(vocabulary) for count in counts]
    return {
        word: [round(math.log((count[word] + 1) / total), DIGITS) for count, total in zip(counts, totals, strict=True)]
        for word in vocabulary
    }


def choose(scores: Mapping[str, Sequence[float]], prompt: str) -> int:
    """The row with the highest sum over the words of the prompt; of equals the first, and unknown words say nothing."""
    known = [scores[word] for word in words(prompt) if word in scores]
    sums = [sum(column) for column in zip(*known, strict=True)]
    return max(range(len(sums)), key=sums.__getitem__, default=0)


def words(text: str) -> list[str]:
    """Letters together, digits and signs one by one, in lower case."""
    return _WORD.findall(text.lower())


def _copy_adapter(read: Callable[[str], bytes], folder: Path) -> None:
    folder.mkdir(parents=True)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        (folder / name).write_bytes(read(name))


def _domains(release: VerifiedRelease) -> dict[str, Mapping[str, Any]]:
    """By site, in the router's order, what the release's evaluation says about its domain's public questions."""
    listed = {each["site"]: each for each in (release.evaluation or {}).get("domains", []) if each.get("generator")}
    missing = [e.site for e in release.experts if listed.get(e.site, {}).get("generator") not in generator_names()]
    if missing:
        raise ConfigError(
            "ROUTE_TABLE_NO_PROMPTS",
            "there are no public prompts from which to learn which expert suits what",
            expected="an evaluation in the release that names a generator known here for each expert's domain",
            got=f"none for {', '.join(missing)}",
        )
    return {expert.site: listed[expert.site] for expert in release.experts}


def _prompts(source: Any, domain: Mapping[str, Any], count: int) -> Iterator[str]:
    name = domain["generator"]
    task = get_task(generator_task(name))
    for example in source(name, domain["config"], count):
        yield task.prompt(example.question)
