"""A site's own rows, and what a run is made from: whoever asks later must split them as the training did."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedcompose.errors import ConfigError
from fedcompose.files import dump_json, read_json, sha256_hex
from fedcompose.tasks import Example
from fedcompose_client.config import Domain, Dp
from fedcompose_client.data import Splits, read_column, read_examples, split

SETTINGS_FILE = "settings.json"  # of a run: what it was made from


@dataclass(frozen=True)
class OwnRows:
    """The examples of a site's file in its order, their splits, and for privacy by user whose each is, by its `id`."""

    examples: Sequence[Example]
    splits: Splits
    owners: Mapping[int, str] | None


def own_rows(site: Path, domain: Domain, dp: Dp | None) -> OwnRows:
    """The rows as a run with this differential privacy splits them: by question, or by user.

    Raises: ConfigError: `DP_UNSOUND` where rows do not say whose they are, and all that `read_examples` raises.
    """
    examples = read_examples(site / domain.file, domain.task, domain.columns.named())
    owners = _owners(site, domain, examples) if dp and dp.unit == "user" else None
    settings = domain.training
    return OwnRows(
        examples, split(examples, settings.seed, settings.validation_count, settings.test_count, owners), owners
    )


def made_from(base_digest: str, domain: Domain, dp: Dp | None, own: OwnRows) -> bytes:
    """What a run is made from, as its settings file says: the base, the settings, and everything of its rows."""
    private = {"dp": dp.model_dump(mode="json")} if dp else {}
    settings = {"base": base_digest, "task": domain.task, **domain.training.model_dump(mode="json"), **private}
    return dump_json({**settings, "data_sha256": sha256_hex("\n".join(_lines(own)).encode())})


def _lines(own: OwnRows) -> Iterator[str]:
    """A row's question and answer, and where it has them its solution and whose it is."""
    for example in own.examples:
        more = (example.solution, own.owners[id(example)] if own.owners else None)
        yield "\t".join([example.question, example.answer, *(part for part in more if part is not None)])


def check_made_from(run: Path, wanted: bytes) -> None:
    """Raises: ConfigError: `RUN_OTHER_SETTINGS` where the folder holds a run that is made from something else."""
    path = run / SETTINGS_FILE
    if path.exists() and path.read_bytes() != wanted:
        raise ConfigError(
            "RUN_OTHER_SETTINGS",
            f"{run} holds a run with other settings, other data or another base",
            fix="restore them to go on with it, or train again with --fresh",
        )


def dp_of(run: Path) -> Dp | None:
    """What the run in this folder was asked for; also of a run that has not ended."""
    path = run / SETTINGS_FILE
    found = read_json(path).get("dp") if path.is_file() else None
    return Dp.model_validate(found) if found else None


def _owners(site: Path, domain: Domain, examples: Sequence[Example]) -> Mapping[int, str]:
    if domain.user is None:
        raise ConfigError(
            "DP_UNSOUND", "no differential privacy by user: the rows do not say whose they are",
            expected="a column", fix='name it in site.toml, as in user = "patient"',
        )  # fmt: skip
    users = read_column(site / domain.file, domain.user)
    return {id(example): user for example, user in zip(examples, users, strict=True)}
