"""Metrics of every daemon, in the Prometheus text format."""

import math
import time
from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest


class Metrics:
    """The metrics of one daemon; their names and labels are a public interface for dashboards and alerts."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._sources: dict[str, frozenset[str]] = {}
        self.version = Gauge("fednats_model_version", "Newest model version known.", registry=self.registry)
        self.buffered = Gauge(
            "fednats_buffered", "Contributions taken in and not yet combined.", registry=self.registry
        )
        self.accepted = Counter(
            "fednats_contributions_accepted", "Updates or aggregates that were combined.", registry=self.registry
        )
        self.refused = Counter(
            "fednats_refused", "What was received and refused, by reason.", ["reason"], registry=self.registry
        )
        self.refused_by_region = Counter(
            "fednats_refused_by_region",
            "Updates of this site that its region refused, by reason.",
            ["reason"],
            registry=self.registry,
        )
        self.present = Gauge("fednats_present", "Sites and regions below that are there.", registry=self.registry)
        self.source_present = Gauge(
            "fednats_source_present",
            "Whether a site or region that reports here is there: 1, or 0.",
            ["source"],
            registry=self.registry,
        )
        self._certificate = Gauge(
            "fednats_certificate_ends_in_seconds",
            "Time until the first of the servers' certificates ends; +Inf: none was seen yet.",
            registry=self.registry,
        )
        self._certificate.set(math.inf)
        self.declined = Gauge(
            "fednats_declined",
            "Services, here and below, that take no part by their own policy.",
            registry=self.registry,
        )
        self.failing = Gauge(
            "fednats_failing", "Sites, this one or those below, whose training fails.", registry=self.registry
        )
        self.claims_bounded = Gauge(
            "fednats_claims_bounded",
            "Sites and regions below that claim more cases, or more mass, than they are believed to have.",
            registry=self.registry,
        )
        self.norm_jumps = Counter(
            "fednats_delta_norm_jumps",
            "Deltas, this site's own or the coordinator's mean, with a hundred times the usual norm.",
            registry=self.registry,
        )
        self.waiting = Counter(
            "fednats_waiting_for_sites",
            "Times that fewer distinct sites than a sum must have were there, at once or at a deadline.",
            registry=self.registry,
        )
        self.rivals_refused = Counter(
            "fednats_rivals_refused",
            "Times that another process wanted to do the work of this one.",
            registry=self.registry,
        )
        self.held_back = Counter(
            "fednats_held_back",
            "Messages that waited because their sender had spent its allowance.",
            ["source"],
            registry=self.registry,
        )
        self.stream_used = Gauge(
            "fednats_stream_used",
            "How full the stream of a site or region that reports here is, of its bytes or its messages: 0 to 1.",
            ["source"],
            registry=self.registry,
        )
        self.staleness = Histogram(
            "fednats_staleness_versions",
            "Staleness of what was combined.",
            buckets=(0, 1, 2, 3, 5, 8, 13, 21),
            registry=self.registry,
        )
        self.sum_norm = Histogram(
            "fednats_sum_norm",
            "L2 norm of the decrypted sums, those that were quarantined included.",
            buckets=[10.0 ** (exponent / 4) for exponent in range(-16, 17)],
            registry=self.registry,
        )
        self.sent_bytes = Counter("fednats_sent_bytes", "Payload and heads published.", registry=self.registry)
        self.received_bytes = Counter("fednats_received_bytes", "Payload and heads read.", registry=self.registry)
        self.ledger_records = Gauge("fednats_ledger_records", "Records in the ledger.", registry=self.registry)
        self.ledger_bytes = Gauge("fednats_ledger_bytes", "Size of the ledger.", registry=self.registry)
        self.train_seconds = Counter("fednats_train_seconds", "Time spent in local training.", registry=self.registry)
        self.epsilon_spent = Gauge(
            "fednats_epsilon_spent",
            "Epsilon of each of a site's records over all runs; +Inf: a release had no noise.",
            registry=self.registry,
        )
        self.epsilon_budget = Gauge(
            "fednats_epsilon_budget", "Largest epsilon that a site allows; +Inf: no limit.", registry=self.registry
        )
        self.epsilon_budget.set(math.inf)
        self.loop_lag = Histogram(
            "fednats_loop_lag_seconds",
            "How late the event loop ran what was due.",
            buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.08, 0.1, 0.2, 0.5, 1, 2, 5),
            registry=self.registry,
        )
        self.failures = Counter(
            "fednats_failures", "Jobs that failed and were given up, by kind.", ["kind"], registry=self.registry
        )

    def sources_present(self, role: str, present: Mapping[str, bool]) -> None:
        """Set which services of ``role`` that report here are present."""
        for source in self._sources.get(role, frozenset()) - set(present):
            self.source_present.remove(source)
        self._sources[role] = frozenset(present)
        for source, there in present.items():
            self.source_present.labels(source=source).set(int(there))

    def certificate_ends_at(self, at_s: float) -> None:
        """Set when the first certificate ends, in seconds since 1970."""
        self._certificate.set_function(lambda: at_s - time.time())

    def text(self) -> bytes:
        """Return all metrics in the Prometheus text format."""
        return generate_latest(self.registry)
