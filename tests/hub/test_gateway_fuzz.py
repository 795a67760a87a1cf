"""Requests made up from the OpenAPI description, sound and broken: each is answered by a body of the closed set, and charged."""

from __future__ import annotations

import hypothesis
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from tests.hub.gatehouse import Gatehouse, probe

from millpond.hub.api import ENDPOINTS
from millpond.hub.body import Closed, Handles, JobStatus, decode
from millpond.hub.serving import status_of

OPERATIONS = sorted({one.handler.__name__ for one in ENDPOINTS if one.path.startswith("/api/v1/p/")})
EXAMPLES = 12


@pytest.fixture(scope="module")
def gate(tmp_path_factory):
    with Gatehouse(tmp_path_factory.mktemp("fuzz"), max_queued=5) as found:
        found.seeded = found.do(found.client("ada"), probe(found.run))
        yield found


@pytest.fixture(scope="module")
def schema(gate):
    return schemathesis.openapi.from_dict(gate.client().get("/api/v1/openapi.json").json())


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["sound", "broken"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_request_has_an_answer_of_the_closed_set_that_was_charged(gate, schema, name, mode):
    operation = schema.find_operation_by_id(name)
    if mode is GenerationMode.NEGATIVE and not (operation.body or operation.path_parameters):
        pytest.skip("nothing to break")
    ada = gate.client("ada")
    names = {"project": ["one", "one", "two"], "handle": [gate.run], "job": [gate.seeded], "number": ["0"]}

    @given(case=operation.as_strategy(generation_mode=mode), data=st.data())
    @settings(
        max_examples=EXAMPLES, deadline=None, database=None, derandomize=True,
        suppress_health_check=list(HealthCheck), phases=[hypothesis.Phase.generate],
    )  # fmt: skip
    def ask(case, data):
        for parameter, known in names.items():  # most random names are of nothing
            if parameter in case.path_parameters and data.draw(st.booleans()):
                case.path_parameters[parameter] = data.draw(st.sampled_from(known))
        request = case.as_transport_kwargs(base_url=gate.origin)
        before = gate.spent() + gate.spent(project="~")
        reply = ada.request(
            request["method"], request["url"], content=_content(request),
            headers={"Content-Type": "application/json"},
        )  # fmt: skip
        body = decode(reply.content)
        assert reply.status_code == status_of(reply.content)
        assert reply.status_code < 500 or name == "read_answer"  # which may come later
        assert reply.headers["content-type"] == "application/octet-stream"
        assert len(reply.headers) == 2
        assert not isinstance(body, Closed)
        charged = gate.spent() + gate.spent(project="~") - before
        if isinstance(body, JobStatus):
            assert charged in (0, 2)
        elif reply.status_code == 404 and charged == 0:
            assert not gate_knows(case)  # no such route: a constant
        else:
            assert charged in (16, len(reply.content) + 16)
        if name == "submit_job" and isinstance(body, Handles):
            ada.delete(f"/api/v1/p/one/jobs/{body.values[0].hex()}")

    ask()


def gate_knows(case):
    return all(value and "/" not in str(value) for value in case.path_parameters.values())


def _content(request):
    import json

    if "json" in request:
        return json.dumps(request["json"])
    data = request.get("data")
    return data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data
