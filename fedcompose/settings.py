"""Settings files: a commented TOML template that a role writes, and a strict model that reads it back."""

from __future__ import annotations

import tomllib
from importlib.resources import files
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from fedcompose.errors import ConfigError

MAX_PROBLEMS = 5  # of one file, shown at once


class Settings(BaseModel):
    """Base of every settings model: unknown names are refused, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


Model = TypeVar("Model", bound=Settings)


def read_settings(path: Path, model: type[Model], make: str) -> Model:
    """The checked settings in `path`; `make` is the command that would write such a file.

    Raises: ConfigError: `SETTINGS_MISSING`, `SETTINGS_INVALID`.
    """
    if not path.is_file():
        raise ConfigError(
            "SETTINGS_MISSING",
            f"there is no {path.name} in {path.parent}",
            fix=f"run `{make}` there, or name the folder",
        )
    try:
        return model.model_validate(tomllib.loads(path.read_text("utf-8")))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError("SETTINGS_INVALID", f"{path} is not valid TOML", got=str(error)) from error
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()[:MAX_PROBLEMS]]
        raise ConfigError("SETTINGS_INVALID", f"{path} has unusable settings", got="; ".join(problems)) from error


def fill_template(package: str, name: str, /, **values: str) -> str:
    """The template `name` of a package with its `@name@` marks replaced."""
    text = (files(package) / "templates" / name).read_text("utf-8")
    for mark, value in values.items():
        text = text.replace(f"@{mark}@", value)
    return text
