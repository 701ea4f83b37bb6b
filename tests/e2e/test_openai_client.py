"""The real `openai` client against a real cluster: what an application would do on its first day."""

import time

import httpx
import openai
import pytest

pytestmark = pytest.mark.e2e


@pytest.fixture
def client(cluster):
    with openai.OpenAI(base_url=f"{cluster.http_url}/v1", api_key="e2e-client", max_retries=0) as client:
        yield client


@pytest.fixture
def model(client):
    return client.models.list().data[0].id


def test_lists_and_retrieves_models(client, model):
    assert client.models.retrieve(model).id == model


def test_chat_answers_a_question(client, model):
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "What is the capital of France? Answer in one word."}],
        max_tokens=16,
        temperature=0,
    )
    choice = answer.choices[0]
    assert "Paris" in choice.message.content
    assert choice.message.role == "assistant"
    assert choice.finish_reason in ("stop", "length")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_stream_equals_the_whole_and_carries_usage(client, model):
    request = {
        "model": model,
        "messages": [{"role": "user", "content": "List three colours."}],
        "max_tokens": 24,
        "temperature": 0,
    }
    whole = client.chat.completions.create(**request)
    chunks = list(
        client.chat.completions.create(**request, stream=True, stream_options={"include_usage": True})
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert len([c for c in chunks if c.choices]) > 3


def test_completion_with_several_choices_and_a_stop_string(client, model):
    answer = client.completions.create(
        model=model, prompt="1, 2, 3, 4,", max_tokens=32, temperature=0, stop=[" 8"], n=2
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    for choice in answer.choices:
        assert choice.text.startswith(" 5, 6, 7")
        assert " 8" not in choice.text
        assert choice.finish_reason == "stop"


def test_a_seed_fixes_a_sampled_text_and_another_changes_it(client, model):
    def sample(seed):
        answer = client.completions.create(
            model=model, prompt="Once upon a time", max_tokens=24, temperature=0.8, seed=seed
        )
        return answer.choices[0].text

    assert sample(7) == sample(7)
    assert len({sample(seed) for seed in range(4)}) > 1


def test_logprobs_of_the_chosen_token_head_the_likeliest(client, model):
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "Say hello."}],
        max_tokens=6,
        temperature=0,
        logprobs=True,
        top_logprobs=3,
    )
    entries = answer.choices[0].logprobs.content
    assert len(entries) == answer.usage.completion_tokens
    for entry in entries:
        assert len(entry.top_logprobs) == 3
        assert entry.logprob == pytest.approx(entry.top_logprobs[0].logprob)
        assert entry.logprob <= 0.0
        assert bytes(entry.bytes).decode(errors="replace") == entry.token
    whole = client.completions.create(
        model=model, prompt="The sea is", max_tokens=4, temperature=0, logprobs=2
    )
    logprobs = whole.choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == 4
    assert "".join(logprobs.tokens) == whole.choices[0].text


def test_cancel_mid_stream_frees_kv_on_both_sides_within_a_second(cluster, client, model):
    held = ("headrace_kv_cache_used_tokens", "headrace_prefill_kv_cache_used_tokens")
    stream = client.completions.create(
        model=model,
        prompt="A long story about the river. " * 40,
        max_tokens=400,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    for _, _chunk in zip(range(3), stream, strict=False):
        pass
    assert cluster.metrics().total(held[0]) > 0
    stream.response.close()
    deadline_s = time.monotonic() + 1.0
    while any(cluster.metrics().total(name) for name in held) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert [cluster.metrics().total(name) for name in held] == [0, 0]


def test_errors_are_the_clients_typed_exceptions(client, model):
    with pytest.raises(openai.NotFoundError) as unknown_model:
        client.completions.create(model="no-such-model", prompt="x")
    assert unknown_model.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as too_hot:
        client.completions.create(model=model, prompt="x", temperature=9)
    assert too_hot.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as too_long:
        client.completions.create(model=model, prompt="word " * 9000, max_tokens=10)
    assert too_long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as unknown_field:
        client.completions.create(model=model, prompt="x", extra_body={"temprature": 1})
    assert "temperature" in unknown_field.value.message


def test_a_deadline_ends_the_text_with_what_there_is(client, model):
    answer = client.completions.create(
        model=model,
        prompt="Count: one, two,",
        max_tokens=2000,
        extra_body={"deadline_ms": 1000, "ignore_eos": True},
    )
    assert answer.choices[0].finish_reason == "deadline"
    assert 0 < answer.usage.completion_tokens < 2000


def test_health_ready_and_metrics(cluster):
    assert httpx.get(f"{cluster.http_url}/health").status_code == 200
    assert httpx.get(f"{cluster.http_url}/ready").status_code == 200
    metrics = cluster.metrics()
    assert metrics.total("headrace_kv_cache_total_tokens") > 0
    assert metrics.total("headrace_prefill_kv_cache_total_tokens") > 0
