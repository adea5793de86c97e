"""What does it cost to route experts, against one LoRA, against PEFT, and against a loop over masked experts?

Models have the shape of SmolLM2-135M and random weights, which all forms share. The forms of one case run in turn,
in one process with one thread; what counts is the thread's own processor time, of which the 20th percentile is kept,
so that other work on the machine disturbs less. Compare ratios. The forms:

    base        no experts
    peft        one LoRA by PEFT, not merged
    ours        K experts, hard top-1 router, as `compose_model` makes it; also with two experts
    reference   the same by the loop that the reference code of arXiv 2606.31413 has: for every projection and expert a
                mask, its rows, two products and an index_add
    dense       (training) the straight-through estimator as its formula reads: every expert for every token
    arrow, peft arrow   both routers that need no training, top 3

Cases: `decode` (batch 1, batch 8) and `prefill` (512 tokens) through the MLPs of some layers; `train`, forward and
backward of one MLP of 512 tokens, with the bytes that autograd keeps; `model`, decoding with the whole model and its
cache; `start`, imports and, given a release and the root's fingerprint, how long it takes to verify and load.

    python benchmarks/routing.py --quick
    python benchmarks/routing.py --out routing.json
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from fedcompose.model.experts import Expert, Update
from fedcompose.model.kernels import RoutedLinear
from fedcompose.model.learned import make_router
from fedcompose.model.placement import compose_model, decision_points
from fedcompose.routing import RouterConfig

HIDDEN, WIDE, LAYERS = 576, 1536, 30
TARGETS = ("gate_proj", "up_proj", "down_proj")
STACK = 8  # layers of the MLP cases: 85 MB of weights, more than the cache of most processors
PREFILL = TRAIN = 512  # tokens
PERCENTILE = 0.2
ALPHA = 2.0  # s of every expert

Forms = dict[str, Callable[[], Any]]


class ReferenceMLP(nn.Module):
    """A routed gated MLP as the reference code computes it: one expert after the other, each on its own tokens."""

    def __init__(self, mlp: Any, experts: Sequence[Expert], name: str, router: Tensor) -> None:
        super().__init__()
        self.mlp, self.router = mlp, nn.Parameter(router.clone())
        self.updates = {target: [each.updates[f"{name}.{target}"] for each in experts] for target in TARGETS}

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        p = functional.linear(flat.float(), self.router).softmax(-1)
        choice = p.argmax(-1)
        weights = functional.one_hot(choice, p.shape[-1]) - p.detach() + p
        hidden = functional.silu(self.project("gate_proj", flat, choice, weights))
        hidden = hidden * self.project("up_proj", flat, choice, weights)
        return self.project("down_proj", hidden, choice, weights).view(x.shape)

    def project(self, target: str, x: Tensor, choice: Tensor, weights: Tensor) -> Tensor:
        y = getattr(self.mlp, target)(x)
        total = torch.zeros_like(y)
        for index, update in enumerate(self.updates[target]):
            mask = choice == index
            if not mask.any():
                continue
            rows = mask.nonzero()[:, 0]
            part = functional.linear(functional.linear(x[rows], update.a), update.b) * update.scale
            total = total.index_add(0, rows, part * weights[rows, index, None].to(x.dtype))
        return y + total


class DenseMLP(ReferenceMLP):
    """The same with every expert for every token, so that every probability has its gradient."""

    def project(self, target: str, x: Tensor, choice: Tensor, weights: Tensor) -> Tensor:
        y = getattr(self.mlp, target)(x)
        for index, update in enumerate(self.updates[target]):
            part = functional.linear(functional.linear(x, update.a), update.b) * update.scale
            y = y + part * weights[:, index, None].to(x.dtype)
        return y


def make_model(layers: int, vocabulary: int = 64) -> Any:
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=HIDDEN, intermediate_size=WIDE, num_hidden_layers=layers,
        num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=2048, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def make_experts(model: Any, count: int, rank: int) -> list[Expert]:
    linears = [name for name, _ in model.named_modules() if name.endswith(TARGETS)]

    def update(name: str) -> Update:
        linear = model.get_submodule(name)
        a, b = torch.randn(rank, linear.in_features), torch.randn(linear.out_features, rank)
        return Update(a / linear.in_features**0.5, b * 0.1 / rank**0.5, ALPHA)

    return [Expert(str(index), {name: update(name) for name in linears}) for index in range(count)]


def sharing(model: Any) -> Any:
    """A copy that has the same tensors."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def routed(model: Any, experts: Sequence[Expert], config: RouterConfig | None = None) -> Any:
    """Ours; the experts passed in become views of the packed ones, so that their weights exist once."""
    config = config or RouterConfig()
    points = decision_points(model, experts, config.decides)
    router = make_router(config, points, len(experts)).requires_grad_(False)
    composed = compose_model(sharing(model), experts, router, config.decides)
    return composed


def referring(model: Any, experts: Sequence[Expert], router: Tensor, kind: type[ReferenceMLP] = ReferenceMLP) -> Any:
    model = sharing(model)
    for index, layer in enumerate(model.model.layers):
        layer.mlp = kind(layer.mlp, experts, f"model.layers.{index}.mlp", router).requires_grad_(False)
    return model


def with_peft(model: Any, rank: int) -> Any:
    lora = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(TARGETS), init_lora_weights=False)
    return peft.get_peft_model(sharing(model), lora).eval().get_base_model()


def with_peft_arrow(model: Any, count: int, rank: int) -> Any:
    """PEFT's Arrow over `count` copies of one adapter: what they say does not matter to the time."""
    lora = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(TARGETS), init_lora_weights=False)
    with tempfile.TemporaryDirectory() as folder:
        peft.get_peft_model(sharing(model), lora).save_pretrained(folder)
        config = peft.ArrowConfig(top_k=min(3, count), router_temperature=1.0)
        return peft.create_arrow_model(sharing(model), [folder] * count, config).eval().get_base_model()


def through_mlps(model: Any) -> Callable[[Tensor], Tensor]:
    """Only the MLPs of a model, one after the other, with their residuals and norms."""
    layers = [(layer.post_attention_layernorm, layer.mlp) for layer in model.model.layers]

    def run(x: Tensor) -> Tensor:
        for norm, mlp in layers:
            x = x + mlp(norm(x))
        return x

    return run


def in_turn(forms: Forms, rounds: int) -> dict[str, float]:
    """Milliseconds of each form."""
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for number in range(rounds + 1):
        for name, run in forms.items():
            started = time.thread_time()
            run()
            if number:  # the first round warms up
                seconds[name].append(time.thread_time() - started)
    return {name: 1000 * sorted(times)[int(PERCENTILE * len(times))] for name, times in seconds.items()}


def mlp_models(layers: int, count: int, rank: int, arrow: bool) -> dict[str, Any]:
    model = make_model(layers)
    experts = make_experts(model, count, rank)
    ours = routed(model, experts)
    share_experts(ours, experts)
    models = {
        "base": model,
        "peft": with_peft(model, rank),
        "ours": ours,
        "ours, K=2": routed(model, experts[:2]),
        "reference": referring(model, experts, ours.router.scorer.weights[0]),
    }
    if arrow:
        settings: dict[str, Any] = {"decides": "linear", "sharing": "module"}
        config = RouterConfig(scorer="arrow", estimator="top_k", top_k=min(3, count), normalise=count > 1, **settings)
        models["arrow"] = routed(model, experts, config)
        for weight in models["arrow"].router.scorer.weights:
            weight.data.normal_()
        models["peft arrow"] = with_peft_arrow(model, count, rank)
    return models


def share_experts(composed: Any, experts: Sequence[Expert]) -> None:
    """Make the experts' tensors views of those that are packed in the model."""
    for name, module in composed.named_modules():
        if isinstance(module, RoutedLinear):
            name = name.replace(".block.", ".")
            for index, expert in enumerate(experts):
                a, b = module.experts.each[index]
                expert.updates[name] = Update(a.T, b.T, 1.0)  # type: ignore[index]


@torch.no_grad()
def decode_and_prefill(grid: Sequence[tuple[int, int]], rounds: int) -> Iterator[dict[str, Any]]:
    for count, rank in grid:
        layers = STACK if count * rank <= 4096 else 2
        models = mlp_models(layers, count, rank, arrow=rank == 16 and count <= 64)
        for case, shape in (("decode 1", (1, 1)), ("decode 8", (8, 1)), ("prefill", (1, PREFILL))):
            inputs = [torch.randn(*shape, HIDDEN) for _ in range(8)]
            agree(models, inputs[0])
            forms = {name: over(through_mlps(model), inputs) for name, model in models.items()}
            turns = max(3, rounds // 10) if case == "prefill" else rounds
            yield {"case": case, "K": count, "r": rank, "layers": layers, "ms": in_turn(forms, turns)}


def over(run: Callable[[Tensor], Any], inputs: Sequence[Tensor]) -> Callable[[], Any]:
    """A form that takes another input each time."""
    number = 0

    def once() -> Any:
        nonlocal number
        number += 1
        return run(inputs[number % len(inputs)])

    return once


def agree(models: dict[str, Any], x: Tensor) -> None:
    ours, reference = (through_mlps(models[name])(x) for name in ("ours", "reference"))
    torch.testing.assert_close(ours, reference, rtol=1e-3, atol=1e-3)


def train(grid: Sequence[tuple[int, int]], rounds: int) -> Iterator[dict[str, Any]]:
    """Forward and backward of one MLP with its router; experts and base frozen, the input asks for its gradient."""
    for count, rank in grid:
        model = make_model(1)
        experts = make_experts(model, count, rank)
        ours, selected = (routed(model, experts, RouterConfig(estimator=e)) for e in ("hard", "hard_selected"))
        weight = ours.router.scorer.weights[0]
        blocks = {
            "base": model,
            "peft": with_peft(model, rank).requires_grad_(False),
            "ours, all experts": ours,
            "ours, selected": selected,
            "reference": referring(model, experts, weight),
        }
        if count <= 16:
            blocks["dense"] = referring(model, experts, weight, DenseMLP)
        steps = {name: training_step(block) for name, block in blocks.items()}
        same_gradients(steps)
        kept = {name: kept_mb(blocks[name], experts, step) for name, step in steps.items()}
        yield {"case": "train", "K": count, "r": rank, "ms": in_turn(steps, rounds), "kept_mb": kept}


def training_step(model: Any) -> Callable[[], tuple[Tensor, Tensor | None]]:
    mlp = model.model.layers[0].mlp
    routers = [*getattr(model, "router", nn.Module()).parameters(), *([mlp.router] if hasattr(mlp, "router") else [])]
    for parameter in routers:
        parameter.requires_grad_()
    generator = torch.Generator().manual_seed(1)
    inputs, upstream = (torch.randn(1, TRAIN, HIDDEN, generator=generator) for _ in range(2))

    def step() -> tuple[Tensor, Tensor | None]:
        x = inputs.clone().requires_grad_()
        gradients = torch.autograd.grad(mlp(x), [x, *routers], upstream)
        return gradients[0], gradients[1] if routers else None

    return step


def same_gradients(steps: dict[str, Callable[[], tuple[Tensor, Tensor | None]]]) -> None:
    for one, other in (("ours, selected", "reference"), ("ours, all experts", "dense")):
        if other in steps:
            for ours, theirs in zip(steps[one](), steps[other](), strict=True):
                assert ours is not None and theirs is not None
                assert (ours - theirs).norm() < 1e-3 * theirs.norm(), f"{one} differs from {other}"


def kept_mb(model: Any, experts: Sequence[Expert], step: Callable[[], Any]) -> float:
    """MB that autograd keeps between forward and backward, weights not counted."""
    updates = [tensor for expert in experts for update in expert.updates.values() for tensor in (update.a, update.b)]
    weights = {each.untyped_storage().data_ptr() for each in (*model.parameters(), *model.buffers(), *updates)}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step()
    return sum(kept.values()) / 1e6


@torch.no_grad()
def whole_model(grid: Sequence[tuple[int, int]], rounds: int) -> Iterator[dict[str, Any]]:
    """Writing one token with a cache of 32, with the real vocabulary."""
    for count, rank in grid:
        model = make_model(LAYERS, vocabulary=49152)
        experts = make_experts(model, count, rank)
        ours = routed(model, experts)
        share_experts(ours, experts)
        reference = referring(model, experts, ours.router.scorer.weights[0])
        models = {"base": model, "peft": with_peft(model, rank), "ours": ours, "reference": reference}
        ids = torch.randint(49152, (1, 24))
        torch.testing.assert_close(ours(ids).logits, reference(ids).logits, rtol=1e-3, atol=1e-3)
        for batch in (1, 8):
            forms = {name: one_token(each, batch) for name, each in models.items()}
            yield {"case": f"model {batch}", "K": count, "r": rank, "ms": in_turn(forms, rounds)}


def one_token(model: Any, batch: int, past: int = 32) -> Callable[[], Any]:
    cache, generator = DynamicCache(config=model.config), torch.Generator().manual_seed(2)
    model(input_ids=torch.randint(49152, (batch, past), generator=generator), past_key_values=cache)

    def step() -> None:
        model(input_ids=torch.randint(49152, (batch, 1), generator=generator), past_key_values=cache)
        cache.crop(-1)

    return step


def start(release: Path | None, root: str | None) -> dict[str, Any]:
    """Seconds of processor time, the best of three: imports, and verifying and loading a release."""
    tasks = {
        "import fedcompose": "import fedcompose",
        "import the verifier": "import fedcompose.release",
        "import the model": "import fedcompose.model.composed",
    }
    if release and root:
        names = "from pathlib import Path; from fedcompose.release import ReceivedRelease, verify_release"
        opened = f"ReceivedRelease(Path({str(release)!r})), [{root!r}]"
        tasks |= {
            "verify a release": f"{names}; verify_release({opened})",
            "verify and load it": f"import fedcompose; fedcompose.load({str(release)!r}, [{root!r}])",
        }
    return {name: min(_process_seconds(code) for _ in range(3)) for name, code in tasks.items()}


def _process_seconds(code: str) -> float:
    timed = f"import time\n{code}\nprint(time.process_time())"
    done = subprocess.run([sys.executable, "-c", timed], check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def table(rows: Sequence[dict[str, Any]]) -> None:
    """Ratios to the base, and ours to PEFT's single LoRA and to the reference form."""
    for row in rows:
        ms = row["ms"]
        ratios = "  ".join(f"{name} {value / ms['base']:.2f}" for name, value in ms.items())
        ours = next(name for name in ("ours", "ours, selected") if name in ms)
        print(
            f"{row['case']:10} K={row['K']:<4} r={row['r']:<3} {ratios}   ours/peft {ms[ours] / ms['peft']:.2f}"
            f"   ours/reference {ms[ours] / ms['reference']:.2f}", flush=True,
        )  # fmt: skip
        if "kept_mb" in row:
            kept = row["kept_mb"]
            print("    keeps MB: " + "  ".join(f"{name} {value:.1f}" for name, value in kept.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only what the README quotes")
    parser.add_argument("--only", nargs="*", default=["decode", "train", "model", "start"], help="some of the cases")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--release", type=Path)
    parser.add_argument("--root", help="fingerprint of the root of --release")
    parser.add_argument("--out", type=Path, help="also write the numbers to this JSON file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    counts = (2, 64) if arguments.quick else (2, 8, 64, 256)
    grid = [(count, rank) for rank in ((16,) if arguments.quick else (16, 64)) for count in counts]
    steps = [(count, rank) for rank in ((16,) if arguments.quick else (16, 64)) for count in (8, 16, 64)]
    wholes = [(64, 16)] if arguments.quick else [(8, 16), (64, 16), (8, 64)]
    cases = {
        "decode": lambda: decode_and_prefill(grid, arguments.rounds),
        "train": lambda: train(steps, max(8, arguments.rounds // 3)),
        "model": lambda: whole_model(wholes, arguments.rounds),
    }
    rows = []
    for name, measure in cases.items():
        if name in arguments.only:
            for row in measure():
                table([row])
                rows.append(row)
    seconds = start(arguments.release, arguments.root) if "start" in arguments.only else {}
    for name, value in seconds.items():
        print(f"{name}: {value:.2f} s")
    report = {
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads()},
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, peft)},
        "rows": rows,
        "start": seconds,
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
