"""What `capture_params` makes of its arguments, and what it refuses as the server would."""

import json
from typing import Any

import pytest

import millpond as mp
from millpond.store.capture_spec import check_argument_name, read_request_args
from millpond.store.errors import InvalidInput
from millpond.store.interventions import Ablate, Add, Clamp, Patch, SpliceSae

HOOK = "blocks.1.hook_resid_post"


@pytest.mark.parametrize(
    ("typed", "plain"),
    [
        (Add(hook=HOOK, vector=(1.0, 0.0)), {"op": "add", "hook": HOOK, "vector": [1.0, 0.0]}),
        (
            Ablate(hook=HOOK, vector="lie", positions="last"),
            {"op": "ablate", "hook": HOOK, "vector": "lie", "positions": "last"},
        ),
        (Clamp(hook=HOOK, vector="lie", max=2.0), {"op": "clamp", "hook": HOOK, "vector": "lie", "max": 2.0}),
        (Patch(hook=HOOK, run="r", prompt="p"), {"op": "patch", "hook": HOOK, "run": "r", "prompt": "p"}),
        (SpliceSae(hook=HOOK, artifact="sae"), {"op": "sae", "hook": HOOK, "artifact": "sae"}),
    ],
)
def test_an_intervention_is_an_object_or_its_class(typed: Any, plain: dict[str, Any]) -> None:
    for given in (typed, plain):
        asked = mp.capture_params("r", intervene=[given])
        assert asked["millpond"]["intervene"] == [plain]
        assert json.loads(mp.capture_params("r", intervene=[given], http=True)["millpond"]) == asked["millpond"]


@pytest.mark.parametrize(
    "wrong", [{"vector": [1e39, 0.0]}, {"vector": [float("nan")] * 4096}, {"vector": [1.0], "scale": 1e39}]
)
def test_what_float32_cannot_hold_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match=next(reversed(wrong))) as caught:
        mp.capture_params("r", intervene=[{"op": "add", "hook": HOOK} | wrong])
    assert len(str(caught.value)) < 400  # of a long vector, the beginning


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"captur": {}}, "captur: .*did you mean 'capture'"),
        ({"capture": {"positons": "last"}}, "capture.positons: .*did you mean 'positions'"),
        ({"capture": {"first-position": 1}}, "capture.first-position: .*did you mean 'first_position'"),
        ({"capture": {"colour": 1}}, "capture.colour: .*the fields are end_position, every, first_position, hooks"),
        ({"intervene": [{"op": "add", "hook": HOOK, "vector": [1.0], "Scale": 2}]}, "Scale: .*did you mean 'scale'"),
        (
            {"intervene": [{"op": "clamp", "hook": HOOK, "vector": [1.0], "max": 1, "scale": 2}]},
            "fields are end_p.*min",
        ),
        (
            {"capture": {"reads": [{"read": "probe", "artifact": "lie", "hook": HOOK, "k": 3}]}},
            "k: .*fields are artifact, hook, name, read ",
        ),
    ],
)
def test_a_misspelt_field_is_named_with_the_nearest(asked: dict[str, Any], words: str) -> None:
    for given in (asked, json.dumps(asked)):
        with pytest.raises(InvalidInput, match=f"^millpond: .*{words}"):
            read_request_args({"millpond": given})


def test_nothing_is_asked_of_millpond_under_another_name() -> None:
    check_argument_name(None)
    check_argument_name({"millpond": "{}", "kv_transfer_params": {}, "milestones": 1})
    for name in ("milpond", "Millpond", "mill_pond", "millpond.capture"):
        with pytest.raises(InvalidInput, match=f"^{name}: .*did you mean 'millpond'"):
            check_argument_name({name: "{}"})
