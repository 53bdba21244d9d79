"""An engine in this process, ready as a server's is, for benches that need no HTTP."""

import sys

from headstart.engine.config import EngineConfig, default_home
from headstart.engine.engine import Engine
from headstart.engine.models.store import resolve


def start_engine(model: str, weights: str) -> Engine:
    """Load ``model``, warm it up and prepare its memory; says on stderr what it runs on."""
    engine = Engine(EngineConfig(model_path=str(resolve(model, default_home())), weights=weights))
    engine.warm_up()
    while engine.prepare_memory():
        pass
    print(f"{model}, {engine.model.weights}, {engine.model.backend}", file=sys.stderr)
    return engine
