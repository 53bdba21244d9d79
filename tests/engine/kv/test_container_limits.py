"""What a container's limits (cgroup v2) leave of the machine's memory and cores."""

import os

import psutil
import pytest

from headstart.engine.kv.memory import available_memory
from headstart.engine.process.cores import usable_cores

MIB = 2**20


def test_memory_counts_cached_files_as_free(tmp_path):
    (tmp_path / "memory.max").write_text(f"{512 * MIB}\n")
    (tmp_path / "memory.current").write_text(f"{400 * MIB}\n")
    (tmp_path / "memory.stat").write_text(
        f"anon {100 * MIB}\nfile {300 * MIB}\nactive_file {120 * MIB}\ninactive_file {170 * MIB}\n"
    )
    assert available_memory(tmp_path) == (512 - 400 + 120 + 170) * MIB


@pytest.mark.parametrize("limit", ["max\n", None])
def test_memory_without_a_limit_is_the_machines(tmp_path, limit):
    if limit is not None:
        (tmp_path / "memory.max").write_text(limit)
    assert available_memory(tmp_path) == pytest.approx(
        psutil.virtual_memory().available, abs=1024 * MIB
    )


@pytest.mark.parametrize(
    ("quota", "cores"),
    [
        ("200000 100000", 2),
        ("150000 100000", 1),
        ("50000 100000", 1),
        ("9900000 100000", 8),
        ("max 100000", 8),
        (None, 8),
    ],
)
def test_cores(tmp_path, monkeypatch, quota, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    if quota is not None:
        (tmp_path / "cpu.max").write_text(quota + "\n")
    assert usable_cores(tmp_path, tmp_path / "no processors") == cores


@pytest.mark.parametrize(
    ("siblings", "cpus", "cores"),
    [
        (["0-1", "0-1", "2-3", "2-3"], {0, 1, 2, 3}, 2),
        (["0,2", "1,3", "0,2", "1,3"], {0, 1, 2, 3}, 2),
        (["0,2", "1,3", "0,2", "1,3"], {0, 1}, 2),
        (["0,2", "1,3", "0,2", "1,3"], {1, 3}, 1),
        (["0", "1"], {0, 1}, 2),
        (["0-1", "0-1"], {0, 1, 2, 3}, 3),  # of two nothing is said
    ],
)
def test_threads_of_a_core_count_once(tmp_path, monkeypatch, siblings, cpus, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: cpus)
    for cpu, text in enumerate(siblings):
        topology = tmp_path / f"cpu{cpu}" / "topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(text + "\n")
    assert usable_cores(tmp_path / "no cgroup", tmp_path) == cores
