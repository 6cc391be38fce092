"""The metrics of a node, served from its main process; those of a prefork child come with its report."""

from typing import Any

from pool.sharding.coordinator import ShardStep
from pool.worker.report import report_of, shards_of


class Gauges:
    """Serves ``/metrics`` of a worker whose settings name a port; *extension* is its `WarmPool`.

    Raises `ConfigError` without prometheus_client.
    """

    def __init__(self, extension: Any) -> None:
        from pool.metrics import NodeMetrics

        self._extension = extension
        settings = extension.settings
        self._node = NodeMetrics(lambda: shards_of(extension), settings.lease_ttl if settings.leased else None)
        self._server: Any = None

    def start(self) -> None:
        """Listen. Raises `ConfigError` when the address cannot be had."""
        from pool.metrics import MetricsServer

        settings = self._extension.settings
        self._server = MetricsServer(settings.metrics_host, settings.metrics_port, self.render)

    def render(self) -> bytes:
        """Return everything, in Prometheus' text format."""
        from pool.metrics import merge

        return merge(self._node.render(), report_of(self._extension).metrics().encode())

    def hear(self, step: ShardStep) -> None:
        """Some shards came or went."""
        for _ in step.shards:
            if step.what == "takeover":
                self._node.took_over(step.seconds)
            elif step.what == "handoff":
                self._node.handed_over(step.seconds)

    def stop(self) -> None:
        """Give the port back."""
        if self._server is not None:
            self._server.close()
            self._server = None


class NoGauges:
    """Of a worker that serves none."""

    def start(self) -> None:
        """Nothing."""

    def hear(self, step: ShardStep) -> None:
        """Nothing."""

    def stop(self) -> None:
        """Nothing."""


def gauges_for(extension: Any) -> Gauges | NoGauges:
    """Return what serves the metrics of a worker."""
    return Gauges(extension) if extension.settings.metrics_port else NoGauges()
