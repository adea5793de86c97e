"""Problems with checkable answers: how to ask them, read an answer, score it, and make more of them."""

from fedcompose.tasks.answer_line import AnswerLine
from fedcompose.tasks.choice import render_choices
from fedcompose.tasks.example import JSON, Example, Origin, Task
from fedcompose.tasks.generators import Generator, GeneratorConfig, split_of
from fedcompose.tasks.registry import (
    GENERATORS,
    TASKS,
    generate,
    generator_names,
    generator_task,
    get_task,
    held_out,
    task_names,
    training,
)

__all__ = [
    "GENERATORS",
    "JSON",
    "TASKS",
    "AnswerLine",
    "Example",
    "Generator",
    "GeneratorConfig",
    "Origin",
    "Task",
    "generate",
    "generator_names",
    "generator_task",
    "get_task",
    "held_out",
    "render_choices",
    "split_of",
    "task_names",
    "training",
]
