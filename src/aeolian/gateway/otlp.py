"""Sends spans to an OpenTelemetry collector by OTLP over HTTP (`…/v1/traces`), in the background, in batches.

Headers, compression and certificates come from OpenTelemetry's own environment variables (`OTEL_EXPORTER_OTLP_…`).
A collector that is away costs the spans that do not fit into the queue, nothing else.
"""

from urllib.parse import urlsplit

from aeolian import __version__
from aeolian.control.traces import Span
from aeolian.domain.errors import InvalidArgument

TRACES_PATH = "/v1/traces"
CLOSE_MS = 2000


class OtlpExporter:
    """Raises InvalidArgument where OpenTelemetry's packages are missing or the URL is none."""

    def __init__(self, endpoint: str):
        """`endpoint`: of the collector, `http://127.0.0.1:4318`, with or without the path."""
        url = traces_url(endpoint)
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.sdk.util.instrumentation import InstrumentationScope
        except ImportError as error:
            raise InvalidArgument(
                f"--otlp-endpoint needs OpenTelemetry's packages ({error.name} is missing): "
                "`pip install 'aeolian[otel]'`"
            ) from error
        self._resource = Resource.create({SERVICE_NAME: "aeolian", SERVICE_VERSION: __version__})
        self._scope = InstrumentationScope("aeolian", __version__)
        self._processor = BatchSpanProcessor(OTLPSpanExporter(endpoint=url))

    def export(self, spans: list[Span]) -> None:
        for span in spans:
            self._processor.on_end(self._readable(span))

    def close(self) -> None:
        """Send what is queued, for a moment at most."""
        self._processor.force_flush(CLOSE_MS)
        self._processor.shutdown()

    def _readable(self, span: Span):
        from opentelemetry.sdk.trace import ReadableSpan
        from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags

        def context(span_id: int) -> SpanContext:
            return SpanContext(span.trace_id, span_id, is_remote=False, trace_flags=TraceFlags(TraceFlags.SAMPLED))

        return ReadableSpan(
            name=span.name,
            context=context(span.span_id),
            parent=context(span.parent_id) if span.parent_id else None,
            resource=self._resource,
            attributes=span.attributes,
            kind=SpanKind.INTERNAL if span.parent_id else SpanKind.SERVER,
            status=Status(StatusCode.ERROR, span.error) if span.error else Status(StatusCode.OK),
            start_time=int(span.began_at * 1e9),
            end_time=int(span.ended_at * 1e9),
            instrumentation_scope=self._scope,
        )


def traces_url(endpoint: str) -> str:
    """Where spans are posted to. Raises InvalidArgument for what is no URL of HTTP."""
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InvalidArgument(
            f"--otlp-endpoint {endpoint!r} is not a URL: name a collector that takes OTLP over HTTP, as in "
            "http://127.0.0.1:4318"
        )
    return endpoint if parts.path.endswith(TRACES_PATH) else endpoint.rstrip("/") + TRACES_PATH
