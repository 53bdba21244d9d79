"""The definitions of the figures, on numbers worked out by hand."""

import pytest

from headstart.bench.prompts import Calibration, PromptSource, words
from headstart.bench.samples import Burst, Sample, percentile


def test_ttft_and_tpot() -> None:
    sample = Sample(sent=1.0, times=(1.5, 1.6, 1.9), output_tokens=5)
    assert sample.ttft == pytest.approx(0.5)
    assert sample.tpot == pytest.approx(0.4 / 4)
    assert Sample(sent=0.0, times=(1.0,), output_tokens=1).tpot is None


def test_rates() -> None:
    a = Sample(sent=0.0, times=(1.0, 2.0, 3.0, 4.0), output_tokens=4)
    b = Sample(sent=0.0, times=(2.0, 3.0, 4.0, 5.0), output_tokens=4)
    failed = Sample(sent=0.0, error="no")
    burst = Burst([a, b, failed])
    assert burst.output_rate() == pytest.approx(8 / 5)
    # All decode from 2 to 4: two more tokens of each.
    assert burst.decode_rate() == pytest.approx(4 / 2)


def test_no_window_where_all_decode() -> None:
    a = Sample(sent=0.0, times=(1.0, 2.0), output_tokens=2)
    b = Sample(sent=0.0, times=(2.0, 3.0), output_tokens=2)
    assert Burst([a, b]).decode_rate() is None
    assert Burst([]).output_rate() is None


def test_percentile() -> None:
    assert percentile([], 0.95) is None
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile(list(range(1, 21)), 0.95) == 19


def test_words_are_unique_and_plain() -> None:
    assert len(words()) > 500
    assert len(set(words())) == len(words())
    assert all(word.isascii() and word.isalpha() and word.islower() for word in words())


def test_prompts_follow_seed_and_label() -> None:
    source = PromptSource(5)
    assert source.conversation("a", 40, "u") == PromptSource(5).conversation("a", 40, "u")
    assert source.text("a", 40) != source.text("b", 40)
    assert source.text("a", 40) != PromptSource(6).text("a", 40)
    system, user = source.conversation("a", 40, "u")
    assert (len(system["content"].split()), len(user["content"].split())) == (40, 24)


def test_calibration() -> None:
    exact = Calibration.from_counts(32 + 40, 160 + 40)
    assert exact.system_words(1748) == 1748 - 40
    assert exact.system_words(exact.prompt_tokens(512)) == 512
    rough = Calibration.from_counts(round(32 * 1.5) + 40, 160 * 3 // 2 + 40)
    assert rough.system_words(340) == 200
    with pytest.raises(ValueError, match="too short"):
        exact.system_words(40)
    with pytest.raises(ValueError, match="must have more tokens"):
        Calibration.from_counts(50, 50)
