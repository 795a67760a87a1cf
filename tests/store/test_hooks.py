import pytest

from millpond.store.errors import HookNotCaptured, InvalidInput
from millpond.store.hooks import Hook, match_hooks, parse_hook, summarize_hooks

HELD = tuple(f"blocks.{layer}.hook_{kind}" for layer in (8, 12, 16) for kind in ("resid_post", "mlp_out"))


def test_names_and_aliases():
    assert parse_hook("blocks.12.hook_mlp_out") == Hook(12, "mlp_out")
    assert parse_hook("blocks.3.hook_out") == Hook(3, "resid_post")
    assert str(Hook(3, "resid_pre")) == "blocks.3.hook_resid_pre"


def test_hidden_states_of_hugging_face():
    # hidden_states[0] is the embedding, [i + 1] the output of block i
    assert Hook(0, "resid_pre").hidden_state == 0
    assert Hook(4, "resid_post").hidden_state == 5
    assert Hook(4, "attn_out").hidden_state is None


@pytest.mark.parametrize(
    "name", ["blocks.1.resid_post", "blocks.x.hook_resid_post", "blocks.1.hook_q", "", "blocks.1.hook_out "]
)
def test_other_names_are_refused(name):
    with pytest.raises(InvalidInput, match="is not a hook point; write blocks"):
        parse_hook(name)


def test_globs_keep_the_order_of_the_run():
    assert match_hooks(["blocks.16.*", "blocks.8.hook_out"], HELD, "it holds") == (HELD[0], HELD[4], HELD[5])
    assert match_hooks("blocks.*.hook_resid_post", HELD, "it holds") == HELD[::2]


def test_a_missing_hook_is_named_with_what_there_is():
    with pytest.raises(HookNotCaptured) as caught:
        match_hooks("blocks.13.hook_resid_post", HELD[::2], "run 'pile' holds")
    assert str(caught.value) == (
        "'blocks.13.hook_resid_post' selects no hook point: run 'pile' holds blocks.{8,12,16}.hook_resid_post; name one of these"
    )


@pytest.mark.parametrize(
    ("layers", "text"),
    [([4], "blocks.4"), ([0, 1, 2], "blocks.{0..2}"), ([2, 0, 6], "blocks.{0,2,6}"), ([], "nothing")],
)
def test_summaries(layers, text):
    assert summarize_hooks(f"blocks.{n}.hook_resid_post" for n in layers) == text + (
        ".hook_resid_post" if layers else ""
    )
