"""Where the SuperLink's door for the driver is, and the secret that opens it; both change with every start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedcompose.errors import FedcomposeError
from fedcompose.files import dump_json, read_json, write_atomic

FLOWER = "flower"  # the folder; Flower itself keeps nothing in it
DOOR_FILE = "driver.json"


def write_door(home: Path, port: int, secret: bytes) -> None:
    write_atomic(home / FLOWER / DOOR_FILE, dump_json({"port": port, "secret": secret.hex()}), 0o600)


def read_door(home: Path) -> dict[str, Any] | None:
    """`port` and `secret`, or None while there is no door."""
    try:
        door: dict[str, Any] = read_json(home / FLOWER / DOOR_FILE)
    except FedcomposeError:
        return None
    return door


def close_door(home: Path) -> None:
    """Forget the door of a SuperLink that is no more."""
    (home / FLOWER / DOOR_FILE).unlink(missing_ok=True)
