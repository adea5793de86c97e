"""A small real federation for tests: real keys, a tiny base, sites with random experts.

    sim = make_federation(tmp_path, tiny_base, random_experts)
    sim.contribute("site-a")          # a signed outbox, made by the site's own code
    sim.receive()                     # every outbox through the coordinator's intake
    sim.compose()                     # a candidate with a random router
    release = sim.release()           # signed, verified, in sim.coordinator_home / "release"

Nothing is mocked. Only training and composing are replaced by random weights, which no check looks at.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from fedcompose.adapter import read_adapter, write_adapter
from fedcompose.bases import Base, base_shapes
from fedcompose.call import Call
from fedcompose.contribution import VerifiedContribution
from fedcompose.drafts import create_federation, enrol
from fedcompose.federation import Federation
from fedcompose.federation_file import verify_federation
from fedcompose.files import dir_hash, folder_digests, write_atomic, write_json
from fedcompose.keys import FileSigner, load_signer, new_key
from fedcompose.release import VerifiedRelease
from fedcompose.routing import RouterConfig
from fedcompose.tasks import generator_task, training
from fedcompose.tensors import StoredTensor, canonical_safetensors
from fedcompose.traces import Trace
from fedcompose_client.contribute import contribute
from fedcompose_client.firewall import write_passed
from fedcompose_coordinator import intake, publish
from fedcompose_coordinator.approvals import Rule
from fedcompose_coordinator.intake import NO_APPROVALS

SITES = {"site-a": "clock", "site-b": "ordering"}
MLP = ["gate_proj", "up_proj", "down_proj"]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


SHARED = RouterConfig()  # one linear for all layers


@dataclass
class SimSite:
    """A site's folder with a finished run in it, and its key."""

    id: str
    domain: str
    folder: Path
    signer: FileSigner

    @property
    def outbox(self) -> Path:
        return self.folder / "outbox" / self.domain


@dataclass
class FederationSim:
    """Everything of one federation, in one folder; `now` is its clock."""

    folder: Path
    base: Base
    now: datetime
    root: FileSigner
    coordinator: FileSigner
    sites: dict[str, SimSite]
    envelope: bytes
    attention: Path
    made: list[VerifiedContribution] = field(default_factory=list)
    rule: Rule = NO_APPROVALS

    @property
    def federation(self) -> Federation:
        return verify_federation(self.envelope, root_fingerprints=[self.root.keyid], now=self.now)

    @property
    def coordinator_home(self) -> Path:
        return self.folder / "coordinator"

    def contribute(self, site_id: str, call: Call | None = None, **options: Any) -> list[VerifiedContribution]:
        """Sign the site's adapter and traces, as `fedcompose client contribute` does."""
        site = self.sites[site_id]
        options = {"traces": True} | options
        return contribute(
            site.folder, site.domain, site.signer, self.federation, self.now, call=call, base=self.base, **options
        )

    def receive(self, *folders: Path) -> list[intake.Receipt]:
        """Take folders in, by default every site's outbox."""
        given = folders or tuple(site.outbox for site in self.sites.values())
        return intake.receive(given, self.coordinator_home, self.federation, self.base, self.now, self.rule)

    def admitted(self) -> list[VerifiedContribution]:
        return intake.admitted(self.coordinator_home, self.federation)

    def experts(self) -> list[VerifiedContribution]:
        return [each for each in self.admitted() if each.kind == "adapter"]

    def compose(self, router: RouterConfig = SHARED) -> Path:
        """A candidate as `compose` writes it, with a random router and attention LoRA."""
        experts, candidate = self.experts(), self.coordinator_home / "candidate"
        tensors = random_router(router, len(experts), base_shapes(self.base))
        write_atomic(candidate / "router.safetensors", canonical_safetensors(tensors))
        write_adapter(candidate / "attention", read_adapter(self.attention, base_shapes(self.base)))
        write_json(
            candidate / "composition.json",
            {
                "schema": "fedcompose/composition/v1",
                "method": "hard",
                "base": {"name": self.base.name, "dirHash": self.base.digest},
                "router": router.model_dump(),
                "experts": [{"site": e.site, "domain": e.domain, "dirHash": e.dir_hash} for e in experts],
                "targets": MLP,
                "attention": {"r": 4, "alpha": 8},
                "training": {"steps": 3, "lessons": {"clock": 12}},
            },
        )
        return candidate

    def release(self) -> VerifiedRelease:
        home = self.coordinator_home
        return publish.release(home, self.coordinator, self.federation, home / "candidate", self.admitted(), self.now)

    def released(self, router: RouterConfig = SHARED) -> VerifiedRelease:
        """All steps at once."""
        for site_id in self.sites:
            self.contribute(site_id)
        self.receive()
        self.compose(router)
        return self.release()


def random_router(config: RouterConfig, experts: int, shapes: Mapping[str, tuple[int, int]]) -> dict[str, StoredTensor]:
    """Of a linear router, one for all layers or one for each."""
    rng, widths = np.random.default_rng(0), [shape[1] for name, shape in shapes.items() if name.endswith("gate_proj")]
    places = range(1 if config.sharing == "model" else len(widths))
    drawn = {f"weights.{place}": rng.normal(size=(experts, widths[place])) for place in places}
    drawn |= {f"biases.{place}": rng.normal(size=experts) for place in places if config.bias}
    return {
        name: StoredTensor("F32", each.shape, memoryview(each.astype("<f4").tobytes())) for name, each in drawn.items()
    }


def make_federation(
    folder: Path, base: Path, experts: Mapping[str, Path], sites: Mapping[str, str] | None = None
) -> FederationSim:
    """A federation in `folder` whose sites (by id, with their domains) have finished runs.

    `experts` are PEFT folders from `make_random_experts`.
    """
    now = datetime.now(UTC).replace(microsecond=0)
    based = Base("tiny", base, dir_hash(folder_digests(base)))
    root = load_signer(new_key(folder / "root", "root", "root", None, None).private)
    envelope = create_federation(
        "Test", root, "root", {based.name: based.digest}, "urn:uuid:6b0c0000-0000-4000-8000-000000000001", now
    )
    home = folder / "coordinator"
    key = new_key(home / "keys", "hub", "coordinator", None, None)
    envelope = enrol(envelope, key.enrolment.read_bytes(), root, now)
    found = {}
    for site_id, domain in (sites or SITES).items():
        site, request = _make_site(folder / "sites" / site_id, site_id, domain, experts)
        envelope, found[site_id] = enrol(envelope, request.read_bytes(), root, now), site
    for place in (home, *(site.folder for site in found.values())):
        write_atomic(place / "federation.json", envelope)
    return FederationSim(folder, based, now, root, load_signer(key.private), found, envelope, experts["attention"])


def _make_site(folder: Path, site_id: str, domain: str, experts: Mapping[str, Path]) -> tuple[SimSite, Path]:
    key = new_key(folder / "keys", site_id, "site", domain, None)
    run = folder / "runs" / domain
    shutil.copytree(experts.get(site_id, experts["site-a"]), run / "expert")
    write_passed(run, make_traces(3))
    accuracy = {"value": 0.71234567, "low": 0.6, "high": 0.8, "n": 200}
    write_json(run / "result.json", {"accuracy": {"base": accuracy, "rlvr": accuracy}, "settings": {"seed": 0}})
    return SimSite(site_id, domain, folder, load_signer(key.private)), key.enrolment


def make_traces(count: int, generator: str = "clock", **config: Any) -> list[Trace]:
    """Right answers to problems of a public generator."""
    return [
        Trace(
            provenance_class="B", task=generator_task(generator), generator=generator, config=config or None,
            seed=problem.origin.seed, completion=f"Answer: {problem.answer}",
        )
        for problem in training(generator, config, count)
        if problem.origin
    ]  # fmt: skip


def make_random_experts(base: Path, folder: Path) -> dict[str, Path]:
    """PEFT folders for the sites and an attention LoRA; made once per test session, because PEFT is slow to load."""
    experts = {site_id: make_random_expert(base, folder / site_id, seed=seed) for seed, site_id in enumerate(SITES)}
    experts["attention"] = make_random_expert(base, folder / "attention", seed=9, target_modules=ATTENTION)
    return experts


def make_random_expert(base: Path, folder: Path, *, seed: int = 0, dtype: str = "float32", **lora: Any) -> Path:
    """A PEFT folder as `save_pretrained` writes it, with random weights that change the base's outputs."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    options = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", "target_modules": MLP, **lora}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**options))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
            if "lora_" in name:
                parameter.data = parameter.data.to(getattr(torch, dtype))
    model.save_pretrained(folder)
    return folder
