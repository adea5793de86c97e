"""A coordinator's settings: `coordinator.toml`, written by `fedcompose coordinator init`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field

from fedcompose.call import WantedLora
from fedcompose.keys import Identifier
from fedcompose.settings import Settings, read_settings
from fedcompose_coordinator.methods import DEFAULT_METHOD, ComposeSettings, Recipe, recipe

CONFIG_NAME = "coordinator.toml"


class Compose(ComposeSettings):
    """How to compose: the section `[compose]`, or a file of its own for an experiment.

    What is not set is the method's own setting. `router` changes parts of the router of `method`, of no other.
    """

    method: str = DEFAULT_METHOD
    seed: int = Field(0, ge=0)
    sampled_prompts: int = Field(400, ge=1)
    mixed_lessons: int = Field(90, ge=0)
    temperature: float = Field(0.7, gt=0, le=2)
    router: dict[str, Any] = Field(default_factory=dict)

    def recipe(self, method: str | None = None) -> Recipe:
        """The method of this section, or another one with the same settings.

        Raises: ConfigError: as `methods.recipe`.
        """
        name = method or self.method
        chosen = {field: getattr(self, field) for field in self.model_fields_set & ComposeSettings.model_fields.keys()}
        return recipe(name, chosen, self.router if name == self.method else None)


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


class Listen(Settings):
    """Where sites connect: the address to listen on, and the names by which they reach it, the first one invited to."""

    host: str = "127.0.0.1"
    port: int = Field(9443, ge=1, le=65535)
    names: tuple[str, ...] = Field(default=("127.0.0.1",), min_length=1)
    metrics_port: int = Field(0, ge=0, le=65535)

    @property
    def address(self) -> str:
        """What the invitation says."""
        name = self.names[0]
        return f"[{name}]:{self.port}" if ":" in name else f"{name}:{self.port}"


class CoordinatorConfig(Settings):
    """The whole of `coordinator.toml`."""

    id: Identifier
    base: str
    key: str
    federation: Path = Path("federation.json")
    approvals: int = Field(0, ge=0)
    approvers: dict[Identifier, Path] = Field(default_factory=dict)
    listen: Listen = Listen()
    call: WantedLora = WantedLora()
    compose: Compose = Compose()
    evaluate: Evaluate = Evaluate()
    domains: dict[Identifier, DeclaredDomain] = Field(default_factory=dict)


def load_config(home: Path) -> CoordinatorConfig:
    """Read and check `coordinator.toml` of a coordinator's folder.

    Raises: ConfigError: as `read_settings`.
    """
    return read_settings(home / CONFIG_NAME, CoordinatorConfig, "fedcompose coordinator init")
