"""Which way to compose is best, and by how much? Four domains, three seeds, every method beside its controls.

For each seed a federation of its own: four sites train their experts anew, a coordinator takes them in, composes by
every method with the same seed, and measures all of it on the same held-out prompts. So an interval covers other
prompts, other experts and other compositions. Every step is a `fedcompose` command with its log in OUT/seed-N/logs;
what is finished is not done again, also when a run was cut off or is repeated with more methods.

    python benchmarks/compositions.py study                                       # everything
    python benchmarks/compositions.py study --methods hard,guided,soft,top2       # these and the controls
    python benchmarks/compositions.py study --quick --seeds 1                     # does it run at all?

The result is OUT/comparison.json, .html and .md; `--results docs/results.md` puts the tables into that page. The
controls are described in `fedcompose_coordinator/comparison.py`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from fedcompose.demo import SCENARIOS, Demo, Scenario, train_and_receive, with_settings
from fedcompose.files import write_atomic
from fedcompose_coordinator.commands_evaluate import available, open_evaluation, runs_of
from fedcompose_coordinator.comparison import summarise
from fedcompose_coordinator.report import write_comparison
from fedcompose_coordinator.results import replace_tables

# The demo's three domains and one more that shows its steps: long division, of which a site sees the question and the
# solution. Its numbers look like those of the others, so that a router has to read what is asked.
REMAINDERS = Scenario(
    "school",
    "remainders",
    "remainder",
    {"digits": 3, "max_divisor": 6},
    True,
    {"warm_up_steps": 64, "steps": 16, "lr": 1e-4, "max_new_tokens": 28},
)
STUDY = (*SCENARIOS, REMAINDERS)
# More than the demo, which must end soon, asks and teaches: with 96 prompts to distill on and 44 steps an expert that
# is often wrong left 8 traces, and compositions lost something (docs/log.md).
TRACE_PROMPTS = 600
MORE = {
    "prompts_per_domain": 300,
    "batch": 3 * (len(STUDY) + 1),
    "steps": 100,
    "mixed_lessons": 90,
}


def study_seed(out: Path, seed: int, methods: list[str], quick: bool, base: str) -> Path:
    """One federation, trained, composed and measured; returns the coordinator's folder."""
    demo = Demo(
        out / f"seed-{seed}",
        seed=seed,
        quick=quick,
        base=base,
        scenarios=STUDY,
        trace_prompts=TRACE_PROMPTS,
        on_start=say,
    )
    train_and_receive(demo)
    hub = demo.out / "coordinator"
    if not quick:
        settings = hub / "coordinator.toml"
        demo.once("study-settings", lambda: write_atomic(settings, with_settings(settings.read_text(), MORE).encode()))
    compare = ("coordinator", "evaluate", "--home", hub, "--seeds", "1", "--methods", ",".join(methods))
    demo.step("compare-" + "-".join(methods), *compare)
    return hub


def say(step: str, command: str) -> None:
    print(f"{step:24}{command}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", help="separated by commas, the one that others are compared with first")
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--quick", action="store_true", help="a few steps and prompts, to see it run")
    parser.add_argument("--results", type=Path, help="a page whose tables are made anew")
    arguments = parser.parse_args()
    methods = arguments.methods.split(",") if arguments.methods else available([])
    seeds = range(arguments.seeds)
    hubs = [study_seed(arguments.out, seed, methods, arguments.quick, arguments.base) for seed in seeds]
    measured = [runs_of(open_evaluation(hub), methods, [seed]) for hub, seed in zip(hubs, seeds, strict=True)]
    comparison = summarise([run for runs, _ in measured for run in runs], measured[0][1])
    write_comparison(comparison, arguments.out)
    if arguments.results:
        write_atomic(arguments.results, replace_tables(arguments.results.read_text(), comparison).encode())
    print((arguments.out / "comparison.md").read_text())


if __name__ == "__main__":
    main()
