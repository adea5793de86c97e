"""Put experts and a router into a model: which linears are routed, and which points decide.

The experts' own targets say it. Each linear that an expert changes becomes a `RoutedLinear`. Where blocks decide,
the module that holds it becomes a `RoutedBlock` (a `RoutedMLP`, which is faster, if it computes what a gated MLP
computes) and asks about its input, for all its linears; where linears decide, each asks about its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from fedcompose.errors import ConfigError, RefusedError
from fedcompose.model.experts import Expert
from fedcompose.model.kernels import RoutedLinear, RoutedMLP, gated_mlp
from fedcompose.model.router import Point, RoutedBlock, RoutingContext
from fedcompose.routing import Decides

GATED_MLP = ("gate_proj", "up_proj", "down_proj")
OTHER_SEQUENCE = "key_value_states"  # what an attention calls the states of another sequence that it reads


def decision_points(model: Any, experts: Sequence[Expert], decides: Decides = "block") -> tuple[Point, ...]:
    """Who decides in `model` when these experts are put in, in the model's order.

    Raises: RefusedError: `COMPOSE_TARGETS` when an expert changes something that is not a linear inside a block,
                `COMPOSE_SHAPES` when it was made for another base.
            ConfigError: `ROUTER_BLOCK` when a block reads two sequences and cannot decide for both.
    """
    linears = _targeted(model, experts)
    if decides == "linear":
        return tuple(Point(name, linear.in_features) for name, linear in linears.items())
    blocks = dict.fromkeys(name.rpartition(".")[0] for name in linears)
    for block in blocks:
        _check_block(model, block)
    return tuple(Point(block, hidden_size(model)) for block in blocks)


def compose_model(model: Any, experts: Sequence[Expert], router: nn.Module, decides: Decides = "block") -> Any:
    """Put the experts and the router into `model` and return it, with `model.routing` and `model.router`.

    The router's experts are `experts`, in order.

    Raises: RefusedError, ConfigError: as `decision_points`.
    """
    if hasattr(model, "routing"):
        raise ValueError("this model is composed already")
    points = decision_points(model, experts, decides)
    context = RoutingContext(router, points)
    own = {point.name: number for number, point in enumerate(points)}
    blocks = {name: model.get_submodule(name) for name in own} if decides == "block" else {}
    fast = {name for name, block in blocks.items() if is_gated_mlp(block)}
    linears = _targeted(model, experts)
    for name in fast:  # is computed as a whole, also where experts leave one of its linears alone
        linears |= {f"{name}.{part}": getattr(blocks[name], part) for part in GATED_MLP}
    for name, linear in linears.items():
        updates = [expert.updates.get(name) for expert in experts]
        model.set_submodule(name, RoutedLinear(linear, updates, context, own.get(name)))
    for name, block in blocks.items():
        kind = RoutedMLP if name in fast else RoutedBlock
        model.set_submodule(name, kind(block, own[name], context))
    router.to(next(model.parameters()).device)
    model.router, model.routing = router, context
    return model


def routed_modules(model: Any) -> Iterator[tuple[str, RoutedLinear]]:
    """Every routed linear of a composed model, by its name in the base."""
    for name, module in model.named_modules():
        if isinstance(module, RoutedLinear):
            yield base_name(model, name), module


def base_name(model: Any, name: str) -> str:
    """What a module of a composed model is called in the base: its path without the wrappers."""
    kept, module = [], model
    for part in name.split("."):
        if not isinstance(module, RoutedBlock | RoutedLinear):
            kept.append(part)
        module = getattr(module, part)
    return ".".join(kept)


def hidden_size(model: Any) -> int:
    """Width of what blocks read."""
    return int(model.config.get_text_config().hidden_size)


@torch.no_grad()
def is_gated_mlp(block: Any) -> bool:
    """Whether `block` is, bit for bit, down(act(gate(x)) · up(x)): tried out, whatever the class is called."""
    parts = [getattr(block, name, None) for name in GATED_MLP]
    if not all(type(part) is nn.Linear for part in parts) or not callable(getattr(block, "act_fn", None)):
        return False
    gate: nn.Linear = block.gate_proj
    probe = torch.linspace(-1, 1, 2 * gate.in_features, dtype=gate.weight.dtype, device=gate.weight.device)
    probe = probe.view(1, 2, -1)
    said = block(probe)
    return isinstance(said, torch.Tensor) and torch.equal(said, gated_mlp(block, probe))


def _targeted(model: Any, experts: Sequence[Expert]) -> dict[str, nn.Linear]:
    """The linears that some expert changes, in the model's order."""
    changed = dict.fromkeys(name for expert in experts for name in expert.updates)
    for expert in experts:
        for name, update in expert.updates.items():
            _check_linear(model, expert.name, name, (len(update.b), update.a.shape[1]))
    return {name: module for name, module in model.named_modules() if name in changed}


def _check_linear(model: Any, expert: str, name: str, shape: tuple[int, int]) -> None:
    linear = linear_of(model, name)
    if linear is None or "." not in name:
        raise RefusedError(
            "COMPOSE_TARGETS",
            f"the expert {expert!a} changes something that is not a linear inside a block of this base",
            got=ascii(name),
            fix="train the expert on linears of the blocks, and on this base",
        )
    check_shape(linear, name, shape)


def check_shape(linear: nn.Linear, name: str, shape: tuple[int, int]) -> None:
    """Raises: RefusedError: `COMPOSE_SHAPES` unless the linear is (out, in) as `shape` says."""
    if tuple(linear.weight.shape) != shape:
        raise RefusedError(
            "COMPOSE_SHAPES", f"a LoRA on {name} was made for another base",
            expected=str(tuple(linear.weight.shape)), got=str(shape),
        )  # fmt: skip


def linear_of(model: Any, name: str) -> nn.Linear | None:
    """The linear that has this name in the base, or None; one that carries an attention LoRA is one too."""
    module = model
    for part in name.split("."):
        module = _unwrapped(getattr(module, part, None))
    inner = getattr(module, "base_layer", module)
    return module if isinstance(inner, nn.Linear) else None


def _unwrapped(module: Any) -> Any:
    if isinstance(module, RoutedBlock):
        return module.block
    return module.linear if isinstance(module, RoutedLinear) else module


def _check_block(model: Any, name: str) -> None:
    if OTHER_SEQUENCE in inspect.signature(model.get_submodule(name).forward).parameters:
        raise ConfigError(
            "ROUTER_BLOCK",
            f"{name} may read another sequence, for whose tokens its own input cannot decide",
            fix='let each linear decide: decides = "linear"',
        )
