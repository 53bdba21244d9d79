"""Why the cache did not have more of a prompt: each cause is made, and asked for."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from headstart.engine.config import EngineConfig
from headstart.engine.engine import Engine
from headstart.engine.kv.history import Earlier, History, Namespace
from headstart.engine.process.messages import Explanation, Missed
from headstart.engine.sampling.params import SamplingParams

PAGE = 32
PROMPT = [3 + i % 300 for i in range(150)]
PLAIN = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)

New = Callable[..., Engine]


@pytest.fixture
def new_engine(tiny_model: Callable[..., Path]) -> New:
    def new(**settings: Any) -> Engine:
        given: dict[str, Any] = {"weights": "f32", "threads": 1, "kv_memory": 4 << 20}
        path = str(tiny_model("llama", num_hidden_layers=2))
        return Engine(EngineConfig(model_path=path, **(given | settings)))

    return new


@pytest.fixture
def engine(new_engine: New) -> Engine:
    return new_engine()


class Asking:
    """Requests of one engine, each with the next id."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.last = 0
        self.outputs: dict[int, list[int]] = {}
        self.explained: dict[int, Explanation] = {}
        self.cached: dict[int, int] = {}

    def add(self, tokens: Iterable[int], *, ask: bool = False, **where: Any) -> int:
        params = where.pop("params", PLAIN)
        self.last += 1
        asking = msgspec.structs.replace(params, cache_explain=ask)
        self.engine.add(self.last, array("i", tokens), asking, **where)
        return self.last

    def step(self) -> None:
        for output in self.engine.step():
            self.outputs.setdefault(output.id, []).extend(output.token_ids)
            self.cached[output.id] = output.cached_tokens
            if output.explanation is not None:
                assert output.id not in self.explained
                self.explained[output.id] = output.explanation
        self.engine.check()

    def finish(self) -> None:
        while self.engine.has_work:
            self.step()

    def answer(self, tokens: Iterable[int], **where: Any) -> list[int]:
        request_id = self.add(tokens, **where)
        self.finish()
        return self.outputs.get(request_id, [])

    def why(self, tokens: Iterable[int], **where: Any) -> Explanation:
        """Ask, and see that the explanation is about all that was not cached."""
        tokens = list(tokens)
        request_id = self.add(tokens, ask=True, **where)
        self.finish()
        return self.of(request_id, len(tokens))

    def of(self, request_id: int, size: int) -> Explanation:
        found = self.explained[request_id]
        assert found.page_size == PAGE
        missed = sum(span.end - span.start for span in found.missed)
        assert missed == size - self.cached[request_id]
        for a, b in zip(found.missed, found.missed[1:], strict=False):
            assert a.end <= b.start
        return found


@pytest.fixture
def asking(engine: Engine) -> Asking:
    return Asking(engine)


def spans(found: Explanation) -> list[tuple[int, int, str]]:
    return [(span.start, span.end, span.cause) for span in found.missed]


def of_cause(found: Explanation, cause: str) -> Missed:
    [span] = [span for span in found.missed if span.cause == cause]
    return span


def test_who_does_not_ask_is_told_nothing(asking: Asking) -> None:
    asking.answer(PROMPT)
    asking.answer(PROMPT)
    assert asking.explained == {}


def test_never_seen(asking: Asking) -> None:
    found = asking.why(PROMPT)
    assert spans(found) == [(0, 149, "never_seen"), (149, 150, "last_token")]
    assert found.difference is None


def test_fully_cached_below_a_page_and_the_last_token(asking: Asking) -> None:
    asking.answer(PROMPT)
    found = asking.why(PROMPT)
    assert spans(found) == [(128, 149, "below_page"), (149, 150, "last_token")]
    assert found.difference is None


def test_the_page_of_the_last_token_is_computed_whole(asking: Asking) -> None:
    asking.answer(PROMPT)
    assert spans(asking.why(PROMPT[:128])) == [(96, 128, "last_token")]


def test_sampling_does_not_matter(asking: Asking) -> None:
    asking.answer(PROMPT)
    params = SamplingParams(max_tokens=3, temperature=1.5, seed=3, top_k=5, min_tokens=2)
    assert spans(asking.why(PROMPT, params=params))[0] == (128, 149, "below_page")


def test_the_first_token_that_differs(asking: Asking) -> None:
    asking.answer(PROMPT)
    other = [*PROMPT[:100], 7, *PROMPT[101:]]
    found = asking.why(other)
    assert spans(found) == [
        (96, 100, "below_page"),
        (100, 149, "differs"),
        (149, 150, "last_token"),
    ]
    difference = found.difference
    assert difference is not None
    assert difference.token == 100
    assert difference.seconds_ago is not None
    at = difference.token - difference.start
    assert difference.earlier[at] == PROMPT[100]
    assert difference.earlier[:at] == PROMPT[difference.start : 100]
    assert len(difference.earlier) < 100


def test_the_closest_earlier_prompt_explains(asking: Asking) -> None:
    asking.answer(PROMPT[:40] + [5] * 40)
    asking.answer(PROMPT[:120] + [5] * 20)
    asking.answer(PROMPT[:80] + [5] * 20)
    found = asking.why(PROMPT)
    assert found.difference is not None
    assert found.difference.token == 120


def test_a_conversation_that_goes_on(asking: Asking) -> None:
    answer = asking.answer(PROMPT)
    longer = [*PROMPT, *answer, *range(10, 60)]
    found = asking.why(longer)
    assert of_cause(found, "new").start == len(PROMPT) + len(answer)
    # What differs in the answer is told as such.
    changed = [*PROMPT, answer[0], answer[1] + 1, *range(10, 60)]
    found = asking.why(changed)
    assert found.difference is not None
    assert found.difference.token == len(PROMPT) + 1


def test_a_token_that_ends_an_answer_on_a_page_has_no_kv(asking: Asking) -> None:
    prompt = PROMPT[:124]
    answer = asking.answer(prompt)
    found = asking.why([*prompt, *answer, *range(10, 60)])
    assert of_cause(found, "not_computed").start == 96


def fill(asking: Asking) -> None:
    """Prompts that need all pages."""
    for i in range(12):
        asking.answer([20 + i, *range(30, 220)])


def test_evicted_by_a_prompt_that_needed_room(new_engine: New) -> None:
    asking = Asking(new_engine(kv_memory=256 << 10))
    asking.answer(PROMPT)
    fill(asking)
    found = asking.why(PROMPT)
    span = of_cause(found, "evicted")
    assert (span.start, span.end, span.by) == (0, 128, "prompt")
    assert span.seconds_ago is not None
    assert span.seconds_ago >= 0


def test_evicted_by_an_answer_that_grew(new_engine: New) -> None:
    asking = Asking(new_engine(kv_memory=256 << 10))
    pages = asking.engine.model.num_pages
    asking.answer(PROMPT)
    params = msgspec.structs.replace(PLAIN, max_tokens=(pages - 2) * PAGE - 4)
    asking.answer([9, 8, 7], params=params)
    found = asking.why(PROMPT)
    assert of_cause(found, "evicted").by == "answer"


def test_an_eviction_that_is_forgotten_has_no_time(new_engine: New) -> None:
    asking = Asking(new_engine(kv_memory=256 << 10))
    asking.answer(PROMPT)
    fill(asking)
    history = asking.engine._scheduler._history
    history._most_evicted = 1
    asking.answer([19, *range(30, 220)])
    span = of_cause(asking.why(PROMPT), "evicted")
    assert (span.seconds_ago, span.by) == (None, None)


def test_another_salt_is_never_told_of(asking: Asking) -> None:
    asking.answer(PROMPT, salt=b"theirs")
    found = asking.why(PROMPT, salt=b"mine")
    fresh = asking.why([1, *PROMPT[1:]], salt=b"new")
    # Just what is told where nobody has sent anything.
    assert spans(found) == spans(fresh) == [(0, 149, "never_seen"), (149, 150, "last_token")]
    assert found.difference is fresh.difference is None


def test_another_owner_shares_kv_and_is_not_told_of(asking: Asking) -> None:
    asking.answer(PROMPT, owner=b"theirs")
    found = asking.why([*PROMPT[:100], *range(30)], owner=b"mine")
    assert asking.cached[asking.last] == 96
    assert [span.cause for span in found.missed] == ["never_seen", "last_token"]
    assert found.difference is None


def test_another_adapter(new_engine: New, tiny_model: Callable[..., Path], lora: Any) -> None:
    folder = lora.write(tiny_model("llama", num_hidden_layers=2))
    asking = Asking(new_engine(adapters={"poet": str(folder)}))
    asking.answer(PROMPT, adapter="poet")
    span = of_cause(asking.why(PROMPT), "other_adapter")
    assert (span.start, span.end, span.by) == (0, 149, "poet")
    # And the other way round: the model itself has no name.
    asking.answer(range(10, 100))
    span = of_cause(asking.why(range(10, 100), adapter="poet"), "other_adapter")
    assert (span.start, span.end, span.by) == (0, 89, None)


def test_another_segment_mask(asking: Asking) -> None:
    asking.answer(PROMPT, segments=[(1, 100)])
    span = of_cause(asking.why(PROMPT), "other_segment_mask")
    assert (span.start, span.end, span.by) == (0, 149, "turns")


def test_a_segment_that_has_changed_is_computed_whole(asking: Asking) -> None:
    asking.answer(PROMPT, segments=[(1, 40), (50, 110), (110, 148)])
    changed = [*PROMPT[:100], 7, *PROMPT[101:]]
    found = asking.why(changed, segments=[(1, 40), (50, 110), (110, 148)])
    assert spans(found) == [
        (32, 50, "below_page"),
        (50, 100, "segment_changed"),
        (100, 149, "differs"),
        (149, 150, "last_token"),
    ]


def test_rows_that_are_read_are_computed(asking: Asking) -> None:
    asking.answer(PROMPT)
    params = msgspec.structs.replace(PLAIN, prompt_logprobs=1)
    assert spans(asking.why(PROMPT, params=params)) == [(0, 150, "reads_prompt")]


def test_prefix_caching_off(new_engine: New) -> None:
    asking = Asking(new_engine(prefix_caching=False))
    asking.answer(PROMPT)
    assert spans(asking.why(PROMPT)) == [(0, 150, "prefix_caching_off")]


def test_one_that_was_aborted_has_computed_a_part(new_engine: New) -> None:
    asking = Asking(new_engine(max_batched_tokens=32))
    first = asking.add(PROMPT)
    asking.step()
    asking.step()
    asking.engine.abort([first])
    asking.finish()
    found = asking.why(PROMPT)
    assert spans(found)[0] == (64, 128, "not_computed")
    assert found.missed[0].by == "aborted"


def test_computed_for_another_meanwhile(new_engine: New) -> None:
    asking = Asking(new_engine(max_batched_tokens=32))
    asking.add(PROMPT)
    asking.step()
    second = asking.add(PROMPT, ask=True)
    asking.finish()
    found = asking.of(second, len(PROMPT))
    assert found.meanwhile == 96
    assert [span.cause for span in found.missed] == ["below_page", "last_token"]


def test_still_waiting_to_be_computed_for_another(new_engine: New) -> None:
    asking = Asking(new_engine(max_batched_tokens=32, scheduling_policy="priority"))
    asking.add(PROMPT, priority=5)
    second = asking.add(PROMPT[:100], ask=True)
    asking.finish()
    span = of_cause(asking.of(second, 100), "being_computed")
    assert (span.start, span.end, span.by) == (0, 96, "waiting")


def test_preempted_before_its_first_token(new_engine: New) -> None:
    asking = Asking(new_engine(max_batched_tokens=2, kv_memory=256 << 10))
    room = asking.engine.model.num_pages * PAGE
    long = msgspec.structs.replace(PLAIN, max_tokens=room - 8)
    first = asking.add([3, 4, 5], params=long)
    # A token of the prompt a step, so that the answer grows by more than what was kept for it.
    while len(asking.outputs.get(first, ())) < room - 7 * PAGE:
        asking.step()
    second = asking.add(PROMPT[:100], ask=True)
    asking.finish()
    found = asking.of(second, 100)
    assert found.preemptions == 1


def test_those_who_leave_are_forgotten(asking: Asking) -> None:
    first = asking.add(PROMPT, ask=True)
    asking.engine.abort([first])
    asking.finish()
    assert not asking.engine._explainer.asked


# ------------------------------------------------------------------------------- the history


def earlier(tokens: list[int], *, salt: bytes = b"", owner: bytes = b"", **rest: Any) -> Earlier:
    given = {"kept": len(tokens) // PAGE * PAGE, "when": 0.0} | rest
    key = Namespace(salt, b"", False).key
    ids = array("i", tokens)
    return Earlier(namespace=key, owner=owner, token_ids=ids, **given)


def test_a_namespace_comes_back_from_its_key() -> None:
    for namespace in (
        Namespace(b"", b"", False),
        Namespace(b"salt", b"", True),
        Namespace(b"\x01\x02", b"digest", True),
    ):
        assert Namespace.of(namespace.key) == namespace


def test_the_history_is_bounded() -> None:
    history = History(most_prompts=3, most_bytes=1000, clock=lambda: 0.0)
    for i in range(5):
        history.add(earlier([i, i + 1]))
    assert [list(e.token_ids) for e in history.prompts(b"", b"")] == [[4, 5], [3, 4], [2, 3]]
    history.add(earlier([9] * 249))
    assert [len(e.token_ids) for e in history.prompts(b"", b"")] == [249]
    history.add(earlier([8] * 300))  # longer than all that there is room for
    assert list(history.prompts(b"", b"")) == []


def test_a_prompt_that_goes_on_takes_the_place_of_the_earlier_one() -> None:
    history = History(clock=lambda: 0.0)
    history.add(earlier([1, 2, 3]))
    history.add(earlier([1, 2, 3, 4]))
    history.add(earlier([1, 2, 3], salt=b"other"))
    assert [list(e.token_ids) for e in history.prompts(b"", b"")] == [[1, 2, 3, 4]]
    # One of which less was computed says less.
    history.add(earlier([1, 2, 3, 4, 5], kept=-1))
    assert len(list(history.prompts(b"", b""))) == 2


def test_the_first_eviction_since_is_the_prompts_own() -> None:
    now = 0.0
    history = History(most_evicted=6, clock=lambda: now)
    history.evicted([1, 2], "prompt")
    seen = earlier([1] * 64, pages=[1, 2], evictions=1)
    assert history.eviction(seen, 0) is None
    now = 1.0
    history.evicted([2], "answer")
    history.evicted([1, 2], "prompt")
    found = history.eviction(seen, 1)
    assert found is not None
    assert (found.when, found.why) == (1.0, "answer")
    history.evicted([3, 4, 5, 6], "prompt")
    assert history.eviction(seen, 1) is None  # forgotten: that of the page's next life is not it
