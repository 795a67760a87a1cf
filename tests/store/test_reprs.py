import html.parser
import shutil

import pytest

from millpond.store.reprs import human_bytes


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (1.5e9, "1.5 GB"), (2e18, "2000.0 PB")]
)
def test_human_bytes(count, text):
    assert human_bytes(count) == text


def delete_activations(made):
    for hook in made.run.hooks:
        for shard in made.folder.glob(f"data-*/{hook}/c/*/0"):
            shard.unlink()


def test_a_run_shows_itself_without_reading(sealed):
    run = sealed.run
    shutil.rmtree(sealed.folder)  # what follows reads nothing at all
    text = repr(run)
    assert "sealed" in text
    assert "blocks.0.hook_resid_post, blocks.1.hook_mlp_out (2)" in text
    assert "172 of 4 x bfloat16, 2.8 kB" in text  # 172 rows * 4 * 2 bytes * 2 hooks = 2752 bytes
    assert "labels:  source; see run.labels" in text  # one by token was added, which only reading would tell
    assert "<td" in run._repr_html_()


def test_reprs_read_no_activation(sealed):
    delete_activations(sealed)
    run = sealed.run
    assert "float32" in repr(run["blocks.0.hook_resid_post"])
    assert "made" in sealed.lake._repr_html_()
    assert repr(sealed.lake).endswith(", 1 run: made>")
    assert repr(run.labels) == "<Labels by token: even; by prompt: source>"
    assert "labels:  even, source" in repr(run)


def test_html_is_escaped_and_well_formed(tmp_path, build):
    made = build([3], folder=tmp_path / "<b>lake")
    tags = []

    class Parser(html.parser.HTMLParser):
        def handle_starttag(self, tag, attrs):
            tags.append(tag)

        def handle_endtag(self, tag):
            assert tags.pop() == tag

    source = made.lake._repr_html_()
    Parser().feed(source)
    assert tags == []
    assert "&lt;b&gt;lake" in source


def test_one_broken_run_does_not_hide_the_others(opened):
    opened.lake.create_run("broken", hooks=opened.run.hooks, d_model=4, dtype="float32")
    (opened.lake.run_folder("broken") / "run.json").write_text("{")
    source = opened.lake._repr_html_()
    assert "172 of 4" in source
    assert "is not JSON" in source
