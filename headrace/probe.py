"""What a caller sees of a running cluster: whether it is ready, answers, and its metrics."""

import http.client
import json
import time
import urllib.error
import urllib.request
from typing import Any

import msgspec
from prometheus_client.parser import text_string_to_metric_families

READY_TIMEOUT_S = 60.0
FIRST_TOKEN_TIMEOUT_S = 60.0
_POLL_S = 0.05


class NotServingError(Exception):
    """The cluster does not answer as it should; the message says how it does. Handled by who called."""


class Sample(msgspec.Struct, frozen=True):
    name: str
    labels: dict[str, str]
    value: float


class MetricsSnapshot(msgspec.Struct, frozen=True):
    """One answer of `/metrics`."""

    samples: tuple[Sample, ...]

    def select(self, name: str, **labels: str) -> list[Sample]:
        """The samples of that name that carry these labels."""
        return [
            sample
            for sample in self.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        ]

    def total(self, name: str, **labels: str) -> float:
        """Their sum; 0 where there is none."""
        return sum(sample.value for sample in self.select(name, **labels))


def parse_metrics(text: str) -> MetricsSnapshot:
    return MetricsSnapshot(
        tuple(
            Sample(sample.name, dict(sample.labels), sample.value)
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        )
    )


def fetch_metrics(http_url: str, timeout_s: float = 5.0) -> MetricsSnapshot:
    """Raises NotServingError."""
    return parse_metrics(_get(f"{http_url}/metrics", timeout_s))


def is_ready(http_url: str, timeout_s: float = 5.0) -> bool:
    try:
        _get(f"{http_url}/ready", timeout_s)
    except NotServingError:
        return False
    return True


def wait_until_ready(http_url: str, timeout_s: float = READY_TIMEOUT_S) -> None:
    """Raises NotServingError when time is up."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        try:
            _get(f"{http_url}/ready", 5.0)
        except NotServingError as error:
            if time.monotonic() > deadline_s:
                raise NotServingError(f"not ready after {timeout_s:.0f} s: {error}") from None
            time.sleep(_POLL_S)
        else:
            return


def generate_one_token(http_url: str, model: str) -> None:
    """Proves the whole path. Raises NotServingError."""
    body = {"model": model, "prompt": "Hello", "max_tokens": 1}
    _get(f"{http_url}/v1/completions", FIRST_TOKEN_TIMEOUT_S, body)


def _get(url: str, timeout_s: float, body: dict[str, Any] | None = None) -> str:
    request = urllib.request.Request(  # noqa: S310 - the URL is a cluster's own
        url,
        data=None if body is None else json.dumps(body).encode(),
        headers={"content-type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as response:  # noqa: S310
            text: bytes = response.read()
    except urllib.error.HTTPError as error:
        answer = error.read(2000).decode(errors="replace").strip()
        raise NotServingError(f"{url} answered {error.code}: {answer}") from None
    except (OSError, http.client.HTTPException) as error:
        raise NotServingError(f"{url} does not answer: {error}") from None
    return text.decode(errors="replace")
