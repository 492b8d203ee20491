"""Requests that nobody would write, drawn from the OpenAPI document by schemathesis.

Whatever is asked, the answer is one that the document describes: its status, its content type,
the shape of its body. Nothing is a 5xx but the 503 and 504 that are documented. The draws are the
same in every run.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis import Case
from schemathesis.config import SchemathesisConfig
from schemathesis.schemas import BaseSchema

from app.main import create_app
from tests.servers import Running, make_settings

# Long enough for anything that can be wrong with a text, short enough to be spoken in a moment.
LONGEST_TEXT = 60

SAME_EACH_TIME = settings(
    derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
)


def _document(**checks: dict[str, Any]) -> BaseSchema:
    config = SchemathesisConfig.from_dict(
        {
            "seed": 1,
            "generation": {"deterministic": True},
            "checks": {
                "not_a_server_error": {"expected-statuses": ["2xx", "4xx", "503", "504"]},
                # A parameter that this model cannot honour; one that is not there; no recording.
                "positive_data_acceptance": {
                    "expected-statuses": ["2xx", "400", "404", "415", "503"]
                },
                **checks,
            },
        }
    )
    app = create_app(make_settings(Path("nowhere")))
    return schemathesis.openapi.from_dict(app.openapi(), config=config)


anything = _document()
# Here a part of each request is mended, so what was meant to be wrong may turn out right.
a_voice = _document(negative_data_rejection={"enabled": False}).include(operation_id="clone")


@pytest.fixture(scope="module")
def statuses() -> Iterator[Counter[int]]:
    """Counts the answers about clones: some must be clones, or these tests would test little."""
    count: Counter[int] = Counter()
    yield count
    assert count[200] >= 5, count
    assert count[400] >= 5, count


@anything.parametrize()
@settings(SAME_EACH_TIME, max_examples=40)
def test_every_answer_is_one_that_the_document_describes(case: Case, bare: Running) -> None:
    _shorten(case.body)
    case.call_and_validate(base_url=bare.url, timeout=60)


@a_voice.parametrize()
@settings(SAME_EACH_TIME, max_examples=20)
def test_every_clone_of_a_true_recording_is_answered_as_documented(
    case: Case, voxcpm: Running, recording: bytes, statuses: Counter[int]
) -> None:
    _shorten(case.body)
    if isinstance(case.body, dict):
        case.body |= {"model": "tiny/voxcpm2", "inference_timesteps": 2, "max_seconds": 0.4}
        case.body |= {"prompt_wav": recording}
        if "reference_wav" in case.body:
            case.body |= {"reference_wav": recording}
        case.body.pop("voice", None)  # which no VoxCPM has
    response = case.call_and_validate(base_url=voxcpm.url, timeout=60)
    statuses[response.status_code] += 1


def _shorten(body: Any) -> None:
    for name in ("text", "prompt_text"):
        if isinstance(body, dict) and isinstance(body.get(name), str):
            body[name] = body[name][:LONGEST_TEXT]
