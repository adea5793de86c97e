"""Try many mutated inputs on everything that reads a stranger's bytes, and count what came of them.

    python tests/fuzz/run.py --cases 200000 --out findings

With atheris installed (`make fuzz` makes an environment that has it) each target runs in a process of its own, and what
reaches new code is mutated further. Without it the same mutations are made blindly. A finding is any error but a
refusal, or an accepted input with another meaning; its bytes are kept in `--out`, and the exit status is 1. Niceness is
raised first: nothing here is urgent.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from random import Random

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

try:
    import atheris
except ImportError:
    atheris = None


def main() -> int:
    arguments = parsed()
    os.nice(19 - os.nice(0))
    if arguments.target:
        return one_target(arguments)
    from tests.fuzz.targets import targets

    with tempfile.TemporaryDirectory() as folder:
        names = list(targets(Path(folder)))
    share = -(-arguments.cases // len(names))
    began, total, findings = time.monotonic(), 0, 0
    for name in names:
        command = [sys.executable, __file__, "--target", name, "--cases", str(share), "--out", str(arguments.out)]
        begun = time.monotonic()
        ended = subprocess.run([*command, "--seed", str(arguments.seed)], capture_output=True, text=True, check=False)
        done = executed(ended.stderr)
        total, findings = total + done, findings + (ended.returncode != 0)
        print(f"{name:20} {done:8} cases {time.monotonic() - begun:7.1f} s  {'FINDING' if ended.returncode else 'ok'}")
        if ended.returncode:
            print(ended.stderr[-3000:])
    engine = "atheris" if atheris else "random"
    summary = {"engine": engine, "cases": total, "seconds": round(time.monotonic() - began, 1), "findings": findings}
    print(json.dumps(summary))
    return 1 if findings else 0


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=200_000, help="in total")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--out", type=Path, default=Path("fuzz-findings"), help="where inputs that are findings are kept"
    )
    parser.add_argument("--target", help="one target only, in this process")
    return parser.parse_args()


def executed(text: str) -> int:
    """How many inputs were tried, as either engine says at its end."""
    found = re.findall(r"Done (\d+) ", text) or re.findall(r"^#(\d+)", text, re.MULTILINE)
    return int(found[-1]) if found else 0


def one_target(arguments: argparse.Namespace) -> int:
    arguments.out.mkdir(parents=True, exist_ok=True)
    prefix = arguments.out / f"{arguments.target.replace(' ', '-')}-"
    with tempfile.TemporaryDirectory() as folder:
        if atheris:
            guided(arguments, Path(folder), prefix)
        return blind(arguments, Path(folder), prefix)


def guided(arguments: argparse.Namespace, folder: Path, prefix: Path) -> None:
    """Mutate what reaches new code; ends the process."""
    with atheris.instrument_imports(include=["fedcompose"]):
        from tests.fuzz.targets import targets
    from tests.fuzz.mutation import mutated

    target = targets(folder)[arguments.target]
    (corpus := folder / "corpus").mkdir()
    (corpus / "seed").write_bytes(target.seed)

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        """Half of the time the good input once more: what is far from it is refused at the first look."""
        random = Random(seed)
        if random.random() < 0.2:
            return bytes(atheris.Mutate(data, max_size))
        return mutated(data if random.random() < 0.4 else target.seed, target.form, random)[:max_size]

    options = [f"-runs={arguments.cases}", f"-seed={arguments.seed}", "-max_len=65536", "-len_control=0", "-timeout=20"]
    limits = ["-rss_limit_mb=2048", f"-artifact_prefix={prefix}", "-print_final_stats=0", str(corpus)]
    atheris.Setup([sys.argv[0], *options, *limits], target.try_, custom_mutator=mutate)
    atheris.Fuzz()


def blind(arguments: argparse.Namespace, folder: Path, prefix: Path) -> int:
    """The same mutations, of the good input and of what was accepted."""
    from tests.fuzz.mutation import mutated
    from tests.fuzz.targets import targets

    target, random = targets(folder)[arguments.target], Random(arguments.seed)
    pool: list[bytes] = [target.seed]
    for number in range(arguments.cases):
        data = mutated(random.choice(pool), target.form, random)
        try:
            if target.try_(data) and len(pool) < 500:
                pool.append(data)
        except BaseException as error:
            prefix.with_name(f"{prefix.name}{number}").write_bytes(data)
            print(f"#{number}\n{type(error).__name__}: {error}", file=sys.stderr)
            raise
    print(f"Done {arguments.cases} runs", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
