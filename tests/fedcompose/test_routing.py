"""Router settings: combinations that could never learn, or make no sense, are refused with the reason."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from fedcompose.errors import ConfigError
from fedcompose.routing import RouterConfig

DEAD: list[dict[str, Any]] = [
    {"normalise": True},
    {"estimator": "hard_selected", "normalise": True},
    {"estimator": "gumbel", "normalise": True},
    {"estimator": "top_k", "top_k": 1, "normalise": True},
    {"estimator": "sampled", "top_k": 2, "normalise": True},
    {"scorer": "arrow", "sharing": "layer", "estimator": "gumbel"},
]
SENSELESS: list[dict[str, Any]] = [
    {"estimator": "top_k"},
    {"top_k": 2},
    {"estimator": "soft", "normalise": True},
    {"scale": "1/k"},
    {"scorer": "static"},
    {"estimator": "identity"},
    {"scorer": "arrow", "bias": True, "sharing": "layer"},
    {"scorer": "arrow"},
    {"sharing": "module"},
    {"decides": "linear", "sharing": "layer"},
    {"granularity": "prompt", "sharing": "layer"},
]


@pytest.mark.parametrize("settings", DEAD, ids=str)
def test_a_router_that_could_never_learn_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as error:
        RouterConfig(**settings)
    assert error.value.code == "ROUTER_DEAD" and error.value.got


@pytest.mark.parametrize("settings", SENSELESS, ids=str)
def test_settings_that_do_not_fit_together_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as error:
        RouterConfig(**settings)
    assert error.value.code == "ROUTER_INVALID" and error.value.got


def test_what_was_written_is_read_again_and_nothing_else() -> None:
    config = RouterConfig(estimator="top_k", top_k=2, normalise=True)
    assert RouterConfig.model_validate(config.model_dump()) == config
    for wrong in ({"scorer": "magic"}, {"top_k": "2"}, {"further": 1}, {"top_k": 0}):
        with pytest.raises(ValidationError):
            RouterConfig.model_validate(wrong)
