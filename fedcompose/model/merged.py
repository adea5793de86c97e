"""One expert of a release as an ordinary model: base, attention LoRA and expert in one set of weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fedcompose.adapter import CONFIG_FILE, WEIGHTS_FILE, parse_adapter
from fedcompose.bases import Base, base_shapes
from fedcompose.composition import ATTENTION_FOLDER
from fedcompose.errors import ConfigError, RefusedError
from fedcompose.export import ORIGIN_FILE, origin
from fedcompose.files import new_folder, write_json
from fedcompose.model.experts import Expert, make_expert, read_expert
from fedcompose.model.lm import load_base
from fedcompose.model.placement import check_shape, linear_of
from fedcompose.release import VerifiedRelease


def export_merged(release: VerifiedRelease, site: str, base: Base, target: Path) -> None:
    """Write what the model id `expert:SITE` answers with, as a folder that any program loads; in float32, as merged.

    Raises: ConfigError: `EXPERT_UNKNOWN`.
            RefusedError: `BASE_MISMATCH`, `FILE_CHANGED`.
    """
    chosen = [expert for expert in release.experts if expert.site == site]
    if not chosen:
        names = ", ".join(expert.site for expert in release.experts)
        raise ConfigError("EXPERT_UNKNOWN", "the release has no expert of this name", expected=names, got=ascii(site))
    check_base(release, base)
    shapes = base_shapes(base)
    model, tokenizer = load_base(base.path, torch.float32)
    for each in (*attention(release, shapes), read_expert(chosen[0], shapes)):
        add_into(model, each)
    with new_folder(target) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_json(folder / ORIGIN_FILE, origin(release) | {"merged": site})


@torch.no_grad()
def add_into(model: Any, expert: Expert) -> None:
    """Add a LoRA to the model's own weights, each with one rounding.

    Raises: RefusedError: `COMPOSE_TARGETS`, `COMPOSE_SHAPES`.
    """
    for name, update in expert.updates.items():
        linear = linear_of(model, name)
        if linear is None:
            raise RefusedError("COMPOSE_TARGETS", "the expert changes something that is not there", got=ascii(name))
        check_shape(linear, name, (len(update.b), update.a.shape[1]))
        linear.weight.copy_(linear.weight.float() + update.delta().to(linear.weight.device))


def check_base(release: VerifiedRelease, base: Base) -> None:
    """Raises: RefusedError: `BASE_MISMATCH`."""
    if base.digest != release.composition["base"]["dirHash"]:
        raise RefusedError(
            "BASE_MISMATCH",
            "the release was made for another base model",
            expected=release.composition["base"]["dirHash"],
            got=f"{base.digest} ({base.path})",
        )


def attention(release: VerifiedRelease, shapes: Mapping[str, tuple[int, int]]) -> Sequence[Expert]:
    """The release's attention LoRA, if it has one."""
    if release.composition["attention"] is None:
        return ()
    settings, weights = (release.read(f"{ATTENTION_FOLDER}/{name}") for name in (CONFIG_FILE, WEIGHTS_FILE))
    return (make_expert(ATTENTION_FOLDER, parse_adapter(settings, weights, shapes)),)
