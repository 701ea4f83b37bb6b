"""The real `openai` client over a real HTTP server."""

import asyncio

import openai
import pytest

from router.admission import choice_seed
from tests.router.conftest import MODEL, eventually
from tests.router.scripted_workers import completion_ids


@pytest.fixture
async def client(cluster, serve):
    url = await serve(cluster)
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0, timeout=20) as client:
        yield client


def text_of(tokenizer, prompt, seed, count):
    ids = completion_ids(tokenizer, tuple(prompt), seed, count)
    return b"".join(tokenizer.token_bytes(i) for i in ids).decode()


CHAT = [{"role": "system", "content": "you are"}, {"role": "user", "content": "hello"}]


async def test_models(client):
    models = await client.models.list()
    assert [model.id for model in models.data] == [MODEL]
    assert (await client.models.retrieve(MODEL)).id == MODEL
    with pytest.raises(openai.NotFoundError) as unknown:
        await client.models.retrieve("other")
    assert unknown.value.code == "model_not_found"


async def test_chat(client, cluster, tokenizer):
    answer = await client.chat.completions.create(model=MODEL, messages=CHAT, max_tokens=6, seed=-1)
    (generate,) = cluster.decode.seen.generates
    assert generate.sampling.seed == 2**64 - 1
    prompt = list(generate.prompt_token_ids)
    assert b"".join(tokenizer.token_bytes(i) for i in prompt).decode() == (
        "<|im_start|>system\nyou are<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    )
    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == text_of(tokenizer, prompt, 2**64 - 1, 6)
    assert choice.finish_reason == "length"
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.usage.total_tokens == len(prompt) + 6


async def test_chat_stream_equals_the_whole_and_carries_usage(client):
    request = {"model": MODEL, "messages": CHAT, "max_tokens": 9, "seed": 5}
    whole = await client.chat.completions.create(**request)
    stream = await client.chat.completions.create(
        **request, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage


async def test_completion_streams_without_usage_too(client, tokenizer):
    stream = await client.completions.create(model=MODEL, prompt="hello", max_tokens=5, seed=1, stream=True)
    chunks = [chunk async for chunk in stream]
    prompt = tokenizer.encode("hello", allow_special=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == text_of(tokenizer, prompt, 1, 5)
    assert all(chunk.usage is None for chunk in chunks)


@pytest.mark.parametrize("stream", [False, True])
async def test_several_choices_of_several_prompts(client, cluster, tokenizer, stream):
    prompts = [[5, 6, 7], [8, 9, 10, 11]]
    answer = await client.completions.create(
        model=MODEL, prompt=prompts, n=3, max_tokens=4, seed=11, stream=stream
    )
    texts = [""] * 6
    if stream:
        async for chunk in answer:
            texts[chunk.choices[0].index] += chunk.choices[0].text
    else:
        assert [choice.index for choice in answer.choices] == list(range(6))
        texts = [choice.text for choice in answer.choices]
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (7, 24)
    expected = [text_of(tokenizer, p, choice_seed(11, c), 4) for p in prompts for c in range(3)]
    assert texts == expected
    assert len({generate.request_id for generate in cluster.decode.seen.generates}) == 6


async def test_choices_interleave_in_a_stream(client, cluster):
    cluster.decode.behaviour.step_delay_s = 0.005
    stream = await client.chat.completions.create(model=MODEL, messages=CHAT, n=2, max_tokens=10, stream=True)
    indices = [chunk.choices[0].index async for chunk in stream]
    assert 1 in indices[: len(indices) // 2]
    assert 0 in indices[len(indices) // 2 :]


async def test_sampling_reaches_the_worker_as_given(client, cluster):
    await client.completions.create(
        model=MODEL,
        prompt="hello",
        max_tokens=2,
        temperature=0.3,
        top_p=0.9,
        stop=["a", "bb"],
        seed=2**63 - 1,
        extra_body={"top_k": 5, "min_p": 0.1, "ignore_eos": True},
    )
    sampling = cluster.decode.seen.generates[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.3, 0.9, 5, 0.1)
    assert list(sampling.stop) == ["a", "bb"]
    assert (sampling.seed, sampling.ignore_eos, sampling.max_tokens) == (2**63 - 1, True, 2)
    assert not sampling.HasField("num_logprobs")


async def test_stop_is_a_finish_reason(client, cluster):
    cluster.decode.behaviour.stop_after = 3
    answer = await client.completions.create(model=MODEL, prompt="hello", max_tokens=50, stop="x")
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == 3


async def test_logprobs(client, tokenizer):
    chat = await client.chat.completions.create(
        model=MODEL, messages=CHAT, max_tokens=3, logprobs=True, top_logprobs=2
    )
    content = chat.choices[0].logprobs.content
    assert len(content) == 3
    assert all(len(entry.top_logprobs) == 2 and entry.logprob == -0.5 for entry in content)
    assert "".join(entry.token for entry in content) == chat.choices[0].message.content
    bare = await client.chat.completions.create(model=MODEL, messages=CHAT, max_tokens=3, logprobs=True)
    assert [entry.top_logprobs for entry in bare.choices[0].logprobs.content] == [[], [], []]
    whole = await client.completions.create(model=MODEL, prompt="hello", max_tokens=3, logprobs=1)
    logprobs = whole.choices[0].logprobs
    assert "".join(logprobs.tokens) == whole.choices[0].text
    assert logprobs.text_offset[0] == 0
    stream = await client.completions.create(
        model=MODEL, prompt="hello", max_tokens=3, logprobs=1, stream=True
    )
    offsets = [o async for chunk in stream if (lp := chunk.choices[0].logprobs) for o in lp.text_offset]
    assert len(offsets) == 3


async def test_errors_are_typed_exceptions(client, make_cluster, serve):
    with pytest.raises(openai.BadRequestError) as too_hot:
        await client.completions.create(model=MODEL, prompt="x", temperature=9)
    assert too_hot.value.param == "temperature"
    with pytest.raises(openai.NotFoundError):
        await client.completions.create(model="other", prompt="x")
    empty = await make_cluster(decodes=0)
    url = await serve(empty)
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0) as other:
        with pytest.raises(openai.InternalServerError) as unavailable:
            await other.completions.create(model=MODEL, prompt="x")
    assert unavailable.value.status_code == 503


async def test_an_error_inside_a_stream_is_an_exception_not_an_end(client, cluster):
    cluster.decode.behaviour.step_delay_s = 0.01
    stream = await client.completions.create(
        model=MODEL, prompt="x", max_tokens=200, stream=True, extra_body={"deadline_ms": 60_000}
    )

    async def read_on():
        async for _ in stream:
            await cluster.decode.stop()

    with pytest.raises(openai.APIError, match="broke"):
        await read_on()


async def test_cancel_mid_stream_reaches_the_worker(client, cluster):
    cluster.decode.behaviour.step_delay_s = 0.01
    stream = await client.chat.completions.create(
        model=MODEL, messages=CHAT, max_tokens=200, n=2, stream=True
    )
    async for _ in stream:
        break
    await stream.close()
    await eventually(lambda: cluster.decode.num_live == 0)
    assert len(cluster.decode.seen.cancels) == 2
    await eventually(lambda: cluster.metric("headrace_router_inflight_requests") == 0)
    await eventually(
        lambda: cluster.metric("headrace_requests_total", route="chat", outcome="cancelled") == 1
    )


async def test_a_client_that_leaves_before_a_whole_answer_cancels_it(client, cluster):
    cluster.decode.behaviour.hang_at = 1
    asking = asyncio.create_task(client.completions.create(model=MODEL, prompt="x", max_tokens=20))
    await eventually(lambda: cluster.decode.num_live == 1)
    asking.cancel()
    await asyncio.wait((asking,))
    await eventually(lambda: cluster.decode.num_live == 0)


async def test_finished_answers_are_not_counted_as_cancelled(client, cluster):
    for n in (1, 4):
        for stream in (False, True):
            answer = await client.completions.create(
                model=MODEL, prompt="x", max_tokens=3, n=n, stream=stream
            )
            if stream:
                async for _ in answer:
                    pass

    def num(outcome):
        return cluster.metric("headrace_requests_total", route="completions", outcome=outcome)

    await eventually(lambda: num("length") == 4)
    assert num("cancelled") == num("failed") == 0
    assert not cluster.decode.seen.cancels
