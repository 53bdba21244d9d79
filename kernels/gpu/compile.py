"""Compile every kernel ahead of time, for devices that need not be there: what each one takes.

    python -m headstart.kernels.gpu.compile            choose configurations, write tuning.json
                                                       and the table in kernels/gpu/README.md
    python -m headstart.kernels.gpu.compile --check    compile what is chosen; fail if the table
                                                       or the choices are not what comes out

The choice for each Key is the first candidate that spills no register, fits the shared memory of
the architecture, and has the tensor-core instructions that are to be expected. Registers, spills
and shared memory are ptxas's own words (-v).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from headstart.kernels.gpu import attention
from headstart.kernels.gpu.tuning import (
    ARCHITECTURES,
    HEAD_SIZES,
    SHARED_MEMORY,
    SHIPPED,
    Config,
    Key,
    candidates,
    shipped,
)

README = Path(__file__).with_name("README.md")
BEGIN, END = "<!-- compiled kernels -->", "<!-- end of compiled kernels -->"

TENSOR_CORES = {80: "mma.sync", 90: "wgmma", 100: "tcgen05.mma", 120: "mma.sync"}
"""The matrix instruction of each architecture's large tiles; small ones (16 rows) have mma.sync
everywhere."""

INSTRUCTIONS = ("mma.sync", "wgmma.mma_async", "tcgen05.mma")


@dataclass(frozen=True, slots=True)
class Specimen:
    """A kernel with the types of its arguments, as a launch of a common model has them.

    types: of the arguments that are no constants, in Triton's spelling. Pointers and ``wide``
    arguments are multiples of 16, which Triton compiles for.
    """

    kernel: str
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    wide: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Compiled:
    """registers a thread; spilled: bytes stored and loaded; shared: bytes a block."""

    registers: int
    spilled: int
    shared: int
    instructions: tuple[str, ...]


def attention_specimen(key: Key, config: Config) -> Specimen:
    """``attend_items`` for a model of 32 query heads and 8 KV heads."""
    main, tail = attention.head_parts(key.head_dim)
    activation = "*bf16"
    element = {"same": activation, "int8": "*i8", "fp8": "*u8", "fp8_native": "*u8"}[key.format]
    types = {"q_ptr": activation, "kv": element, "scales": "*fp32"}
    types |= dict.fromkeys(("items", "pages", "rows", "visible_ptr"), "*i32")
    types |= {"out_ptr": activation}
    types |= dict.fromkeys(("lse_ptr", "part_ptr", "part_lse_ptr"), "*fp32")
    types |= dict.fromkeys(("q_stride", "page_stride", "scale_stride"), "i32")
    types |= {"scale": "fp32"}
    constants = {
        "GROUP": 4,
        "KV_HEADS": 8,
        "MAIN": main,
        "TAIL": tail,
        "PAGE": 32,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "FORMAT": key.format,
        "PRECISION": "tf32",
    }
    return Specimen("attend_items", types, constants, ("q_stride", "page_stride", "scale_stride"))


def compile_kernel(kernel: Any, specimen: Specimen, config: Config, arch: int) -> Compiled:
    """Compile for ``arch``. Raises RuntimeError with the compiler's reason."""
    signature = {name: specimen.types.get(name, "constexpr") for name in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or name in specimen.wide
    }
    source = ASTSource(kernel, signature, dict(specimen.constants), aligned)
    log = io.StringIO()
    with (
        contextlib.redirect_stdout(log),
        triton.knobs.nvidia.scope(),
        triton.knobs.compilation.scope(),
    ):
        triton.knobs.nvidia.dump_ptxas_log = True
        triton.knobs.compilation.always_compile = True
        options = {"num_warps": config.warps, "num_stages": config.stages, "enable_fp_fusion": True}
        found = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    text = log.getvalue()
    registers = re.search(r"Used (\d+) registers", text)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", text)
    if registers is None or spills is None:
        raise RuntimeError(f"ptxas said nothing of registers: {text[:500]}")
    ptx = found.asm["ptx"]
    return Compiled(
        int(registers[1]),
        int(spills[1]) + int(spills[2]),
        found.metadata.shared,
        tuple(name for name in INSTRUCTIONS if name in ptx),
    )


def keys() -> Iterator[Key]:
    """Every key of the tuning table."""
    for arch in ARCHITECTURES:
        fp8 = "fp8" if arch < 89 else "fp8_native"
        for kernel in ("tile", "row"):
            for head_dim in HEAD_SIZES:
                for format in ("same", "int8", fp8):
                    yield Key(kernel, arch, head_dim, 2, format)


def compile_key(key: Key, config: Config) -> Compiled:
    return compile_kernel(attention.attend_items, attention_specimen(key, config), config, key.arch)


def wanted(key: Key) -> str:
    """The matrix instruction a choice for ``key`` has to have."""
    return TENSOR_CORES[key.arch] if key.kernel == "tile" else "mma.sync"


def fits(key: Key, compiled: Compiled) -> bool:
    """No spills, shared memory within the chip's limit, tensor cores in use."""
    return (
        compiled.spilled == 0
        and compiled.shared <= SHARED_MEMORY[key.arch] * 1024
        and any(name.startswith(wanted(key)) for name in compiled.instructions)
    )


def choose(key: Key) -> tuple[Config, Compiled]:
    """The first candidate that fits. Raises RuntimeError where none does."""
    for config in candidates(key):
        with contextlib.suppress(triton.OutOfResources):
            compiled = compile_key(key, config)
            if fits(key, compiled):
                return config, compiled
    raise RuntimeError(f"no candidate for {key} fits")


def chosen(key: Key) -> tuple[Config, Compiled]:
    config = shipped()[str(key)]
    return config, compile_key(key, config)


def table(found: Mapping[Key, tuple[Config, Compiled]]) -> str:
    """The table of kernels/gpu/README.md."""
    lines = [
        f"Triton {triton.__version__} and its own ptxas; activations in bf16.",
        "",
        "| kernel | head | KV | sm | tile | warps | stages | registers | spilled | shared KiB (of) "
        "| tensor cores |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for key, (config, compiled) in found.items():
        name = key.format.replace("same", "bf16").replace("_native", "")
        target = f"{key.arch}a" if key.arch >= 90 else str(key.arch)
        lines.append(
            f"| {key.kernel} | {key.head_dim} | {name} | {target} "
            f"| {config.block_m}x{config.block_n} | {config.warps} | {config.stages} "
            f"| {compiled.registers} | {compiled.spilled} "
            f"| {compiled.shared / 1024:.1f} ({SHARED_MEMORY[key.arch]}) "
            f"| {', '.join(compiled.instructions) or '-'} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="compare with what is kept")
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile")
    args = parser.parse_args(argv)
    every = list(keys())
    with ProcessPoolExecutor(args.jobs) as pool:
        results = pool.map(chosen if args.check else choose, every)
        found = {}
        for key, result in zip(every, results, strict=True):
            found[key] = result
            if sys.stderr.isatty():
                print(f"\r{len(found)} of {len(every)}", end="", file=sys.stderr)
    entries = {str(key): asdict(config) for key, (config, _) in found.items()}
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    new = f"{before}{BEGIN}\n{table(found)}\n{END}{after}"
    if not args.check:
        lines = ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in entries.items())
        SHIPPED.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
        README.write_text(new, encoding="utf-8")
        return 0
    wrong = [str(key) for key, (_, compiled) in found.items() if not fits(key, compiled)]
    if wrong:
        print(f"does not fit: {', '.join(wrong)}", file=sys.stderr)
    if new != text:
        print(
            "kernels/gpu/README.md is stale: run python -m headstart.kernels.gpu.compile",
            file=sys.stderr,
        )
    return 1 if wrong or new != text else 0


if __name__ == "__main__":
    sys.exit(main())
