"""Takes from Python on Linux what it has not on macOS. Found by every process with PYTHONPATH here.

What libraries do in C stays. psutil may read /proc: on macOS it is another psutil.
"""

import fcntl
import mmap
import os
import resource
import select
import signal
import socket
import sys

LINUX_ONLY = {
    os: (
        *("copy_file_range", "getrandom", "memfd_create", "pidfd_open", "pipe2", "splice"),
        *("sched_getaffinity", "sched_setaffinity", "sched_getscheduler", "sched_setscheduler"),
        *("eventfd", "eventfd_read", "eventfd_write", "getresuid", "posix_fadvise"),
        *("posix_fallocate", "fdatasync", "getxattr", "setxattr"),
    ),
    signal: ("SIGPWR", "SIGSTKFLT", "SIGRTMIN", "SIGRTMAX", "sigtimedwait", "sigwaitinfo"),
    resource: ("prlimit", "RLIMIT_RTTIME", "RLIMIT_SIGPENDING", "RLIMIT_NICE", "RUSAGE_THREAD"),
    select: ("epoll",),
    mmap: ("MADV_HUGEPAGE", "MADV_NOHUGEPAGE", "MADV_DONTFORK", "MAP_POPULATE", "MAP_STACK"),
    fcntl: ("F_SETPIPE_SZ", "F_ADD_SEALS", "F_NOTIFY", "F_OFD_SETLK"),
    socket: ("SO_PEERCRED", "SOCK_CLOEXEC", "SOCK_NONBLOCK", "AF_NETLINK", "TCP_USER_TIMEOUT"),
}

for module, names in LINUX_ONLY.items():
    for name in names:
        if hasattr(module, name):
            delattr(module, name)
for package in ("triton", "flash_attn"):
    sys.modules[package] = None  # type: ignore[assignment]


def _hide_folders(event: str, arguments: tuple[object, ...]) -> None:
    """There is no /proc and no /sys."""
    if event not in ("open", "os.listdir", "os.scandir"):
        return
    path = str(arguments[0])
    if path.startswith(("/proc", "/sys")):
        frame = sys._getframe()
        while frame is not None:
            if "psutil" in frame.f_code.co_filename:
                return
            frame = frame.f_back
        raise FileNotFoundError(2, "No such file or directory", path)


sys.addaudithook(_hide_folders)
