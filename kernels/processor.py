"""What the system says of its processor."""

import contextlib
import itertools
import platform


def processor_name() -> str:
    """The processor's model, as far as the system tells."""
    fields: dict[str, str] = {}
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as lines:
        for line in itertools.takewhile(str.strip, lines):
            name, _, value = line.partition(":")
            fields[name.strip()] = value.strip()
    known = ("model name", "cpu family", "model", "stepping")
    return " ".join(fields[name] for name in known if name in fields) or platform.machine()
