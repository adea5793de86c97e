"""What a coordinator composed: `composition.json`, and where the parts lie that it speaks of.

composition.json       method, base, experts in the router's row order, what the experts are attached to
router.safetensors     the router's rows and settings
attention/             the attention LoRA in PEFT's format, if there is one
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedcompose.document import Digest, Title
from fedcompose.errors import ConfigError, RefusedError
from fedcompose.files import parse_json
from fedcompose.keys import Identifier
from fedcompose.provenance import Label
from fedcompose.routing import RouterConfig

COMPOSITION_FILE = "composition.json"
ROUTER_FILE = "router.safetensors"
ATTENTION_FOLDER = "attention"

MAX_ROUTER_BYTES = 64 << 20  # 1,000 experts on a hidden size of 16,384 in float32


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class ComposedExpert(_Part):
    """One row of the router."""

    site: Identifier
    domain: Identifier
    dir_hash: Digest = Field(alias="dirHash")


class _ComposedBase(_Part):
    name: Title
    dir_hash: Digest = Field(alias="dirHash")


class _Attention(_Part):
    r: Annotated[int, Field(ge=1)]
    alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Composition(_Part):
    """`composition.json`: how the parts of a release belong together. `training` is for people to read.

    `masked`: sites whose experts the router and the attention LoRA were trained beside, and that were then taken out.
    """

    schema_: Literal["fedcompose/composition/v1"] = Field(alias="schema")
    method: Label
    base: _ComposedBase
    router: RouterConfig
    experts: Annotated[tuple[ComposedExpert, ...], Field(strict=False, min_length=1, max_length=512)]
    targets: Annotated[tuple[Label, ...], Field(strict=False, min_length=1, max_length=64)]
    attention: _Attention | None
    masked: Annotated[tuple[Identifier, ...], Field(strict=False, max_length=512)] = ()
    training: dict[str, Any]


def parse_composition(data: bytes) -> Composition:
    """The checked content of `composition.json`.

    Raises: RefusedError: `COMPOSITION_INVALID`, `JSON_INVALID`.
    """
    document = parse_json(data, COMPOSITION_FILE)
    try:
        return Composition.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part)[:32] for part in first["loc"])
        raise RefusedError(
            "COMPOSITION_INVALID", f"{COMPOSITION_FILE} is not acceptable", got=f"{where!a}: {first['type']}"
        ) from None
    except ConfigError as error:
        raise RefusedError("COMPOSITION_INVALID", f"{COMPOSITION_FILE}: {error.what}", got=error.got) from None
