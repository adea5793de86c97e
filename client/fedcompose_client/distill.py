"""Step 3: sample the expert and keep what is verifiably right, as traces that say where their prompts come from.

Input: `runs/<domain>/expert/`. Output: `runs/<domain>/sampled.jsonl`, for the trace firewall.

Nothing is sampled unless site.toml asks for traces. Prompts come from the domain's declared generator (class B), which
does not depend on private data, or from a public file (class C); only a domain that was declared non-private may be
distilled on its own questions (class F). A completion is kept when it ended by itself, answers correctly and holds
nothing that could be taken for a chat marker or a control token; equal ones are kept once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from peft import PeftModel

from fedcompose.bases import control_tokens, resolve_base
from fedcompose.errors import ConfigError
from fedcompose.files import write_atomic
from fedcompose.model.lm import load_base, merged, prompt_ids
from fedcompose.model.sampling import sample
from fedcompose.tasks import Example, Task, generator_task, get_task, training
from fedcompose.traces import TRACES_FILE, Trace, encode, is_plain_text
from fedcompose_client.config import Domain, SiteConfig, TraceSource
from fedcompose_client.firewall import (
    CLASSES,
    HELD_FILE,
    REVIEW_FILE,
    SAMPLED_FILE,
    public_problems,
    trace_source,
)
from fedcompose_client.own_rows import dp_of, own_rows

FIRST_SEED = 1_000_000  # far from seeds a person would pick, and the same at every site: seeds say nothing


@dataclass(frozen=True)
class Distilled:
    """What was kept, and what it took."""

    path: Path
    traces: int
    prompts: int
    sampled: int
    correct: int


def distill(site: Path, config: SiteConfig, domain_name: str, on_done: Callable[[int, int], None]) -> Distilled:
    """Write the domain's traces, for the firewall to judge.

    Raises: ConfigError: `TRACES_OFF`, `TRACES_PRIVATE`, `EXPERT_MISSING`, `TRACES_NONE`.
    """
    domain = config.domain(domain_name)
    source, run = trace_source(domain), site / "runs" / domain_name
    if not (run / "expert").is_dir():
        raise ConfigError(
            "EXPERT_MISSING",
            f"{run} holds no finished expert",
            fix=f"fedcompose client train --domain {domain_name}",
        )
    task, examples = _prompts(site, domain, source, run)
    examples = [example for example in examples if is_plain_text(example.question)]
    base = resolve_base(config.base)
    tokens = control_tokens(base)
    frozen, tokenizer = load_base(base.path)
    model = PeftModel.from_pretrained(frozen, str(run / "expert")).eval()
    for name in (SAMPLED_FILE, HELD_FILE, TRACES_FILE, REVIEW_FILE):  # of an earlier time: they are not for this one
        (run / name).unlink(missing_ok=True)
    done = 0

    def count(prompts: int) -> None:
        nonlocal done
        done += prompts
        on_done(done, len(examples))

    with merged(model):
        groups = sample(
            model, tokenizer, [prompt_ids(tokenizer, task.prompt(example.question)) for example in examples],
            max_new_tokens=domain.training.max_new_tokens, count=source.samples_per_prompt,
            temperature=source.temperature, seed=domain.training.seed, on_done=count,
        )  # fmt: skip
    correct, traces = 0, []
    for example, group in zip(examples, groups, strict=True):
        right = [one for one in group if one.finished and task.is_correct(one.text, example.answer)]
        correct += len(right)
        texts = dict.fromkeys(one.text for one in right if is_plain_text(one.text, tokens))
        traces += [_trace(task, example, text, source) for text in list(texts)[: source.max_per_prompt]]
    if not traces:
        raise ConfigError(
            "TRACES_NONE",
            "the expert answered none of the prompts correctly",
            fix="train it longer, or declare an easier generator configuration for its traces",
        )
    write_atomic(run / SAMPLED_FILE, encode(traces))
    return Distilled(run / SAMPLED_FILE, len(traces), len(examples), sum(map(len, groups)), correct)


def _prompts(site: Path, domain: Domain, source: TraceSource, run: Path) -> tuple[Task, list[Example]]:
    """The problems to sample on."""
    if source.generator:
        task = get_task(generator_task(source.generator))
        return task, training(source.generator, source.config, source.prompts, FIRST_SEED)
    if source.questions == "public":
        return get_task(domain.task), public_problems(site, domain)[: source.prompts]
    rows = own_rows(site, domain, dp_of(run)).splits.train
    return get_task(domain.task), rows[: source.prompts]


def _trace(task: Task, example: Example, text: str, source: TraceSource) -> Trace:
    if example.origin:
        return Trace(
            provenance_class="B", task=task.name, completion=text, generator=example.origin.name,
            config=dict(example.origin.config), seed=example.origin.seed,
        )  # fmt: skip
    return Trace(
        provenance_class=CLASSES[source.questions], task=task.name, completion=text, question=example.question,
        answer=example.answer,
    )  # fmt: skip
