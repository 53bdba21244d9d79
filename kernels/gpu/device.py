"""Device: what runs the kernels. A CUDA device, or Triton's interpreter on CPU tensors.

The interpreter computes what the kernels say, one program after the other in numpy: it is how they
are tested where there is no GPU. It is asked for by Triton's own switch, ``TRITON_INTERPRET=1``,
which has to be set before anything imports triton. Its bfloat16 is wrong (Triton 3.9: stores
truncate, dot products are garbage), so it is refused there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

NO_GPU = (
    "the gpu backend needs an NVIDIA GPU of compute capability 8.0 or later, and torch "
    "{what}; use --backend cpu, or install a CUDA build of torch"
)


@dataclass(frozen=True, slots=True)
class Config:
    """block_m: vectors (or rows) of a tile; block_n: keys (or columns) of one. warps of 32
    threads; stages of the pipeline that loads ahead."""

    block_m: int
    block_n: int
    warps: int = 4
    stages: int = 1

    def at_least(self, block_m: int) -> Config:
        """The same with at least so many vectors in a tile."""
        return self if self.block_m >= block_m else replace(self, block_m=block_m)


class Device(Protocol):
    """Where tensors live and kernels run.

    arch: compute capability, 80 for 8.0. processors: streaming multiprocessors (SMs).
    measures: whether ``seconds`` says anything of a kernel.
    """

    name: str
    torch_device: torch.device
    arch: int
    processors: int
    measures: bool

    def seconds(self, work: Callable[[], object]) -> float:
        """Time of one run of ``work`` on the device."""
        ...

    def launch(
        self, kernel: Any, grid: tuple[int, ...], config: Config, *args: Any, **constants: Any
    ) -> None:
        """Start ``kernel``; ``constants`` are its constexpr arguments."""
        ...

    def upload(self, host: Tensor) -> Tensor:
        """A copy on the device, in order with what is launched; ``host`` may change at once."""
        ...

    def upload_into(self, host: Tensor, target: Tensor) -> None:
        """The same into memory that is there."""
        ...

    def capture(self, work: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        """Record what ``work`` launches: its result, and what computes that again in place.

        ``work`` runs on the tensors it sees now; a replay reads what they hold then. It may not
        wait for the device nor decide by values. Run it once before, so that kernels are compiled.
        """
        ...

    def synchronize(self) -> None:
        """Wait until everything launched is done."""
        ...

    def free_memory(self) -> int | None:
        """Bytes that can still be allocated; None: of the host's memory."""
        ...

    def peak_memory(self, work: Callable[[], None]) -> int | None:
        """Bytes that running ``work`` allocates at most, beyond what is allocated now; None:
        unknown, and not run."""
        ...


class CudaDevice:
    """The current CUDA device."""

    measures = True

    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        self.name = properties.name
        self.torch_device = torch.device("cuda", torch.cuda.current_device())
        self.arch = 10 * properties.major + properties.minor
        self.processors = properties.multi_processor_count
        if self.arch < 80:
            raise ValueError(NO_GPU.format(what=f"sees a {self.name} ({self.arch / 10:.1f})"))

    def seconds(self, work: Callable[[], object]) -> float:
        return float(triton.testing.do_bench(work, warmup=5, rep=20)) / 1e3

    def launch(
        self, kernel: Any, grid: tuple[int, ...], config: Config, *args: Any, **constants: Any
    ) -> None:
        kernel[grid](
            *args,
            **constants,
            num_warps=config.warps,
            num_stages=config.stages,
            enable_fp_fusion=True,
        )

    def upload(self, host: Tensor) -> Tensor:
        # torch keeps pinned blocks and gives one out again only when its copies are done.
        return host.pin_memory().to(self.torch_device, non_blocking=True)

    def upload_into(self, host: Tensor, target: Tensor) -> None:
        target.copy_(host.pin_memory(), non_blocking=True)

    def capture(self, work: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = work()
        return result, graph.replay

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def free_memory(self) -> int:
        free, _ = torch.cuda.mem_get_info()
        # What torch has reserved and does not use is free, too.
        return int(free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated())

    def peak_memory(self, work: Callable[[], None]) -> int:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated() - before)


@dataclass
class _Recording:
    """Calls in order, to be made again on the same tensors."""

    calls: list[Callable[[], None]] = field(default_factory=list)

    @torch.inference_mode()
    def replay(self) -> None:
        for call in self.calls:
            call()


class _RecordTorch(TorchDispatchMode):
    """Notes torch operations: a replay computes them again and copies into the same results."""

    def __init__(self, recording: _Recording) -> None:
        super().__init__()
        self._recording = recording

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("a value was read while a graph was captured")
        kwargs = kwargs or {}
        result = func(*args, **kwargs)

        def again() -> None:
            new = func(*args, **kwargs)
            pairs = zip(
                new if isinstance(new, list | tuple) else [new],
                result if isinstance(result, list | tuple) else [result],
                strict=True,
            )
            for source, target in pairs:
                if isinstance(target, Tensor) and target.data_ptr() != source.data_ptr():
                    target.copy_(source)

        self._recording.calls.append(again)
        return result


class InterpretedDevice:
    """Triton's interpreter on CPU tensors, with a CUDA device's rules.

    ``capture`` records launches and torch operations with the tensors they were given, as a CUDA
    graph does: a value that python baked in at capture is baked in here, too.
    """

    name = "Triton interpreter"
    torch_device = torch.device("cpu")
    arch = 80
    processors = 8
    measures = False

    def __init__(self) -> None:
        self._recording: _Recording | None = None

    def seconds(self, work: Callable[[], object]) -> float:
        raise RuntimeError("the interpreter's times say nothing of a kernel")

    def launch(
        self, kernel: Any, grid: tuple[int, ...], config: Config, *args: Any, **constants: Any
    ) -> None:
        if any(isinstance(arg, Tensor) and arg.dtype is torch.bfloat16 for arg in args):
            raise ValueError(
                "Triton's interpreter computes bfloat16 wrongly: use float32 or float16"
            )

        def start() -> None:
            if all(grid):
                with _disable_current_modes():  # what the interpreter does with torch is its own
                    kernel[grid](*args, **constants)

        start()
        if self._recording is not None:
            self._recording.calls.append(start)

    def upload(self, host: Tensor) -> Tensor:
        return host.clone()

    def upload_into(self, host: Tensor, target: Tensor) -> None:
        target.copy_(host)

    def capture(self, work: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        self._recording = recording = _Recording()
        try:
            with _RecordTorch(recording):
                result = work()
        finally:
            self._recording = None
        return result, recording.replay

    def synchronize(self) -> None:
        """Nothing is ever under way."""

    def free_memory(self) -> None:
        """It computes in the host's memory."""

    def peak_memory(self, work: Callable[[], None]) -> None:
        """Not counted."""


def find_device() -> Device:
    """The device the gpu backend runs on. Raises ValueError where there is none."""
    if triton.knobs.runtime.interpret:
        return InterpretedDevice()
    if not torch.version.cuda:
        raise ValueError(NO_GPU.format(what=f"{torch.__version__} is a build without CUDA"))
    if not torch.cuda.is_available():
        raise ValueError(NO_GPU.format(what="sees none"))
    return CudaDevice()
