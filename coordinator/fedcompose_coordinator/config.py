"""A coordinator's settings: `coordinator.toml`, written by `fedcompose coordinator init`."""

from __future__ import annotations

import tomllib
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedcompose.errors import ConfigError
from fedcompose.keys import Identifier

CONFIG_NAME = "coordinator.toml"


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Compose(_Frozen):
    """How router and attention LoRA are trained. The defaults are the settings that were measured (docs/log.md)."""

    seed: int = Field(0, ge=0)
    steps: int = Field(60, ge=1)
    batch: int = Field(12, ge=1)
    router_lr: float = Field(5e-3, gt=0)
    attention_lr: float = Field(5e-4, gt=0)
    attention_rank: int = Field(8, ge=1, le=512)
    sampled_prompts: int = Field(96, ge=1)
    temperature: float = Field(0.7, gt=0, le=2)


class Evaluate(_Frozen):
    """How the candidate is measured."""

    prompts_per_domain: int = Field(200, ge=10)
    max_new_tokens: int = Field(48, ge=1, le=8192)
    processes: int = Field(1, ge=1, le=64)


class DeclaredDomain(_Frozen):
    """A domain's public generator: what a candidate is measured on, and sampled on where no traces came."""

    site: Identifier
    generator: str
    config: dict[str, Any] = Field(default_factory=dict)


class CoordinatorConfig(_Frozen):
    """The whole of `coordinator.toml`."""

    id: Identifier
    base: str
    key: Path
    federation: Path = Path("federation.json")
    compose: Compose = Compose()
    evaluate: Evaluate = Evaluate()
    domains: dict[Identifier, DeclaredDomain] = Field(default_factory=dict)


def load_config(home: Path) -> CoordinatorConfig:
    """Read and check `coordinator.toml` of a coordinator's folder.

    Raises: ConfigError: `COORDINATOR_CONFIG_MISSING`, `COORDINATOR_CONFIG_INVALID`.
    """
    path = home / CONFIG_NAME
    if not path.is_file():
        raise ConfigError(
            "COORDINATOR_CONFIG_MISSING",
            f"there is no {CONFIG_NAME} in {home}",
            fix="run `fedcompose coordinator init` there, or name the folder with --home",
        )
    try:
        return CoordinatorConfig.model_validate(tomllib.loads(path.read_text("utf-8")))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError("COORDINATOR_CONFIG_INVALID", f"{path} is not valid TOML", got=str(error)) from error
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:5])
        raise ConfigError("COORDINATOR_CONFIG_INVALID", f"{path} has unusable settings", got=problems) from error


def template(**values: str) -> str:
    """The commented `coordinator.toml` with `@name@` marks replaced."""
    text = (files("fedcompose_coordinator") / "templates" / CONFIG_NAME).read_text("utf-8")
    for name, value in values.items():
        text = text.replace(f"@{name}@", value)
    return text
