"""Requests that schemathesis makes of /openapi.json: answers are as the document says they are.

All of its checks are made, of every single request; schemathesis.toml says what an answer to data
that follows the document may be.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS, load_all_checks

from headstart.server.http.api_document import ANSWERS, STATUSES
from headstart.server.http.app import BODIES

load_all_checks()
CONFIG = Path(__file__).parent / "schemathesis.toml"
CASES = 2 * settings.default.max_examples // 5


def test_every_operation(app, engine):
    engine.vector = [1.0] * 8
    config = schemathesis.Config.from_path(CONFIG)
    api = schemathesis.openapi.from_asgi("/openapi.json", app, config=config)
    checks = CHECKS.get_all()
    operations = [result.ok() for result in api.get_all_operations()]
    assert {operation.path for operation in operations} >= set(ANSWERS)
    statuses: Counter[int] = Counter()

    def send(case):
        if isinstance(case.body, dict):
            # Any other name is a 404, any other field a 400, which say little.
            known = BODIES[case.operation.path].model_fields
            if case.meta.generation.mode is GenerationMode.POSITIVE:
                case.body = {name: case.body[name] for name in known if name in case.body}
            if isinstance(case.body.get("model"), str):
                case.body["model"] = "tiny"
        statuses[case.call_and_validate(checks=checks).status_code] += 1

    for operation in operations:
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            if mode is GenerationMode.NEGATIVE and not operation.body:
                continue
            settings(
                max_examples=CASES,
                deadline=None,
                database=None,
                derandomize=True,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )(given(operation.as_strategy(generation_mode=mode))(send))()
    print(dict(statuses))
    assert statuses.total() > 15 * CASES
    assert set(statuses) <= {200, *STATUSES}
    assert statuses[200] > CASES // 2
