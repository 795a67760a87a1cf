"""`millpond verify --reference` against runs whose rows, edits and reads the test works out by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from millpond.capture.edits import Edits
from millpond.capture.provenance import model_provenance
from millpond.capture.reads import Readers
from millpond.capture.reference import check_reference
from millpond.cli import main
from millpond.store.artifacts import save_direction
from millpond.store.dtypes import encode_bfloat16
from millpond.store.lake import Lake, open_lake
from millpond.store.reads import ReadProbe, ReadSaeTopk
from millpond.store.segment import CapturedRequest, RunWriter
from tests.capture.artifacts import INTERCEPT, coefficients, dense_codes, make_artifacts
from tests.capture.models import D_MODEL, N_LAYERS, VOCABULARY, Inside, make_model

pytestmark = pytest.mark.slow  # its provenance asks for vLLM's version
POST = [f"blocks.{layer}.hook_resid_post" for layer in range(N_LAYERS)]
HOOKS = [*POST, "blocks.1.hook_attn_out"]
MIDDLE = "blocks.1.hook_resid_mid"
VECTOR = np.random.default_rng(4).normal(0, 1, D_MODEL).astype(np.float32)
UNIT = torch.from_numpy(VECTOR / np.linalg.norm(VECTOR))
N_PROMPT = 11
PROMPTS = {f"p{n}": np.random.default_rng(n).integers(3, VOCABULARY, 14 + n).tolist() for n in range(3)}
READS = (
    ReadProbe(artifact="lie", hook=POST[1]),
    ReadSaeTopk(artifact="topk", hook=POST[0], k=5),
    ReadSaeTopk(artifact="jump", hook=POST[2], k=16),
)


class Place:
    def __init__(self, folder: Path) -> None:
        self.model = make_model("Llama", folder / "model", seed=3)
        self.lake: Lake = open_lake(folder / "lake", create=True)
        self.saes = make_artifacts(self.lake, folder, D_MODEL)
        save_direction(self.lake, "direction", VECTOR, hook=POST[1])
        self.inside = {dtype: Inside(self.model, getattr(torch, dtype)) for dtype in ("float32", "bfloat16")}

    def write(
        self,
        name: str,
        *,
        dtype: str = "float32",
        hooks: list[str] = HOOKS,
        intervene: tuple[dict[str, Any], ...] = (),
        spoil: Callable[[dict[str, Any], dict[str, Any]], None] = lambda rows, reads: None,
    ) -> None:
        specs = Readers(self.lake, D_MODEL, dtype, Edits(self.lake, D_MODEL).sae).resolve(READS, POST)
        provenance = model_provenance(self.model) | {"interventions": intervene, "taps": [*HOOKS, MIDDLE]}
        spec = self.lake.create_run(
            name, hooks=tuple(hooks), d_model=D_MODEL, dtype=dtype, provenance=provenance, reads=specs
        )
        writer = RunWriter(self.lake.run_folder(name), spec)
        for prompt_id, tokens in PROMPTS.items():
            at = np.arange(len(tokens) - 1, dtype=np.int32)
            inside = {hook: x[at].float().numpy() for hook, x in self.inside[dtype].values(tokens[:-1]).items()}
            stored: Callable[[np.ndarray], np.ndarray] = encode_bfloat16 if dtype == "bfloat16" else np.asarray
            reads = {"lie.scores": (inside[POST[1]] @ coefficients(D_MODEL).T + INTERCEPT).astype(np.float32)}
            for sae, hook, k in (("topk", POST[0], 5), ("jump", POST[2], 16)):
                dense = dense_codes(self.saes[sae], inside[hook])
                assert (dense > 0).any(1).all()
                best = np.argsort(-dense, axis=1, kind="stable")[:, :k]
                reads[f"{sae}.indices"] = best.astype(np.uint16)
                reads[f"{sae}.values"] = stored(np.take_along_axis(dense, best, 1).astype(np.float32))
                reads[f"{sae}.active"] = (dense > 0).sum(1).astype(np.int32)
            rows = {hook: stored(inside[hook]) for hook in hooks}
            if prompt_id == "p2":
                spoil(rows, reads)
            ids = np.array(tokens[:-1], np.int32)
            writer.append(CapturedRequest(prompt_id, ids, N_PROMPT, at, rows, reads))
        writer.commit()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("reference"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_reads_are_in_the_table_and_right(place: Place, dtype: str) -> None:
    place.write(f"good-{dtype}", dtype=dtype)
    place.write(f"alone-{dtype}", dtype=dtype, hooks=[])
    reads = ["lie.scores", "topk.values", "topk.active", "jump.values", "jump.active"]
    for name, hooks in ((f"good-{dtype}", HOOKS), (f"alone-{dtype}", [])):
        check = check_reference(place.lake[name])
        assert check.ok, check.table()
        assert sorted(error.hook for error in check.errors) == sorted([*hooks, *reads])
        assert (check.prompts, check.rows) == (3, sum(len(tokens) - 1 for tokens in PROMPTS.values()))
        if dtype == "bfloat16":  # the stored rows are those of Hugging Face in bfloat16
            for error in check.errors:
                assert error.own_relative == pytest.approx(error.relative, rel=0.4), error.hook


def flip(array: str, column: int, by: float) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    def spoil(rows: dict[str, Any], reads: dict[str, Any]) -> None:
        target = (rows | reads)[array]
        target[3, column] = target[3, column] + by

    return spoil


@pytest.mark.parametrize(
    ("name", "array", "column", "by", "flagged"),
    [
        ("score", "lie.scores", 1, 0.5, "lie.scores"),
        ("value", "topk.values", 4, 0.2, "topk.values"),
        ("index", "jump.indices", 0, 1, "jump.values"),
        ("row", POST[1], 3, 0.1, POST[1]),
    ],
)
def test_one_wrong_value_is_flagged_where_it_is(
    place: Place, name: str, array: str, column: int, by: float, flagged: str
) -> None:
    place.write(f"wrong-{name}", spoil=flip(array, column, by))
    check = check_reference(place.lake[f"wrong-{name}"])
    assert [error.hook for error in check.errors if not error.ok] == [flagged]
    assert check.table().count("too far") == 1


def at_positions(wanted: range, change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def edit(x: Tensor) -> Tensor:
        x = x.clone()
        at = [position for position in wanted if position < x.shape[1]]
        x[:, at] = change(x[:, at])
        return x

    return edit


def jump(place: Place, x: Tensor) -> Tensor:
    w = place.saes["jump"]
    pre = (x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    latents = torch.where(pre > w["threshold"], pre, torch.zeros(()))
    latents[..., 3] = 4.0
    return latents @ w["W_dec"] + w["b_dec"]


EVERY, GENERATED = range(99), range(N_PROMPT, 99)
EDITS: dict[str, tuple[dict[str, Any], int, range, Callable[[Place, Tensor], Tensor]]] = {
    "add": ({"op": "add", "scale": 3.0, "positions": "generated"}, 1, GENERATED,
            lambda _, x: x + 3 * torch.from_numpy(VECTOR)),
    "ablate": ({"op": "ablate", "first_position": 2}, 0, range(2, 99), lambda _, x: x - (x @ UNIT)[..., None] * UNIT),
    "clamp": ({"op": "clamp", "min": -0.2, "max": 0.1}, 1, EVERY,
              lambda _, x: x + ((x @ UNIT).clamp(-0.2, 0.1) - x @ UNIT)[..., None] * UNIT),
    "sae": ({"op": "sae", "artifact": "jump", "set_latents": {"3": 4.0}}, 1, EVERY, jump),
}  # fmt: skip


@contextmanager
def edited(inside: Inside, layer: int, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    handle = inside.edit(layer, change)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("op", EDITS)
def test_interventions_are_made_again(place: Place, op: str) -> None:
    """Rows of a model edited by hand are right under the intervention, and wrong without."""
    asked, layer, where, change = EDITS[op]
    vector = {} if op == "sae" else {"vector": "direction"}
    given = ({"hook": f"blocks.{layer}.hook_resid_post", **vector, **asked},)
    with edited(place.inside["float32"], layer, at_positions(where, lambda x: change(place, x))):
        place.write(op, intervene=given)
        place.write(f"{op}-unsaid")
    check = check_reference(place.lake[op])
    assert check.ok, check.table()
    wrong = {error.hook for error in check_reference(place.lake[f"{op}-unsaid"]).errors if not error.ok}
    assert {hook for hook in POST if int(hook.split(".")[1]) >= layer} <= wrong
    assert POST[0] not in wrong or layer == 0


def test_an_edit_between_attention_and_mlp_stays_in_the_stream(place: Place) -> None:
    """What enters the MLP's norm and what is added to later is one value: an addition there is one to attention's output."""
    attention = place.inside["float32"].layers[1].self_attn
    handle = attention.register_forward_hook(lambda _, __, out: (out[0] + 2 * torch.from_numpy(VECTOR), *out[1:]))
    given = {"op": "add", "hook": MIDDLE, "vector": VECTOR.tolist(), "scale": 2.0}
    place.write("middle", hooks=POST, intervene=(given,))
    handle.remove()
    check = check_reference(place.lake["middle"])
    assert check.ok, check.table()


def test_a_patch_is_taken_from_its_run(place: Place) -> None:
    place.write("source")
    row = torch.from_numpy(place.lake["source"].select(["p0"])[POST[1]].values[6].copy())
    with edited(place.inside["float32"], 1, at_positions(range(2, 3), lambda x: row.expand_as(x))):
        patch = {"op": "patch", "run": "source", "prompt": "p0", "positions": (2,), "source_positions": (6,)}
        place.write("patched", intervene=({"hook": POST[1], **patch},))
    check = check_reference(place.lake["patched"])
    assert check.ok, check.table()


@pytest.mark.parametrize(
    ("flags", "words"),
    [(["--reference", "--prompts", "0"], "--prompts is 0"), (["--model", "m"], "give --reference too")],
)
def test_a_check_that_would_check_nothing_is_refused(
    flags: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    open_lake(tmp_path / "lake", create=True)
    assert main(["verify", str(tmp_path / "lake"), *flags]) == 2
    assert words in capsys.readouterr().err
