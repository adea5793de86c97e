"""Who takes part in compositions: leave a site out, at once or thoroughly, and let it in again.

A removed site stays removed: its contributions stay in the store and are skipped. What it left in the candidate goes
in one of two ways:

    mask        its row of the router and its expert go, in no time; the rest was trained beside it and stays as it is,
                which the composition, `verify` and `serve` say
    recompose   the candidate is made again, by the same recipe, as if the site had never been there

No tensor library is loaded.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedcompose.composition import COMPOSITION_FILE, MAX_ROUTER_BYTES, ROUTER_FILE
from fedcompose.contribution import VerifiedContribution
from fedcompose.document import Time
from fedcompose.errors import ConfigError, RefusedError
from fedcompose.files import new_folder, read_json, read_limited, write_atomic, write_json
from fedcompose.keys import Identifier
from fedcompose.release import EVALUATION_FILE
from fedcompose.tensors import StoredTensor, canonical_safetensors, parse_safetensors
from fedcompose_coordinator.methods import ComposeSettings, Recipe, recipe

REMOVED_FILE = "removed.json"
CHANGED_FOLDER = "changed"  # of a candidate: copies of experts that were trained on, a folder of each site
LEVELS = ("mask", "recompose")


class _Removed(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    schema_: Literal["fedcompose/removed/v1"] = Field(alias="schema")
    sites: dict[Identifier, Time]


def members(home: Path, contributions: Sequence[VerifiedContribution]) -> list[VerifiedContribution]:
    """The contributions of the sites that were not removed.

    Raises: ConfigError: `REMOVED_INVALID`.
    """
    removed = _removed(home)
    return [each for each in contributions if each.site not in removed]


def leave_out(home: Path, site: str, contributions: Sequence[VerifiedContribution], now: datetime) -> None:
    """Remember that a site is out.

    Raises: ConfigError: `SITE_NOT_ADMITTED` for a site that contributed nothing.
    """
    _check_admitted(site, contributions)
    _remember(home, {**_removed(home), site: now})


def let_in(home: Path, site: str, contributions: Sequence[VerifiedContribution]) -> None:
    """Forget that a site was out, if it was. Raises: ConfigError: `SITE_NOT_ADMITTED`."""
    _check_admitted(site, contributions)
    _remember(home, {name: at for name, at in _removed(home).items() if name != site})


def mask(candidate: Path, site: str) -> dict[str, Any]:
    """Take a site's expert and its row of the router out of the candidate; return the new composition.

    Raises: ConfigError: `SITE_NOT_COMPOSED`, `COMPOSE_NO_EXPERTS` when nobody is left, `MASK_UNSUPPORTED` for
        candidates that have no row per expert.
    """
    composition = read_composition(candidate)
    sites = [expert["site"] for expert in composition["experts"]]
    if site not in sites:
        raise ConfigError("SITE_NOT_COMPOSED", f"the candidate has no expert of {site!a}", expected=", ".join(sites))
    if len(sites) == 1:
        raise ConfigError("COMPOSE_NO_EXPERTS", f"the candidate has no other expert than that of {site}")
    if composition["router"] is None or composition["router"]["scorer"] == "static":
        raise ConfigError(
            "MASK_UNSUPPORTED",
            f"in a candidate made by {composition['method']} all experts are one",
            fix="--level recompose; it takes seconds",
        )
    row = sites.index(site)
    composition["experts"].pop(row)
    composition["masked"] = sorted({*composition.get("masked", ()), site})
    with new_folder(candidate) as folder:
        shutil.copytree(candidate, folder, dirs_exist_ok=True)
        shutil.rmtree(folder / CHANGED_FOLDER / site, ignore_errors=True)
        write_atomic(folder / ROUTER_FILE, without_row(read_limited(candidate / ROUTER_FILE, MAX_ROUTER_BYTES), row))
        write_json(folder / COMPOSITION_FILE, composition)
    return composition


def without_row(router: bytes, row: int) -> bytes:
    """A router's file without one expert: every tensor in it has a row per expert."""
    kept = {}
    for name, tensor in parse_safetensors(router).items():
        values = np.ascontiguousarray(np.delete(tensor.float32(), row, axis=0), dtype="<f4")
        kept[name] = StoredTensor("F32", values.shape, memoryview(values.tobytes()))
    return canonical_safetensors(kept)


def same_recipe(candidate: Path) -> tuple[Recipe, int]:
    """The recipe and the seed that a candidate was made with."""
    composition = read_composition(candidate)
    training = composition["training"]
    settings = {name: training[name] for name in ComposeSettings.model_fields.keys() & training.keys()}
    return recipe(composition["method"], settings, composition["router"]), training["seed"]


def read_composition(candidate: Path) -> dict[str, Any]:
    """Raises: ConfigError: `CANDIDATE_MISSING`."""
    if not (candidate / COMPOSITION_FILE).is_file():
        raise ConfigError(
            "CANDIDATE_MISSING", f"there is no candidate in {candidate}", fix="fedcompose coordinator compose"
        )
    composition: dict[str, Any] = read_json(candidate / COMPOSITION_FILE)
    return composition


def forget_evaluation(home: Path) -> None:
    """What was measured was measured on another candidate; finished cells are kept."""
    (home / EVALUATION_FILE).unlink(missing_ok=True)


def _check_admitted(site: str, contributions: Sequence[VerifiedContribution]) -> None:
    known = sorted({each.site for each in contributions})
    if site not in known:
        raise ConfigError(
            "SITE_NOT_ADMITTED", f"nothing of {site!a} was admitted", expected=", ".join(known) or "some contribution",
            fix="fedcompose coordinator receive",
        )  # fmt: skip


def _removed(home: Path) -> dict[str, datetime]:
    path = home / REMOVED_FILE
    if not path.exists():
        return {}
    try:
        return _Removed.model_validate(read_json(path)).sites
    except (ValidationError, RefusedError) as error:
        raise ConfigError("REMOVED_INVALID", f"{path} cannot be read", fix="restore it from a backup") from error


def _remember(home: Path, sites: dict[str, datetime]) -> None:
    state = _Removed(schema="fedcompose/removed/v1", sites=sites)
    write_json(home / REMOVED_FILE, state.model_dump(mode="json", by_alias=True))
