"""headstart: an LLM inference server for prompts that are long and shared.

Subpackages, importing one way only: server -> engine -> kernels; bench drives them from outside.
"""

from importlib.metadata import version

__version__ = version("headstart")
