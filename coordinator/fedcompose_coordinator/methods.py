"""Ways to compose: one table of all of them, and the settings that they share.

A method is a router (who speaks), a way to make it, and the settings that differ from the usual ones. `guided`, the
paper's `hard` with a hint, is the default; the others are there to be compared with it. All of them leave the experts
as the sites signed them.

    trained      router and attention LoRA learn from lessons by gradient; `compose.py`
    sampled      the router learns from sampled selections, without a gradient through them; `remix.py`
    closed form  the router is computed from the experts, or from what the base makes of the lessons; `closed_form.py`
    static       the same mixture for every token; `static.py`
    merged       one LoRA that stands for all experts; there is no router; `static.py`

No tensor library is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import Field

from fedcompose.errors import ConfigError
from fedcompose.routing import RouterConfig
from fedcompose.settings import Settings

Made = Literal["trained", "sampled", "closed form", "static", "merged"]

PAPER = "arXiv 2606.31413"
LORA_MIXER = "arXiv 2507.00029"
REMIX = "arXiv 2603.10160"


class ComposeSettings(Settings):
    """How router and attention LoRA are trained. The measured settings, the demo's, are in docs/log.md."""

    # The sites' traces, and sampled experts where a site shipped none; or sampled experts everywhere.
    learn_from: Literal["traces", "sampled"] = "traces"
    steps: int = Field(100, ge=1)
    batch: int = Field(12, ge=1)  # lessons per step, the same number from every domain
    tokens_per_domain: int | None = Field(None, ge=1)  # lessons beyond this budget are left out
    router_lr: float = Field(1e-2, gt=0)
    attention_lr: float = Field(2e-3, gt=0)
    attention_rank: int = Field(2, ge=0, le=512)  # alpha is twice the rank; a large one learns what experts know
    warm_up: float = Field(0.05, ge=0, lt=1)  # share of the steps
    clip: float = Field(1.0, gt=0)  # largest norm of a step's gradient
    # Weights of the losses in `objectives.py`; 0 is off.
    guidance: float = Field(0.0, ge=0)
    balance: float = Field(0.0, ge=0)
    entropy: float = Field(0.0, ge=0)
    entropy_form: Literal["sharpen", "explore", "inform"] = "sharpen"
    consistency: float = Field(0.0, ge=0)
    consistency_over: Literal["token", "sequence"] = "token"
    losses_warm_up: float = Field(0.0, ge=0, le=1)  # share of the steps over which these weights rise from 0
    temperature_start: float = Field(1.5, gt=0)  # of `gumbel`; falls exponentially, the last tenth is held
    temperature_end: float = Field(0.1, gt=0)
    selections: int = Field(4, ge=2)  # of `sampled`: forward passes of each lesson per step
    # LoRA-Mixer's joint training: steps in which copies of the experts learn too. Such a candidate is never released.
    expert_steps: int = Field(0, ge=0)
    expert_lr: float = Field(1e-4, gt=0)
    preserve: float = Field(5e-5, ge=0)  # price of the squared distance from what the sites shipped
    patience: int | None = Field(None, ge=1)  # stop after so many checks of held-back lessons without a better one
    checkpoint_every: int = Field(10, ge=1)  # steps; also between two such checks


@dataclass(frozen=True)
class Method:
    """`router` is None where no router is left; `settings` differ from the defaults of `ComposeSettings`.

    `fixed` is what makes it this method; a coordinator's own settings, which are for all methods, do not change it.
    """

    says: str
    made: Made
    router: RouterConfig | None
    settings: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""
    needs_lessons: bool = True


_PER_LAYER: dict[str, Any] = {"sharing": "layer"}
_PER_LINEAR: dict[str, Any] = {"decides": "linear", "sharing": "module"}
_PHATGOOSE = RouterConfig(scorer="phatgoose", estimator="top_k", top_k=2, normalise=True, **_PER_LINEAR)
_ALONE: dict[str, Any] = {"attention_rank": 0}
_GUIDED: dict[str, Any] = {"guidance": 1.0, "router_lr": 0.1}

METHODS: Mapping[str, Method] = {
    "hard": Method(
        "one expert per token; the gradient asks all experts", "trained", RouterConfig(), source=PAPER,
    ),
    "hard-selected": Method(
        "one expert per token; the gradient asks the chosen one", "trained",
        RouterConfig(estimator="hard_selected"), source=f"{PAPER}, its code",
    ),
    "guided": Method(
        "one expert per token; every layer's router is also told whose lesson it reads", "trained",
        RouterConfig(bias=True, **_PER_LAYER), _GUIDED, source="ours",
    ),
    "guided-sampled": Method(
        "`guided`, learned from sampled experts, without any trace of a site", "trained",
        RouterConfig(bias=True, **_PER_LAYER), _GUIDED, {"learn_from": "sampled"}, source="ours",
    ),
    "gumbel": Method(
        "one expert per token; training adds noise that cools down", "trained",
        RouterConfig(estimator="gumbel"), source=PAPER,
    ),
    "soft": Method("all experts, weighted by probability", "trained", RouterConfig(estimator="soft"), source=PAPER),
    "top2": Method(
        "two experts, their probabilities made to add up to 1", "trained",
        RouterConfig(estimator="top_k", top_k=2, normalise=True), source=PAPER,
    ),
    "lora-mixer": Method(
        "every linear mixes: all experts in training, three in use", "trained",
        RouterConfig(estimator="soft", top_k=3, **_PER_LINEAR),
        {**_ALONE, "balance": 0.1, "entropy": 0.05, "losses_warm_up": 0.3}, source=LORA_MIXER,
    ),
    "remix": Method(
        "two experts at equal weight, learned by trial", "sampled",
        RouterConfig(estimator="sampled", top_k=2, scale="1/sqrt(k)", **_PER_LAYER), _ALONE, source=REMIX,
    ),
    "arrow": Method(
        "whoever would change this input most; needs no lessons", "closed form",
        RouterConfig(scorer="arrow", estimator="top_k", top_k=3, normalise=True, **_PER_LINEAR),
        source="arXiv 2405.11157", needs_lessons=False,
    ),
    "centroid": Method(
        "whose lessons look most like this token, on average", "closed form",
        RouterConfig(scorer="centroid", **_PER_LAYER), source="arXiv 2405.11157",
    ),
    "phatgoose": Method(
        "whose own gate opens widest; gates learned from each site's lessons", "closed form",
        _PHATGOOSE, {"steps": 100, "batch": 4, "router_lr": 1e-3}, source="arXiv 2402.05859",
    ),
    "phatgoose-sites": Method(
        "whose own gate opens widest; gates learned by each site on its own data", "closed form",
        _PHATGOOSE, source="arXiv 2402.05859", needs_lessons=False,
    ),
    "ridge": Method(
        "a linear classifier of domains at every layer, in one solve", "closed form",
        RouterConfig(bias=True, **_PER_LAYER), source="ridge regression",
    ),
    "prompt": Method(
        "one expert per prompt, by a linear classifier", "closed form",
        RouterConfig(bias=True, granularity="prompt"), source=PAPER,
    ),
    "uniform": Method(
        "all experts at equal weight", "static", RouterConfig(scorer="static", estimator="identity"),
        source="control", needs_lessons=False,
    ),
    "lorahub": Method(
        "one mixture for everything, found by search on a few lessons", "static",
        RouterConfig(scorer="static", estimator="identity"), source="arXiv 2307.13269",
    ),
    "ties": Method(
        "one LoRA from all: small changes dropped, signs elected", "merged", None, source="arXiv 2306.01708",
        needs_lessons=False,
    ),
    "dare": Method(
        "one LoRA from all: changes dropped at random, the rest rescaled", "merged", None, source="arXiv 2311.03099",
        needs_lessons=False,
    ),
}  # fmt: skip
DEFAULT_METHOD = "guided"


@dataclass(frozen=True)
class Recipe:
    """A method as somebody wants it: its name, its router, and all settings."""

    name: str
    made: Made
    router: RouterConfig | None
    settings: ComposeSettings
    needs_lessons: bool = True

    @property
    def top_k(self) -> int:
        """How many experts speak at once, where that is limited; else 1."""
        return (self.router and self.router.top_k) or 1

    @property
    def attention_rank(self) -> int:
        """Rank of the attention LoRA; only training makes one."""
        return self.settings.attention_rank if self.made in ("trained", "sampled") else 0


def recipe(name: str, settings: Mapping[str, Any] | None = None, router: Mapping[str, Any] | None = None) -> Recipe:
    """The method `name`, with some of its settings and some parts of its router replaced.

    Raises: ConfigError: `METHOD_UNKNOWN`; `ROUTER_DEAD`, `ROUTER_INVALID` for a router that cannot be.
    """
    method = METHODS.get(name)
    if method is None:
        raise ConfigError("METHOD_UNKNOWN", f"there is no method {name!a}", expected=", ".join(METHODS))
    changed = method.router
    if router:
        if changed is None:
            raise ConfigError("ROUTER_INVALID", f"{name} has no router that could be changed")
        changed = RouterConfig.model_validate({**changed.model_dump(), **router})
        _check_kind(name, method, changed)
    wanted = ComposeSettings(**{**method.settings, **(settings or {}), **method.fixed})
    return Recipe(name, method.made, changed, wanted, method.needs_lessons)


def _check_kind(name: str, method: Method, changed: RouterConfig) -> None:
    """A method is made for its kind of router; the rest is free.

    Raises: ConfigError: `ROUTER_INVALID`.
    """
    own = method.router or changed
    fixed = {"scorer", "granularity"}
    if method.made == "closed form":
        fixed.add("bias")
    if "sampled" in (own.estimator, changed.estimator):
        fixed.add("estimator")
    for part in sorted(fixed):
        wanted, got = getattr(own, part), getattr(changed, part)
        if wanted != got:
            raise ConfigError(
                "ROUTER_INVALID", f"{name} cannot make such a router", expected=f"{part} = {wanted!a}", got=f"{got!a}",
                fix="choose another method",
            )  # fmt: skip
