"""AttentionCosts: reading the table, making one, and the file it is kept in."""

from __future__ import annotations

import itertools
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headstart.engine.costs import attention as attention_costs
from headstart.engine.costs.attention import (
    FOOTPRINTS,
    ROWS,
    AttentionCosts,
    load_costs,
    measure_costs,
)
from headstart.kernels.backend import AttentionShape, Backend
from headstart.kernels.devices import load_backend

SHAPE = AttentionShape(4, 2, 64)
TABLE: dict[str, Any] = {
    "rows": [1, 2, 6],
    "fixed": [2.0, 3.0, 11.0],
    "cold": [4.0, 5.0, 9.0],
    "hot": [1.0, 1.5, 7.5],
    "footprints": [100, 200, 600],
    "coldness": [0.1, 0.3, 0.9],
    "key_bytes": 2,
}


def table(**changes: Any) -> AttentionCosts:
    return AttentionCosts(**(TABLE | changes))


def any_backend() -> Backend:
    return load_backend("cpu", isa="auto", weights="f32", threads=2)


# ---------------------------------------------------------------- the table


def test_measured_points_are_given_as_they_are() -> None:
    costs = table()
    for at, rows in enumerate(TABLE["rows"]):
        assert costs.of(rows) == tuple(TABLE[name][at] for name in ("fixed", "cold", "hot"))


def test_linear_between_and_in_proportion_beyond() -> None:
    costs = table()
    assert costs.of(3) == (5.0, 6.0, 3.0)
    assert costs.of(5) == (9.0, 8.0, 6.0)
    assert costs.of(12) == (22.0, 18.0, 15.0)
    assert table(rows=[3, 4, 6]).of(1) == (2.0, 4.0, 1.0)  # never below what was measured
    one = AttentionCosts([4], [1.0], [2.0], [0.5], [1], [1.0], 1)
    assert [one.of(rows) for rows in (1, 4, 8)] == [(1, 2, 0.5), (1, 2, 0.5), (2, 4, 1)]


rising = st.lists(st.floats(0.1, 100), min_size=4, max_size=4).map(sorted)


@given(rising, rising, rising, st.lists(st.integers(1, 60), min_size=4, max_size=4, unique=True))
def test_more_rows_never_cost_less(
    fixed: list[float], cold: list[float], hot: list[float], rows: list[int]
) -> None:
    costs = AttentionCosts(sorted(rows), fixed, cold, hot, [1], [1.0], 1)
    for fewer, more in itertools.pairwise(map(costs.of, range(1, 130))):
        assert all(a <= b * (1 + 1e-12) for a, b in zip(fewer, more, strict=True))


def test_seconds_of_a_range_read_from_memory() -> None:
    costs = table()
    assert costs.seconds(3, 0) == 5.0
    assert costs.seconds(3, 10.5) == 5.0 + 6.0 * 10.5


@pytest.mark.parametrize(
    ("keys", "coldness"),
    [(0, 0.1), (50, 0.1), (51, 0.104), (75, 0.2), (100, 0.3), (200, 0.6), (300, 0.9), (9999, 0.9)],
)
def test_coldness_after(keys: int, coldness: float) -> None:
    """Two bytes a key: 50 keys are the first footprint, 300 the last."""
    assert table().coldness_after(keys) == pytest.approx(coldness)


@pytest.mark.parametrize(
    "changes",
    [
        {"rows": [1, 2]},
        {"fixed": [1.0, 2.0]},
        {"cold": [1.0]},
        {"hot": []},
        {"rows": [], "fixed": [], "cold": [], "hot": []},
        {"rows": [1, 2, 2]},
        {"rows": [2, 1, 3]},
        {"rows": [0, 1, 2]},
        {"footprints": [100, 200]},
        {"coldness": [0.1]},
        {"footprints": [], "coldness": []},
        {"footprints": [200, 100, 600]},
        {"key_bytes": 0},
        {"key_bytes": -2},
    ],
)
def test_what_is_no_table(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="not a table of attention costs"):
        table(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"fixed": [0.0, -1.0, 1.0]},
        {"coldness": [0.0, -0.1, 1.0]},
        {"cold": [0.0, 1.0, 1.0]},
        {"hot": [1.0, 1.0, -1.0]},
    ],
)
def test_costs_below_zero(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="attention costs below zero"):
        table(**changes)


# ---------------------------------------------------------------- measuring


def sane(costs: AttentionCosts, key_bytes: int) -> None:
    assert tuple(costs.rows) == ROWS[: len(costs.rows)]
    assert tuple(costs.footprints) == attention_costs.FOOTPRINTS
    assert costs.key_bytes == key_bytes
    assert all(0 <= coldness <= 1 for coldness in costs.coldness)
    for cold, hot in zip(costs.cold, costs.hot, strict=True):
        assert 0 < hot <= cold < 1e-3
    assert all(0 <= fixed < 0.1 for fixed in costs.fixed)


def test_measured_on_the_cpu() -> None:
    backend = any_backend()
    sane(measure_costs(backend, SHAPE), 2 * 2 * 64 * 4)


@pytest.mark.slow
def test_many_rows_cost_less_than_as_many_times_one() -> None:
    """Measured, so of a machine that does little else."""
    costs = measure_costs(any_backend(), SHAPE)
    # 64 rows are more work than one, and less than 64 times as much: what sharing lives on.
    if len(costs.rows) == len(ROWS):
        assert costs.cold[0] < costs.cold[-1] < 64 * costs.cold[0]


def test_a_short_measurement_knows_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_costs, "FOOTPRINTS", FOOTPRINTS[:2])
    shape = AttentionShape(2, 2, 256)
    backend = load_backend("reference", isa="auto", weights="f32", threads=2)
    costs = measure_costs(backend, shape, budget=0.0)
    sane(costs, 2 * 2 * 256 * 4)
    assert costs.rows == [1]
    assert costs.of(10)[1] == pytest.approx(10 * costs.cold[0])


# ---------------------------------------------------------------- the file


class Measure:
    """Stands in for measure_costs: tables that differ by the number of the call."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, backend: Backend, shape: AttentionShape) -> AttentionCosts:
        self.calls += 1
        return table(fixed=[0.1, 1 / 3, float(self.calls)])


@pytest.fixture
def measure(monkeypatch: pytest.MonkeyPatch) -> Measure:
    measure = Measure()
    monkeypatch.setattr(attention_costs, "measure_costs", measure)
    return measure


def kept(folder: Path) -> Path:
    [file] = folder.iterdir()
    return file


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def test_measured_once_and_then_read(
    measure: Measure, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "not" / "yet" / "there"
    first = load_costs(any_backend(), SHAPE, folder)
    assert load_costs(any_backend(), SHAPE, folder) == first
    assert measure.calls == 1
    assert kept(folder).name.startswith("attention-")
    assert json.loads(kept(folder).read_bytes())["about"]["device"] == any_backend().device
    assert warnings(caplog) == []


def test_no_folder_keeps_nothing(measure: Measure, tmp_path: Path) -> None:
    for calls in (1, 2):
        load_costs(any_backend(), SHAPE, None)
        assert measure.calls == calls
    assert list(tmp_path.iterdir()) == []


def test_another_machine_shape_or_version_is_measured_anew(
    measure: Measure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = any_backend()
    first = load_costs(backend, SHAPE, tmp_path)
    others = [
        (load_backend("cpu", isa="auto", weights="f32", threads=1), SHAPE),
        (load_backend("cpu", isa="portable", weights="f32", threads=2), SHAPE),
        (load_backend("cpu", isa="auto", weights="bf16", threads=2), SHAPE),
        (load_backend("cpu", isa="auto", weights="f32", threads=2, page_size=64), SHAPE),
        (load_backend("reference", isa="auto", weights="f32", threads=2), SHAPE),
        (backend, AttentionShape(2, 2, 64)),
        (backend, AttentionShape(4, 4, 64)),
        (backend, AttentionShape(4, 2, 32)),
    ]
    for number, (other, shape) in enumerate(others, 2):
        assert load_costs(other, shape, tmp_path).fixed[-1] == number
    monkeypatch.setattr(attention_costs, "VERSION", attention_costs.VERSION + 1)
    assert load_costs(backend, SHAPE, tmp_path).fixed[-1] == len(others) + 2
    monkeypatch.undo()
    # They lie side by side: going back costs no new measurement.
    assert load_costs(backend, SHAPE, tmp_path) == first


def test_a_device_of_another_name_is_measured_anew(
    measure: Measure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = any_backend()
    load_costs(backend, SHAPE, tmp_path)
    monkeypatch.setattr(backend, "device", "another processor, and the folder came with the disk")
    assert load_costs(backend, SHAPE, tmp_path).fixed[-1] == 2


def test_a_file_about_something_else_is_not_believed(measure: Measure, tmp_path: Path) -> None:
    load_costs(any_backend(), SHAPE, tmp_path)
    path = kept(tmp_path)
    found = json.loads(path.read_bytes())
    found["about"]["device"] = "another"
    path.write_text(json.dumps(found))
    assert load_costs(any_backend(), SHAPE, tmp_path).fixed[-1] == 2
    assert load_costs(any_backend(), SHAPE, tmp_path).fixed[-1] == 2  # it was replaced


def changed(**costs: Any) -> bytes:
    return json.dumps({"about": {}, "measured": TABLE | costs}).encode()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 500,
        b"not JSON",
        b"[]",
        b"null",
        b'{"about": "\xff\xfe", "measured": {}}',
        json.dumps({"about": {}}).encode(),
        json.dumps({"about": [], "measured": TABLE}).encode(),
        json.dumps({"about": {}, "measured": [TABLE]}).encode(),
        changed(rows="1 2 6"),
        changed(rows=[1, 2, 6.5]),
        changed(cold=[1.0, None, 2.0]),
        changed(cold=[1.0, 2.0]),
        changed(cold=[1.0, 2.0, -3.0]),
        changed(footprints=[3, 2, 1]),
        changed(key_bytes=0),
        changed(key_bytes="2"),
        changed(fixed=[1.0, float("nan"), 2.0]),
        changed(fixed=[1.0, float("inf"), 2.0]),
        changed(fixed=[1.0, 10**400, 2.0]),
    ],
)
def test_a_file_that_makes_no_sense_is_measured_anew(
    content: bytes, measure: Measure, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load_costs(any_backend(), SHAPE, tmp_path)
    path = kept(tmp_path)
    path.write_bytes(content)
    anew = load_costs(any_backend(), SHAPE, tmp_path)
    assert anew.fixed[-1] == 2
    [warning] = warnings(caplog)
    assert str(path) in warning
    assert "measured anew" in warning
    assert "\n" not in warning
    assert load_costs(any_backend(), SHAPE, tmp_path) == anew
    assert measure.calls == 2


def test_a_file_cut_off_anywhere_is_measured_anew(
    measure: Measure, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    backend = any_backend()
    load_costs(backend, SHAPE, tmp_path)
    path = kept(tmp_path)
    whole = path.read_bytes()
    for calls, length in enumerate(range(0, len(whole) - 1, 7), 2):
        path.write_bytes(whole[:length])
        assert load_costs(backend, SHAPE, tmp_path).fixed[-1] == calls
        assert len(warnings(caplog)) == calls - 1


def test_a_folder_that_cannot_be_written_only_warns(
    measure: Measure, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    blocked = tmp_path / "a file"
    blocked.write_text("in place of the folder")
    for calls in (1, 2):
        assert load_costs(any_backend(), SHAPE, blocked / "machine").fixed[-1] == calls
    assert any("not kept in" in warning for warning in warnings(caplog))
    assert blocked.read_text() == "in place of the folder"


def test_a_folder_in_place_of_the_file_only_warns(
    measure: Measure, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load_costs(any_backend(), SHAPE, tmp_path)
    path = kept(tmp_path)
    path.unlink()
    path.mkdir()
    assert load_costs(any_backend(), SHAPE, tmp_path).fixed[-1] == 2
    assert any("not kept in" in warning for warning in warnings(caplog))
    assert "is not readable" in warnings(caplog)[0]
    assert kept(tmp_path) == path  # and nothing half-written beside it
