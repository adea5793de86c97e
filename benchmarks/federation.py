"""What a federation costs its coordinator: many sites in one process, and large contributions over real connections.

    python benchmarks/federation.py grid --out grid.json              10, 100 and 1,000 sites with tiny adapters
    python benchmarks/federation.py transfer --out transfer.json      1 to 5 SuperNodes; 10 MB, 200 MB, 1 GB

Real keys, signatures, call and intake; the adapters hold random numbers. `grid` runs each number of sites in a process
of its own and takes the time of the coordinator's steps; what the sites do themselves (signing) is not counted.
`transfer` runs the processes that `coordinator start` and `client join` run, on loopback with TLS, and sends the same
bytes over a plain TLS connection in turn; a first, tiny contribution shows what Flower waits for in any case. Memory
is the most that a process ever held in RAM.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests' own federation is in the clone only

from fedcompose.files import write_json
from fedcompose.leftovers import processes
from fedcompose_coordinator.tls import make_certificates
from tests.deployed import Deployed, Parties, found, made_call, running, sign_everywhere

SITES = (10, 100, 1000)
TINY = (16, 4, 2)  # hidden size, rank, modules
LARGE = (512, 512)  # hidden size and rank: 2 MiB for each module
MODULE_BYTES = 2 * 4 * LARGE[0] * LARGE[1]
SIZES_MB = (10, 200, 1000)
FLOOR_MB = 2  # so small that only Flower's waits are measured
PLAIN_COPIES = 3  # before, and as many after
PROCESSES = {
    "superlink": "fedcompose_coordinator.superlink", "driver": "fedcompose_coordinator.driver",
    "node": "join --only node", "executor": "join --only executor",
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("grid", "transfer"))
    parser.add_argument("--sites", type=int, nargs="+", help="numbers of sites")
    parser.add_argument(
        "--megabytes", type=int, nargs="+", default=SIZES_MB, help="of each contribution; transfer only"
    )
    parser.add_argument("--out", type=Path, help="write the figures here as well")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measured_grid(arguments.sites[0])))
        return
    if arguments.what == "grid":
        rows = [in_fresh_process(count) for count in arguments.sites or SITES]
    else:
        floor = measured_transfer(1, FLOOR_MB)
        rows = [floor] + [
            measured_transfer(count, size) for size in arguments.megabytes for count in arguments.sites or (1, 2, 5)
        ]
        for row in rows:
            row["plain_copies_above_floor"] = round((row["fetch_s"] - floor["fetch_s"]) / row["plain_tls_s"], 2)
    result = {"cpus": os.cpu_count(), "load": os.getloadavg()[0], "rows": rows}
    print(json.dumps(result, indent=2))
    if arguments.out:
        write_json(arguments.out, result)


# Many sites in one process ------------------------------------------------------------------------


def in_fresh_process(count: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "grid", "--child", "--sites", str(count)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout))


def measured_grid(count: int) -> dict[str, Any]:
    from fedcompose_client.flower import make_app
    from fedcompose_coordinator.driver import judge
    from fedcompose_coordinator.flower import make_driver_app, make_server_app
    from fedcompose_coordinator.local_grid import run_locally
    from fedcompose_coordinator.status import read_status

    with tempfile.TemporaryDirectory() as folder:
        parties = found(Path(folder), count, *TINY)
        call = made_call(parties, TINY[1])
        apps = [Watched(make_app(parties.site(name))) for name in parties.names]
        before = peak_mb()
        server = make_server_app(parties.home, "call", node_timeout_s=0, hear_every_s=0.01)
        called = timed(lambda: run_locally(server, apps))
        sign_everywhere(parties, call)
        admitted: list[str] = []

        def counted(job: Any) -> None:
            judge(job)
            admitted.append(job.state)

        driver = make_driver_app(parties.home, counted, lambda: len(admitted) == count, hear_every_s=0.01)
        collected = timed(lambda: run_locally(driver, apps))
        by_sites = sum(app.worked for app in apps)
        assert set(admitted) == {"admitted"}, set(admitted)
        looked = timed(lambda: read_status(parties.home, datetime.now(UTC)))
        all_s, work_s = (one + other for one, other in zip(called, collected, strict=True))
        return {
            "sites": count,
            "federation_kb": round((parties.home / "federation.json").stat().st_size / 1e3, 1),
            "call_kb": round(next((parties.home / "calls").glob("*.json")).stat().st_size / 1e3, 1),
            "elapsed_ms_per_site": round(1e3 * all_s / count, 1),
            "coordinator_cpu_ms_per_site": round(1e3 * (work_s - by_sites) / count, 1),
            "site_cpu_ms_per_site": round(1e3 * by_sites / count, 1),
            "status_cpu_ms": round(1e3 * looked[1], 1),
            "ledger_kb": round((parties.home / "ledger.jsonl").stat().st_size / 1e3, 1),
            "records_kb": round(
                sum(path.stat().st_size for path in (parties.home / "calls").rglob("*.json*")) / 1e3, 1
            ),
            "peak_mb_before": round(before, 1),
            "peak_mb": round(peak_mb(), 1),
        }


class Watched:
    """A site's app, and the work of its own that it did."""

    def __init__(self, app: Any) -> None:
        self._app, self.site, self.worked = app, app.site, 0.0

    def __call__(self, message: Any, context: Any) -> Any:
        begun = time.thread_time()
        try:
            return self._app(message, context)
        finally:
            self.worked += time.thread_time() - begun


def timed(action: Callable[[], Any]) -> tuple[float, float]:
    """Seconds on the clock, and of this process's own work, which a busy machine does not stretch."""
    begun, worked = time.perf_counter(), time.process_time()
    action()
    return time.perf_counter() - begun, time.process_time() - worked


def peak_mb(pid: int | str = "self") -> float:
    """The most memory a process ever held in RAM. (`ru_maxrss` would count the process that started it, too.)"""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


# Real connections ---------------------------------------------------------------------------------


def measured_transfer(count: int, megabytes: int) -> dict[str, Any]:
    """All sites have signed when they are called; the time is from the first window asked for to the last one kept."""
    with tempfile.TemporaryDirectory() as folder:
        parties = found(Path(folder), count, *LARGE, max(1, megabytes * 10**6 // MODULE_BYTES))
        call = made_call(parties, LARGE[1])
        keep_everywhere(parties, call)
        sign_everywhere(parties, call)
        plain = [plain_tls_copy(parties) for _ in range(PLAIN_COPIES)]
        with running(parties) as deployed:
            begun = time.perf_counter()
            deployed.start_coordinator()
            for name in parties.names:
                deployed.join(name)
            fetching = received = 0.0
            deployed.wait(lambda: any(deployed.state(name) == "fetching" for name in parties.names))
            fetching = time.perf_counter()
            deployed.wait(lambda: all(deployed.state(name) in ("received", "admitted") for name in parties.names), 1800)
            received = time.perf_counter()
            peaks = footprint(deployed)
            deployed.wait(lambda: all(deployed.state(name) == "admitted" for name in parties.names), 600)
            admitted = time.perf_counter()
        plain += [plain_tls_copy(parties) for _ in range(PLAIN_COPIES)]
        return {
            "sites": count,
            "megabytes": megabytes,
            "fetch_s": round(received - fetching, 2),
            "start_to_fetch_s": round(fetching - begun, 2),
            "judge_s": round(admitted - received, 2),
            "plain_tls_s": round(count * min(plain), 2),
            "plain_tls_slowest_s": round(count * max(plain), 2),
            "peak_mb_and_cpu_s": peaks,
        }


def keep_everywhere(parties: Parties, call: Any) -> None:
    """As if the call had come, and its owner had approved it, before the clock starts."""
    from fedcompose_client.jobs import keep

    (envelope,) = (path.read_bytes() for path in (parties.home / "calls").glob("*.json"))
    for name in parties.names:
        keep(parties.site(name), call, envelope, parties.now)


def footprint(deployed: Deployed) -> dict[str, list[float]]:
    """Peak memory in MB and processor seconds, which a busy machine does not stretch; of the largest of each kind."""
    costs: dict[str, list[float]] = {}
    for kind, words in PROCESSES.items():
        commands = {each.pid: each.command for each in processes().values()}
        pids = [pid for pid, command in commands.items() if words in command and str(deployed.parties.root) in command]
        costs[kind] = [round(max(measure(pid) for pid in pids), 1) for measure in (peak_mb, cpu_s)]
    return costs


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def plain_tls_copy(parties: Parties) -> float:
    """Seconds for one site's contribution through a TLS connection on loopback, from file to file."""
    name = parties.names[0]
    (weights,) = (parties.site(name) / "outbox").rglob("adapter_model.safetensors")
    tls, copied = parties.home / "tls", parties.root / "copied"
    if not tls.exists():
        make_certificates(parties.home, ["127.0.0.1"], parties.now)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(tls / "server.pem", tls / "server.key")
    client = ssl.create_default_context(cafile=str(tls / "ca.pem"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        sender = os.fork()
        if sender == 0:
            send_file(listener, server, weights)
        begun = time.perf_counter()
        with (
            client.wrap_socket(socket.create_connection(listener.getsockname()), server_hostname="127.0.0.1") as line,
            copied.open("wb") as stream,
        ):
            while data := line.recv(1 << 20):
                stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        seconds = time.perf_counter() - begun
        os.waitpid(sender, 0)
    assert copied.stat().st_size == weights.stat().st_size
    copied.unlink()
    return seconds


def send_file(listener: socket.socket, context: ssl.SSLContext, path: Path) -> None:
    """In a process of its own, as a site's node is; it never returns."""
    try:
        connection, _ = listener.accept()
        with context.wrap_socket(connection, server_side=True) as line, path.open("rb") as stream:
            while data := stream.read(1 << 20):
                line.sendall(data)
            line.unwrap()
    finally:
        os._exit(0)


if __name__ == "__main__":
    main()
