"""Reading a LoRA folder as if an enemy had written it, and writing it in one canonical form.

PEFT lets an adapter's files choose code paths, run regular expressions, download models and overwrite
base weights. So nothing a site wrote is ever handed to PEFT: the configuration is reduced to the handful of
values below, every other key must say "off", and the tensors must be exactly those that this configuration
implies, on modules of the base. What passes is written again from those values.

Checking reads the weights once, in pieces, so that it takes the same memory for a file of any size.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedcompose.errors import RefusedError
from fedcompose.files import MAX_JSON_BYTES, dump_json, parse_json, read_limited, write_atomic
from fedcompose.tensors import (
    MAX_NAME_CHARS,
    Readable,
    StoredTensor,
    canonical_safetensors,
    parse_safetensors,
    read_header,
    read_norm,
)

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

MAX_WEIGHTS_BYTES = 2 << 30  # a rank-64 adapter on every projection of a 70B base stays below
MAX_RANK = 512
MAX_SCALE = 64.0  # alpha/r; practice is 0.5 to 4
MAX_TARGETS = 1024
MAX_PATTERNS = 2048
MAX_UPDATE_RMS = 1.0  # bound on the root mean square of an entry of scale·B·A; a trained expert is below 0.01
# Two-dimensional weights that are no linear layers; PEFT would adapt them in another way.
EMBEDDINGS = frozenset({"embed_tokens", "embed_positions", "word_embeddings", "wte", "wpe", "embed_in"})
MODULE_NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
TENSOR_NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")

# PEFT's other switches and the values that mean "off". Anything else, an unknown key included, is refused:
# new PEFT versions add switches, and each one is harmless only after somebody has looked at it.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "auto_mapping": (None,),
    "bias": ("none",),
    "corda_config": (None,),
    "ensure_weight_tying": (False,),
    "eva_config": (None,),
    "exclude_modules": (None, []),
    "fan_in_fan_out": (False,),
    "inference_mode": (True, False),
    "init_lora_weights": (True, False, "gaussian"),
    "kasa_config": (None,),
    "layer_replication": (None,),
    "layers_pattern": (None, []),
    "layers_to_transform": (None, []),
    "loftq_config": (None, {}),
    "lora_bias": (False,),
    "lora_ga_config": (None,),
    "megatron_config": (None,),
    "megatron_core": (None, "megatron.core"),
    "modules_to_save": (None, []),
    "monteclora_config": (None,),
    "peft_type": ("LORA",),
    "target_parameters": (None, []),
    "task_type": (None, "CAUSAL_LM"),
    "trainable_token_indices": (None,),
    "use_bdlora": (None, False),
    "use_dora": (False,),
    "use_qalora": (False,),
    "velora_config": (None,),
}
# Read by nobody: they say how training went or name a place on the site's machine.
IGNORED = frozenset({"base_model_name_or_path", "lora_dropout", "peft_version", "qalora_group_size", "revision"})
BASE_NAME = "see provenance.json"

Number = TypeVar("Number", int, float)
Rank = Annotated[int, Field(strict=True, ge=1, le=MAX_RANK)]
Alpha = Annotated[float, Field(strict=True, gt=0, le=MAX_RANK * MAX_SCALE, allow_inf_nan=False)]
ModuleName = Annotated[str, Field(strict=True, max_length=MAX_NAME_CHARS, pattern=rf"^{MODULE_NAME.pattern}$")]


class AdapterConfig(BaseModel):
    """The values of a LoRA that matter; module names are plain, never patterns."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    r: Rank
    lora_alpha: Alpha
    target_modules: Annotated[tuple[ModuleName, ...], Field(min_length=1, max_length=MAX_TARGETS)]
    use_rslora: Annotated[bool, Field(strict=True)] = False
    rank_pattern: Annotated[dict[ModuleName, Rank], Field(max_length=MAX_PATTERNS)] = {}
    alpha_pattern: Annotated[dict[ModuleName, Alpha], Field(max_length=MAX_PATTERNS)] = {}

    def targets(self, module: str) -> bool:
        """Whether this adapter has a LoRA on `module`: a target is the module's name or its last parts."""
        return any(_names(target, module) for target in self.target_modules)

    def rank(self, module: str) -> int:
        return _first(self.rank_pattern, module, self.r)

    def alpha(self, module: str) -> float:
        return _first(self.alpha_pattern, module, self.lora_alpha)

    def scale(self, module: str) -> float:
        """The factor s in y = Wx + s·B·A·x."""
        rank = self.rank(module)
        return self.alpha(module) / (math.sqrt(rank) if self.use_rslora else rank)


@dataclass(frozen=True)
class Adapter:
    """A checked LoRA: its tensors are exactly an A and a B for every module that it targets."""

    config: AdapterConfig
    tensors: Mapping[str, StoredTensor]

    def modules(self) -> tuple[str, ...]:
        """Names of the adapted modules, as the base names them, sorted."""
        return _modules(self.tensors)

    def pair(self, module: str) -> tuple[StoredTensor, StoredTensor]:
        """A [rank, in] and B [out, rank] of one module."""
        return self.tensors[tensor_name(module, "A")], self.tensors[tensor_name(module, "B")]


def tensor_name(module: str, side: str) -> str:
    return f"base_model.model.{module}.lora_{side}.weight"


def module_of(name: str) -> str:
    """The base's module that a LoRA tensor belongs to.

    Raises: RefusedError: `ADAPTER_TENSORS` for any other tensor, such as one that replaces a base weight.
    """
    match = TENSOR_NAME.fullmatch(name)
    if match is None or not MODULE_NAME.fullmatch(match["module"]):
        raise RefusedError(
            "ADAPTER_TENSORS",
            "the adapter holds a tensor that is not a LoRA weight",
            got=ascii(name[:MAX_NAME_CHARS]),
        )
    return match["module"]


def read_adapter(folder: Path, base_shapes: Mapping[str, tuple[int, int]] | None) -> Adapter:
    """Read and check the LoRA in `folder`; see `parse_adapter`."""
    config = read_limited(folder / CONFIG_FILE, MAX_JSON_BYTES)
    return parse_adapter(config, read_limited(folder / WEIGHTS_FILE, MAX_WEIGHTS_BYTES), base_shapes)


def parse_adapter(config: bytes, weights: bytes, base_shapes: Mapping[str, tuple[int, int]] | None) -> Adapter:
    """The adapter in two files given as bytes, checked in full as `check_adapter` does."""
    parsed = check_adapter(config, io.BytesIO(weights), len(weights), base_shapes)
    return Adapter(parsed, parse_safetensors(weights))


def check_adapter(
    config: bytes, weights: Readable, weights_bytes: int, base_shapes: Mapping[str, tuple[int, int]] | None
) -> AdapterConfig:
    """Check an adapter whose weights are `weights_bytes` long, reading them once from begin to end.

    With `base_shapes` the tensors must be exactly those the configuration implies on that base. Without (a
    machine that has no base may still verify a signature chain) they must be complete, well-formed LoRA
    pairs on targeted modules.

    Raises: RefusedError: `ADAPTER_UNSUPPORTED`, `ADAPTER_INVALID`, `SAFETENSORS_INVALID`, `ADAPTER_TENSORS`,
        `ADAPTER_NOT_FINITE`, `ADAPTER_TOO_STRONG`.
    """
    parsed = parse_config(config)
    layouts = read_header(weights, weights_bytes)
    shapes = {layout.name: layout.shape for layout in layouts}
    _check_names(parsed, shapes, base_shapes)
    _check_shapes(parsed, shapes, base_shapes)
    norms = {layout.name: read_norm(weights, layout) for layout in layouts}
    _check_strength(parsed, shapes, norms)
    return parsed


def parse_config(data: bytes) -> AdapterConfig:
    """The allow-listed values of an `adapter_config.json`; every other switch must be off."""
    document = parse_json(data, CONFIG_FILE)
    if not isinstance(document, dict):
        raise RefusedError("ADAPTER_INVALID", f"{CONFIG_FILE} is not a JSON object")
    if document.get("peft_type") != "LORA":
        raise RefusedError("ADAPTER_UNSUPPORTED", "the adapter is not a LoRA", expected='"peft_type": "LORA"')
    values = {key: value for key, value in document.items() if key in AdapterConfig.model_fields}
    for key, value in document.items():
        if key not in values and key not in IGNORED and not _is_off(key, value):
            raise RefusedError(
                "ADAPTER_UNSUPPORTED",
                f"the adapter uses {key[:64]!a}, which is not supported",
                expected="a plain LoRA: " + ", ".join(AdapterConfig.model_fields),
                fix="train a LoRA without this option",
            )
    return _validated(values)


def write_adapter(folder: Path, adapter: Adapter) -> None:
    """Write `adapter` in its one canonical form: fixed fields, no path or version, tensors sorted by name."""
    write_atomic(folder / CONFIG_FILE, canonical_config(adapter))
    write_atomic(folder / WEIGHTS_FILE, canonical_safetensors(adapter.tensors))


def canonical_config(adapter: Adapter) -> bytes:
    """An `adapter_config.json` that PEFT loads and that says nothing about the machine it was made on.

    Patterns are written per module: PEFT takes the first that matches, and JSON has no order to rely on.
    """
    config, modules = adapter.config, adapter.modules()
    ranks = {module: config.rank(module) for module in modules}
    alphas = {module: _number(config.alpha(module)) for module in modules}
    return dump_json(
        {
            "alpha_pattern": {m: alpha for m, alpha in alphas.items() if alpha != config.lora_alpha},
            "base_model_name_or_path": BASE_NAME,
            "bias": "none",
            "inference_mode": True,
            "init_lora_weights": True,
            "lora_alpha": _number(config.lora_alpha),
            "lora_dropout": 0.0,
            "peft_type": "LORA",
            "r": config.r,
            "rank_pattern": {m: rank for m, rank in ranks.items() if rank != config.r},
            "target_modules": sorted(set(config.target_modules)),
            "task_type": "CAUSAL_LM",
            "use_rslora": config.use_rslora,
        }
    )


def _names(pattern: str, module: str) -> bool:
    return module == pattern or module.endswith(f".{pattern}")


def _first(patterns: Mapping[str, Number], module: str, default: Number) -> Number:
    """What PEFT would take: the first pattern, in the file's order, that names the module."""
    return next((value for pattern, value in patterns.items() if _names(pattern, module)), default)


def _number(value: float) -> int | float:
    return int(value) if value == int(value) else value


def _is_off(key: str, value: Any) -> bool:
    """Whether a PEFT switch has one of its harmless values; 0 and 1 are not booleans here."""
    return any(type(value) is type(off) and value == off for off in NEUTRAL.get(key, ()))


def _validated(values: dict[str, Any]) -> AdapterConfig:
    for pattern in ("rank_pattern", "alpha_pattern"):
        values[pattern] = values.get(pattern) or {}
    try:
        config = AdapterConfig.model_validate(values)
    except ValidationError as error:
        where = ".".join(str(part)[:64] for part in error.errors()[0]["loc"])
        raise RefusedError(
            "ADAPTER_INVALID",
            f"{CONFIG_FILE} has an unacceptable value",
            got=f"{where!a}: {error.errors()[0]['type']}",
            expected=f"module names without patterns, 1 <= r <= {MAX_RANK}, finite alpha",
        ) from None
    alphas = [config.lora_alpha, *config.alpha_pattern.values()]
    ranks = [config.r, *config.rank_pattern.values()]
    if max(alphas) / min(ranks) > MAX_SCALE:
        raise RefusedError("ADAPTER_INVALID", "alpha is too large for the rank", expected=f"alpha/r <= {MAX_SCALE:g}")
    return config


def _check_names(
    config: AdapterConfig, shapes: Mapping[str, tuple[int, ...]], base_shapes: Mapping[str, tuple[int, int]] | None
) -> None:
    """The most important check of all: PEFT would write any further tensor over the base's own weights."""
    found = _modules(shapes) if base_shapes is None else base_shapes
    linears = (module for module in found if module.rpartition(".")[2] not in EMBEDDINGS)
    targeted = {module for module in linears if config.targets(module)}
    expected = {tensor_name(module, side) for module in targeted for side in "AB"}
    names = set(shapes)
    unused = [target for target in config.target_modules if not any(_names(target, m) for m in targeted)]
    if names != expected or unused:
        extra, missing = sorted(names - expected), sorted(expected - names)
        example = (extra + missing + unused)[0]
        raise RefusedError(
            "ADAPTER_TENSORS",
            "the adapter's tensors are not those its configuration implies",
            got=f"{len(extra)} unexpected, {len(missing)} missing, {len(unused)} targets without a module; "
            f"for example {example[:MAX_NAME_CHARS]!a}",
        )


def _check_shapes(
    config: AdapterConfig, shapes: Mapping[str, tuple[int, ...]], base_shapes: Mapping[str, tuple[int, int]] | None
) -> None:
    for module in _modules(shapes):
        a, b = (shapes[tensor_name(module, side)] for side in "AB")
        rank = config.rank(module)
        out, into = base_shapes[module] if base_shapes else (b[0], a[-1])
        if a != (rank, into) or b != (out, rank):
            raise RefusedError(
                "ADAPTER_TENSORS",
                f"the LoRA on {module!a} has the wrong shape",
                expected=f"A [{rank}, {into}], B [{out}, {rank}]",
                got=f"A {list(a)}, B {list(b)}",
            )


def _check_strength(config: AdapterConfig, shapes: Mapping[str, tuple[int, ...]], norms: Mapping[str, float]) -> None:
    """No module is changed beyond what training ever does. The norm of B·A is at most that of B times that of A."""
    for module in _modules(shapes):
        a, b = (tensor_name(module, side) for side in "AB")
        bound = config.scale(module) * norms[b] * norms[a] / math.sqrt(shapes[b][0] * shapes[a][1])
        if not bound <= MAX_UPDATE_RMS:
            raise RefusedError(
                "ADAPTER_TOO_STRONG",
                f"the LoRA on {module!a} changes its module beyond reason",
                expected=f"scale·|B|·|A| per root of the module's size at most {MAX_UPDATE_RMS:g}",
                got=f"{bound:.3g}",
            )


def _modules(names: Collection[str]) -> tuple[str, ...]:
    return tuple(sorted({module_of(name) for name in names}))
