import threading
import time

import numpy as np
import pytest

from millpond.store.errors import InvalidInput
from millpond.store.follow import consumed, consumers
from millpond.store.seal import seal_run
from millpond.store.segment import CapturedRequest, RunWriter

HOOK = "blocks.0.hook_resid_post"


def append(writer, numbers):
    for number in numbers:
        steps = np.arange(3, dtype=np.int32)
        rows = {hook: np.full((3, 4), number, np.float32) for hook in writer.spec.hooks}
        writer.append(CapturedRequest(f"p{number}", steps, 3, steps, rows))
    writer.commit()


@pytest.fixture
def grown(build, tmp_path):
    made = build([], dtype="float32", folder=tmp_path / "lake")
    return made, RunWriter(made.folder, made.run.plan.spec)


def test_every_prompt_comes_once_until_the_run_is_sealed(grown):
    made, writer = grown
    append(writer, range(2))

    def write():
        for first in range(2, 20, 3):
            append(writer, range(first, first + 3))
            time.sleep(0.02)
        seal_run(made.folder)

    thread = threading.Thread(target=write)
    seen, views = [], 0
    thread.start()
    for view in made.run.follow(poll_s=0.01):
        values = view[HOOK].values[:, 0]
        assert sorted({f"p{int(value)}" for value in values}) == sorted(view.prompts["id"])
        seen += values.tolist()
        views += 1
    thread.join()
    assert sorted(seen) == np.repeat(np.arange(20), 3).tolist()
    assert views > 1


def test_a_consumer_goes_on_where_it_was(grown):
    made, writer = grown
    append(writer, range(4))
    first = made.run.follow("sae", poll_s=0.01, timeout_s=0)
    assert len(next(first).prompts) == 4
    first.close()  # it was not used up: nobody asked for the next one
    assert consumed(made.run.plan.folder, "sae") == set()
    assert [len(view.prompts) for view in made.run.follow("sae", poll_s=0.01, timeout_s=0)] == [4]
    append(writer, range(4, 6))
    assert [view.prompts["id"].tolist() for view in made.run.follow("sae", poll_s=0.01, timeout_s=0)] == [["p4", "p5"]]
    assert [len(view.prompts) for view in made.run.follow("probe", poll_s=0.01, timeout_s=0)] == [6]
    assert consumers(made.run.plan.folder) == ["probe", "sae"]
    assert consumed(made.run.plan.folder, "sae") == {f"p{number}" for number in range(6)}
    seal_run(made.folder)
    assert list(made.run.follow("sae", poll_s=0.01)) == []


def test_what_cannot_be_followed(sealed):
    with pytest.raises(InvalidInput, match="poll_s is 0; give seconds above 0"):
        sealed.run.follow(poll_s=0)
    with pytest.raises(InvalidInput, match="follow the run itself"):
        sealed.run.select(position=0).follow()
    assert [view.n_rows for view in sealed.run.follow(poll_s=0.01)] == [172]
