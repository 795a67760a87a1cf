import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millpond.store import shards
from millpond.store.errors import InvalidInput

HOOK = "blocks.0.hook_resid_post"


@pytest.fixture(scope="module")
def made(build, tmp_path_factory):
    """Prompts of several lengths in shards of 16 rows and parts of 40."""
    made = build(
        (5, 0, 1, 30, 17, 8, 64, 3),
        chunk_rows=4,
        shard_rows=16,
        segment_rows=40,
        folder=tmp_path_factory.mktemp("s") / "l",
    )
    made.run.labels.add("even", {f"p{i}": made.even[f"p{i}"] for i in range(8)})
    made.run.labels.add("mood", [f"m{i % 3}" for i in range(8)])
    return made


def rows_of(made, view):
    """The rows of a view as numbers in the run, found by their values, which are all different."""
    found = view[HOOK].values
    whole = {row.tobytes(): number for number, row in enumerate(made.float32(HOOK))}
    assert len(whole) == len(made.prompt)
    return np.array([whole[row.tobytes()] for row in found], int)


def check(made, view, marks):
    """A view holds exactly the marked rows, whatever it is asked for."""
    expected = np.flatnonzero(marks)
    assert rows_of(made, view).tolist() == expected.tolist()
    tokens = view.tokens.compute()
    for name in ("prompt", "position", "token_id"):
        assert tokens[name].values.tolist() == getattr(made, name)[expected].tolist()
    assert view.labels["even"].values.tolist() == (made.token_id[expected] % 2 == 0).tolist()
    assert view.labels["mood"].values.tolist() == [f"m{i % 3}" for i in made.prompt[expected]]
    assert np.array_equal(view.to_numpy(HOOK), made.float32(HOOK)[expected])
    streamed = view.stream(HOOK, 1, epochs=1) if len(view) else []
    assert sorted(row.tobytes() for batch in streamed for row in batch) == sorted(
        row.tobytes() for row in made.float32(HOOK)[expected]
    )


def last_token(made):
    return made.position == np.array(made.lengths)[made.prompt] - 1


@pytest.mark.parametrize(
    ("arguments", "marks"),
    [
        ({"position": 3}, lambda m: m.position == 3),
        ({"position": [0, 2]}, lambda m: np.isin(m.position, [0, 2])),
        ({"position": -1}, last_token),
        ({"position": "last"}, last_token),
        ({"position": "generated"}, lambda m: np.zeros(len(m.position), bool)),
        ({"position": "prompt"}, lambda m: np.ones(len(m.position), bool)),
        ({"position": slice(2, 9, 3)}, lambda m: np.isin(m.position, [2, 5, 8])),
        ({"position": slice(-2, None)}, lambda m: m.position >= np.maximum(np.array(m.lengths)[m.prompt] - 2, 0)),
        ({"token_id": [1, 500, 7]}, lambda m: np.isin(m.token_id, [1, 500, 7])),
        ({"where": "even and position > 2"}, lambda m: (m.token_id % 2 == 0) & (m.position > 2)),
        ({"where": "mood == 'm1' and not even"}, lambda m: (m.prompt % 3 == 1) & (m.token_id % 2 == 1)),
        ({"where": "mood in ['m0', 'm2']"}, lambda m: m.prompt % 3 != 1),
        ({"where": "5 <= n_tokens < 31"}, lambda m: np.isin(m.prompt, [0, 3, 4, 5])),
        ({"where": "(prompt % 2 == 0) | (token_id // 100 == 3)"}, lambda m: (m.prompt % 2 == 0) | (m.token_id // 100 == 3)),
        ({"where": "even@1 and -position == -1"}, lambda m: (m.token_id % 2 == 0) & (m.position == 1)),
        ({"prompts": ["p6", "p0"]}, lambda m: np.isin(m.prompt, [0, 6])),
        ({"prompts": ["p6"], "where": "even", "position": 9}, lambda m: (m.prompt == 6) & (m.token_id % 2 == 0) & (m.position == 9)),
    ],
)  # fmt: skip
def test_conditions_select_what_numpy_selects(made, arguments, marks):
    check(made, made.run.select(**arguments), marks(made))


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_selections_of_selections_and_splits(made, data):
    view, marks = made.run, np.ones(len(made.prompt), bool)
    for _ in range(data.draw(st.integers(1, 3))):
        low, step = data.draw(st.integers(0, 9)), data.draw(st.integers(1, 4))
        kind = data.draw(st.sampled_from(["position", "prompt", "token"]))
        if kind == "position":
            view, marks = (
                view.select(position=slice(low, None, step)),
                marks & (made.position >= low) & ((made.position - low) % step == 0),
            )
        elif kind == "token":
            view, marks = view.select(where=f"token_id % {step} == 0"), marks & (made.token_id % step == 0)
        else:
            kept = np.array(
                data.draw(st.lists(st.booleans(), min_size=len(view.prompts), max_size=len(view.prompts))), bool
            )
            numbers = view.prompts.index.to_numpy()[kept]
            view, marks = view.select(kept), marks & np.isin(made.prompt, numbers)
    check(made, view, marks)
    whole = set(made.prompt[marks])
    if made.run is not view and view.plan.marks is not None:
        assert set(view.prompts.index) == whole
    if len(view.prompts) > 1:
        train, test = view.split(0.5, seed=1)
        assert sorted([*rows_of(made, train), *rows_of(made, test)]) == np.flatnonzero(marks).tolist()


def test_samples(made):
    run = made.run
    view = run.select(position=slice(1, None), sample=20, seed=3)
    numbers = rows_of(made, view)
    assert len(numbers) == 20
    assert (np.diff(numbers) > 0).all()
    assert (made.position[numbers] > 0).all()
    assert rows_of(made, run.select(position=slice(1, None), sample=20, seed=3)).tolist() == numbers.tolist()
    assert rows_of(made, run.select(position=slice(1, None), sample=20, seed=4)).tolist() != numbers.tolist()
    assert len(run.select(sample=0.25)) == 32
    counts = np.zeros(128, int)
    for seed in range(200):
        counts[rows_of(made, run.select(sample=32, seed=seed))] += 1
    assert abs(counts.mean() - 50) < 1e-9
    assert counts.min() > 50 - 5 * np.sqrt(200 * 0.25 * 0.75)  # five standard deviations of 200 draws


def test_a_selection_reads_the_index_alone(made, monkeypatch):
    read, original = [], shards.read_rows
    monkeypatch.setattr(
        "millpond.store.rows.read_rows", lambda folder, *more: read.append(folder.name) or original(folder, *more)
    )
    run = made.run
    run.select(where="n_tokens > 3", sample=5)
    assert read == []
    view = run.select(where="token_id > 3 and mood == 'm1'", position="last")
    assert set(read) == {"position", "token_id"}
    repr(view), view.to_xarray(), view._repr_html_()
    assert set(read) == {"position", "token_id"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"where": "colour == 1"}, "'colour' is no column of run 'made'; name one of position, token_id, prompt, even"),
        ({"where": "position"}, "gives int32 values, not booleans"),
        ({"where": "mood and even"}, "and, or, not need booleans, not <U2; compare"),
        ({"where": "mood == 1"}, "it compares text with numbers"),
        ({"where": "position in 3"}, "'in' needs a list of constants"),
        ({"where": "even@7"}, "label 'even' has no version 7 in run 'made'; it has 1"),
        ({"where": "__import__('os').system('true')"}, "is not allowed"),
        ({"where": "position.real > 1"}, "'position.real' is not allowed"),
        ({"where": "[p for p in position]"}, "is not allowed"),
        ({"where": "position >"}, "invalid syntax"),
        ({"where": "(" * 300 + "even" + ")" * 300}, "nested"),
        ({"where": "not " * 60 + "even"}, "nested too deeply"),
        ({"where": "even or " * 1000 + "even"}, "more than 4096"),
        ({"position": "first"}, "position is 'first'; give all, prompt"),
        ({"position": slice(0, 3, -1)}, "step -1; give 1 or more"),
        ({"position": 1.5}, "position is 1.5"),
        ({"token_id": "a"}, "token_id is 'a'"),
        ({"sample": 0}, "sample is 0; give 1 to 128 rows"),
        ({"sample": 129}, "sample is 129"),
        ({"sample": 1.0}, "a fraction between 0 and 1"),
        ({"sample": True}, "sample is True"),
        ({"where": np.ones(128, bool)}, "where is a ndarray; write the condition as text"),
        ({"prompts": "p1"}, "prompts is 'p1'; give a list of ids"),
        ({"prompts": ["p1", "q"]}, "prompt 'q' is not in this view of run 'made'"),
    ],
)
def test_what_does_not_fit_is_named(made, arguments, message):
    with pytest.raises(InvalidInput) as caught:
        made.run.select(**arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
