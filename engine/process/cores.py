"""How many CPU cores there are for this process, and how its children use them."""

import contextlib
import os
from pathlib import Path


def usable_cores(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Cores this process may run on, or fewer where a container's quota (cgroup v2) allows fewer.

    A part of a core does not count, unless there is no more: the kernels' threads wait for each
    other, so one that the quota stops would stop them all.
    """
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:  # not Linux
        cores = os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # no cgroup v2, or "max"
        quota, period = (cgroup / "cpu.max").read_text().split()
        cores = min(cores, int(quota) // int(period))
    return max(1, cores)


def kernel_environment() -> dict[str, str]:
    """The environment for a process that runs kernels; what is set already stays.

    Its threads wait for the next parallel region by spinning, but not for long: others need the
    cores, too.
    """
    return {"GOMP_SPINCOUNT": "20000", "OMP_PROC_BIND": "false", **os.environ}
