import pytest

from millpond.hub.demo import HOOKS, PROBED, RUN, TOKEN_LABELS, DemoConfig, Stages, capture_toml, find_example
from millpond.store.capture_spec import read_job
from millpond.store.errors import InvalidInput


def make_example(folder, *, trained):
    (folder / "model").mkdir(parents=True)
    (folder / "prompts.py").touch()
    if trained:
        (folder / "model" / "model.safetensors").touch()
    return folder


def test_the_capture_job_is_one_that_capture_accepts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    example = make_example(tmp_path / 'an "odd" folder', trained=True)
    config = DemoConfig(out=tmp_path / "de\\mo")
    config.out.mkdir()
    path = config.out / "capture.toml"
    path.write_text(capture_toml(config, example))
    job = read_job(path)
    assert job.model.path == 'an "odd" folder/model'
    assert job.capture.hooks == (HOOKS,)
    assert job.capture.first_position == 1
    assert job.destination.lake == str(config.out / "lake")
    assert job.destination.run == RUN
    assert set(PROBED) | {"bracket_depth"} <= set(job.prompts.token_labels)
    assert job.prompts.token_labels == TOKEN_LABELS
    assert "path" in job.prompts.metadata


def test_the_example_is_found_in_the_working_directory(tmp_path, monkeypatch):
    example = make_example(tmp_path / "examples" / "stdlib_llama", trained=True)
    monkeypatch.chdir(tmp_path)
    assert find_example(None) == example


def test_a_missing_example_is_refused_with_a_remedy(tmp_path):
    with pytest.raises(InvalidInput, match="--example"):
        find_example(tmp_path)


def test_an_untrained_model_is_refused_with_a_remedy(tmp_path):
    with pytest.raises(InvalidInput, match=r"train it first with: python .*train\.py"):
        find_example(make_example(tmp_path / "x", trained=False))


@pytest.mark.parametrize("name", ["tokens", "d_sae", "k", "sae_tokens"])
def test_numbers_below_one_are_refused(name):
    with pytest.raises(InvalidInput, match=f"{name} is 0"):
        DemoConfig(**{name: 0})


def test_stages_are_numbered_and_timed(capsys):
    stages = Stages()
    with stages("a", "doing a"):
        pass
    with stages("b", "doing b"):
        pass
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "[1/6] doing a ..."
    assert lines[2] == "[2/6] doing b ..."
    assert list(stages.seconds) == ["a", "b"]
