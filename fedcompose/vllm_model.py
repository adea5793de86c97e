"""A release's composition as a model of vLLM, which routes token by token as ours does.

`register` is an entry point of vLLM's general plugins: where fedcompose is installed beside vLLM, folders that
`fedcompose export --vllm` wrote are served by `vllm serve FOLDER`. The attention LoRA is merged in them; experts and
router lie beside. All experts are computed in the space of their ranks and all but the chosen one are then set to
zero, so that no step depends on data: vLLM may compile it and put it into CUDA graphs. That costs ranks × experts of
every token, so this is for few or small experts.

vLLM is imported only when vLLM asks for the model. Verification is done by the export; vLLM reads what lies there.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

ARCHITECTURE = "FedcomposeLlamaForCausalLM"
SETTINGS = "fedcompose"  # the key in config.json: {"ranks": [...]}, of the experts in router row order
PREFIX = "fedcompose."  # of the names of experts' and routers' tensors


def register() -> None:
    """Tell vLLM about the architecture; loads nothing."""
    from vllm import ModelRegistry

    ModelRegistry.register_model(ARCHITECTURE, "fedcompose.vllm_model:RoutedLlama")


def __getattr__(name: str) -> Any:
    """The class is made when vLLM looks it up, for its base class is vLLM's."""
    if name == "RoutedLlama":
        globals()[name] = _make_class()
        return globals()[name]
    raise AttributeError(name)


def _make_class() -> Any:
    import torch
    from torch import Tensor, nn
    from vllm.model_executor.models.llama import LlamaForCausalLM

    class Experts(nn.Module):
        """The experts of one layer, for gate and up from the MLP's input and for down from what it makes of it."""

        owners: Tensor

        def __init__(self, hidden: int, wide: int, ranks: list[int]) -> None:
            super().__init__()
            rows, owners = sum(ranks), torch.arange(len(ranks)).repeat_interleave(torch.tensor(ranks))
            self.register_buffer("owners", owners, persistent=False)
            self.router = nn.Parameter(torch.zeros(len(ranks), hidden, dtype=torch.float32), False)
            self.router_bias = nn.Parameter(torch.zeros(len(ranks), dtype=torch.float32), False)
            for part, into, out in (("gate", hidden, wide), ("up", hidden, wide), ("down", wide, hidden)):
                setattr(self, f"{part}_a", nn.Parameter(torch.zeros(rows, into), False))
                setattr(self, f"{part}_b", nn.Parameter(torch.zeros(rows, out), False))

        def choose(self, x: Tensor) -> Tensor:
            """(tokens, rows) 1 for the rows of each token's expert, the first of equals."""
            choice = nn.functional.linear(x.float(), self.router, self.router_bias).argmax(-1)
            rows: Tensor = choice[:, None].eq(self.owners)
            return rows.to(x.dtype)

        def add(self, part: str, x: Tensor, chosen: Tensor) -> Tensor:
            a, b = getattr(self, f"{part}_a"), getattr(self, f"{part}_b")
            added: Tensor = ((x @ a.T) * chosen) @ b
            return added

    class RoutedMLP(nn.Module):
        """vLLM's MLP and its experts; tensor parallelism would need them cut up too."""

        gate_up_proj: Any
        down_proj: Any
        act_fn: Any

        def __init__(self, mlp: Any, experts: Experts) -> None:
            super().__init__()
            self.gate_up_proj, self.down_proj, self.act_fn = mlp.gate_up_proj, mlp.down_proj, mlp.act_fn
            self.experts = experts

        def forward(self, x: Tensor) -> Tensor:
            chosen = self.experts.choose(x)
            both, _ = self.gate_up_proj(x)
            added = [self.experts.add(part, x, chosen) for part in ("gate", "up")]
            made = self.act_fn(both + torch.cat(added, dim=-1))
            down, _ = self.down_proj(made)
            whole: Tensor = down + self.experts.add("down", made, chosen)
            return whole

    class RoutedLlama(LlamaForCausalLM):  # type: ignore[misc]
        def __init__(self, *, vllm_config: Any, prefix: str = "", **options: Any) -> None:
            super().__init__(vllm_config=vllm_config, prefix=prefix, **options)
            if vllm_config.parallel_config.tensor_parallel_size > 1:
                raise ValueError("a fedcompose release runs on one device of vLLM, not split over several")
            config = self.config
            ranks = getattr(config, SETTINGS)["ranks"]
            for layer in self.model.layers:
                experts = Experts(config.hidden_size, config.intermediate_size, ranks)
                layer.mlp = RoutedMLP(layer.mlp, experts)

        def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
            """The base's by vLLM's own loader, ours by name: `fedcompose.LAYER.gate_a` and so on."""
            own: dict[str, Tensor] = {}

            def base() -> Iterable[tuple[str, Tensor]]:
                for name, tensor in weights:
                    if name.startswith(PREFIX):
                        own[name] = tensor
                    else:
                        yield name, tensor

            loaded = set(super().load_weights(base()))
            for number, layer in enumerate(self.model.layers):
                for name, parameter in layer.mlp.experts.named_parameters():
                    parameter.data.copy_(own.pop(f"{PREFIX}{number}.{name}"))
                    loaded.add(f"model.layers.{number}.mlp.experts.{name}")
            if own:
                raise ValueError(f"{len(own)} tensors belong to no layer")
            return loaded

    RoutedLlama.__qualname__ = RoutedLlama.__name__
    RoutedLlama.__module__ = __name__
    return RoutedLlama
