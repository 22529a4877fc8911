"""Counters of the server, in Prometheus's text form."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from crosstill.search.searcher import Searcher
from crosstill.search.serve.batching import Gate

TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """Counters in a registry of their own, so that two servers in a process do not add up."""

    def __init__(self, searcher: Searcher) -> None:
        registry = self._registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter(
            "crosstill_requests", "Requests answered.", ["route", "status"], registry=registry
        )
        self.seconds = Histogram(
            "crosstill_request_seconds",
            "From the head of a request to the end of its answer.",
            ["route"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.rejected = Counter(
            "crosstill_rejected",
            "Requests and connections turned away by a limit.",
            ["limit"],
            registry=registry,
        )
        self.received = Counter(
            "crosstill_received_bytes", "Bytes read from connections.", registry=registry
        )
        self.connections = Gauge("crosstill_connections", "Open connections.", registry=registry)
        self.batches = Histogram(
            "crosstill_batch_size",
            "Searches computed together.",
            buckets=_SIZES,
            registry=registry,
        )
        self._watch("crosstill_index_photos", "Photos in the index.", lambda: len(searcher))
        self._watch("crosstill_index_generation", "Generation served.", lambda: searcher.generation)

    def watch_queue(self, gate: Gate) -> Gate:
        """Report how many searches are inside."""
        self._watch("crosstill_queue", "Searches waiting or under way.", lambda: gate.inside)
        return gate

    def text(self) -> bytes:
        """Return all counters, for a scrape."""
        return generate_latest(self._registry)

    def _watch(self, name: str, meaning: str, value: Callable[[], float]) -> None:
        Gauge(name, meaning, registry=self._registry).set_function(value)
