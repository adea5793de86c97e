from __future__ import annotations

import numpy as np
import pytest

from fedcompose.files import read_json, write_atomic, write_json
from fedcompose.routing import RouterConfig
from fedcompose.serve.engine import Engine, Settings
from fedcompose.tensors import StoredTensor, canonical_safetensors, parse_safetensors
from tests.federation_sim import FederationSim


def _stored(values: np.ndarray) -> StoredTensor:
    values = np.ascontiguousarray(values, dtype="<f4")
    return StoredTensor("F32", values.shape, memoryview(values.tobytes()))


@pytest.mark.parametrize("chosen", [0, 1])
def test_a_router_of_prompts_lets_one_expert_answer_the_whole_prompt(chosen: int, sim: FederationSim) -> None:
    """Only the bias speaks, so the choice is known."""
    for site in sim.sites:
        sim.contribute(site)
    sim.receive()
    candidate = sim.compose()
    weight = parse_safetensors((candidate / "router.safetensors").read_bytes())["weights.0"].float32()
    bias = np.eye(2)[chosen]
    router = {"weights.0": _stored(0 * weight), "biases.0": _stored(bias)}
    write_atomic(candidate / "router.safetensors", canonical_safetensors(router))
    changed = {"method": "prompt", "router": RouterConfig(granularity="prompt", bias=True).model_dump()}
    write_json(candidate / "composition.json", {**read_json(candidate / "composition.json"), **changed})
    engine = Engine(sim.release(), sim.base)

    answers = [
        engine.submit(engine.prepare([{"role": "user", "content": "hi"}], Settings(model=model, max_tokens=6))).result()
        for model in ("auto", f"expert:site-{'ab'[chosen]}")
    ]

    assert answers[0].text == answers[1].text
    assert answers[0].shares == answers[1].shares == {"site-a": 1.0 - chosen, "site-b": float(chosen)}
    engine.close()
