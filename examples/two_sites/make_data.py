"""Data for the tour of the README: one file of problems for each of two sites, standing for their own.

Run `python examples/two_sites/make_data.py FOLDER`. Each line has a question, its answer and a worked solution, made by
the generators that come with fedcompose, and no question that the coordinator would test on.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from fedcompose.tasks import training

ROWS = 700
SITES = {"site-a": "count_items", "site-b": "logic"}


def main(folder: Path) -> None:
    for site, generator in SITES.items():
        path = folder / site / "problems.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [
            {"question": example.question, "answer": example.answer, "solution": example.solution}
            for example in training(generator, {}, ROWS)
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"wrote {len(rows)} problems to {path}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
