"""What kind of router a composition has: the part of `composition.json` that says how experts are chosen.

A router is a scorer (one number per expert), an estimator (what becomes of the numbers, and which gradient they
get) and a place (who is asked, and what it reads). Combinations whose router could never learn, because its
output does not depend on its scores, are refused here, before anything is trained. No tensor library is needed.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fedcompose.errors import ConfigError

Scorer = Literal["linear", "arrow", "centroid", "phatgoose", "static"]
Estimator = Literal["hard", "hard_selected", "gumbel", "soft", "top_k", "sampled", "identity"]
Scale = Literal["unit", "1/k", "1/sqrt(k)"]
Granularity = Literal["token", "prompt"]
Sharing = Literal["model", "layer", "module"]
Decides = Literal["block", "linear"]

VECTORS = ("arrow", "centroid", "phatgoose")  # scorers that compare with one fixed vector per expert and place
ONE_EXPERT = ("hard", "hard_selected", "gumbel")  # estimators that let exactly one expert speak, at weight 1
LEARNING = ("hard_selected", "gumbel", "sampled")  # estimators that differ from `hard` or `top_k` only in training


class RouterConfig(BaseModel):
    """How a router chooses; the defaults are Hard-Routed MoR-LoRA's.

    Raises: ConfigError: `ROUTER_DEAD` when the router could not learn, `ROUTER_INVALID` when it makes no sense.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    scorer: Scorer = "linear"
    bias: bool = False  # of the linear scorer
    estimator: Estimator = "hard"
    top_k: int | None = Field(None, ge=1, le=512)  # experts per token; of `soft` only in use, not in training
    normalise: bool = False  # whether the kept weights are divided by their sum
    scale: Scale = "unit"  # the constant weight of a `sampled` expert
    granularity: Granularity = "token"
    sharing: Sharing = "model"  # one scorer for all, one per block (layer), or one per linear (module)
    decides: Decides = "block"  # whose input is read: the block's, for all its linears, or each linear's own

    @model_validator(mode="after")
    def _check(self) -> RouterConfig:
        self._check_gradient()
        self._check_sense()
        return self

    def _check_gradient(self) -> None:
        if self.normalise and self.estimator in ONE_EXPERT:
            _dead(f"{self.estimator} gives one expert weight 1; divided by its own sum it no longer depends on scores")
        if self.normalise and self.estimator == "top_k" and self.top_k == 1:
            _dead("the only kept weight divided by itself is 1 whatever the scores are")
        if self.normalise and self.estimator == "sampled":
            _dead("the weights of sampled experts are constants; normalised they are constants still")
        if self.scorer != "linear" and self.estimator in LEARNING:
            _dead(f"{self.estimator} is a way to train scores, and those of {self.scorer} are fixed")

    def _check_sense(self) -> None:
        sharing = {"block": ("model", "layer"), "linear": ("model", "module")}[self.decides]
        keeps = self.estimator in ("soft", "top_k", "sampled")
        per_prompt = (self.scorer, self.estimator, self.sharing, self.decides) == ("linear", "hard", "model", "block")
        for wrong, reason in (
            (self.estimator in ("top_k", "sampled") and self.top_k is None, f"{self.estimator} needs top_k"),
            (not keeps and self.top_k is not None, f"{self.estimator} has no use for top_k"),
            (self.normalise and self.top_k is None, "without top_k there is nothing to normalise"),
            (self.scale != "unit" and self.estimator != "sampled", "only sampled experts have a constant weight"),
            (self.bias and self.scorer != "linear", "only a linear scorer has a bias"),
            ((self.scorer == "static") != (self.estimator == "identity"), "static weights are used as they are"),
            (self.sharing not in sharing, f"with decides={self.decides} sharing is {' or '.join(sharing)}"),
            (self.scorer == "static" and self.sharing != "model", "static weights are the same everywhere"),
            (self.scorer in VECTORS and self.sharing == "model", "vectors belong to a place: share by layer or module"),
            (self.granularity == "prompt" and not per_prompt, "a prompt's one expert is chosen by a linear classifier"),
        ):
            if wrong:
                raise ConfigError("ROUTER_INVALID", "these router settings do not fit together", got=reason)


def _dead(reason: str) -> None:
    raise ConfigError("ROUTER_DEAD", "this router could never learn", got=reason)
