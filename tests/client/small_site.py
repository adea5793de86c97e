"""A site whose answers a tiny model can learn in a few steps, so that its samples earn something."""

from __future__ import annotations

import json
from pathlib import Path

from fedcompose_client.config import SiteConfig

TRAINING = {
    "rank": 8, "validation_count": 10, "test_count": 10, "warm_up_steps": 45, "warm_up_batch": 2, "warm_up_lr": 0.05,
    "steps": 6, "prompts_per_step": 2, "samples_per_prompt": 8, "max_new_tokens": 14, "lr": 0.005, "temperature": 0.7,
}  # fmt: skip


def make_site(folder: Path, base: Path, **training: object) -> SiteConfig:
    """Its file and settings: is the first digit smaller than the second?"""
    folder.mkdir()
    rows = [{"question": f"{a}{b}", "answer": "yes" if a < b else "no"} for a in range(7) for b in range(7)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    domain = {"file": "rows.jsonl", "task": "yes_no", "training": TRAINING | training}
    return SiteConfig.model_validate({"id": "site-a", "base": str(base), "key": "k", "domains": {"order": domain}})


def silent(stage: str, step: int, steps: int, note: str) -> None:
    """No progress wanted."""
