"""What the official OpenAI client gets from the real server and the default model."""

from __future__ import annotations

import asyncio

import openai
import pytest

MODEL = "smollm2-135m"
PARIS = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]


@pytest.fixture
def client(server):
    with server.client() as client:
        yield client


@pytest.fixture
async def async_client(server):
    async with server.async_client() as client:
        yield client


def test_chat(client):
    answer = client.chat.completions.create(
        model=MODEL, messages=PARIS, max_tokens=12, temperature=0
    )
    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    assert "Paris" in choice.message.content
    assert choice.finish_reason == "stop"
    assert answer.model == MODEL
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_chat_streamed(client):
    whole = client.chat.completions.create(
        model=MODEL, messages=PARIS, max_tokens=12, temperature=0
    )
    chunks = list(
        client.chat.completions.create(
            model=MODEL,
            messages=PARIS,
            max_tokens=12,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    *deltas, last = chunks
    assert deltas[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in deltas)
    assert text == whole.choices[0].message.content
    assert deltas[-1].choices[0].finish_reason == "stop"
    assert last.choices == []
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    assert len({chunk.id for chunk in chunks}) == 1


def test_completions(client):
    request = {"model": MODEL, "prompt": "1, 2, 3, 4, 5,", "max_tokens": 12, "temperature": 0}
    whole = client.completions.create(**request)
    assert whole.choices[0].text.startswith(" 6, 7, 8,")
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage.completion_tokens == 12
    streamed = list(client.completions.create(**request, stream=True))
    assert "".join(chunk.choices[0].text for chunk in streamed) == whole.choices[0].text


def test_prompts_are_scored(client):
    """As evaluation harnesses ask: the prompt again with its log-probabilities, and no answer."""
    request = {"model": MODEL, "max_tokens": 0, "echo": True, "logprobs": 1}
    texts = ["The capital of France is Paris.", "The capital of France is banana."]
    answer = client.completions.create(prompt=texts, **request)
    assert [choice.text for choice in answer.choices] == texts
    sums = [sum(choice.logprobs.token_logprobs[1:]) for choice in answer.choices]
    assert sums[0] > sums[1] + 5


def test_embeddings(client):
    """The client asks for base64 by itself. Alike texts have alike vectors."""
    texts = ["The cat sat on the mat.", "A cat is sitting on a mat.", "Interest rates rose."]
    answer = client.embeddings.create(
        model=MODEL, input=texts, extra_body={"pooling": "mean"}, dimensions=512
    )
    first, second, third = (entry.embedding for entry in answer.data)
    assert len(first) == 512

    def cosine(one, other):
        return sum(a * b for a, b in zip(one, other, strict=True))

    assert cosine(first, first) == pytest.approx(1, abs=1e-5)
    assert cosine(first, second) > cosine(first, third)


async def test_async_client(async_client):
    whole = await async_client.chat.completions.create(
        model=MODEL, messages=PARIS, max_tokens=12, temperature=0
    )
    assert "Paris" in whole.choices[0].message.content
    stream = await async_client.completions.create(
        model=MODEL, prompt="Hello", max_tokens=8, stream=True, extra_body={"ignore_eos": True}
    )
    assert [c.choices[0].finish_reason async for c in stream if c.choices][-1] == "length"


def test_the_second_long_prompt_is_cached(client, text):
    request = {"model": MODEL, "prompt": text(600, 1), "max_tokens": 8, "temperature": 0}
    first = client.completions.create(**request)
    second = client.completions.create(**request)
    assert first.usage.prompt_tokens == second.usage.prompt_tokens > 600
    assert first.usage.prompt_tokens_details.cached_tokens < 32  # "Story 1" may be known
    cached = second.usage.prompt_tokens_details.cached_tokens
    assert second.usage.prompt_tokens - 64 <= cached < second.usage.prompt_tokens
    assert second.choices[0].text == first.choices[0].text
    print(f"cached {cached} of {second.usage.prompt_tokens}")


def test_a_cache_salt_shares_nothing(client, text):
    request = {"model": MODEL, "prompt": text(300, 2), "max_tokens": 4, "temperature": 0}
    texts = []
    for salt in ("a", "b"):
        answer = client.completions.create(**request, extra_body={"cache_salt": salt})
        assert answer.usage.prompt_tokens_details.cached_tokens == 0
        texts.append(answer.choices[0].text)
    assert texts[0] == texts[1]


def test_n_choices(client):
    request = {"model": MODEL, "messages": PARIS, "max_tokens": 12, "n": 4, "seed": 5}
    answer = client.chat.completions.create(**request, temperature=1.5)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert len({choice.message.content for choice in answer.choices}) > 1
    texts = dict.fromkeys(range(4), "")
    for chunk in client.chat.completions.create(**request, temperature=1.5, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == {choice.index: choice.message.content for choice in answer.choices}


def test_stop(client):
    request = {"model": MODEL, "prompt": "1, 2, 3, 4, 5,", "max_tokens": 40, "temperature": 0}
    cut = client.completions.create(**request, stop=[", 8", "never this"]).choices[0]
    assert cut.finish_reason == "stop"
    assert cut.text == " 6, 7"
    streamed = client.completions.create(**request, stop=", 8", stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == cut.text


def test_which_tokens_may_come(client):
    def ask(**fields):
        request = {"model": MODEL, "messages": PARIS, "temperature": 0, "max_tokens": 40}
        answer = client.chat.completions.create(**request, extra_body=fields)
        return answer.choices[0], answer.usage.completion_tokens

    choice, count = ask()
    assert "Paris" in choice.message.content
    assert (choice.finish_reason, count < 20) == ("stop", True)
    longer, least = ask(min_tokens=30)
    assert least >= 30
    assert longer.message.content.startswith(choice.message.content)
    without, _ = ask(bad_words=["Paris"])
    assert "Paris" not in without.message.content
    shown, _ = ask(skip_special_tokens=False, include_stop_str_in_output=True)
    assert shown.message.content == choice.message.content + "<|im_end|>"
    with pytest.raises(openai.BadRequestError, match="which min_tokens forbids"):
        ask(min_tokens=2, allowed_token_ids=[2])  # <|im_end|>


def test_logprobs(client):
    answer = client.chat.completions.create(
        model=MODEL, messages=PARIS, max_tokens=12, temperature=0, logprobs=True, top_logprobs=3
    )
    entries = answer.choices[0].logprobs.content
    assert "".join(entry.token for entry in entries) == answer.choices[0].message.content
    for entry in entries:
        assert len(entry.top_logprobs) == 3
        assert entry.logprob == entry.top_logprobs[0].logprob <= 0
        assert entry.token == entry.top_logprobs[0].token
    old = client.completions.create(
        model=MODEL, prompt="One two three", max_tokens=3, temperature=0, logprobs=2
    ).choices[0]
    assert "".join(old.logprobs.tokens) == old.text
    assert [len(top) for top in old.logprobs.top_logprobs] == [2, 2, 2]


async def test_a_seed_decides_alone_or_in_a_batch(async_client, text):
    async def ask(seed: int) -> str:
        answer = await async_client.completions.create(
            model=MODEL, prompt=text(50, 3), max_tokens=24, seed=seed, temperature=0.9
        )
        return answer.choices[0].text

    alone = await ask(11)
    assert await ask(11) == alone
    batch = await asyncio.gather(ask(11), *(ask(seed) for seed in range(20, 31)), ask(11))
    assert batch[0] == batch[-1] == alone
    assert len(set(batch)) > 6


@pytest.mark.slow
async def test_greedy_is_the_same_alone_and_among_16(async_client, text):
    # Up to some 1,000 tokens, so that prompts are cut into chunks differently in company.
    async def ask(seed: int) -> str:
        answer = await async_client.completions.create(
            model=MODEL,
            prompt=text(100 * (seed - 99), seed),
            max_tokens=32,
            temperature=0,
            extra_body={"ignore_eos": True, "cache_salt": f"{seed}"},
        )
        return answer.choices[0].text

    seeds = range(100, 108)
    alone = [await ask(seed) for seed in seeds]
    together = await asyncio.gather(*(ask(seed) for seed in (*seeds, *seeds)))
    assert together == alone * 2


def test_models(client):
    listed = client.models.list().data
    assert [model.id for model in listed] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL


def test_what_has_no_effect_is_named(client):
    answer = client.chat.completions.with_raw_response.create(
        model=MODEL, messages=PARIS, max_tokens=1, store=True, verbosity="low"
    )
    assert answer.headers["x-headstart-ignored"] == "store, verbosity"


def test_errors_are_those_of_the_client_library(client):
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model=MODEL, messages=PARIS, temperature=9)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as unsupported:
        client.chat.completions.create(model=MODEL, messages=PARIS, modalities=["audio"])
    assert unsupported.value.param == "modalities"
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-4o", messages=PARIS)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model=MODEL, messages=PARIS, stream=True, max_tokens=0)
