"""Metrics of a server in the text format of Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from megatron_owl2.serving.engine import Engine

_FIRST_TOKEN = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_PER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
DISCONNECTED = 499  # nginx's status of requests whose client is gone


class Metrics:
    """Counters and times of requests, and what the engine holds when they are read."""

    def __init__(self, engine: Engine):
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "owl2_requests",
            "Chat requests by the status of their answer; 499: the client was gone.",
            ["status"],
            registry=registry,
        )
        self.prompt_tokens = Counter(
            "owl2_prompt_tokens", "Positions of answered prompts, with images.", registry=registry
        )
        self.new_tokens = Counter("owl2_new_tokens", "Generated tokens.", registry=registry)
        self.open = Gauge("owl2_requests_open", "Requests that have a place.", registry=registry)
        self.first_token = Histogram(
            "owl2_time_to_first_token_seconds",
            "From a request's last byte to its first token.",
            buckets=_FIRST_TOKEN,
            registry=registry,
        )
        self.per_token = Histogram(
            "owl2_time_per_token_seconds",
            "Time between tokens after the first, the mean of a request.",
            buckets=_PER_TOKEN,
            registry=registry,
        )
        active = Gauge("owl2_requests_active", "Requests in generation.", registry=registry)
        active.set_function(lambda: engine.active)
        queued = Gauge("owl2_requests_queued", "Requests that wait for it.", registry=registry)
        queued.set_function(lambda: engine.waiting)

    def text(self) -> bytes:
        """All of them in the text format."""
        return generate_latest(self._registry)
