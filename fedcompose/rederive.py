"""A trace's problem, made again or taken from the trace, and whether the trace answers it: nobody's word is needed.

A site checks its own traces this way before they leave, and the coordinator checks them again when they arrive.
"""

from __future__ import annotations

from fedcompose.errors import ConfigError
from fedcompose.tasks import Example, Origin, generate, generator_task, get_task
from fedcompose.traces import Trace


def rederive(trace: Trace) -> Example | None:
    """The problem that the trace answers; None where it answers wrongly, or names a problem that does not exist here.

    Raises: MissingError: `PACKAGE_MISSING`, for a generator of reasoning-gym.
    """
    try:
        example, task = _problem(trace), get_task(trace.task)
    except ConfigError:  # a task, a generator or settings that do not exist here
        return None
    return example if example and task.is_correct(trace.completion, example.answer) else None


def _problem(trace: Trace) -> Example | None:
    if trace.generator is not None and trace.seed is not None:
        fits = trace.task == generator_task(trace.generator)
        return generate(Origin(trace.generator, trace.config or {}, trace.seed)) if fits else None
    if trace.question is not None and trace.answer is not None:
        return Example(trace.question, trace.answer)
    return None
