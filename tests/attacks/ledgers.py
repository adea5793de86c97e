"""Attacks on the coordinator's ledger, by whoever can write its file; heads that others hold give them away."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from fedcompose import ledger
from fedcompose.ledger import Head
from tests.attacks.attack import Cases, Mutation, refusal_of

NOW = datetime(2026, 11, 20, tzinfo=UTC)


@dataclass
class Ledger:
    """Eight decisions; a site has seen the head after the sixth."""

    path: Path
    held: dict[str, Head]

    def refusal(self) -> str:
        return refusal_of(self.admit)

    def admit(self) -> None:
        assert len(ledger.verify(self.path, self.held)) >= 6

    def lines(self) -> list[bytes]:
        return self.path.read_bytes().splitlines(keepends=True)


def a_ledger(released: object, tmp_path: Path) -> Ledger:
    heads = write(tmp_path / "ledger.jsonl", [f"contribution-{n}" for n in range(8)])
    return Ledger(tmp_path / "ledger.jsonl", {"site-a": heads[5]})


def write(path: Path, contributions: list[str]) -> list[Head]:
    return [ledger.append(path, "refused", NOW, contribution=name) for name in contributions]


def lines(change: Callable[[list[bytes]], object]) -> Mutation:
    def mutate(attack: Ledger) -> None:
        changed = attack.lines()
        change(changed)
        attack.path.write_bytes(b"".join(changed))

    return mutate


def edited(position: int) -> Mutation:
    """Another decision under the same number."""

    def change(found: list[bytes]) -> None:
        entry = json.loads(found[position]) | {"event": "admitted"}
        found[position] = json.dumps(entry, sort_keys=True, separators=(",", ":")).encode() + b"\n"

    return lines(change)


def anew_from(position: int) -> Mutation:
    """Another history from some entry on, which agrees with itself."""

    def mutate(attack: Ledger) -> None:
        kept = attack.lines()[:position]
        attack.path.write_bytes(b"".join(kept))
        write(attack.path, [f"other-{n}" for n in range(8 - position)])

    return mutate


def linked(attack: Ledger) -> None:
    moved = attack.path.with_name("elsewhere")
    attack.path.rename(moved)
    attack.path.symlink_to(moved)
    ledger.append(attack.path, "refused", NOW, contribution="x")


LEDGERS: Cases = {
    "ledger-entry-removed": (lines(lambda found: found.pop(3)), "LEDGER_BROKEN"),
    "ledger-entry-edited": (edited(3), "LEDGER_BROKEN"),
    "ledger-last-entry-spelled-otherwise": (
        lines(lambda found: found.append(found.pop().replace(b":", b": "))),
        "LEDGER_BROKEN",
    ),
    "ledger-entries-swapped": (lines(lambda found: found.insert(3, found.pop(4))), "LEDGER_BROKEN"),
    "ledger-entry-inserted": (lines(lambda found: found.insert(3, found[2])), "LEDGER_BROKEN"),
    "ledger-entry-cut": (lines(lambda found: found.append(found.pop()[:-9])), "LEDGER_BROKEN"),
    "ledger-no-ledger": (lambda a: a.path.write_bytes(b"\x80\x04K\x01."), "LEDGER_BROKEN"),
    "ledger-truncated": (lines(lambda found: found.__delitem__(slice(4, None))), "LEDGER_TRUNCATED"),
    "ledger-emptied": (lambda a: a.path.unlink(), "LEDGER_TRUNCATED"),
    "ledger-forked": (anew_from(4), "LEDGER_FORKED"),
    "ledger-written-anew": (anew_from(0), "LEDGER_FORKED"),
}
