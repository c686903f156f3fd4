"""Prometheus metrics of a server: each replica keeps its own, and any of them shows all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import Metric

from .flags import Flags
from .stack import PatchSource

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """The metrics of one replica."""

    def __init__(self) -> None:
        own = self.registry = CollectorRegistry()
        self.requests = Counter(
            "atpatch_requests", "Inference requests by HTTP status.", ["code"], registry=own
        )
        self.latency = Histogram(
            "atpatch_request_seconds",
            "Seconds from a request's arrival at the replica to its answer.",
            buckets=SECONDS,
            registry=own,
        )
        self.batch = Histogram(
            "atpatch_batch_inputs", "Inputs of one run.", buckets=ROWS, registry=own
        )
        self.inputs = Counter("atpatch_inputs", "Inputs answered.", registry=own)
        self.flagged = Counter(
            "atpatch_flagged_inputs", "Inputs flagged at any site.", registry=own
        )
        self.sites = Counter(
            "atpatch_site_flagged_inputs", "Inputs flagged, by site.", ["site"], registry=own
        )
        self.swaps = Counter("atpatch_swaps", "Swaps, by result.", ["result"], registry=own)
        self.active = Gauge(
            "atpatch_active",
            "1 for what is served: SHA-256 of the patched model and of the latest patch.",
            ["model_sha256", "patch_sha256", "patches"],
            registry=own,
        )
        self.telemetry = Gauge(
            "atpatch_telemetry", "Whether flagged inputs can be counted.", registry=own
        )

    def serve(self, sha256: str, patches: Sequence[PatchSource], telemetry: bool) -> None:
        """Note what is served from now on."""
        self.active.clear()
        last = patches[-1].sha256 if patches else ""
        self.active.labels(sha256, last, ",".join(p.name for p in patches)).set(1)
        self.telemetry.set(telemetry)

    def answered(self, count: int, flags: Flags | None) -> None:
        """Count the inputs of a request."""
        self.inputs.inc(count)
        if flags is not None:
            self.flagged.inc(int(flags.inputs.sum()))
            for site, found in flags.sites.items():
                self.sites.labels(site).inc(found)

    def families(self, replica: str) -> list[Metric]:
        """The metrics as they are, each sample labelled with the replica."""
        found = []
        for metric in self.registry.collect():
            metric.samples = [
                s._replace(labels={**s.labels, "replica": replica}) for s in metric.samples
            ]
            found.append(metric)
        return found


class _Merged:
    """Families of several replicas as one collector."""

    def __init__(self, replicas: Iterable[list[Metric]]) -> None:
        self.families: dict[str, Metric] = {}
        for metrics in replicas:
            for metric in metrics:
                same = self.families.setdefault(metric.name, metric)
                if same is not metric:
                    same.samples.extend(metric.samples)

    def collect(self) -> Iterator[Metric]:
        yield from self.families.values()


def exposition(replicas: Iterable[list[Metric]]) -> bytes:
    """The metrics of several replicas in Prometheus' text format."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Merged(replicas))
    return generate_latest(registry)
