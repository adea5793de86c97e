"""A coordinator's settings: `coordinator.toml`, written by `fedcompose coordinator init`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field

from fedcompose.call import WantedLora
from fedcompose.keys import Identifier
from fedcompose.settings import Settings, read_settings

CONFIG_NAME = "coordinator.toml"


class Compose(Settings):
    """How router and attention LoRA are trained. The measured settings, the demo's, are in docs/log.md."""

    seed: int = Field(0, ge=0)
    steps: int = Field(60, ge=1)
    batch: int = Field(12, ge=1)
    router_lr: float = Field(1e-2, gt=0)
    attention_lr: float = Field(2e-3, gt=0)
    attention_rank: int = Field(16, ge=1, le=512)
    sampled_prompts: int = Field(96, ge=1)
    temperature: float = Field(0.7, gt=0, le=2)


class Evaluate(Settings):
    """How the candidate is measured."""

    prompts_per_domain: int = Field(200, ge=10)
    max_new_tokens: int = Field(48, ge=1, le=8192)
    processes: int = Field(1, ge=1, le=64)


class DeclaredDomain(Settings):
    """A domain's public generator: what a candidate is measured on, and sampled on where no traces came."""

    site: Identifier
    generator: str
    config: dict[str, Any] = Field(default_factory=dict)


class CoordinatorConfig(Settings):
    """The whole of `coordinator.toml`."""

    id: Identifier
    base: str
    key: str
    federation: Path = Path("federation.json")
    approvals: int = Field(0, ge=0)
    approvers: dict[Identifier, Path] = Field(default_factory=dict)
    call: WantedLora = WantedLora()
    compose: Compose = Compose()
    evaluate: Evaluate = Evaluate()
    domains: dict[Identifier, DeclaredDomain] = Field(default_factory=dict)


def load_config(home: Path) -> CoordinatorConfig:
    """Read and check `coordinator.toml` of a coordinator's folder.

    Raises: ConfigError: as `read_settings`.
    """
    return read_settings(home / CONFIG_NAME, CoordinatorConfig, "fedcompose coordinator init")
