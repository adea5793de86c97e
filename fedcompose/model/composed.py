"""The composed model: a base, frozen experts in its MLPs, one router and an attention LoRA.

`load` verifies a release and gives back an ordinary transformers model whose `generate` works as before; its
attribute `routing` (a `RoutingContext`) records who spoke. The parts are put together by `compose_model` and
`add_attention` for training, and by `assemble` for use, where the attention LoRA is merged into the weights.
Models are changed in place.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as dump_safetensors
from torch import Tensor, nn

from fedcompose.adapter import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    Adapter,
    AdapterConfig,
    StoredTensor,
    parse_adapter,
    parse_safetensors,
    tensor_name,
    write_adapter,
)
from fedcompose.bases import Base, base_shapes, resolve_base
from fedcompose.errors import ConfigError, RefusedError
from fedcompose.files import read_limited, write_atomic
from fedcompose.model.experts import TARGETS, Expert, RoutedLinear, load_expert, make_expert, read_expert
from fedcompose.model.lm import load_base
from fedcompose.model.router import RoutedBlock, Router, RoutingContext
from fedcompose.release import ATTENTION_FOLDER as ATTENTION_FOLDER
from fedcompose.release import MAX_ROUTER_BYTES, ReceivedRelease, VerifiedRelease, verify_for_use
from fedcompose.release import ROUTER_FILE as ROUTER_FILE

ATTENTION_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
_PEFT_NAME = "default"  # PEFT's own name for the only adapter


def load(
    path: Path | str, root_fingerprints: Collection[str] | None = None, base: Path | str | None = None
) -> tuple[Any, Any]:
    """Verify the release in `path`, then load it: (model, tokenizer). See `verify_for_use`, `load_release`.

    Raises: RefusedError: when anything in the release is not what its signatures say; nothing is loaded then.
    """
    release = verify_for_use(ReceivedRelease(Path(path)), root_fingerprints)
    return load_release(release, base=None if base is None else resolve_base(base))


def load_release(
    release: VerifiedRelease, dtype: torch.dtype | None = None, base: Base | None = None
) -> tuple[Any, Any]:
    """(model, tokenizer) of a verified release, on the base that it names or on the one given.

    Every file is checked against its signed digest once more as it is read.

    Raises: RefusedError: `BASE_MISMATCH` when the base has other bytes than the one the release was made for,
                `FILE_CHANGED`.
            MissingError: `BASE_NOT_FOUND`.
    """
    wanted = release.composition["base"]
    base = base or resolve_base(wanted["name"])
    if base.digest != wanted["dirHash"]:
        raise RefusedError(
            "BASE_MISMATCH",
            "the release was made for another base model",
            expected=wanted["dirHash"],
            got=f"{base.digest} ({base.path})",
        )
    model, tokenizer = load_base(base.path, dtype)
    shapes = base_shapes(base)
    if release.composition["attention"] is not None:
        config, weights = (release.read(f"{ATTENTION_FOLDER}/{name}") for name in (CONFIG_FILE, WEIGHTS_FILE))
        _merge(model, make_expert(ATTENTION_FOLDER, parse_adapter(config, weights, shapes)))
    experts = [read_expert(each, shapes) for each in release.experts]
    router = parse_router(release.read(ROUTER_FILE), len(experts), hidden_size(model))
    return compose_model(model, experts, router), tokenizer


def assemble(base: Base, experts: Sequence[Path], candidate: Path, dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """(model, tokenizer): a candidate of one's own, before it is released, with its experts in router row order."""
    model, tokenizer = load_base(base.path, dtype)
    shapes = base_shapes(base)
    merge_attention(model, candidate / ATTENTION_FOLDER)
    if experts:
        router = load_router(candidate / ROUTER_FILE, len(experts), hidden_size(model))
        compose_model(model, [load_expert(each, shapes) for each in experts], router)
    return model, tokenizer


def compose_model(model: Any, experts: Sequence[Expert], router: nn.Module) -> Any:
    """Put the experts and the router into `model` and return it, with `model.routing` and `model.router`.

    Blocks are the modules that hold all of `TARGETS`; those that no expert changes stay as they are. The rows
    of the router are the experts, in order.

    Raises: RefusedError: `COMPOSE_TARGETS` when an expert changes a linear outside these blocks,
                `COMPOSE_SHAPES` when it was made for another base.
            ConfigError: `COMPOSE_NO_BLOCKS` when the model has no such block.
    """
    if hasattr(model, "routing"):
        raise ValueError("this model is composed already")
    blocks = _blocks(model)
    for expert in experts:
        _check(model, blocks, expert)
    context = RoutingContext(router)
    touched = {name.rpartition(".")[0] for expert in experts for name in expert.updates}
    for name in (name for name in blocks if name in touched):
        block = model.get_submodule(name)
        for target in TARGETS:
            updates = [expert.updates.get(f"{name}.{target}") for expert in experts]
            if any(update is not None for update in updates):
                setattr(block, target, RoutedLinear(getattr(block, target), updates, context))
        model.set_submodule(name, RoutedBlock(block, context.layers, context))
        context.layers += 1
    router.to(next(model.parameters()).device)
    model.router, model.routing = router, context
    return model


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


def save_router(path: Path, router: Router) -> None:
    """One tensor, `weight` (experts, hidden) float32; rows in the order of the composition's experts."""
    write_atomic(path, dump_safetensors({"weight": router.weight.detach().cpu()}, metadata={"format": "pt"}))


def load_router(path: Path, experts: int, hidden: int) -> Router:
    """Raises: RefusedError: as `parse_router`."""
    return parse_router(read_limited(path, MAX_ROUTER_BYTES), experts, hidden)


def parse_router(data: bytes, experts: int, hidden: int) -> Router:
    """Raises: RefusedError: `ROUTER_INVALID` for anything but one finite float32 (experts, hidden) matrix."""
    tensors = parse_safetensors(data)
    stored = tensors.get("weight")
    if len(tensors) != 1 or stored is None or (stored.dtype, stored.shape) != ("F32", (experts, hidden)):
        raise RefusedError("ROUTER_INVALID", "the router does not fit", expected=f"weight: F32 ({experts}, {hidden})")
    weight = torch.tensor(stored.float32())
    if not weight.isfinite().all():
        raise RefusedError("ROUTER_INVALID", "the router holds a number that is not finite")
    router = Router(hidden, experts)
    router.weight = nn.Parameter(weight, requires_grad=False)
    return router


def save_attention(folder: Path, model: Any) -> None:
    """The attention LoRA as a plain PEFT folder."""
    tensors: dict[str, StoredTensor] = {}
    config: AdapterConfig | None = None
    for name, layer, a, b in _attention(model):
        config = AdapterConfig(
            r=layer.r[_PEFT_NAME], lora_alpha=layer.lora_alpha[_PEFT_NAME], target_modules=ATTENTION_TARGETS
        )
        tensors[tensor_name(name, "A")] = _stored(a.weight)
        tensors[tensor_name(name, "B")] = _stored(b.weight)
    if config is None:
        raise ValueError("the model has no attention LoRA")
    folder.mkdir(parents=True, exist_ok=True)
    write_adapter(folder, Adapter(config, tensors))


def merge_attention(model: Any, folder: Path) -> None:
    """Add the LoRA in `folder` to the model's own weights, with one rounding; for use, not for training.

    Raises: RefusedError: `COMPOSE_TARGETS`, `COMPOSE_SHAPES` when it does not fit the model.
    """
    _merge(model, load_expert(folder))


def hidden_size(model: Any) -> int:
    """Width of what the blocks read."""
    return int(model.config.get_text_config().hidden_size)


def routed_modules(model: Any) -> Iterator[tuple[str, RoutedLinear]]:
    """Every routed linear of a composed model, by name."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, RoutedLinear))


def _blocks(model: Any) -> list[str]:
    found = [
        name
        for name, module in model.named_modules()
        if all(isinstance(getattr(module, target, None), nn.Linear) for target in TARGETS)
    ]
    if not found:
        raise ConfigError(
            "COMPOSE_NO_BLOCKS",
            "this base has no MLP that experts can be routed in",
            expected=" ".join(TARGETS),
        )
    return found


def _check(model: Any, blocks: Sequence[str], expert: Expert) -> None:
    for name, update in expert.updates.items():
        block, _, target = name.rpartition(".")
        if block not in blocks or target not in TARGETS:
            raise RefusedError(
                "COMPOSE_TARGETS",
                f"the expert {expert.name!a} changes a linear that is not routed",
                expected="updates only of " + ", ".join(TARGETS),
                got=ascii(name),
                fix="train the expert with these targets",
            )
        _check_shape(model.get_submodule(name), name, (len(update.b), update.a.shape[1]))


def _merge(model: Any, attention: Expert) -> None:
    for name, update in attention.updates.items():
        linear = _linear(model, name)
        if linear is None or name.rpartition(".")[2] not in ATTENTION_TARGETS:
            raise RefusedError("COMPOSE_TARGETS", "the attention LoRA changes something else", got=ascii(name))
        _check_shape(linear, name, (len(update.b), update.a.shape[1]))
        with torch.no_grad():
            linear.weight.copy_(linear.weight.float() + update.delta().to(linear.weight.device))


def _check_shape(linear: nn.Linear, name: str, shape: tuple[int, int]) -> None:
    if tuple(linear.weight.shape) != shape:
        raise RefusedError(
            "COMPOSE_SHAPES", f"a LoRA on {name} was made for another base",
            expected=str(tuple(linear.weight.shape)), got=str(shape),
        )  # fmt: skip


def _linear(model: Any, name: str) -> nn.Linear | None:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        return None
    return module if isinstance(module, nn.Linear) else None


def _attention(model: Any) -> Iterator[tuple[str, Any, nn.Linear, nn.Linear]]:
    """Name, PEFT layer, A and B of the attention LoRA, in the model's order."""
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and _PEFT_NAME in module.lora_A:
            yield name, module, module.lora_A[_PEFT_NAME], module.lora_B[_PEFT_NAME]


def _stored(weight: Tensor) -> StoredTensor:
    values = weight.detach().float().cpu().contiguous().numpy()
    return StoredTensor("F32", values.shape, memoryview(values.tobytes()))
