"""A site's settings: `site.toml`, written by `fedcompose client init` and read by every other command of a site."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from fedcompose.document import Digest
from fedcompose.errors import ConfigError
from fedcompose.provenance import Required
from fedcompose.settings import Settings, read_settings

CONFIG_NAME = "site.toml"
Identifier = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")]


class Columns(Settings):
    """Names of the columns of a domain's file."""

    question: str = "question"
    answer: str = "answer"
    solution: str | None = None
    choices: str | None = None

    def named(self) -> dict[str, str]:
        """The file's columns by what they hold, of those that it has."""
        return self.model_dump(exclude_none=True)


class TraceSource(Settings):
    """Where the questions of traces come from: that traces are wanted at all, and of which class.

    generator   class B, a declared generator, which must not depend on private data
    public      class C, the file `public`, in the columns of the domain, whose SHA-256 is `sha256`
    own         class F, the domain's own questions; only where its data was declared non-private
    """

    questions: Literal["generator", "public", "own"] = "generator"
    generator: str | None = None
    config: dict[str, Any] = Field(default_factory=dict)
    public: Path | None = None
    sha256: Digest | None = None
    background: Path | None = None  # public text; phrases in it are nobody's secret
    scanners: tuple[Literal["presidio", "detect-secrets"], ...] = ()  # of the extra `pii`
    prompts: int = Field(400, ge=1, le=10_000)
    samples_per_prompt: int = Field(2, ge=1, le=16)
    temperature: float = Field(0.7, gt=0, le=2)
    max_per_prompt: int = Field(1, ge=1, le=16)

    @model_validator(mode="after")
    def _names_its_questions(self) -> TraceSource:
        if (self.questions == "generator") != (self.generator is not None):
            raise ValueError("a generator is named exactly where questions come from one")
        if (self.questions == "public") != (self.public is not None and self.sha256 is not None):
            raise ValueError("public questions need `public`, a file, and its `sha256`; others have no use for them")
        return self


class Training(Settings):
    """How a domain's expert is trained. The measured settings, the demo's, are in docs/log.md."""

    engine: Literal["auto", "packed", "trl"] = "auto"
    seed: int = Field(0, ge=0)
    rank: int = Field(16, ge=1, le=512)
    targets: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    validation_count: int = Field(100, ge=10)
    test_count: int = Field(200, ge=10)
    warm_up_steps: int = Field(16, ge=0)
    warm_up_lr: float = Field(1e-3, gt=0)
    warm_up_batch: int = Field(16, ge=1)
    steps: int = Field(40, ge=0)
    lr: float = Field(2e-4, gt=0)
    prompts_per_step: int = Field(8, ge=1)
    samples_per_prompt: int = Field(8, ge=2)
    temperature: float = Field(1.0, gt=0)
    max_new_tokens: int = Field(48, ge=1, le=8192)

    @model_validator(mode="after")
    def _trains_at_all(self) -> Training:
        if not self.warm_up_steps and not self.steps:
            raise ValueError("warm_up_steps and steps are both 0: nothing would be trained")
        return self


class Dp(Settings):
    """The differential privacy that a run was asked for."""

    epsilon: float = Field(gt=0, le=100)
    delta: float = Field(1e-5, gt=0, lt=1)
    unit: Literal["prompt", "user"] = "prompt"


class Privacy(Settings):
    """What must be so before an adapter leaves, and whether an audit's numbers may leave with it."""

    require_audit: Required = "none"
    max_epsilon: float | None = Field(None, gt=0)
    audit_numbers: bool = False


class Domain(Settings):
    """One kind of problem this site has data for."""

    file: Path
    task: str
    private: bool = True
    user: str | None = None  # column that says whose row it is, for privacy by user
    identifiers: tuple[str, ...] = ()  # columns whose values name a person or a case; no trace may hold one
    columns: Columns = Columns()
    traces: TraceSource | None = None
    training: Training = Training()
    dp: Dp | None = None  # where `train` is given no other by its options


class Calls(Settings):
    """What happens when a call comes in, and when its answer has been signed: who decides about the next step."""

    decide: Literal["refuse", "ask", "run"] = "ask"
    release: Literal["ask", "run"] = "ask"


class Use(Settings):
    """On which terms others may use what this site contributes; they travel inside the signature."""

    purpose: str
    recipients: tuple[Identifier, ...]
    until: date
    contact: str


class SiteConfig(Settings):
    """The whole of `site.toml`."""

    id: Identifier
    base: str
    key: str
    node_key: Path | None = None  # of the connection to the coordinator
    federation: Path = Path("federation.json")
    calls: Calls = Calls()
    privacy: Privacy = Privacy()
    use: Use | None = None
    domains: dict[Identifier, Domain]

    @property
    def node_key_file(self) -> Path:
        """Where `fedcompose keys new` puts the node key, unless the settings say otherwise."""
        return self.node_key or Path("keys") / f"{self.id}.node.key"

    def domain(self, name: str) -> Domain:
        """The settings of one domain.

        Raises: ConfigError: `DOMAIN_UNKNOWN`.
        """
        if name not in self.domains:
            raise ConfigError(
                "DOMAIN_UNKNOWN",
                f"{CONFIG_NAME} has no domain {name!a}",
                expected=", ".join(self.domains) or "at least one [domains.NAME] section",
                fix=f"add a section [domains.{name}] or choose one of those",
            )
        return self.domains[name]


def load_config(site: Path) -> SiteConfig:
    """Read and check `site.toml` of a site's folder.

    Raises: ConfigError: as `read_settings`.
    """
    return read_settings(site / CONFIG_NAME, SiteConfig, "fedcompose client init")
