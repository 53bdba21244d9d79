"""Turns any tokenizer transformers can read into tokenizer.json, in a process of its own.

    python -m headstart.engine.models.files.tokenizer SOURCE TARGET PARENT

SOURCE is a folder with a tokenizer: tokenizer.json, or SentencePiece's tokenizer.model. (Those of
GGUF files: gguf_tokenizer.py.) TARGET gets tokenizer.json, tokenizer_config.json and, if the model
has a chat template, chat_template.jinja; nothing is written once process PARENT has ended.
Everything goes through transformers, also a tokenizer.json: it applies the settings of
tokenizer_config.json (such as add_bos_token), so that the result, read by the tokenizers library
alone, gives its tokens.

A process of its own, because transformers loads torch: the server's process must stay small, and
weights can be checked meanwhile. The error, one line, is the last line of stderr.
"""

import os
import subprocess
import sys
from pathlib import Path

from headstart.engine.errors import ModelError

REQUIRED = ("tokenizer.json", "tokenizer_config.json")


class TokenizerConversion:
    """A running conversion; ``wait`` ends it."""

    def __init__(self, source: Path, target: Path) -> None:
        self._source = source
        self._target = target
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "headstart.engine.models.files.tokenizer",
                source,
                target,
                str(os.getpid()),
            ],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait(self) -> None:
        """Raise ModelError, naming the source, unless the files are there."""
        _, stderr = self._process.communicate()
        missing = [name for name in REQUIRED if not (self._target / name).exists()]
        if self._process.returncode == 0 and not missing:
            return
        lines = [line.strip() for line in stderr.splitlines() if line.strip()]
        reason = lines[-1] if lines else f"exit status {self._process.returncode}"
        raise ModelError(f"{self._source}: the tokenizer cannot be read: {reason}")

    def cancel(self) -> None:
        """End the conversion early; harmless once it has ended."""
        self._process.kill()
        self._process.wait()
        if self._process.stderr is not None:
            self._process.stderr.close()


def convert(source: Path, target: Path, parent: int) -> None:
    """Read the tokenizer of ``source`` with transformers and save it in ``target``.

    If ``parent`` (a process id) was killed meanwhile, another pull may be at work: write nothing.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source)
    if not tokenizer.is_fast:
        raise ModelError(f"{type(tokenizer).__name__} has no form the tokenizers library reads")
    if os.getppid() == parent:
        tokenizer.save_pretrained(target)


def main() -> int:
    source, target, parent = sys.argv[1:]
    try:
        convert(Path(source), Path(target), int(parent))
    except Exception as error:
        print(" ".join(str(error).split()) or type(error).__name__, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
