"""The composed model: a base, frozen experts in its blocks, one router and an attention LoRA.

`load` verifies a release and gives back an ordinary transformers model whose `generate` works as before; its
attribute `routing` (a `RoutingContext`) records who spoke. For training, the parts are put together by
`placement.compose_model` and `add_attention`; for use, by `assemble`, which merges the attention LoRA into the
weights. Models are changed in place.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedcompose.adapter import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    Adapter,
    AdapterConfig,
    parse_adapter,
    tensor_name,
    write_adapter,
)
from fedcompose.bases import Base, base_shapes, resolve_base
from fedcompose.composition import ATTENTION_FOLDER, MAX_ROUTER_BYTES, ROUTER_FILE
from fedcompose.errors import ConfigError, RefusedError
from fedcompose.files import read_limited
from fedcompose.model.controls import FixedRouter, NoExpertRouter
from fedcompose.model.experts import Expert, load_expert, make_expert, read_expert
from fedcompose.model.learned import parse_router
from fedcompose.model.lm import load_base, prompt_ids
from fedcompose.model.placement import base_name, check_shape, compose_model, decision_points, linear_of
from fedcompose.model.spread import spread as over_gpus
from fedcompose.release import ReceivedRelease, VerifiedRelease
from fedcompose.routing import RouterConfig
from fedcompose.standing import verify_for_use
from fedcompose.tensors import StoredTensor

ATTENTION_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
ALIVE_PROBE = "What is 17 + 25? Think step by step."
_PEFT_NAME = "default"  # PEFT's own name for the only adapter


def load(
    path: Path | str,
    root_fingerprints: Collection[str] | None = None,
    base: Path | str | None = None,
    transfer: bool = False,
    spread: bool = False,
) -> tuple[Any, Any]:
    """Verify the release in `path`, then load it: (model, tokenizer). See `verify_for_use`, `load_release`.

    Raises: RefusedError: when anything in the release is not what its signatures say; nothing is loaded then.
    """
    release = verify_for_use(ReceivedRelease(Path(path)), root_fingerprints)
    found = None if base is None else resolve_base(base)
    return load_release(release, base=found, transfer=transfer, spread=spread)


def load_release(
    release: VerifiedRelease,
    dtype: torch.dtype | None = None,
    base: Base | None = None,
    transfer: bool = False,
    spread: bool = False,
) -> tuple[Any, Any]:
    """(model, tokenizer) of a verified release, on the base that it names or on the one given.

    Every file is checked against its signed digest once more as it is read. `transfer` puts the composition on another
    base that has the same linears, say a fine-tuned one; nobody has signed, or measured, what comes of it.
    `spread` puts it on all GPUs of this machine, where one is too small.

    Raises: RefusedError: `BASE_MISMATCH` when the base has other bytes than the one the release was made for,
                `FILE_CHANGED`; `ADAPTER_TENSORS`, `COMPOSE_SHAPES`, `ROUTER_INVALID` when a transfer does not fit.
            MissingError: `BASE_NOT_FOUND`; ConfigError, MissingError: as `fedcompose.model.spread.spread`.
    """
    base = base or resolve_base(release.composition["base"]["name"])
    if not transfer:
        check_base_bytes(release, base)
    model, tokenizer = load_base(base.path, dtype, to_gpu=not spread)
    shapes = base_shapes(base)
    if release.composition["attention"] is not None:
        settings, weights = (release.read(f"{ATTENTION_FOLDER}/{name}") for name in (CONFIG_FILE, WEIGHTS_FILE))
        _merge(model, make_expert(ATTENTION_FOLDER, parse_adapter(settings, weights, shapes)))
    experts = [read_expert(each, shapes) for each in release.experts]
    config = RouterConfig.model_validate(release.composition["router"])
    model = _with_router(model, experts, config, release.read(ROUTER_FILE))
    return over_gpus(model) if spread else model, tokenizer


def check_base_bytes(release: VerifiedRelease, base: Base) -> None:
    """Raises: RefusedError: `BASE_MISMATCH`."""
    wanted = release.composition["base"]["dirHash"]
    if base.digest != wanted:
        raise RefusedError(
            "BASE_MISMATCH",
            "the release was made for another base model",
            expected=wanted,
            got=f"{base.digest} ({base.path})",
        )


def prove_alive(model: Any, tokenizer: Any, names: Sequence[str]) -> None:
    """Every expert of a composed model moves what the model says, and to finite numbers.

    A LoRA that is loaded wrongly is silent: the model answers as if it were not there.

    Raises: RefusedError: `EXPERT_DEAD`, with the names.
    """
    without = _said(model, tokenizer, NoExpertRouter(len(names)))
    dead = []
    for row, name in enumerate(names):
        said = _said(model, tokenizer, FixedRouter(row, len(names)))
        if torch.equal(said, without) or not said.isfinite().all():
            dead.append(name)
    if dead:
        raise RefusedError("EXPERT_DEAD", "an expert changes nothing, or breaks the model", got=", ".join(dead))


@torch.no_grad()
def _said(model: Any, tokenizer: Any, router: nn.Module) -> Tensor:
    """The logits at every token of a probe, under another router."""
    ids = torch.tensor([prompt_ids(tokenizer, ALIVE_PROBE)], device=model.device)
    with model.routing.using(router):
        logits: Tensor = model(input_ids=ids).logits
    return logits


def assemble(
    base: Base,
    experts: Sequence[Path],
    candidate: Path,
    config: RouterConfig | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Any, Any]:
    """(model, tokenizer): a candidate of one's own, before it is released, with its experts in router row order.

    On a base of the same shapes that is not the one it was composed on, it is the composition transferred.
    """
    model, tokenizer = load_base(base.path, dtype)
    shapes = base_shapes(base)
    if (candidate / ATTENTION_FOLDER).is_dir():
        merge_attention(model, candidate / ATTENTION_FOLDER)
    if experts:
        data = read_limited(candidate / ROUTER_FILE, MAX_ROUTER_BYTES)
        _with_router(model, [load_expert(each, shapes) for each in experts], config or RouterConfig(), data)
    return model, tokenizer


def add_attention(model: Any, rank: int, alpha: int, seed: int) -> list[nn.Parameter]:
    """Give q/k/v/o a trainable float32 LoRA by PEFT and return its parameters; everything else is frozen.

    Raises: ConfigError: `COMPOSE_NO_ATTENTION` when the model has no such projections.
    """
    from peft import LoraConfig, inject_adapter_in_model

    if not any(name.rpartition(".")[2] in ATTENTION_TARGETS for name, _ in model.named_modules()):
        raise ConfigError(
            "COMPOSE_NO_ATTENTION",
            "this base has no attention projections that we know",
            expected=" ".join(ATTENTION_TARGETS),
        )
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(ATTENTION_TARGETS), lora_dropout=0.0)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model)
    model.requires_grad_(False)
    layers = nn.ModuleList(layer for _, _, *pair in _attention(model) for layer in pair)
    return list(layers.float().requires_grad_(True).parameters())


def save_attention(folder: Path, model: Any) -> None:
    """The attention LoRA as a plain PEFT folder."""
    tensors: dict[str, StoredTensor] = {}
    config: AdapterConfig | None = None
    for name, layer, a, b in _attention(model):
        config = AdapterConfig(
            r=layer.r[_PEFT_NAME], lora_alpha=layer.lora_alpha[_PEFT_NAME], target_modules=ATTENTION_TARGETS
        )
        tensors[tensor_name(name, "A")] = stored(a.weight)
        tensors[tensor_name(name, "B")] = stored(b.weight)
    if config is None:
        raise ValueError("the model has no attention LoRA")
    folder.mkdir(parents=True, exist_ok=True)
    write_adapter(folder, Adapter(config, tensors))


def merge_attention(model: Any, folder: Path) -> None:
    """Add the LoRA in `folder` to the model's own weights, with one rounding; for use, not for training.

    Raises: RefusedError: `COMPOSE_TARGETS`, `COMPOSE_SHAPES` when it does not fit the model.
    """
    _merge(model, load_expert(folder))


def _with_router(model: Any, experts: Sequence[Expert], config: RouterConfig, data: bytes) -> Any:
    points = decision_points(model, experts, config.decides)
    return compose_model(model, experts, parse_router(data, config, points, len(experts)), config.decides)


def _merge(model: Any, attention: Expert) -> None:
    for name, update in attention.updates.items():
        linear = linear_of(model, name)
        if linear is None or name.rpartition(".")[2] not in ATTENTION_TARGETS:
            raise RefusedError("COMPOSE_TARGETS", "the attention LoRA changes something else", got=ascii(name))
        check_shape(linear, name, (len(update.b), update.a.shape[1]))
        with torch.no_grad():
            linear.weight.copy_(linear.weight.float() + update.delta().to(linear.weight.device))


def _attention(model: Any) -> Iterator[tuple[str, Any, nn.Linear, nn.Linear]]:
    """Name in the base, PEFT layer, A and B of the attention LoRA, in the model's order."""
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and _PEFT_NAME in module.lora_A:
            yield base_name(model, name), module, module.lora_A[_PEFT_NAME], module.lora_B[_PEFT_NAME]


def stored(weight: Tensor) -> StoredTensor:
    """As a file holds it, float32."""
    values = weight.detach().float().cpu().contiguous().numpy()
    return StoredTensor("F32", values.shape, memoryview(values.tobytes()))
