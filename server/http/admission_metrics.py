"""What was let in and refused, as metrics: read from the books when somebody scrapes."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from headstart.server.http.admission import Admission


class AdmissionCollector(Collector):
    """The books of one app."""

    def __init__(self, admission: Admission, model_name: str) -> None:
        self._admission = admission
        self._model_name = model_name

    def collect(self) -> Iterator[Metric]:
        admission = self._admission
        refused = CounterMetricFamily(
            "headstart:requests_refused",
            "Requests that were not let in",
            labels=["model_name", "reason"],
        )
        for reason, count in admission.refused.items():
            refused.add_metric([self._model_name, reason], count)
        yield refused
        gauges = (
            ("requests_in_flight", "Choices let in that have not ended", admission.in_flight),
            ("requests_in_flight_limit", "How many may be", admission.limit),
            ("queue_depth", "Choices let in that have no first token yet", admission.waiting),
            (
                "predicted_first_token_seconds",
                "Until a short prompt that came now would have its first token",
                admission.predicted(),
            ),
            (
                "predicted_backlog_seconds",
                "Until all prompts that have no first token now would have it",
                admission.backlog_seconds(),
            ),
        )
        for name, text, value in gauges:
            if value is not None:  # what is not known is not 0
                gauge = GaugeMetricFamily(f"headstart:{name}", text, labels=["model_name"])
                gauge.add_metric([self._model_name], value)
                yield gauge
