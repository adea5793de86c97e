"""What verifying costs: a contribution and a release of 200 MB and of 1 GB, against hashing the same files.

    python benchmarks/verify.py --out verify.json

Everything is made here with random weights, real keys and real signatures, in a temporary folder (3 GB at most). Each
measurement is of a fresh process, in turn with `sha256sum`, and with `openssl dgst -sha256`, which uses the processor's
own SHA instructions where `sha256sum` may not; the files are in the page cache. The best of several runs counts. The
peak of memory is to be the same for files of any size.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np

from fedcompose.adapter import CONFIG_FILE, WEIGHTS_FILE, tensor_name
from fedcompose.contribution import ReceivedContribution, verify_contribution
from fedcompose.drafts import create_federation, enrol
from fedcompose.federation_file import verify_federation
from fedcompose.files import dir_hash, folder_digests, write_json
from fedcompose.keys import load_signer, new_key
from fedcompose.provenance import (
    BaseReference,
    Ingredient,
    LoraSummary,
    Provenance,
    ReleaseProvenance,
)
from fedcompose.release import ReceivedRelease, verify_release
from fedcompose.routing import RouterConfig
from fedcompose.signing import SIGNATURE_FILE, Signer, keyid_of, sign_files, verify_files
from fedcompose.statement import build_provenance, build_release_provenance
from fedcompose.tensors import StoredTensor, canonical_safetensors

NOW = datetime(2026, 11, 20, 9, tzinfo=UTC)
FEDERATION = "urn:uuid:6b0c0000-0000-4000-8000-000000000006"
BASE = {"base": "1" * 64}
RANK, HIDDEN = 64, 4096  # a tensor of a megabyte
SITES = ("site-a", "site-b")
SIZES_MB = (8, 200, 1000)
METHOD = "hard"
RUNS = 5
TARGET = 1.3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="write the figures here as well")
    parser.add_argument("--child", nargs=3, metavar=("KIND", "FOLDER", "ROOT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measured(*arguments.child)))
        return
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FEDCOMPOSE_HOME"] = str(Path(folder) / "home")
        rows = compared(Path(folder))
    result = {"target": TARGET, "cpus": os.cpu_count(), "load": os.getloadavg()[0], "rows": rows}
    print(json.dumps(result, indent=2))
    if arguments.out:
        write_json(arguments.out, result)


def compared(folder: Path) -> list[dict[str, Any]]:
    """Every kind and size, each verified in turn with hashing its files."""
    federation, root = made_federation(folder)
    rows = []
    for megabytes in SIZES_MB:
        contribution = made_contribution(folder / f"contribution-{megabytes}", folder, "site-a", megabytes)
        release = made_release(folder / f"release-{megabytes}", folder, federation, megabytes)
        rows += [compare("contribution", contribution, root, megabytes), compare("release", release, root, megabytes)]
        for made in (contribution, release):
            subprocess.run(["rm", "-r", str(made)], check=True)
    return rows


def compare(kind: str, folder: Path, root: str, megabytes: int) -> dict[str, Any]:
    files = [str(path) for path in sorted(folder.rglob("*")) if path.is_file()]
    child = [sys.executable, __file__, "--child", kind, str(folder), root]
    verified, whole, hashed, openssl = [], [], [], []
    timed(["sha256sum", *files])  # into the page cache
    for _ in range(RUNS):
        seconds, text = timed(child)
        whole.append(seconds)
        verified.append(json.loads(text))
        hashed.append(timed(["sha256sum", *files])[0])
        openssl.append(timed(["openssl", "dgst", "-sha256", *files])[0])
    seconds = min(each["seconds"] for each in verified)
    return {
        "kind": kind,
        "megabytes": megabytes,
        "verify_s": round(seconds, 3),
        "process_s": round(min(whole), 3),
        "sha256sum_s": round(min(hashed), 3),
        "openssl_s": round(min(openssl), 3),
        "verify_to_sha256sum": round(seconds / min(hashed), 2),
        "verify_to_openssl": round(seconds / min(openssl), 2),
        "process_to_sha256sum": round(min(whole) / min(hashed), 2),
        "peak_mb": round(max(each["peak_mb"] for each in verified), 1),
    }


def timed(command: list[str]) -> tuple[float, str]:
    begun = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return time.perf_counter() - begun, done.stdout


def measured(kind: str, folder: str, root: str) -> dict[str, float]:
    """In a process of its own: verify once; how long that took, and the most memory the process ever had."""
    path = Path(folder)
    envelope = (path.parent / "federation.json").read_bytes()
    begun = time.perf_counter()
    if kind == "release":
        verify_release(ReceivedRelease(path), [root], NOW)
    else:
        federation = verify_federation(envelope, root_fingerprints=[root], now=NOW)
        verify_contribution(ReceivedContribution(path), federation, now=NOW)
    seconds = time.perf_counter() - begun
    return {"seconds": seconds, "peak_mb": peak_mb()}


def peak_mb() -> float:
    """The most memory this process ever had. (`ru_maxrss` would count the process that started it, too.)"""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


# --- something to verify --------------------------------------------------------------------------


def made_federation(folder: Path) -> tuple[bytes, str]:
    """A federation file beside the folders, and the root's fingerprint."""
    root = load_signer(new_key(folder / "keys", "root", "root", None, None).private)
    envelope = create_federation("Benchmark", root, "root", BASE, FEDERATION, NOW)
    for name in ("hub", *SITES):
        role: Any = "site" if name in SITES else "coordinator"
        request = new_key(folder / "keys", name, role, "domain" if name in SITES else None, None).enrolment
        envelope = enrol(envelope, request.read_bytes(), root, NOW)
    (folder / "federation.json").write_bytes(envelope)
    return envelope, root.keyid


def made_contribution(folder: Path, home: Path, site: str, megabytes: int) -> Path:
    """What a site ships: tensors of a megabyte each, as many as asked for."""
    folder.mkdir(parents=True)
    write_json(
        folder / CONFIG_FILE, {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": ["up_proj"]}
    )
    write_weights(folder / WEIGHTS_FILE, max(1, megabytes // 2))
    write_json(
        folder / "provenance.json",
        build_provenance(
            Provenance(
                **shared(folder),
                kind="adapter",
                site=site,
                domain="domain",
                sequence=1,
                expires=NOW + timedelta(days=14),
                lora=LoraSummary(r=RANK, alpha=float(RANK), targets=("up_proj",)),
            )
        ),
    )
    sign(folder, load_signer(home / "keys" / f"{site}.key"))
    return folder


def write_weights(path: Path, modules: int) -> None:
    """The same random megabyte for every tensor; only its size and its being finite matter here."""
    block = (np.random.default_rng(0).standard_normal(RANK * HIDDEN, dtype=np.float32) * 0.01).tobytes()
    shapes = {"A": (RANK, HIDDEN), "B": (HIDDEN, RANK)}
    tensors = {
        tensor_name(f"model.layers.{n}.mlp.up_proj", side): StoredTensor("F32", shape, memoryview(block))
        for n in range(modules)
        for side, shape in shapes.items()
    }
    path.write_bytes(canonical_safetensors(tensors))


def made_release(folder: Path, home: Path, federation: bytes, megabytes: int) -> Path:
    """What a coordinator ships: the contributions of two sites, half the size each, and a router."""
    experts = [made_contribution(folder / "ingredients" / site, home, site, megabytes // len(SITES)) for site in SITES]
    ingredients = [ingredient(path, site) for path, site in zip(experts, SITES, strict=True)]
    router = StoredTensor("F32", (len(SITES), HIDDEN), memoryview(bytes(4 * len(SITES) * HIDDEN)))
    (folder / "router.safetensors").write_bytes(canonical_safetensors({"weight": router}))
    (folder / "federation.json").write_bytes(federation)
    write_json(folder / "composition.json", composition(ingredients))
    claims = ReleaseProvenance(**shared(folder), coordinator="hub", method=METHOD, ingredients=tuple(ingredients))
    write_json(folder / "provenance.json", build_release_provenance(claims))
    sign(folder, load_signer(home / "keys" / "hub.key"))
    return folder


def ingredient(folder: Path, site: str) -> Ingredient:
    public = load_signer(folder.parents[2] / "keys" / f"{site}.key").public_pem
    signed = verify_files((folder / SIGNATURE_FILE).read_bytes(), public)
    return Ingredient(
        site=site,
        dir_hash=dir_hash(signed.digests),
        payload_sha256=signed.payload_sha256,
        keyid=keyid_of(public),
        sequence=1,
        received_on=NOW,
    )


def composition(ingredients: list[Ingredient]) -> dict[str, Any]:
    return {
        "schema": "fedcompose/composition/v1",
        "method": METHOD,
        "base": {"name": "base", "dirHash": BASE["base"]},
        "router": RouterConfig().model_dump(),
        "experts": [{"site": each.site, "domain": "domain", "dirHash": each.dir_hash} for each in ingredients],
        "targets": ["up_proj"],
        "attention": None,
        "training": {},
    }


def shared(folder: Path) -> dict[str, Any]:
    """What both kinds of provenance say, about the files that lie in the folder so far."""
    return {
        "federation": FEDERATION,
        "federation_version": 4,
        "base": BaseReference(name="base", dir_hash=BASE["base"]),
        "subjects": folder_digests(folder),
        "invocation": "benchmark",
        "finished": NOW,
        "versions": {"fedcompose": "0.1.0"},
    }


def sign(folder: Path, signer: Signer) -> None:
    (folder / SIGNATURE_FILE).write_bytes(sign_files(folder.name, folder_digests(folder), signer))


if __name__ == "__main__":
    main()
