"""Planner: answers come from its thread, and it ends when it is told to."""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from headstart.engine.costs.prefill import PrefillCosts
from headstart.engine.ranges.segments import CAUSAL
from headstart.engine.runahead import cuts
from headstart.engine.runahead import planner as planner_module
from headstart.engine.runahead.costs import Chain, LinkCosts, first_token_seconds
from headstart.engine.runahead.cuts import CutTable, Plan, plan
from headstart.engine.runahead.planner import WORTH, Planner, Prompt

PAGE = 32
SECONDS = 60.0
COSTS = PrefillCosts(0.002, 1e-4, 1e-9)
QUICK = LinkCosts(1e-6, 1e-12)
SLOW = LinkCosts(10.0, 0.0)


def chain(ranks: int, link: LinkCosts = QUICK) -> Chain:
    return Chain(4, 64, (COSTS,) * ranks, (link,) * (ranks - 1), link)


@pytest.fixture
def planner() -> Iterator[Planner]:
    planner = Planner("auto", False, PAGE, COSTS, CutTable())
    yield planner
    planner.close()


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_shortest_prompt_that_pays(planner: Planner, ranks: int) -> None:
    some = chain(ranks)
    found = planner.pays_from(some, 4096).result(SECONDS)

    def pays(tokens: int) -> bool:
        local = COSTS.seconds(0, tokens)
        return plan(some, [0] * ranks, tokens, PAGE).seconds <= WORTH * local

    assert found % PAGE == 0
    assert pays(found)
    assert not pays(found - PAGE)


def test_where_nothing_pays(planner: Planner) -> None:
    some = chain(2, SLOW)
    assert planner.pays_from(some, 4096).result(SECONDS) == 4096
    alone = planner.plan(some, Prompt(640, (0, 0), CAUSAL)).result(SECONDS)
    assert alone.bounds == (0, 640)


def test_ways_to_cut() -> None:
    prompt, some = Prompt(640, (0, 0), CAUSAL), chain(2)
    table = CutTable().with_cuts([0, 96, 640])
    bounds = {}
    for way in planner_module.CUTS:
        planner = Planner(way, False, PAGE, COSTS, table)
        bounds[way] = planner.plan(some, prompt).result(SECONDS).bounds
        planner.close()
    assert bounds["even"] == (0, 320, 640)
    assert bounds["auto"] == bounds["predicted"] == (0, 96, 640)
    assert bounds["modelled"] == tuple(plan(some, (0, 0), 640, PAGE).bounds)


def test_cuts_that_are_asked_for(planner: Planner) -> None:
    forced = Prompt(640, (0, 0), CAUSAL, (0, 32, 640))
    assert planner.plan(chain(2), forced).result(SECONDS).bounds == (0, 32, 640)
    always = Planner("modelled", True, PAGE, COSTS, CutTable())
    found = always.plan(chain(2, SLOW), Prompt(640, (0, 0), CAUSAL)).result(SECONDS)
    assert found.bounds == (0, 320, 640)
    always.close()


def test_closing_gives_up_what_is_begun_and_what_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go, calls = threading.Event(), threading.Event(), []

    def held(*args: Any, **more: Any) -> Plan:
        calls.append(args)
        begun.set()
        assert go.wait(SECONDS)
        return plan(*args, **more)

    monkeypatch.setattr(planner_module, "plan", held)
    before = set(threading.enumerate())
    planner = Planner("auto", False, PAGE, COSTS, CutTable())
    first = planner.pays_from(chain(2, SLOW), 1 << 20)
    waiting = planner.plan(chain(2), Prompt(640, (0, 0), CAUSAL))
    assert begun.wait(SECONDS)
    closing = threading.Thread(target=planner.close)
    closing.start()
    end = time.monotonic() + SECONDS
    while not waiting.cancelled():
        assert time.monotonic() < end
        time.sleep(0.001)
    assert not first.done()
    go.set()
    closing.join(SECONDS)
    assert first.done()
    assert len(calls) == 1
    assert set(threading.enumerate()) == before


@pytest.mark.parametrize("ask", ["plan", "pays_from"])
def test_a_search_that_is_given_up_ends_with_its_trial(
    planner: Planner, monkeypatch: pytest.MonkeyPatch, ask: str
) -> None:
    """Which an aborted prompt's would go on with, for seconds where there are many ranks."""
    trials, begun, go = [], threading.Event(), threading.Event()

    def held(*args: Any) -> float:
        trials.append(args)
        begun.set()
        assert go.wait(SECONDS)
        return first_token_seconds(*args)

    monkeypatch.setattr(cuts, "first_token_seconds", held)
    some = chain(12)
    prompt = Prompt(1 << 17, (0,) * 12, CAUSAL)
    asked = planner.plan(some, prompt) if ask == "plan" else planner.pays_from(some, 1 << 17)
    assert begun.wait(SECONDS)
    asked.cancel()
    go.set()
    asked.result(SECONDS)
    assert len(trials) == 1


def test_a_search_takes_no_longer_than_it_may(
    planner: Planner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then the best so far is the answer: the engine alone, where there is no time at all."""
    length, trials = 1 << 17, []
    seconds = itertools.count()  # one passes whenever the time is asked
    clock = SimpleNamespace(monotonic=lambda: next(seconds), sleep=time.sleep)
    monkeypatch.setattr(planner_module, "time", clock)

    def counted(*args: Any) -> float:
        trials.append(args)
        return first_token_seconds(*args)

    monkeypatch.setattr(cuts, "first_token_seconds", counted)
    local = COSTS.seconds(0, length)
    prompt = Prompt(length, (0,) * 12, CAUSAL)
    monkeypatch.setattr(planner_module, "SEARCH_SECONDS", 0.0)
    for share, most in ((0.0, 0), (3.0, math.ceil(3 * local))):
        monkeypatch.setattr(planner_module, "SEARCH_SHARE", share)
        trials.clear()
        bounds = planner.plan(chain(12), prompt).result(SECONDS).bounds
        assert (len(bounds) > 2) == (most > 0)
        assert len(trials) <= most
