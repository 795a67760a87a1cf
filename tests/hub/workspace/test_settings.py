"""What is refused before anything starts, and what the hub is told."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest
from pydantic import ValidationError
from traitlets.config import Config

from millpond.hub.queue_api import read_workers
from millpond.hub.workspace.cgroups import Limits, make_group
from millpond.hub.workspace.config import ROLES, configure, gateway_origin
from millpond.hub.workspace.helper import check_environment
from millpond.hub.workspace.lockdown import DISABLED
from millpond.hub.workspace.seccomp import CALLS, program
from millpond.hub.workspace.settings import Authentication, Workspace, is_user
from millpond.hub.workspace.up import settings_of
from millpond.hub.workspace.up_config import read_up_config
from millpond.hub.workspace.users import UserNumbers
from millpond.hub.workspace.vault import Vault
from millpond.store.errors import InvalidInput, IsolationFailed


@pytest.fixture
def settings(tmp_path, monkeypatch):
    monkeypatch.setenv("MILLPOND_GATEWAY_TOKEN", "t" * 40)
    return Workspace(state=tmp_path)


@pytest.mark.parametrize(
    ("origin", "why"),
    [
        ("http://127.0.0.1:8000", "an address has no subdomains"),
        ("http://[::1]:8000", "an address has no subdomains"),
        ("http://millpond.example.org", "without https"),
        ("https://millpond.example.org/hub", "give scheme, host and port"),
        ("ftp://localhost", "give scheme, host and port"),
    ],
)
def test_origins_that_users_would_share_are_refused(tmp_path, origin, why):
    with pytest.raises(ValidationError, match=why):
        Workspace(state=tmp_path, origin=origin)


@pytest.mark.parametrize(
    "name", ["services", "hub", "gateway--service", "a--b", "Ada", "a.b", "a_b", "-a", "a-", "", "a" * 33, "ada\n"]
)
def test_names_that_are_somebody_elses_origin_are_refused(name):
    assert not is_user(name)
    with pytest.raises(ValidationError):
        Authentication(admins=(name,))


def test_the_hub_is_told_what_keeps_origins_and_rights_apart(settings):
    c = Config()
    configure(c, settings)
    hub = c.JupyterHub
    assert hub.subdomain_host == "http://localhost:8000"
    assert hub.cookie_host_prefix_enabled is True
    assert hub.admin_access is False
    assert hub.cleanup_servers is False
    assert hub.authenticator_class.endswith("LocalAuthenticator")
    assert c.NativeAuthenticator.open_signup is False
    service = hub.services[0]
    assert service["oauth_redirect_uri"] == "http://gateway--service.localhost:8000/services/gateway/oauth_callback"
    assert gateway_origin(settings) == "http://gateway--service.localhost:8000"
    pattern = re.compile(c.Authenticator.username_pattern)
    for name in ("ada", "services", "gateway--service", "hub", "bob-2"):
        assert bool(pattern.match(name)) == is_user(name)
    scopes = {role["name"]: set(role["scopes"]) for role in ROLES}
    assert "custom:millpond:review" in scopes["reviewer"]
    assert not scopes["server"] & {"custom:millpond:review", "custom:millpond:admin", "inherit"}


def test_logins_that_anybody_passes_are_refused(settings):
    def oauth(**how):
        configure(Config(), settings.model_copy(update={"authentication": Authentication(kind="oauth", **how)}))

    for name in ("dummy", "null"):
        with pytest.raises(InvalidInput, match="name an OAuthenticator"):
            oauth(authenticator=name, options={"allow_all": True})
    with pytest.raises(InvalidInput, match="allow nobody"):
        oauth(options={"client_id": "x"})
    with pytest.raises(InvalidInput, match="secrets come from the environment"):
        oauth(options={"client_secret": "x", "allow_all": True})
    oauth(authenticator="github", options={"client_id": "x", "allowed_organizations": ["a"]})


def test_the_helper_takes_only_what_it_knows():
    good = {
        "JUPYTERHUB_USER": "ada",
        "JUPYTERHUB_SERVICE_PREFIX": "/user/ada/",
        "JUPYTERHUB_API_URL": "http://127.0.0.1:8901/hub/api",
    }
    assert check_environment("ada", good) == good
    for bad in (
        None, {**good, "LD_PRELOAD": "/x"}, {**good, "PATH": "/x"}, {**good, "JUPYTERHUB_HOST": "a\nb"}, {**good, "JUPYTERHUB_HOST": 3},
        {**good, "JUPYTERHUB_HOST": "x" * 9000}, {**good, "JUPYTERHUB_USER": "bob"}, {**good, "JUPYTERHUB_SERVICE_PREFIX": "/user/bob/"},
        {**good, "JUPYTERHUB_API_URL": "http://evil/"}, {},
    ):  # fmt: skip
        with pytest.raises(InvalidInput):
            check_environment("ada", bad)


def test_numbers_of_users_are_given_once(tmp_path):
    numbers = UserNumbers(tmp_path / "users.json", 59_100)
    assert [numbers.number(name) for name in ("ada", "bob", "ada")] == [59_100, 59_101, 59_100]
    assert UserNumbers(tmp_path / "users.json", 59_100).number("bob") == 59_101
    with pytest.raises(InvalidInput):
        numbers.number("../etc")
    with pytest.raises(IsolationFailed, match="'root'"):
        UserNumbers(tmp_path / "other.json", 0).number("ada")


def test_the_filters_numbers_are_the_kernels():
    header = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")
    found = dict(re.findall(r"#define __NR_(\w+) (\d+)", header.read_text()))
    for name, (number, _) in CALLS.items():
        if name in found:
            assert int(found[name]) == number, name
    assert len(set(CALLS) - set(found)) <= 1  # newer than this machine's headers
    for machine in ("x86_64", "aarch64"):
        assert len(program(machine)) % 8 == 0
    with pytest.raises(InvalidInput, match="s390x"):
        program("s390x")


def test_limits_of_version_2_are_written_and_read_back(tmp_path):
    """On plain files: this checks which files and values, not what the kernel makes of them."""
    (tmp_path / "cgroup.controllers").write_text("memory pids cpu")
    group = make_group("mp", "ada", Limits(memory=1 << 30, cpus=1.5, processes=99), tmp_path)
    values = {file.name: file.read_text() for file in group.folders[0].iterdir()}
    assert values == {"memory.max": str(1 << 30), "pids.max": "99", "cpu.max": "150000 100000"}
    with pytest.raises(IsolationFailed, match=r"limits\.required"):
        make_group("mp", "ada", Limits(), tmp_path / "nowhere")


def test_lab_is_told_the_same_twice():
    import millpond.hub.workspace as package

    page = json.loads((Path(package.__file__).parent / "lab" / "page_config.json").read_text())
    assert page["disabledExtensions"] == page["lockedExtensions"] == dict.fromkeys(DISABLED, True)


def test_a_configuration_file_names_its_mistake(tmp_path):
    file = tmp_path / "lake.toml"
    for text, why in (
        ('lake = "x"', "policy is missing"),
        ('lake = "s3://b/x"\npolicy = "p"', "has no network"),
        ('lake = "x"\npolicy = "p"\n[workspace]\norigin = "http://10.0.0.1"', "an address has no subdomains|origin"),
        ('lake = "x"\nsecret = 1', "secret"),
        ("lake = ", "cannot be read"),
    ):
        file.write_text(text)
        with pytest.raises((InvalidInput, ValidationError), match=why):
            settings_of(read_up_config(file))


def test_the_dictionary_is_made_once_or_the_operators(tmp_path):
    from millpond.hub.workspace.dictionary import make_dictionary, standard_library

    text = standard_library(20_000)
    assert len(text) == 40_000
    assert text == standard_library(20_000)
    assert b"import" in text[20_000:]
    (tmp_path / "dictionary").write_bytes(b"of an earlier Python")
    assert make_dictionary(tmp_path, None).read_bytes() == b"of an earlier Python"
    own = tmp_path / "own.txt"
    own.write_bytes(b"public words")
    assert make_dictionary(tmp_path, own).read_bytes() == b"public words"
    own.write_bytes(bytes(5 << 20))
    with pytest.raises(InvalidInput, match="cut it"):
        make_dictionary(tmp_path, own)
    with pytest.raises(InvalidInput, match="cannot be read"):
        make_dictionary(tmp_path, tmp_path / "none")


def test_two_models_have_a_worker_each_with_a_token_of_its_own(tmp_path, monkeypatch):
    """On one queue, from which each takes what is for its own weights."""
    (tmp_path / "policy.toml").write_text("")
    (tmp_path / "lake.toml").write_text(
        'lake = "lake"\nstate = "state"\npolicy = "policy.toml"\n'
        '[models."Llama-3.1-8B"]\npath = "weights/a"\nworker = true\nengine = {gpu_memory_utilization = 0.4}\n'
        '[models.gemma]\npath = "weights/b"\nworker = true\n[models.other]\n'
    )
    monkeypatch.setattr("os.chown", lambda *_: None)  # to users that only root can give files to
    config = read_up_config(tmp_path / "lake.toml")
    (tmp_path / "state" / "vault").mkdir(parents=True)
    parts = {part.name: part for part in Vault(settings_of(config), config).parts("t")}
    assert list(parts) == ["gateway", "executor", "queue", "worker-Llama-3.1-8B", "worker-gemma"]
    known = {worker.sha256: worker.name for worker in read_workers(tmp_path / "state" / "vault" / "workers.toml")}
    for name, folder, engine in (("Llama-3.1-8B", "a", {"gpu_memory_utilization": 0.4}), ("gemma", "b", {})):
        part = parts[f"worker-{name}"]
        token = part.environment["MILLPOND_WORKER_TOKEN"]
        assert known[hashlib.sha256(token.encode()).hexdigest()] == name
        assert token not in " ".join(part.command)
        given = dict(zip(part.command, part.command[1:], strict=False))
        assert given["--model"] == str(tmp_path / "weights" / folder)
        assert json.loads(given["--engine"]) == engine
