"""Numbers for Prometheus, on this machine's loopback address only: how far each site is, and what will expire.

Nothing is counted in memory: at each visit the numbers are read from the coordinator's files, so they are right after a
restart too. Labels are the names that the federation file gives, and states and codes of closed lists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from fedcompose import ledger
from fedcompose.document import parse_time
from fedcompose.errors import FedcomposeError
from fedcompose.federation_file import claimed_federation
from fedcompose.files import MAX_JSON_BYTES, read_limited
from fedcompose.trust_state import accepted_federation
from fedcompose_coordinator.config import load_config
from fedcompose_coordinator.decisions import LEDGER_FILE
from fedcompose_coordinator.status import SiteStatus, read_status
from fedcompose_coordinator.tls import CERTIFICATE_FILE, TLS

ADDRESS = "127.0.0.1"
OF_SITE = ("call", "site", "domain")


def serve_metrics(home: Path, port: int) -> Callable[[], None]:
    """Answer at `http://127.0.0.1:port/metrics` until the returned function is called."""
    registry = CollectorRegistry()
    registry.register(HomeCollector(home))
    server, thread = start_http_server(port, addr=ADDRESS, registry=registry)

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return stop


class HomeCollector(Collector):
    """Reads the folder of a coordinator at every visit."""

    def __init__(self, home: Path) -> None:
        self._home = home

    def describe(self) -> list[GaugeMetricFamily]:
        """Nothing to ask for in advance; without this, registering would read the folder once."""
        return []

    def collect(self) -> Iterator[GaugeMetricFamily]:
        now = datetime.now(UTC)
        yield from _of_sites(read_status(self._home, now), now)
        yield _gauge("ledger_entries", "Lines of the coordinator's ledger.", _ledger_entries(self._home))
        yield _gauge(
            "certificate_expires_seconds", "Until the listener's certificate ends.", _certificate(self._home, now)
        )
        yield _gauge("federation_expires_seconds", "Until the federation file ends.", _federation(self._home, now))


def _of_sites(sites: list[SiteStatus], now: datetime) -> Iterator[GaugeMetricFamily]:
    state = GaugeMetricFamily(
        "fedcompose_site_state", "1 for the state that a site's job is in.", labels=[*OF_SITE, "state", "code"]
    )
    received = GaugeMetricFamily("fedcompose_site_received_bytes", "Of its contribution, so far.", labels=OF_SITE)
    total = GaugeMetricFamily("fedcompose_site_contribution_bytes", "Of its contribution, in all.", labels=OF_SITE)
    progress = GaugeMetricFamily("fedcompose_site_progress_ratio", "Of the training's present stage.", labels=OF_SITE)
    seen = GaugeMetricFamily("fedcompose_site_last_seen_seconds", "Since its last answer.", labels=OF_SITE)
    for each in sites:
        labels = [each.call, each.site, each.domain]
        state.add_metric([*labels, each.state, each.code or ""], 1)
        received.add_metric(labels, max(each.bytes, 0))
        total.add_metric(labels, max(each.total, 0))
        if each.steps > 0:
            progress.add_metric(labels, max(each.step, 0) / each.steps)
        if each.last_seen is not None:
            seen.add_metric(labels, (now - parse_time(each.last_seen)).total_seconds())
    yield from (state, received, total, progress, seen)


def _gauge(name: str, text: str, value: float | None) -> GaugeMetricFamily:
    """One number; none where it cannot be known."""
    family = GaugeMetricFamily(f"fedcompose_{name}", text)
    if value is not None:
        family.add_metric([], value)
    return family


def _ledger_entries(home: Path) -> float | None:
    try:
        return ledger.head(home / LEDGER_FILE).entries
    except FedcomposeError:
        return None


def _certificate(home: Path, now: datetime) -> float | None:
    path = home / TLS / CERTIFICATE_FILE
    if not path.is_file():
        return None
    return (x509.load_pem_x509_certificate(path.read_bytes()).not_valid_after_utc - now).total_seconds()


def _federation(home: Path, now: datetime) -> float | None:
    try:
        envelope = read_limited(home / load_config(home).federation, MAX_JSON_BYTES)
        federation = accepted_federation(claimed_federation(envelope))
    except FedcomposeError:
        return None
    return (federation.expires - now).total_seconds() if federation else None
