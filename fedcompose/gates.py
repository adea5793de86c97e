"""A site's gates: for each linear that its expert changes, one vector that opens for inputs like the site's own.

Source: PHATGOOSE, arXiv 2402.05859. Gates let a coordinator compose without traces. They are learned from the site's
private data, as its expert is, and may tell about it what the expert may tell. They lie beside the weights in the same
signed folder, as one safetensors file: a float32 vector for each linear, by the linear's name in the base. How long a
vector is makes no difference to the router, which standardises it; a direction that fits everybody's inputs would, and
is found by where it sends tokens. No tensor library is needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from fedcompose.adapter import AdapterConfig
from fedcompose.errors import RefusedError
from fedcompose.tensors import StoredTensor, canonical_safetensors, parse_safetensors

GATES_FILE = "gates.safetensors"
MAX_GATES_BYTES = 32 << 20  # those of every MLP of a 70B base take 15 MB

Gates = Mapping[str, NDArray[np.float32]]  # by the name of the linear in the base


def read_gates(data: bytes, config: AdapterConfig, base_shapes: Mapping[str, tuple[int, int]] | None) -> Gates:
    """The gates in a file that anybody may have written, exactly those that the expert's configuration implies.

    Without `base_shapes` (see `check_adapter`) they must be vectors of targeted linears.

    Raises: RefusedError: `GATES_INVALID`, `SAFETENSORS_INVALID`.
    """
    found = parse_safetensors(data)
    if any(tensor.dtype != "F32" or len(tensor.shape) != 1 for tensor in found.values()):
        _refuse("a tensor that is no float32 vector")
    if not all(config.targets(name) for name in found):
        _refuse("a gate for a linear that the expert leaves alone")
    widths = {name: tensor.shape[0] for name, tensor in found.items()}
    expected = {name: shape[1] for name, shape in (base_shapes or {}).items() if config.targets(name)}
    if base_shapes is not None and widths != expected:
        _refuse("not one gate as wide as its input for each linear that the expert changes")
    gates = {name: tensor.float32() for name, tensor in found.items()}
    if not all(np.isfinite(gate).all() and gate.any() for gate in gates.values()):
        _refuse("a gate that is zero or not finite")
    return gates


def write_gates(gates: Gates) -> bytes:
    """The gates in their one canonical form."""
    return canonical_safetensors(
        {
            name: StoredTensor("F32", gate.shape, memoryview(np.ascontiguousarray(gate, dtype="<f4").tobytes()))
            for name, gate in gates.items()
        }
    )


def _refuse(got: str) -> NoReturn:
    raise RefusedError("GATES_INVALID", f"{GATES_FILE} does not fit the expert beside it", got=got)
