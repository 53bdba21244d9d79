"""How many CPU cores there are for this process, and how its children use them."""

import contextlib
import os
from pathlib import Path

import psutil

CGROUP, PROCESSORS = Path("/sys/fs/cgroup"), Path("/sys/devices/system/cpu")


def usable_cores(cgroup: Path = CGROUP, processors: Path = PROCESSORS) -> int:
    """Cores this process may run on, or fewer where a container's quota (cgroup v2) allows fewer.

    Two hardware threads of a core count once: they share its arithmetic, which the kernels keep
    busy with one. A part of a core does not count, unless there is no more: the kernels' threads
    wait for each other, so one that the quota stops would stop them all.
    """
    if hasattr(os, "sched_getaffinity"):
        cores = len({_core(processors, cpu) for cpu in os.sched_getaffinity(0)})
    else:  # not Linux
        cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # no cgroup v2, or "max"
        quota, period = (cgroup / "cpu.max").read_text().split()
        cores = min(cores, int(quota) // int(period))
    return max(1, cores)


def _core(processors: Path, cpu: int) -> str:
    """A name of the core that ``cpu`` is a thread of: the list of its threads."""
    try:
        return (processors / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text()
    except OSError:  # the system does not say
        return str(cpu)


def kernel_environment() -> dict[str, str]:
    """The environment for a process that runs kernels; what is set already stays.

    Its threads wait for the next parallel region by spinning, but not for long: others need the
    cores, too.
    """
    return {"GOMP_SPINCOUNT": "20000", "OMP_PROC_BIND": "false", **os.environ}
