"""What a machine without a GPU does about the gpu backend: nothing, or one clear line."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

# Nobody may import these on a CPU: an attempt by a module of ours is named. (torch and transformers
# look for triton by themselves, and do without.)
CPU_ONLY = """
import sys, traceback

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("triton", "flash_attn"):
            frames = [frame.filename for frame in traceback.extract_stack()]
            # The import machinery's own frames come between the importer and here.
            importers = [name for name in frames[:-1] if not name.startswith("<frozen")]
            if any(part in importers[-1] for part in ("/kernels/", "/engine/", "/server/")):
                print("imported by", importers[-1])
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Refuse())
from headstart.engine.config import EngineConfig
from headstart.engine.engine import Engine
from headstart.engine.sampling.params import SamplingParams
import headstart.server.cli.main, headstart.server.http.app
engine = Engine(EngineConfig(model_path=sys.argv[1], kv_memory=16 << 20, weights="f32"))
print(engine.generate([[1, 2, 3]], SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)))
print("triton" in sys.modules, "flash_attn" in sys.modules)
"""


def environment(**more: str) -> dict[str, str]:
    """That of a machine without a GPU, whatever this one has."""
    kept = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return {**kept, "CUDA_VISIBLE_DEVICES": "", **more}


def test_a_cpu_install_has_neither_triton_nor_flash_attn(tiny_model: Callable[..., Path]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CPU_ONLY, str(tiny_model("llama"))],
        capture_output=True, text=True, timeout=300, env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "imported by" not in done.stdout
    assert done.stdout.splitlines()[-1] == "False False"


def test_gpu_without_a_gpu_is_one_clear_line(smollm2: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "headstart.server.cli", "serve", "smollm2-135m", "--backend", "gpu"],
        capture_output=True, text=True, timeout=300,
        env=environment(HEADSTART_HOME=str(smollm2.parents[1])),
    )  # fmt: skip
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert "the gpu backend needs an NVIDIA GPU of compute capability 8.0 or later" in last
    assert "--backend cpu" in last
    assert "Traceback" not in done.stderr
