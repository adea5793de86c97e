"""Build one reasoning model together without pooling data."""

from __future__ import annotations

import importlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

__version__ = "0.1.0"


def load(
    path: Path | str,
    root_fingerprints: Collection[str] | None = None,
    base: Path | str | None = None,
    transfer: bool = False,
) -> tuple[Any, Any]:
    """Verify the release in `path`, then load it: (transformers model, tokenizer), ready for `generate`.

    Without fingerprints the roots that this machine remembers for the federation decide; the newest federation file and
    revocation list that it has accepted are honoured either way. `base` says where the release's base model lies, where
    its name alone does not; with `transfer` it may be another model whose linears have the same names and shapes, for
    which nobody has signed or measured anything.

    Raises: RefusedError: when anything in the release is not what its signatures say, or it is not to be used any more;
                nothing is loaded then.
            MissingError: when this machine lacks the base model.
    """
    # By name, so that importing fedcompose, or verifying, brings in no torch.
    model, tokenizer = importlib.import_module("fedcompose.model.composed").load(
        path, root_fingerprints, base, transfer
    )
    return model, tokenizer
