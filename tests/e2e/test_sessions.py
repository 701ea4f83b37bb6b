"""Two turns of one session: the second computes only what is new."""

import httpx
import pytest

pytestmark = pytest.mark.e2e


def _chat(cluster, messages, session_id, max_tokens=24):
    answer = httpx.post(
        f"{cluster.http_url}/v1/chat/completions",
        # A tenant of its own: other tests leave the chat template's first tokens in the cache.
        headers={"x-session-id": session_id, "authorization": "Bearer sessions"},
        json={
            "model": cluster.model,
            "messages": messages,
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
        },
        timeout=120,
    )
    answer.raise_for_status()
    return answer.json()


def test_second_turn_prefills_only_the_new_tokens(cluster):
    messages = [{"role": "user", "content": "Tell me about the harbour in winter. " * 12}]
    first = _chat(cluster, messages, "two-turns")
    assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0

    reply = first["choices"][0]["message"]["content"]
    messages += [{"role": "assistant", "content": reply}, {"role": "user", "content": "And in summer?"}]
    computed = ("headrace_local_prefill_tokens_total", "headrace_prefill_tokens_total")
    before = sum(cluster.metrics().total(name) for name in computed)
    second = _chat(cluster, messages, "two-turns")
    after = sum(cluster.metrics().total(name) for name in computed)

    prompt_tokens = second["usage"]["prompt_tokens"]
    cached_tokens = second["usage"]["prompt_tokens_details"]["cached_tokens"]
    # The reply's last token was sampled but never run, and its text may tokenize otherwise when read
    # back; everything up to there is in KV, so what remains is the end of turn and the new question.
    assert cached_tokens >= first["usage"]["prompt_tokens"]
    assert prompt_tokens - cached_tokens <= 24 + 16
    # Every uncached token is computed once; the prompt's last token runs as the first decode row.
    assert after - before in (prompt_tokens - cached_tokens, prompt_tokens - cached_tokens - 1)


def test_tenants_never_share_a_prefix(cluster):
    prompt = "A prefix that two tenants happen to share, word for word. " * 8

    def cached_tokens(key):
        answer = httpx.post(
            f"{cluster.http_url}/v1/completions",
            headers={"authorization": f"Bearer {key}"},
            json={"model": cluster.model, "prompt": prompt, "max_tokens": 1},
            timeout=120,
        )
        answer.raise_for_status()
        return answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert cached_tokens("tenant-a") == 0
    assert cached_tokens("tenant-a") > 0
    assert cached_tokens("tenant-b") == 0
