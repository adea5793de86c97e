"""Every error this project raises on purpose.

    FedcomposeError          code, exit status, and a text for people
    ├── RefusedError         1  something untrusted was checked and turned away
    ├── ConfigError          2  a command, file or setting is wrong
    └── MissingError         3  this machine lacks something (a base, a package, disk)

A text says what happened, what was expected, what was found and what to do. It never contains data, prompts or keys.
"""

from __future__ import annotations


class FedcomposeError(Exception):
    """Base of the tree; `code` is stable across versions and safe to match on."""

    exit_status = 1

    def __init__(
        self, code: str, what: str, *, expected: str | None = None, got: str | None = None, fix: str | None = None
    ) -> None:
        super().__init__(what)
        self.code = code
        self.what = what
        self.expected = expected
        self.got = got
        self.fix = fix

    def diagnostics(self) -> str:
        """The text for people: what, expected, got, what to do."""
        lines = [f"{self.code}: {self.what}"]
        lines += [
            f"  {label:<9} {text}"
            for label, text in (("expected", self.expected), ("got", self.got), ("do", self.fix))
            if text
        ]
        return "\n".join(lines)

    def as_dict(self) -> dict[str, str | None]:
        """The same for machines (`--json`)."""
        return {"code": self.code, "what": self.what, "expected": self.expected, "got": self.got, "do": self.fix}


class RefusedError(FedcomposeError):
    """Something untrusted was checked and turned away; nothing of it was kept or loaded."""

    exit_status = 1


class ConfigError(FedcomposeError):
    """A command line, a configuration file or a data file is not usable as it stands."""

    exit_status = 2


class MissingError(FedcomposeError):
    """This machine lacks something the step needs: a base model, a package, disk space, a peer."""

    exit_status = 3
