"""Logs for the machines that keep them: one JSON object a line, which has no place for data.

    {"at":"2026-11-20T09:00:00Z","code":"CALL_SHAPE","event":"refused an action","level":"warning","part":"executor"}

An event is the constant text of the call that logs it; arguments are never put into it. Values stand only under the
names in `FIELDS`, and only if they are of the form given there: names, codes, digests and numbers, so that no sentence
fits. Of an exception its type and place are kept, not its message, for a message may quote what it is about. Of other
people's packages, whose texts we do not know, only the logger's name and the place are kept. Whoever looks for a fault
sets FEDCOMPOSE_DEBUG=1 and sees every text, which may then quote data.

    log.warning("refused an action", extra={"code": error.code, "site": site})
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import threading
import traceback
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from fedcompose.document import format_time

log = logging.getLogger(__name__)

OWN = ("fedcompose", "fedcompose_client", "fedcompose_coordinator")
DEBUG = "FEDCOMPOSE_DEBUG"
MAX_NUMBER = 1 << 63

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}", re.ASCII)
_CODE = re.compile(r"[A-Z][A-Z0-9_]{2,63}", re.ASCII)
_DIGEST = re.compile(r"[0-9a-f]{16,64}", re.ASCII)

# Everything that a line may say beside its event. A number is any that JSON can write.
FIELDS: Mapping[str, re.Pattern[str] | None] = {
    "site": _NAME, "domain": _NAME, "call": _NAME, "child": _NAME, "action": _NAME, "state": _NAME, "stage": _NAME,
    "code": _CODE, "sha256": _DIGEST,
    "step": None, "steps": None, "bytes": None, "seconds": None, "attempt": None, "pid": None, "status": None,
    "port": None, "count": None,
}  # fmt: skip


def configure(part: str, stream: TextIO | None = None, level: int = logging.INFO) -> None:
    """Send what this process logs to `stream` (by default standard error) in this form, and nowhere else.

    So goes what nothing caught, in any thread: Python would print it with its message, which may quote data.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonLines(part))
    logging.root.handlers[:] = [handler]
    logging.root.setLevel(logging.WARNING)
    for package in OWN:
        logging.getLogger(package).setLevel(level)
    for name in list(logging.root.manager.loggerDict):  # loggers of packages that came with handlers of their own
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
        if name.partition(".")[0] not in OWN:
            logger.setLevel(logging.NOTSET)
    sys.excepthook = _uncaught
    threading.excepthook = lambda thread: _uncaught(thread.exc_type, thread.exc_value, thread.exc_traceback)


def _uncaught(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
    if error is not None and kind is not SystemExit:
        log.critical("nothing caught an error", exc_info=(kind, error, trace))


class JsonLines(logging.Formatter):
    """Formats a record as one JSON object; `part` says which process it is of."""

    def __init__(self, part: str) -> None:
        super().__init__()
        self._part = part

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "at": format_time(datetime.fromtimestamp(record.created, UTC)),
            "level": record.levelname.lower(),
            "part": self._part,
            "event": _event(record),
        }
        line |= {name: value for name in FIELDS if is_loggable(name, value := record.__dict__.get(name))}
        if record.exc_info and record.exc_info[1] is not None:
            line |= _failure(record.exc_info[1])
        if DEBUG in os.environ:
            line["text"] = super().format(record)
        return json.dumps(line, sort_keys=True, separators=(",", ":"), allow_nan=False)


def is_loggable(name: str, value: Any) -> bool:
    """Whether a line may have this value under this name."""
    if isinstance(value, str):
        pattern = FIELDS.get(name)
        return pattern is not None and pattern.fullmatch(value) is not None
    is_number = type(value) in (int, float) and -MAX_NUMBER < value < MAX_NUMBER  # which no infinity or NaN is
    return is_number and name in FIELDS and FIELDS[name] is None


def _event(record: logging.LogRecord) -> str:
    """The text that our own code wrote down as it stands; of other code, where it is."""
    if record.name.partition(".")[0] in OWN and isinstance(record.msg, str):
        return record.msg
    return f"{record.name}, line {record.lineno}"


def _failure(error: BaseException) -> dict[str, str]:
    frames = traceback.extract_tb(error.__traceback__)
    found = {"error": type(error).__name__}
    return found | ({"where": f"{Path(frames[-1].filename).name}:{frames[-1].lineno}"} if frames else {})
