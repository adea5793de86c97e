"""What would supervised training alone have reached in the same time?

For every site of a finished demo: train again on the same rows with as many supervised steps as fit into the seconds
that warm-up and reinforcement took together, and compare on the same test rows. The learning rate falls over the whole
run, so the control is not a cut-off schedule.

    python benchmarks/sft_control.py demo --out control
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from fedcompose_client.config import load_config
from fedcompose_client.train import train


def control(site: Path, out: Path) -> dict[str, object]:
    """Train one site's only domain without reinforcement for the time its real training took."""
    config = load_config(site)
    ((name, domain),) = config.domains.items()
    real = json.loads((site / "runs" / name / "result.json").read_text())
    seconds = real["seconds"]
    wanted = domain.training
    steps = round(wanted.warm_up_steps * (1 + seconds["rlvr"] / seconds["warm_up"]))
    supervised = wanted.model_copy(update={"steps": 0, "warm_up_steps": steps})
    changed = domain.model_copy(update={"training": supervised, "file": (site / domain.file).resolve()})
    folder = out / site.name
    folder.mkdir(parents=True, exist_ok=True)
    result = train(folder, config.model_copy(update={"domains": {name: changed}}), name, lambda *progress: None)
    return {
        "site": site.name,
        "seconds": {"real": sum(seconds.values()), "control": sum(result["seconds"].values())},
        "supervised_steps": steps,
        "base": real["accuracy"]["base"],
        "warmup": real["accuracy"]["warmup"],
        "rlvr": real["accuracy"]["rlvr"],
        "sft_only": result["accuracy"]["warmup"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("demo", type=Path)
    parser.add_argument("--out", type=Path, default=Path("control"))
    arguments = parser.parse_args()
    for site in sorted((arguments.demo / "sites").iterdir()):
        row = control(site, arguments.out)
        (arguments.out / f"{site.name}.json").write_text(json.dumps(row, indent=2))
        print(json.dumps(row))


if __name__ == "__main__":
    main()
