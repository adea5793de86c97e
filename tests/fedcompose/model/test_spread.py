"""A model on several devices says what it says on one.

There is no second device here. What lies on disk comes back for each forward call, as what lies in main memory comes to
a GPU, and is real; `meta` stands for another device where only the place matters.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch

from fedcompose.cli import main
from fedcompose.errors import ConfigError, MissingError
from fedcompose.model import spread
from fedcompose.model.experts import load_expert
from fedcompose.model.learned import make_router
from fedcompose.model.lm import load_base
from fedcompose.model.placement import compose_model, decision_points, routed_modules
from fedcompose.model.router import OneExpert, RoutingRecord
from fedcompose.model.scorers import COMPARE, LinearScorer, StaticScorer, VectorScorer
from fedcompose.routing import Decides, RouterConfig, Sharing
from fedcompose.serve import sequential
from fedcompose.serve.engine import Engine, Settings
from tests.federation_sim import FederationSim
from tests.tiny_experts import make_tiny_expert

PARTS = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")
HALF_ON_DISK = dict.fromkeys(PARTS, "cpu") | {"model.layers.1": "disk"}
IDS = torch.randint(3, 250, (2, 9), generator=torch.Generator().manual_seed(8))


@pytest.fixture(autouse=True)
def disk(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder for each model, which only these tests need."""
    dispatch = accelerate.dispatch_model

    def to_disk(model: Any, devices: spread.Devices) -> Any:
        return dispatch(model, devices, offload_dir=tmp_path_factory.mktemp("disk"))

    monkeypatch.setattr(accelerate, "dispatch_model", to_disk)


@pytest.fixture(scope="module")
def experts(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("experts")
    return [make_tiny_expert(tiny_base, folder / str(seed), seed=seed) for seed in range(3)]


def composed(tiny_base: Path, experts: list[Path], sharing: Sharing, decides: Decides) -> Any:
    model, _ = load_base(tiny_base, torch.float32)
    loaded = [load_expert(folder) for folder in experts]
    config = RouterConfig(sharing=sharing, decides=decides)
    router = make_router(config, decision_points(model, loaded, decides), 3, seed=5).requires_grad_(False)
    for weight in router.scorer.parameters():
        weight.data *= 50  # so that every expert is chosen somewhere
    return compose_model(model, loaded, router, decides)


@pytest.mark.parametrize(("sharing", "decides"), [("model", "block"), ("layer", "block"), ("module", "linear")])
@torch.no_grad()
def test_what_lies_elsewhere_computes_the_same(
    tiny_base: Path, experts: list[Path], sharing: Sharing, decides: Decides
) -> None:
    whole, parts = (composed(tiny_base, experts, sharing, decides) for _ in range(2))
    assert spread.place(parts, HALF_ON_DISK) is parts

    away = [routed for name, routed in routed_modules(parts) if name.startswith("model.layers.1.")]
    assert len(away) == 3 and all(routed.linear.weight.is_meta for routed in away), "nothing was elsewhere"
    assert not any(routed.experts.a.is_meta for routed in away), "the experts lie where their linears compute"
    with whole.routing.recording() as one, parts.routing.recording() as other:
        torch.testing.assert_close(parts(IDS).logits, whole(IDS).logits, rtol=0, atol=0)
    assert torch.equal(one.choices[0], other.choices[0]) and one.choices[0].unique().tolist() == [0, 1, 2]
    said = [model.generate(IDS, max_new_tokens=6, do_sample=False) for model in (whole, parts)]
    assert torch.equal(*said)


def test_over_several_devices_answers_are_the_same_one_at_a_time(
    sim: FederationSim, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for module in ("fedcompose.model.composed", "fedcompose.serve.engine"):
        monkeypatch.setattr(f"{module}.over_gpus", lambda model: spread.place(model, HALF_ON_DISK))
    release, said = sim.released(), []
    for over in (False, True):
        with caplog.at_level(logging.WARNING):
            engine = Engine(release, sim.base, torch.float32, spread=over)
        try:
            assert isinstance(engine._worker, sequential.Worker) == over == ("one request at a time" in caplog.text)
            ask = [Settings(model=model, max_tokens=8) for model in engine.models]
            jobs = [engine.prepare([{"role": "user", "content": "What is 3 + 4?"}], each) for each in ask]
            answers = [engine.submit(job).result() for job in jobs]
            said.append([(answer.text, answer.counts) for answer in answers])
        finally:
            engine.close()
    assert said[0] == said[1]


@pytest.mark.parametrize(
    "scorer", [LinearScorer((8,), 3, bias=True), LinearScorer((8, 8), 3), VectorScorer((8, 8), 3, COMPARE["centroid"]),
               StaticScorer(3)],
)  # fmt: skip
def test_a_scorer_comes_to_the_tokens(scorer: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    linear = torch.nn.functional.linear

    def strict(*given: torch.Tensor | None) -> torch.Tensor:
        """As a GPU is, and `meta` is not."""
        assert all(each is None or each.is_meta for each in given)
        return linear(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.nn.functional, "linear", strict)
    assert scorer(torch.zeros(2, 8, device="meta"), 0).is_meta


def test_a_record_of_several_devices_is_read_together() -> None:
    record = RoutingRecord()
    for point, device in enumerate(("meta", "cpu")):
        record.add(point, OneExpert(torch.zeros(1, 4, dtype=torch.long, device=device), 3))
    assert record.choices[0].shape == (2, 1, 4)


def test_without_a_gpu_it_says_so(
    sim: FederationSim, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fedcompose.commands.serve._run", lambda *_: pytest.fail("it serves"))
    sim.released()
    folder, trust = str(sim.coordinator_home / "release"), ["--root-fingerprint", sim.root.keyid]
    with pytest.raises(SystemExit) as ended:
        main(["serve", folder, *trust, "--base", str(sim.base.path), "--port", "0", "--device-map", "auto"])
    assert ended.value.code == ConfigError.exit_status and "DEVICES_NONE" in capsys.readouterr().err


def test_what_does_not_fit_is_not_spread(tiny_base: Path, experts: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that is asked for its room only, and has none."""
    model = composed(tiny_base, experts, "model", "block")
    room = {0: 1, "cpu": 1}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("accelerate.utils.get_balanced_memory", lambda *_, **__: room)
    with pytest.raises(MissingError) as caught:
        spread.spread(model)
    assert caught.value.code == "DEVICES_FULL"
    assert not hasattr(model, "hf_device_map")
