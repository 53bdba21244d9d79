"""Process groups of torch.distributed, none of its globals, and the stores where ranks meet.

Gloo carries tensors in the host's memory, NCCL those on GPUs, of which every rank has its own.
"""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

from headstart.engine.errors import ConfigError

dist: Any = distributed  # which does not declare what it has


class Store:
    """A rank's torch.distributed store on ``host``, where the two ends of its links meet.

    Raises ConfigError where ``host`` is no address of this machine.
    """

    def __init__(self, host: str) -> None:
        try:
            listener = socket.create_server((host, 0))
        except OSError as error:
            reason = error.strerror or error
            raise ConfigError(f"a runahead rank cannot listen on {host}: {reason}") from error
        self.host = host
        self.port: int = listener.getsockname()[1]
        self.store = dist.TCPStore(
            host, self.port, None, True, wait_for_workers=False, master_listen_fd=listener.detach()
        )


def meeting(host: str, port: int, hosts: bool, timeout: timedelta) -> Any:
    """A torch.distributed store, hosted here or found there; raises RuntimeError."""
    return dist.TCPStore(host, port, None, hosts, timeout, wait_for_workers=False)


def gloo_group(store: Any, rank: int, size: int, host: str, timeout: timedelta) -> Any:
    """A process group of its own, none of torch's globals, whose ranks meet in ``store``.

    ``host``: this rank's address. Raises RuntimeError.
    """
    options = dist.ProcessGroupGloo._Options()
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
    options._timeout = timeout
    return dist.ProcessGroupGloo(store, rank, size, options)


def nccl_group(store: Any, rank: int, size: int, timeout: timedelta) -> Any:
    """The same for tensors on this process's GPU."""
    # Its watchdog would end the process when another rank is gone, which is ours to handle.
    os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"
    os.environ["TORCH_NCCL_ENABLE_MONITORING"] = "0"
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return dist.ProcessGroupNCCL(store, rank, size, options)


def first_line(error: Exception) -> str:
    """What went wrong: messages of torch's begin with a source file in brackets, and go on."""
    return str(error).partition("\n")[0].rpartition("] ")[2]


def use_gpu(rank: int) -> None:
    """Make GPU number ``rank`` this thread's, where there is one; before a backend is loaded."""
    if rank < torch.cuda.device_count():
        torch.cuda.set_device(rank)


def check_gpus(flag: str, ranks: int) -> None:
    """Raise ConfigError where there are not as many GPUs as ranks."""
    count = torch.cuda.device_count()
    if ranks > count:
        raise ConfigError(f"{flag} needs {ranks} GPUs; there are {count}")


def own_address(host: str) -> str:
    """This machine's address as ``host`` sees it. Nothing is sent."""
    family, _, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)
        own: str = probe.getsockname()[0]
        return own
