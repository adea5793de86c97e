"""Public test vectors, where they lie: in FEDCOMPOSE_VECTORS, or in ../shared/vectors beside the repository.

They are not part of the project. A test that finds them absent is skipped and says so.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


def vectors(name: str) -> Any:
    """The JSON document `name` among the vectors."""
    folder = Path(os.environ.get("FEDCOMPOSE_VECTORS") or ROOT.parent / "shared" / "vectors")
    if not (folder / name).is_file():
        pytest.skip(f"no {name} in {folder}; name the folder of public vectors in FEDCOMPOSE_VECTORS")
    return json.loads((folder / name).read_bytes())
