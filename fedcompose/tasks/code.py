"""Python functions, checked by unit tests that run in a separate, limited process (`sandbox.py`).

Here an example's `answer` is its tests: Python source with at least one `assert`, run after the model's
code.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass

from fedcompose.tasks.answer_line import FORM_REWARD
from fedcompose.tasks.example import Example
from fedcompose.tasks.sandbox import DEFAULT_LIMITS, MAX_SOURCE_CHARS, Limits, passes

_BLOCK = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)


@dataclass(frozen=True)
class Code:
    """The task for code; `limits` bound one run of one completion."""

    name: str = "code"
    limits: Limits = DEFAULT_LIMITS

    def prompt(self, question: str) -> str:
        return f"{question}\nWrite Python in a ``` block."

    def canonical(self, answer: str) -> str | None:
        """The tests as they are, when they are Python with an `assert`."""
        tree = _tree(answer)
        return answer if tree and any(isinstance(node, ast.Assert) for node in ast.walk(tree)) else None

    def parse(self, completion: str) -> str | None:
        """The last code block, or the whole text when that is Python with a function or class."""
        blocks = _BLOCK.findall(completion[-MAX_SOURCE_CHARS:])
        source = str(blocks[-1]) if blocks else completion
        tree = _tree(source)
        defines = tree and any(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in tree.body)
        return source.strip() + "\n" if defines else None

    def is_correct(self, completion: str, answer: str) -> bool:
        code = self.parse(completion)
        return code is not None and passes(code, answer, self.limits)

    def reward(self, completion: str, answer: str) -> float:
        code = self.parse(completion)
        if code is None:
            return 0.0
        return 1.0 if passes(code, answer, self.limits) else FORM_REWARD

    def target(self, example: Example) -> str:
        return f"```python\n{(example.solution or '').strip()}\n```"


def _tree(source: str) -> ast.Module | None:
    try:
        return ast.parse(source) if len(source) <= MAX_SOURCE_CHARS else None
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


code = Code()
