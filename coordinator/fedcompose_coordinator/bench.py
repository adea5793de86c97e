"""One loaded model that acts as every method of the evaluation: base, each expert, composed and the controls.

The experts and the router are put in once; a method is then a router (the learned one, one fixed expert, none,
all alike, a random one) and whether an attention LoRA is merged into the weights. What was merged is taken out
by restoring the saved weights, so no method leaves a rounding behind for the next.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedcompose.bases import Base, base_shapes
from fedcompose.errors import ConfigError
from fedcompose.files import read_json
from fedcompose.model.composed import (
    ATTENTION_FOLDER,
    ATTENTION_TARGETS,
    ROUTER_FILE,
    compose_model,
    hidden_size,
    load_router,
    merge_attention,
)
from fedcompose.model.experts import load_expert
from fedcompose.model.lm import load_base, prompt_ids
from fedcompose.model.router import (
    NO_EXPERT,
    FixedRouter,
    RandomRouter,
    RoutingDecision,
    RoutingRecord,
    UniformRouter,
)
from fedcompose.model.sampling import sample
from fedcompose.tasks import Example, Task

if TYPE_CHECKING:
    from fedcompose.contribution import VerifiedContribution


def open_bench(
    candidate: Path,
    contributions: Sequence[VerifiedContribution],
    base: Base,
    attention_only: Path | None = None,
) -> ModelBench:
    """The bench of a candidate, its experts in the router's row order.

    Raises: ConfigError: `EVALUATION_MISMATCH` when the candidate was composed from other experts or another base.
    """
    composition = read_json(candidate / "composition.json")
    admitted = {each.dir_hash: each.path for each in contributions if each.kind == "adapter"}
    wanted = {row["site"]: row["dirHash"] for row in composition["experts"]}
    if composition["base"]["dirHash"] != base.digest or not set(wanted.values()) <= set(admitted):
        raise ConfigError(
            "EVALUATION_MISMATCH",
            "the candidate was composed from other experts or on another base",
            expected=composition["base"]["dirHash"] + " with " + ", ".join(sorted(wanted)),
            got=f"{base.digest} with {len(admitted)} admitted experts",
            fix="compose again, then evaluate",
        )
    return ModelBench(candidate, {site: admitted[digest] for site, digest in wanted.items()}, base, attention_only)


def greedy_answers(
    model: Any, tokenizer: Any, task: Task, examples: Sequence[Example], max_new_tokens: int
) -> list[str]:
    """The most likely completion of every example's prompt, in their order."""
    prompts = [prompt_ids(tokenizer, task.prompt(example.question)) for example in examples]
    rows = sample(model, tokenizer, prompts, max_new_tokens=max_new_tokens)
    return [row[0].text for row in rows]


class NoExpertRouter(nn.Module):
    """Every expert at weight 0: what is left is the base."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, hidden_states: Tensor) -> RoutingDecision:
        shape = hidden_states.shape[:-1]
        weights = hidden_states.new_zeros((*shape, self.experts), dtype=torch.float32)
        return RoutingDecision(weights, torch.full(shape, NO_EXPERT, device=hidden_states.device))


class ModelBench:
    """A `Bench` over a candidate and its experts, in the router's row order."""

    def __init__(
        self, candidate: Path, experts: Mapping[str, Path], base: Base, attention_only: Path | None = None
    ) -> None:
        """`experts`: site → PEFT folder; `attention_only`: the candidate that was trained without experts."""
        model, self.tokenizer = load_base(base.path)
        self._model: Any = model
        self._router = load_router(candidate / ROUTER_FILE, len(experts), hidden_size(model))
        shapes = base_shapes(base)
        compose_model(model, [load_expert(folder, shapes) for folder in experts.values()], self._router)
        self._sites = list(experts)
        self._attention: dict[str, Path | None] = {"composed": candidate, "attention_only": attention_only}
        self._plain = {
            name: module.weight.detach().clone()
            for name, module in model.named_modules()
            if name.rpartition(".")[2] in ATTENTION_TARGETS and isinstance(module, nn.Linear)
        }
        self._acting = ExitStack()
        self._record: RoutingRecord | None = None
        self._counts = torch.empty(0)
        model.register_forward_hook(self._count, with_kwargs=True)

    def become(self, method: str, seed: int) -> Any:
        """The model, acting as `method` from now on.

        Raises: ValueError: for a method that this bench does not know.
        """
        self._acting.close()
        self._switch_attention(self._attention.get(method))
        context = self._model.routing
        self._acting.enter_context(context.using(self._make_router(method, seed)))
        chooses = method == "composed"
        self._record = self._acting.enter_context(context.recording()) if chooses else None
        self._counts = torch.zeros(context.layers, len(self._sites), dtype=torch.long)
        return self._model

    def routed(self) -> list[list[int]] | None:
        """Tokens per layer and expert since `become("composed", ..)`; None for other methods."""
        counts: list[list[int]] = self._counts.tolist()
        return None if self._record is None else counts

    def _make_router(self, method: str, seed: int) -> nn.Module:
        count = len(self._sites)
        if method.startswith("expert:"):
            return FixedRouter(self._sites.index(method.removeprefix("expert:")), count)
        if method == "composed":
            return self._router
        if method == "random_router":
            return RandomRouter(count, seed)
        if method == "uniform":
            return UniformRouter(count)
        if method in ("base", "attention_only"):
            return NoExpertRouter(count)
        raise ValueError(f"no such method: {method}")

    def _switch_attention(self, candidate: Path | None) -> None:
        """Restore the base's own attention, then merge the candidate's attention LoRA where there is one."""
        for name, weight in self._plain.items():
            self._model.get_submodule(name).weight.data.copy_(weight)
        if candidate is not None and (candidate / ATTENTION_FOLDER).is_dir():
            merge_attention(self._model, candidate / ATTENTION_FOLDER)

    def _count(self, _model: Any, _args: Any, kwargs: Mapping[str, Any], _output: Any) -> None:
        """After each forward call of the composed model: add what every layer chose, without padding."""
        if self._record is None:
            return
        choices = self._record.choices.pop()  # (layers, batch, seq)
        mask = kwargs.get("attention_mask")
        real = choices[0] >= 0 if mask is None else mask[:, -choices.shape[-1] :] > 0
        self._counts += functional.one_hot(choices[:, real], len(self._sites)).sum(1).cpu()
