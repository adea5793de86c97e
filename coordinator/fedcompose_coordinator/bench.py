"""One loaded base that acts as every method of the evaluation: candidates, single experts and controls.

The experts are put in once, and again only for a candidate whose router is asked elsewhere. A method is then a router
(learned, one fixed expert, the oracle, none, all alike, a random one) and whether an attention LoRA is merged into the
weights. What was merged is taken out by restoring the saved weights, so no method leaves a rounding behind for the
next. A method that chooses one expert per prompt, the oracle or a classifier, lets that expert speak alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedcompose.bases import Base, base_shapes
from fedcompose.composition import ATTENTION_FOLDER, COMPOSITION_FILE, ROUTER_FILE
from fedcompose.contribution import VerifiedContribution
from fedcompose.errors import ConfigError
from fedcompose.files import read_json
from fedcompose.model.composed import merge_attention
from fedcompose.model.controls import FixedRouter, NoExpertRouter, RandomRouter, UniformRouter
from fedcompose.model.experts import Expert, load_expert
from fedcompose.model.learned import PromptRouter, load_router
from fedcompose.model.lm import load_base, prompt_ids
from fedcompose.model.placement import compose_model, linear_of
from fedcompose.model.router import RoutingDecision, RoutingRecord
from fedcompose.model.sampling import sample
from fedcompose.routing import Decides, RouterConfig
from fedcompose_coordinator.grid import Method
from fedcompose_coordinator.membership import CHANGED_FOLDER
from fedcompose_coordinator.questions import Prompt

MERGED_FOLDER = "merged"
TOGETHER = 8  # rows of a decoding step over which distinct experts are counted, a small server's batch
CHOOSING = ("learned", "random", "oracle")  # routers of which it is told where they sent the tokens


def open_bench(candidates: Sequence[Path], contributions: Sequence[VerifiedContribution], base: Base) -> ModelBench:
    """The bench of candidates of the same experts, in their routers' row order.

    Raises: ConfigError: `EVALUATION_MISMATCH` when one was composed from other experts or on another base.
    """
    admitted = {each.dir_hash: each.path for each in contributions if each.kind == "adapter"}
    wanted: dict[str, str] = {}
    for candidate in candidates:
        composition = read_json(candidate / COMPOSITION_FILE)
        experts = {row["site"]: row["dirHash"] for row in composition["experts"]}
        wanted = wanted or experts
        found = composition["base"]["dirHash"]
        if found != base.digest or not set(experts.values()) <= set(admitted) or list(experts) != list(wanted):
            raise ConfigError(
                "EVALUATION_MISMATCH",
                f"the candidate in {candidate} was composed from other experts or on another base",
                expected=found + " with " + ", ".join(sorted(experts)),
                got=f"{base.digest} with {len(admitted)} admitted experts",
                fix="compose again, then evaluate",
            )
    return ModelBench({site: admitted[digest] for site, digest in wanted.items()}, base)


class ModelBench:
    """A `Bench` over the experts of a federation, in the routers' row order."""

    def __init__(self, experts: Mapping[str, Path], base: Base) -> None:
        """`experts`: site → PEFT folder."""
        self.experts, self.base, self._shapes = experts, base, base_shapes(base)
        self._experts = [load_expert(folder, self._shapes) for folder in experts.values()]
        self._sites = list(experts)
        self._placed: Path | str = ""  # where the router is asked now, or the merge that stands for all experts
        self._copies: Path | None = None  # where the experts came from, if not from the sites
        self._inside: list[Expert] = []
        self._model: Any = None
        self.tokenizer: Any = None
        self._restore: list[tuple[nn.Linear, Tensor]] = []
        self._acting = ExitStack()
        self.router: nn.Module | None = None
        self._record: RoutingRecord | None = None
        self._tally = RoutedTally(0, 0)
        self._held = 0

    def become(self, method: Method) -> Any:
        """The model, acting as `method` from now on.

        Raises: ValueError: for a router that this bench does not know.
        """
        self._acting.close()
        learned = method.candidate if method.router == "learned" else None
        config = router_config(method.candidate)
        self._place(_folder(learned, MERGED_FOLDER) or config.decides, _folder(learned, CHANGED_FOLDER))
        self._switch_attention(method.attention)
        self.router = self._make_router(method, config)
        context = self._model.routing
        self._acting.enter_context(context.using(self.router))
        chooses = method.router in CHOOSING and not isinstance(self._placed, Path)
        self._record = self._acting.enter_context(context.recording()) if chooses else None
        self._tally = RoutedTally(len(context.points), len(self._inside))
        self._held = self._bytes(method.router)
        return self._model

    def ask(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[str]:
        """The most likely completion of every prompt, in their order."""
        ids = [prompt_ids(self.tokenizer, prompt.text) for prompt in prompts]
        answers = [""] * len(prompts)
        for expert, rows in self._by_expert(prompts, ids).items():
            with ExitStack() as speaking:
                if expert is not None:
                    speaking.enter_context(self._model.routing.using(FixedRouter(expert, len(self._sites))))
                found = sample(self._model, self.tokenizer, [ids[row] for row in rows], max_new_tokens=max_new_tokens)
            for row, (completion,) in zip(rows, found, strict=True):
                answers[row] = completion.text
        return answers

    def routed(self) -> dict[str, Any]:
        """`routed`: tokens per point and expert since `become`, None for a method that chooses none; `distinct`:
        experts per point and decoding step among `TOGETHER` rows; `held`: bytes of weights that it needs."""
        counts = self._tally.counts.tolist() if self._record is not None and self._tally.counts.sum() else None
        return {"routed": counts, "distinct": self._tally.mean_distinct(), "held": self._held}

    def _by_expert(self, prompts: Sequence[Prompt], ids: Sequence[Sequence[int]]) -> dict[int | None, list[int]]:
        """Rows of the prompts that one expert answers; all under None where the router decides token by token."""
        choices: list[int | None] = [None] * len(prompts)
        if isinstance(self.router, OracleRouter):
            choices = [self._sites.index(prompt.site) for prompt in prompts]
        if isinstance(self.router, PromptRouter):
            embedding = self._model.get_input_embeddings()
            for row, tokens in enumerate(ids):
                embedded = embedding(torch.tensor([list(tokens)], device=embedding.weight.device))
                (choices[row],) = self.router.choose(embedded, torch.ones(embedded.shape[:2], device=embedded.device))
        groups: dict[int | None, list[int]] = defaultdict(list)
        for row, choice in enumerate(choices):
            groups[choice].append(row)
        return groups

    def _place(self, wanted: Path | Decides, copies: Path | None) -> None:
        """Load the base and put into it the experts, for routers that decide there, or the one LoRA of a merge.

        `copies` holds experts that a candidate trained on, where it did.
        """
        if (wanted, copies) == (self._placed, self._copies):
            return
        self._model, self.tokenizer = load_base(self.base.path)
        self._restore = []
        experts = [load_expert(copies / site, self._shapes) for site in self._sites] if copies else self._experts
        self._inside = [load_expert(wanted, self._shapes)] if isinstance(wanted, Path) else experts
        decides = "block" if isinstance(wanted, Path) else wanted
        compose_model(self._model, self._inside, NoExpertRouter(len(self._inside)), decides)
        self._model.register_forward_hook(self._count, with_kwargs=True)
        self._placed, self._copies = wanted, copies

    def _make_router(self, method: Method, config: RouterConfig) -> nn.Module:
        count = len(self._sites)
        if isinstance(self._placed, Path):
            return FixedRouter(0, 1)
        if method.router.startswith("expert:"):
            return FixedRouter(self._sites.index(method.router.removeprefix("expert:")), count)
        if method.router == "learned" and method.candidate:
            points = self._model.routing.points
            return load_router(method.candidate / ROUTER_FILE, config, points, count).to(self._model.device)
        if method.router == "random":
            return RandomRouter(count, method.seed)
        if method.router in CONTROLS:
            return CONTROLS[method.router](count)
        raise ValueError(f"no such router: {method.router}")

    def _switch_attention(self, candidate: Path | None) -> None:
        """Restore the base's own attention, then merge the candidate's attention LoRA where there is one."""
        for changed, weight in self._restore:
            changed.weight.data.copy_(weight)
        self._restore = []
        if candidate is None:
            return
        for name in load_expert(candidate / ATTENTION_FOLDER).updates:
            linear = linear_of(self._model, name)
            if linear is not None:
                self._restore.append((linear, linear.weight.detach().clone()))
        merge_attention(self._model, candidate / ATTENTION_FOLDER)

    def _bytes(self, router: str) -> int:
        """Of the weights in memory: the base's, and those of the experts and the router that the method needs."""
        experts = self._inside
        if router == "none":
            experts = []
        if router.startswith("expert:"):
            experts = [experts[self._sites.index(router.removeprefix("expert:"))]]
        numbers = sum(update.a.numel() + update.b.numel() for expert in experts for update in expert.updates.values())
        parameters = [*self._model.parameters(), *(self.router.parameters() if self.router else ())]
        return int(numbers * self._model.dtype.itemsize + sum(parameter.nbytes for parameter in parameters))

    def _count(self, _model: Any, _args: Any, kwargs: Mapping[str, Any], _output: Any) -> None:
        """After each forward call: add up what every point chose; nothing while somebody else records."""
        while self._record is not None and self._record.calls:
            call = self._record.calls.pop()
            self._tally.add(list(call.values()), kwargs.get("attention_mask"))


class OracleRouter(NoExpertRouter):
    """Stands for "each prompt's own expert" until the bench asks that expert."""


CONTROLS = {"uniform": UniformRouter, "none": NoExpertRouter, "oracle": OracleRouter}


class RoutedTally:
    """Tokens per point and expert, without padding, and how many experts a decoding step needs."""

    def __init__(self, points: int, experts: int) -> None:
        self.counts = torch.zeros(points, experts, dtype=torch.long)
        self._distinct, self._groups = 0.0, 0

    def add(self, decisions: Sequence[RoutingDecision], mask: Tensor | None) -> None:
        """One forward call; `mask` (rows, tokens so far) is 0 at padding."""
        choices = torch.stack([each.choice for each in decisions])  # (points, rows, tokens)
        if (choices < 0).any():
            return
        real = choices[0] >= 0 if mask is None else mask[:, -choices.shape[-1] :] > 0
        self.counts += functional.one_hot(choices[:, real], self.counts.shape[1]).sum(1).cpu()
        if choices.shape[-1] == 1:
            self._add_step(torch.stack([each.weights[:, 0] != 0 for each in decisions]))

    def mean_distinct(self) -> float | None:
        """Mean over points and decoding steps; None where fewer than `TOGETHER` rows were ever decoded together."""
        return self._distinct / self._groups if self._groups else None

    def _add_step(self, used: Tensor) -> None:
        """used (points, rows, experts)."""
        groups = used.shape[1] // TOGETHER
        if groups:
            together = used[:, : groups * TOGETHER].unflatten(1, (groups, TOGETHER)).any(2)
            self._distinct += float(together.sum(-1).float().mean()) * groups
            self._groups += groups


def _folder(candidate: Path | None, name: str) -> Path | None:
    """A folder of the candidate, if it has it."""
    return candidate / name if candidate and (candidate / name).is_dir() else None


def router_config(candidate: Path | None) -> RouterConfig:
    """That of a candidate; the default one where it has none."""
    composition = read_json(candidate / COMPOSITION_FILE) if candidate else {}
    return RouterConfig.model_validate(composition.get("router") or {})
