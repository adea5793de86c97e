from __future__ import annotations

import numpy as np
import pytest

from fedcompose.adapter import AdapterConfig
from fedcompose.errors import RefusedError
from fedcompose.gates import Gates, read_gates, write_gates

CONFIG = AdapterConfig(r=2, lora_alpha=4, target_modules=("up_proj", "down_proj"))
SHAPES = {"layers.0.up_proj": (8, 4), "layers.0.down_proj": (4, 8), "layers.0.gate_proj": (8, 4)}
GOOD: Gates = {
    "layers.0.up_proj": np.arange(1, 5, dtype="<f4"), "layers.0.down_proj": np.arange(8, dtype="<f4"),
}  # fmt: skip


def test_gates_are_read_as_they_were_written_in_one_form() -> None:
    data = write_gates(GOOD)
    found = read_gates(data, CONFIG, SHAPES)
    assert found.keys() == GOOD.keys() and all((found[name] == GOOD[name]).all() for name in GOOD)
    assert write_gates(dict(reversed(GOOD.items()))) == data == write_gates(found)
    assert read_gates(data, CONFIG, None).keys() == GOOD.keys()


@pytest.mark.parametrize(
    "change",
    [
        {"layers.0.gate_proj": np.ones(4)}, {"layers.0.up_proj": np.ones(5)}, {"layers.0.up_proj": np.zeros(4)},
        {"layers.0.up_proj": np.full(4, np.inf)}, {"layers.0.up_proj": np.ones((2, 2))},
        {"layers.1.up_proj": np.ones(4)},
    ],
)  # fmt: skip
def test_gates_that_do_not_fit_the_expert_are_refused(change: Gates) -> None:
    with pytest.raises(RefusedError) as refusal:
        read_gates(write_gates({**GOOD, **change}), CONFIG, SHAPES)
    assert refusal.value.code == "GATES_INVALID"


def test_every_linear_of_the_expert_has_one() -> None:
    with pytest.raises(RefusedError) as refusal:
        read_gates(write_gates({"layers.0.up_proj": GOOD["layers.0.up_proj"]}), CONFIG, SHAPES)
    assert refusal.value.code == "GATES_INVALID"
