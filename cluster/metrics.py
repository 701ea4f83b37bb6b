"""Every metric's name and meaning, once. Names follow vLLM's where they mean the same.

A process has one registry of its own; the router's `/metrics` adds what live workers answer to
`WorkerAdmin.Metrics`, each sample labelled with its worker.
"""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

LATENCY_BUCKETS_S = (
    0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
)  # fmt: skip
ACCEPTANCE_LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)


class RouterMetrics:
    def __init__(self) -> None:
        self.registry = r = CollectorRegistry()
        self.requests = Counter(
            "headrace_requests", "Requests ended, by how", ["route", "outcome"], registry=r
        )
        self.inflight = Gauge("headrace_router_inflight_requests", "Requests being served", registry=r)
        self.ttft = Histogram(
            "headrace_time_to_first_token_seconds",
            "Arrival to first token",
            buckets=LATENCY_BUCKETS_S,
            registry=r,
        )
        self.itl = Histogram(
            "headrace_inter_token_latency_seconds",
            "Gap between emitted tokens",
            buckets=LATENCY_BUCKETS_S,
            registry=r,
        )
        self.e2e = Histogram(
            "headrace_e2e_request_latency_seconds",
            "Arrival to last token",
            buckets=LATENCY_BUCKETS_S,
            registry=r,
        )
        self.prompt_tokens = Counter("headrace_prompt_tokens", "Prompt tokens received", registry=r)
        self.cached_tokens = Counter(
            "headrace_prefix_cache_hit_tokens", "Prompt tokens whose KV was already cached", registry=r
        )
        self.generation_tokens = Counter(
            "headrace_generation_tokens", "Tokens emitted to clients", registry=r
        )
        self.placements = Counter("headrace_placements", "Placements, by reason", ["reason"], registry=r)
        self.placement_unavailable = Counter(
            "headrace_placement_unavailable", "Placements made without the store's answer", registry=r
        )
        self.retries = Counter("headrace_retries", "Retries, by what failed", ["what"], registry=r)


class DecodeMetrics:
    def __init__(self) -> None:
        self.registry = r = CollectorRegistry()
        self.running = Gauge("headrace_num_requests_running", "Sequences decoding", registry=r)
        self.waiting = Gauge(
            "headrace_num_requests_waiting", "Sequences queued or waiting for KV", registry=r
        )
        self.kv_used_tokens = Gauge(
            "headrace_kv_cache_used_tokens", "KV slots held by live sequences", registry=r
        )
        self.kv_total_tokens = Gauge("headrace_kv_cache_total_tokens", "KV slots of the pool", registry=r)
        self.steps = Counter("headrace_decode_steps", "Steps run", registry=r)
        self.rows = Counter("headrace_decode_rows", "Rows run over all steps", registry=r)
        self.step_seconds = Histogram(
            "headrace_decode_step_seconds",
            "One step, schedule to commit",
            buckets=LATENCY_BUCKETS_S,
            registry=r,
        )
        self.drafts = Counter("headrace_spec_decode_num_drafts", "Draft trees verified", registry=r)
        self.draft_tokens = Counter(
            "headrace_spec_decode_num_draft_tokens", "Rows that drafts took", registry=r
        )
        self.accepted_tokens = Counter(
            "headrace_spec_decode_num_accepted_tokens", "Drafted tokens emitted", registry=r
        )
        self.acceptance_length = Histogram(
            "headrace_spec_decode_acceptance_length",
            "Tokens emitted per draft tree verified, the bonus token included",
            buckets=ACCEPTANCE_LENGTHS,
            registry=r,
        )
        self.local_prefill_tokens = Counter(
            "headrace_local_prefill_tokens", "Prompt tokens computed as chain rows", registry=r
        )
        self.generation_tokens = Counter("headrace_decode_tokens", "Tokens sampled", registry=r)
        self.cached_tokens = Counter(
            "headrace_decode_prefix_cache_hit_tokens", "Prompt tokens found in the prefix cache", registry=r
        )
        self.handoffs = Counter(
            "headrace_handoffs_received", "Hand-offs, by outcome", ["outcome"], registry=r
        )
        self.handoffs_receiving = Gauge(
            "headrace_handoffs_receiving", "Hand-offs waited for or being received", registry=r
        )
        self.handoff_bytes = Counter("headrace_handoff_received_bytes", "KV bytes committed", registry=r)

    def count_draft(self, num_nodes: int, num_accepted: int, num_emitted: int) -> None:
        """Of one verified tree."""
        self.drafts.inc()
        self.draft_tokens.inc(num_nodes)
        self.accepted_tokens.inc(num_accepted)
        self.acceptance_length.observe(num_emitted)


class PrefillMetrics:
    def __init__(self) -> None:
        self.registry = r = CollectorRegistry()
        self.running = Gauge(
            "headrace_prefill_requests_running", "Prompts being computed or sent", registry=r
        )
        self.waiting = Gauge("headrace_prefill_requests_waiting", "Prompts queued", registry=r)
        self.kv_used_tokens = Gauge(
            "headrace_prefill_kv_cache_used_tokens", "KV slots held by live prompts", registry=r
        )
        self.kv_total_tokens = Gauge(
            "headrace_prefill_kv_cache_total_tokens", "KV slots of the pool", registry=r
        )
        self.held = Gauge(
            "headrace_prefill_requests_held",
            "Prompts whose KV is held: admitted, and not let go of by all that copy it",
            registry=r,
        )
        self.staging_used_bytes = Gauge(
            "headrace_prefill_staging_used_bytes",
            "Memory that prompts hold of what the engine's KV passes through on its way out",
            registry=r,
        )
        self.staging_total_bytes = Gauge(
            "headrace_prefill_staging_total_bytes",
            "All of that memory; 0 of an engine that has none",
            registry=r,
        )
        self.computed_tokens = Counter("headrace_prefill_tokens", "Prompt tokens computed", registry=r)
        self.cached_tokens = Counter(
            "headrace_prefill_prefix_cache_hit_tokens", "Prompt tokens found in the prefix cache", registry=r
        )
        self.handoffs = Counter("headrace_handoffs_sent", "Hand-offs, by outcome", ["outcome"], registry=r)
        self.handoff_bytes = Counter(
            "headrace_handoff_sent_bytes", "KV bytes acknowledged, by transport", ["transport"], registry=r
        )


def exposition(registry: CollectorRegistry) -> str:
    """Prometheus text format."""
    return generate_latest(registry).decode()
