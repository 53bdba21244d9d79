"""Outputs follow their grammars, and are the best tokens that do; nobody else notices.

The oracle knows no grammars: for a list of texts, a token may come where some text begins with
what is there and the token behind it. Where the next characters are certain, llguidance allows one
token alone: that which the tokenizer itself would take.
"""

from __future__ import annotations

import json
import math
import re
import threading
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from llguidance import LLMatcher, LLParserLimits
from tokenizers import Tokenizer

from headstart.bench.forced import one_by_one
from headstart.engine import engine as engine_module
from headstart.engine.batch import Batch
from headstart.engine.config import EngineConfig
from headstart.engine.engine import Engine
from headstart.engine.errors import RequestError
from headstart.engine.process.messages import Output
from headstart.engine.sampling.grammar import Constraint, Grammar, Grammars, Masks
from headstart.engine.sampling.params import SamplingParams
from headstart.engine.sampling.sampler import bans

EOS = 2
PAGE_BYTES = 2 * 32 * 2 * 2 * 16 * 4
"""A page of the tiny model: layers, tokens, keys and values, heads, head size, float32."""

TEXTS = ["the quick brown fox", "the lazy dog", "a", "assistant", "answer: 42", "answer: 4"]
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "n": {"type": "integer", "minimum": -5, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["x", "quick", 3]}, "maxItems": 2},
    },
    "required": ["name", "n", "tags"],
    "additionalProperties": False,
}
PROMPTS = [[3, 4, 5, 6], [70, 71, 72] * 12, [9], [7, 8] * 40]

TinyModel = Callable[..., Path]


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """How many tokens come in runs depends on no clock."""
    monkeypatch.setattr("headstart.engine.sampling.grammar.SLOW_RUN", math.inf)
    monkeypatch.setattr(engine_module, "RUN_SECONDS", math.inf)


def choice(texts: list[str]) -> str:
    return LLMatcher.grammar_from_lark("start: " + " | ".join(map(json.dumps, texts)))


def schema(value: Any) -> str:
    options = {"whitespace_flexible": False}
    return LLMatcher.grammar_from_json_schema(json.dumps(value), overrides=options)


def make_engine(folder: Path, **settings: Any) -> Engine:
    fields = {"weights": "f32", "threads": 1, "kv_memory": 400 * PAGE_BYTES, "max_model_len": 512}
    return Engine(EngineConfig(model_path=str(folder), **{**fields, **settings}))


def params(grammar: str | None, **fields: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 100, "temperature": 0.0, "grammar": grammar, **fields})


def certain(done: str) -> bool:
    """Whether all texts that begin with ``done`` go on with the same character."""
    return len({text[len(done) : len(done) + 1] for text in TEXTS if text.startswith(done)}) == 1


class Speller:
    """What ids spell, by the tokenizer itself."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.texts = [self._tokenizer.decode([i], skip_special_tokens=False) for i in range(320)]

    def text(self, ids: list[int]) -> str:
        assert ids[-1] == EOS
        text: str = self._tokenizer.decode(ids[:-1], skip_special_tokens=False)
        return text

    def allowed(self, done: str, texts: list[str]) -> list[int]:
        """Tokens that may come behind ``done``, the texts being plain ASCII."""
        ids = [EOS] if done in texts else []
        return ids + [
            i for i in range(3, 320) if any(text.startswith(done + self.texts[i]) for text in texts)
        ]


@pytest.mark.parametrize("settings", [{}, {"async_scheduling": "on"}, {"max_batched_tokens": 16}])
def test_greedy_tokens_are_the_best_of_those_the_texts_allow(
    tiny_model: TinyModel, settings: dict[str, Any]
) -> None:
    folder = tiny_model("llama")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    speller = Speller(folder)
    outputs = make_engine(folder, **settings).generate(PROMPTS, params(choice(TEXTS)))
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        done = ""
        for i, token in enumerate(output):
            with torch.inference_mode():
                logits = model(input_ids=torch.tensor([prompt + output[:i]])).logits[0, -1]
            allowed = speller.allowed(done, TEXTS)
            assert token in allowed
            if not certain(done):
                assert logits[allowed].max() - logits[token] < 1e-3
            done += speller.texts[token]
        assert speller.text(output) in TEXTS


@pytest.mark.parametrize("settings", [{}, {"async_scheduling": "on"}])
def test_random_answers_follow_their_own_grammar_each(
    tiny_model: TinyModel, settings: dict[str, Any]
) -> None:
    folder = tiny_model("llama")
    speller = Speller(folder)
    grammars = [
        choice(TEXTS),
        schema(SCHEMA),
        LLMatcher.grammar_from_regex(r"[a-c]{2,5}-([0-9]{2})?"),
        LLMatcher.grammar_from_lark('start: "(" start? ")"'),
    ]
    wanted = [
        params(grammar, temperature=1.5, seed=seed, top_k=50)
        for seed in range(6)
        for grammar in grammars
    ]
    prompts = [PROMPTS[i % 4] for i in range(len(wanted))]
    engine = make_engine(folder, **settings)
    for i, output in enumerate(engine.generate(prompts, wanted)):
        if len(output) == 100:  # parentheses may go on for ever
            assert i % 4 == 3
            continue
        text = speller.text(output)
        match i % 4:
            case 0:
                assert text in TEXTS
            case 1:
                value = json.loads(text)
                assert list(value) == ["name", "n", "tags"]
                assert len(value["name"]) <= 6
                assert -5 <= value["n"] <= 120
                assert set(value["tags"]) <= {"x", "quick", 3}
            case 2:
                assert re.fullmatch(r"[a-c]{2,5}-([0-9]{2})?", text)
            case 3:
                assert text == "(" * (len(text) // 2) + ")" * (len(text) // 2)


def test_the_same_seed_gives_the_same_answer_in_any_company(tiny_model: TinyModel) -> None:
    """A grammar's copy is the sequence's own: others in the batch, and chunks, change nothing."""
    folder = tiny_model("qwen3")
    seeded = [params(schema(SCHEMA), temperature=1.0, seed=i) for i in range(4)]
    alone = [make_engine(folder).generate([PROMPTS[1]], each)[0] for each in seeded]
    plain = params(None, max_tokens=40, temperature=1.0, seed=9)
    [free] = make_engine(folder).generate([PROMPTS[2]], plain)
    for settings in ({}, {"max_batched_tokens": 16}, {"async_scheduling": "on"}):
        engine = make_engine(folder, **settings)
        outputs = engine.generate([PROMPTS[1]] * 4 + [PROMPTS[2]], [*seeded, plain])
        assert outputs == [*alone, free]


def test_a_preempted_sequence_goes_on_where_it_was_in_its_grammar(tiny_model: TinyModel) -> None:
    folder = tiny_model("llama")
    grammar = LLMatcher.grammar_from_regex("([ab]c){40}")
    wanted = [params(grammar, temperature=1.0, seed=i) for i in range(6)]
    prompts = [[5 + i] * 40 for i in range(6)]
    roomy = make_engine(folder).generate(prompts, wanted)
    tight = make_engine(folder, kv_memory=12 * PAGE_BYTES, max_model_len=256)
    assert tight.generate(prompts, wanted) == roomy
    assert tight.stats.preemptions > 0
    assert all(len(output) == 81 for output in roomy)


def test_wrong_grammars_are_refused_and_cost_nobody_anything(tiny_model: TinyModel) -> None:
    engine = make_engine(tiny_model("llama"))
    [expected] = engine.generate([[3, 4]], params(None, max_tokens=20))
    wrong = {
        1: "start: missing",
        2: schema({"type": "array", "uniqueItems": True}),
        3: LLMatcher.grammar_from_regex("(?=a)b"),
        4: "{",
    }
    engine.add(0, array("i", [3, 4]), params(None, max_tokens=20))
    for i, grammar in wrong.items():
        engine.add(i, array("i", [3, 4]), params(grammar))
    outputs: list[int] = []
    refused = {}
    while engine.has_work:
        outputs += [token for output in engine.step() for token in output.token_ids]
        refused.update(dict(engine.take_refused()))
        engine.check()
    assert outputs == expected
    assert refused.keys() == wrong.keys()
    assert "uniqueItems" in str(refused[2])
    assert "look-around" in str(refused[3])
    assert all("\n" not in str(error) for error in refused.values())


def test_others_go_on_while_a_grammar_is_compiled(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(tiny_model("llama"))
    compile_now, begin = Grammars._compile, threading.Event()

    def compile_later(self: Grammars, grammar: str) -> Grammar:
        assert begin.wait(60)
        return compile_now(self, grammar)

    monkeypatch.setattr(Grammars, "_compile", compile_later)
    for i in range(3):
        engine.add(i, array("i", [3]), params(choice(["a"])))
    engine.add(3, array("i", [3]), params(None, max_tokens=5))
    told: list[Output] = []
    while sum(output.id == 3 for output in told) < 5:
        told += engine.step()
    assert {output.id for output in told} == {3}
    assert engine.stats.waiting == 3
    engine.abort([1])
    engine.step()  # waits a little
    begin.set()
    while engine.has_work:
        told += engine.step()
    assert {output.id for output in told} == {0, 2, 3}
    assert engine.stats.waiting == 0


def test_a_grammar_is_compiled_once(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(tiny_model("llama"))
    compile_now, compiled = Grammars._compile, []

    def count(self: Grammars, grammar: str) -> Grammar:
        compiled.append(grammar)
        return compile_now(self, grammar)

    monkeypatch.setattr(Grammars, "_compile", count)
    first, second = choice(["a", "ab"]), choice(["b"])
    engine.generate([[3], [4], [5]], [params(first), params(second), params(first)])
    engine.generate([[3]], params(first))
    assert sorted(compiled) == sorted([first, second])


def test_a_request_that_cannot_run_is_refused_after_its_grammar(tiny_model: TinyModel) -> None:
    engine = make_engine(tiny_model("llama"))
    engine.add(1, array("i", [3] * 600), params(choice(["a"])))
    while engine.has_work:
        assert engine.step() == []
    [(request_id, error)] = engine.take_refused()
    assert (request_id, error.param) == (1, "prompt")


@pytest.mark.parametrize("settings", [{}, {"threads": 64}, {"async_scheduling": "on"}])
def test_a_grammar_that_becomes_too_much_is_said_and_costs_no_kv(
    tiny_model: TinyModel,
    settings: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Of its sequence alone; what the cache has of the prompt is good, and stays."""
    engine = make_engine(tiny_model("llama"), **settings)
    few = LLParserLimits(max_lexer_states=40, verbose_errors=False)
    monkeypatch.setattr("headstart.engine.sampling.grammar.limits", lambda: few)
    prompt = [5 + i % 9 for i in range(80)]
    engine.add(1, array("i", prompt), params(LLMatcher.grammar_from_regex("(a|b)*a(a|b){12}")))
    engine.add(2, array("i", [4]), params(LLMatcher.grammar_from_regex("[ab]{20}")))
    told: list[Output] = []
    refused: dict[int, str] = {}
    while engine.has_work:
        told += engine.step()
        refused |= {request_id: str(error) for request_id, error in engine.take_refused()}
        engine.check()
    assert refused.keys() == {1}
    assert "grammar cannot be followed any further: lexer error: too many states" in refused[1]
    assert refused[1].count("\n") == 0
    assert [o.finish_reason for o in told if o.finish_reason] == ["stop"]
    assert sum(len(o.token_ids) for o in told if o.id == 2) >= 10
    assert [r.levelname for r in caplog.records if "too many states" in r.getMessage()] == [
        "WARNING"
    ]
    engine.add(3, array("i", prompt), params(None, max_tokens=1))
    [output] = run(engine)
    assert output.cached_tokens == 64


def run(engine: Engine) -> list[Output]:
    told: list[Output] = []
    while engine.has_work:
        told += engine.step()
    return told


def test_broken_logits_are_told_from_a_grammar_that_ended(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both at once: the KV is not to be trusted."""
    engine = make_engine(tiny_model("llama"))
    few = LLParserLimits(max_lexer_states=40, verbose_errors=False)
    monkeypatch.setattr("headstart.engine.sampling.grammar.limits", lambda: few)
    decode = engine._runner.run

    def broken(batch: Batch) -> torch.Tensor:
        return decode(batch) * float("nan")

    monkeypatch.setattr(engine._runner, "run", broken)
    grammar = LLMatcher.grammar_from_regex("(a|b)*a(a|b){12}")
    engine.add(1, array("i", [5] * 80), params(grammar))
    [output] = run(engine)
    assert output.finish_reason == "error"
    assert engine.take_refused() == []
    assert engine.stats.pages_used == 0


def test_fields_that_leave_no_way_out_are_refused() -> None:
    for name, value in {
        "min_tokens": 3,
        "bad_words": ((5,),),
        "allowed_token_ids": (4, 5),
        "ignore_eos": True,
    }.items():
        with pytest.raises(RequestError, match=f"{name} and .* grammar"):
            params("start: /a/", **{name: value}).validate(320)


def test_a_model_without_a_tokenizer_says_so(tiny_model: TinyModel, tmp_path: Path) -> None:
    grammars = Grammars(tmp_path, 320, [EOS])
    with pytest.raises(RequestError, match="tokenizer"):
        grammars.compile("start: /a/").result()


@given(st.lists(st.booleans(), min_size=1, max_size=100))
def test_bans_say_what_the_bits_say(may: list[bool]) -> None:
    padded = may + [False] * (-len(may) % 32)
    words = np.packbits(padded, bitorder="little").view(np.int32)
    assert (bans(words[None], len(may))[0] == 0).tolist() == may
    assert [bool(words[i // 32] >> (i % 32) & 1) for i in range(len(may))] == may


def test_masks_are_those_of_each_row(tiny_model: TinyModel) -> None:
    grammars = Grammars(tiny_model("llama"), 320, [EOS])
    speller = Speller(tiny_model("llama"))

    def constraint(texts: list[str]) -> Constraint:
        return grammars.compile(choice(texts)).result().begin()

    assert grammars.fill([None, None]) is None
    masks = grammars.fill([None, constraint(["the", "a"]), None, constraint(["fox", "a"])])
    assert isinstance(masks, Masks)
    assert masks.rows == [1, 3]
    for bits, texts in zip(masks.bits, (["the", "a"], ["fox", "a"]), strict=True):
        found = np.flatnonzero(bans(bits[None], 320)[0] == 0).tolist()
        assert found == speller.allowed("", texts)


LONG_NAMES = {
    "type": "object",
    "properties": {
        "assistant_identifier": {"type": "string", "maxLength": 4},
        "the_quick_brown_fox": {"enum": ["lazy dog", "lazy cat"]},
        "answer_to_everything": {"const": 42},
    },
    "required": ["assistant_identifier", "the_quick_brown_fox", "answer_to_everything"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"threads": 64},
        {"max_batched_tokens": 16},
        {"prefix_caching": False},
        {"async_scheduling": "on"},
        {"kv_memory": 12 * PAGE_BYTES, "max_model_len": 256},
        {"backend": "reference"},
    ],
)
def test_certain_tokens_are_those_that_would_be_sampled(
    tiny_model: TinyModel, settings: dict[str, Any]
) -> None:
    folder = tiny_model("llama")
    grammars = [schema(LONG_NAMES), choice(TEXTS), LLMatcher.grammar_from_regex("([ab]cdef){9}")]
    wanted = [
        params(grammar, temperature=temperature, seed=seed, max_tokens=max_tokens)
        for seed, temperature, max_tokens in ((0, 0.0, 100), (1, 1.5, 100), (2, 1.0, 30))
        for grammar in grammars
    ]
    wanted.append(params(None, temperature=1.0, seed=3, max_tokens=60))
    prompts = [PROMPTS[i % 4] for i in range(len(wanted))]
    at_once = make_engine(folder, **settings)
    outputs = at_once.generate(prompts, wanted)
    at_once.check()
    stepping = make_engine(folder, **settings)
    with one_by_one():
        assert stepping.generate(prompts, wanted) == outputs
    assert stepping.stats.forced_tokens == 0
    generated = at_once.stats.generation_tokens
    assert generated == stepping.stats.generation_tokens == sum(map(len, outputs))
    assert at_once.stats.forced_tokens > generated / 3
    assert {len(output) for output in outputs[6:9]} >= {30}


def test_a_run_takes_a_step(tiny_model: TinyModel) -> None:
    """The first token comes with the prompt, what is certain and its end at once."""
    engine = make_engine(tiny_model("llama"))
    grammar = choice(["the quick brown fox jumps over the lazy dog"])
    engine.generate([PROMPTS[2]], params(grammar, max_tokens=1))  # it is compiled then
    before = engine.stats
    [output] = engine.generate([PROMPTS[0]], params(grammar))
    assert len(output) > 8
    assert output[-1] == EOS
    assert engine.stats.forced_tokens - before.forced_tokens == len(output) - 1
    computing = engine.stats.steps - before.steps
    plain = make_engine(tiny_model("llama"))
    plain.generate([PROMPTS[0]], params(None, max_tokens=1))
    assert computing - plain.stats.steps <= 1


def test_a_run_ends_where_the_answer_does(tiny_model: TinyModel) -> None:
    folder = tiny_model("llama")
    grammar = choice(["the quick brown fox jumps over the lazy dog"])
    [whole] = make_engine(folder).generate([PROMPTS[0]], params(grammar))
    engine = make_engine(folder)
    outputs = engine.generate(
        [PROMPTS[0]] * 3,
        [
            params(grammar, max_tokens=4),
            params(grammar, stop_token_ids=(whole[5],)),
            params(grammar, max_tokens=len(whole) - 1),
        ],
    )
    end = whole.index(whole[5]) + 1
    assert outputs == [whole[:4], whole[:end], whole[:-1]]
    engine.check()


def test_tokens_whose_log_probabilities_are_wanted_are_sampled(tiny_model: TinyModel) -> None:
    folder = tiny_model("llama")
    engine = make_engine(folder)
    grammar = choice(["the quick brown fox"])
    engine.add(0, array("i", PROMPTS[0]), params(grammar, logprobs=1))
    outputs: list[Output] = []
    while engine.has_work:
        outputs += engine.step()
    tokens = [i for output in outputs for i in output.token_ids]
    assert [lp.token_id for output in outputs for lp in output.logprobs or []] == tokens
    assert [tokens] == make_engine(folder).generate([PROMPTS[0]], params(grammar))
    assert engine.stats.forced_tokens == 0


def test_who_takes_long_to_find_is_sampled(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A grammar that took long once is not asked again; a step does not ask for ever."""
    folder = tiny_model("llama")
    slow, quick = choice(["the lazy dog the lazy dog"]), choice(["the quick brown fox"])
    wanted = [params(slow), params(slow), params(quick)]
    prompts = [PROMPTS[0]] * 3
    expected = make_engine(folder).generate(prompts, wanted)
    asked: list[int] = []
    forced = Constraint.forced

    def ask(self: Constraint) -> list[int]:
        found = forced(self)
        asked.append(len(found))
        return found

    monkeypatch.setattr(Constraint, "forced", ask)
    monkeypatch.setattr("headstart.engine.sampling.grammar.SLOW_RUN", -1.0)
    engine = make_engine(folder)
    assert engine.generate(prompts, wanted) == expected
    assert sum(found > 0 for found in asked) == 2  # one for each grammar
    monkeypatch.undo()
    monkeypatch.setattr(engine_module, "RUN_SECONDS", -1.0)
    engine = make_engine(folder)
    assert engine.generate(prompts, wanted) == expected
    assert engine.stats.forced_tokens == 0
