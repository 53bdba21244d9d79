"""Compile every kernel ahead of time, for devices that need not be there: what each one takes.

    python -m headstart.kernels.gpu.compile            write the table in kernels/gpu/README.md
    python -m headstart.kernels.gpu.compile --choose   choose configurations anew, too (10 minutes)
    python -m headstart.kernels.gpu.compile --check    fail if the table is not what comes out, or
                                                       a kernel does not fit

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
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from headstart.kernels.gpu import attention, lora, rows
from headstart.kernels.gpu.device import Config
from headstart.kernels.gpu.tuning import (
    ARCHITECTURES,
    HEAD_SIZES,
    SHARED_MEMORY,
    SHIPPED,
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
    return Specimen(types, constants, ("q_stride", "page_stride", "scale_stride"))


def fixed_specimens() -> Iterator[tuple[str, Any, Specimen, Config]]:
    """(name, kernel, specimen, configuration) of the kernels that are not tuned, for a model of
    4,096 wide rows, 32 query heads and 8 KV heads of 128."""
    size, bf16, f32, ints = 4096, "*bf16", "*fp32", "*i32"
    yield (
        "merge",
        attention.merge,
        Specimen(
            dict.fromkeys(("part_ptr", "part_lse_ptr", "lse_ptr"), f32)
            | dict.fromkeys(("rows", "starts", "slots"), ints)
            | {"out_ptr": bf16},
            {"HEADS": 32, "HEAD_DIM": 128, "BLOCK_D": 128},
        ),
        attention.MERGE,
    )
    config = rows.row_config(size)
    yield (
        "add_norm",
        rows.add_norm,
        Specimen(
            {"residual": f32, "delta": bf16, "weight": f32, "out": bf16}
            | {"residual_stride": "i32", "delta_stride": "i32", "eps": "fp32"},
            {"SIZE": size, "BLOCK": config.block_n, "HAS_DELTA": True},
            ("residual_stride", "delta_stride"),
        ),
        config,
    )
    for format, element in (("same", bf16), ("int8", "*i8"), ("fp8", "*u8")):
        yield (
            f"rope_store, {format.replace('same', 'bf16')}",
            rows.rope_store,
            Specimen(
                {"qkv": bf16, "q_norm": f32, "k_norm": f32, "cos_ptr": f32, "sin_ptr": f32}
                | {"positions": ints, "slots": ints, "q_out": bf16, "kv": element}
                | {"scales": f32, "num_rows": "i32", "eps": "fp32"}
                | dict.fromkeys(("qkv_stride", "page_stride", "scale_stride"), "i32"),
                {"HEADS": 32, "KV_HEADS": 8, "HEAD_DIM": 128, "ROWS": 16, "BLOCK": 64}
                | {"PAGE": 32, "Q_NORM": True, "K_NORM": True, "FORMAT": format, "MOST": 1e38},
                ("qkv_stride", "page_stride", "scale_stride"),
            ),
            Config(16, 64, warps=4),
        )
    config = rows.row_config(rows.SILU_BLOCK)
    yield (
        "silu_multiply",
        rows.silu_multiply,
        Specimen(
            {"gate_up": bf16, "out": bf16, "stride": "i32"},
            {"SIZE": 3 * size, "BLOCK": rows.SILU_BLOCK},
            ("stride",),
        ),
        config,
    )
    tables = {"tables": "*i64", "tiles": ints, "rows": ints, "hidden": f32}
    tables |= dict.fromkeys(("table_at", "hidden_stride"), "i32")
    common: dict[str, Any] = {
        "PARTS": lora.MOST_PARTS,
        "TILE": lora.TILE_ROWS,
        "BLOCK_R": lora.RANKS,
    }
    common |= {"PRECISION": "tf32"}
    yield (
        "shrink",
        lora.shrink,
        Specimen(
            {"x": bf16, "x_stride": "i32", **tables},
            {"SIZE": size, "BLOCK_K": lora.SHRINK.block_n, **common},
            ("x_stride", "hidden_stride"),
        ),
        lora.SHRINK,
    )
    yield (
        "expand",
        lora.expand,
        Specimen(
            {"y": bf16, "y_stride": "i32", **tables},
            {"BLOCK_N": lora.EXPAND.block_n, **common},
            ("y_stride", "hidden_stride"),
        ),
        lora.EXPAND,
    )


def compile_fixed(arch: int) -> list[tuple[str, Config, Compiled]]:
    """Every kernel that is not tuned."""
    return [
        (name, config, compile_kernel(kernel, specimen, config, arch))
        for name, kernel, specimen, config in fixed_specimens()
    ]


def compile_kernel(kernel: Any, specimen: Specimen, config: Config, arch: int) -> Compiled:
    """Compile for ``arch``. Raises RuntimeError with the compiler's reason."""
    signature = {name: specimen.types.get(name, "constexpr") for name in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if name in specimen.wide
        or (signature[name].startswith("*") and not kernel.params[i].do_not_specialize_on_alignment)
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


Fixed = Mapping[int, list[tuple[str, Config, Compiled]]]


def table(found: Mapping[Key, tuple[Config, Compiled]], fixed: Fixed) -> str:
    """The table of kernels/gpu/README.md."""
    lines = [
        f"Triton {triton.__version__} and its own ptxas; activations in bf16. `tile` and `row` are "
        "`attend_items` for many and for few vectors.",
        "",
        "| kernel | head | KV | sm | tile | warps | stages | registers | spilled | shared KiB (of) "
        "| tensor cores |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for key, (config, compiled) in found.items():
        name = key.format.replace("same", "bf16").replace("_native", "")
        lines.append(_line(f"{key.kernel} | {key.head_dim} | {name}", key.arch, config, compiled))
    for arch, kernels in fixed.items():
        lines += [_line(f"{name} | |", arch, config, done) for name, config, done in kernels]
    return "\n".join(lines)


def _line(what: str, arch: int, config: Config, compiled: Compiled) -> str:
    target = f"{arch}a" if arch >= 90 else str(arch)
    return (
        f"| {what} | {target} | {config.block_m}x{config.block_n} | {config.warps} "
        f"| {config.stages} | {compiled.registers} | {compiled.spilled} "
        f"| {compiled.shared / 1024:.1f} ({SHARED_MEMORY[arch]}) "
        f"| {', '.join(compiled.instructions) or '-'} |"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="compare with what is kept")
    what.add_argument("--choose", action="store_true", help="choose configurations anew")
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile")
    args = parser.parse_args(argv)
    every = list(keys())
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        others = pool.map(compile_fixed, ARCHITECTURES)
        results = pool.map(choose if args.choose else chosen, every)
        found = {}
        for key, result in zip(every, results, strict=True):
            found[key] = result
            if sys.stderr.isatty():
                print(f"\r{len(found)} of {len(every)}", end="", file=sys.stderr)
        fixed = dict(zip(ARCHITECTURES, others, strict=True))
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    new = f"{before}{BEGIN}\n{table(found, fixed)}\n{END}{after}"
    if args.choose:
        lines = ",\n".join(
            f"{json.dumps(str(key))}: {json.dumps(asdict(config))}"
            for key, (config, _) in found.items()
        )
        SHIPPED.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
    if not args.check:
        README.write_text(new, encoding="utf-8")
        text = new
    wrong = [str(key) for key, (_, compiled) in found.items() if not fits(key, compiled)]
    wrong += [
        f"{name} for {arch}"
        for arch, kernels in fixed.items()
        for name, _, compiled in kernels
        if compiled.spilled or compiled.shared > SHARED_MEMORY[arch] * 1024
    ]
    if wrong:
        print(f"does not fit: {', '.join(wrong)}", file=sys.stderr)
    if new != text:
        stale = f"{README} is stale: run python -m headstart.kernels.gpu.compile"
        print(stale, file=sys.stderr)
    return 1 if wrong or new != text else 0


if __name__ == "__main__":
    sys.exit(main())
