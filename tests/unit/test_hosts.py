"""The hosts file: whom each key belongs to, and a message for each mistake."""

import inspect
from pathlib import Path

import pytest

from pool import SHARED, Backend, LocalFilesystemBackend, MemoryBackend
from pool.errors import ConfigError, InvalidKey
from pool.hosts import _NOT_IN_FILES, KINDS, Hosts, _kind, make_backend
from pool.tables import TYPES


class OwnBackend(Backend):
    """What a user of the package may write."""

    def __init__(self, colour: str) -> None:
        super().__init__()
        self.colour = colour

    async def open(self) -> None:
        """Nothing to open."""

    async def close(self) -> None:
        """Nothing to close."""


def load(folder: Path, text: str) -> Hosts:
    path = folder / "hosts.toml"
    path.write_text(text, encoding="utf-8")
    return Hosts.load(path)


GOOD = """
[default]
backend = "local"
root_dir = "/srv/{key}"

[[match]]
key = "acme:special"
backend = "memory"

[[match]]
key = "acme:*"
backend = "ssh"
host = "build.acme.example"
username = "u-{key}"
root_dir = "work/{key}"
known_hosts = "/etc/known_hosts"
"""


def test_the_first_match_wins_and_default_takes_the_rest(tmp_path):
    """In the order of the file."""
    hosts = load(tmp_path, GOOD)
    assert hosts.config_for("acme:special", "x") == {"backend": "memory"}
    assert hosts.config_for("acme:7", "x")["host"] == "build.acme.example"
    assert hosts.config_for("other", "x") == {"backend": "local", "root_dir": "/srv/other"}


def test_a_match_inherits_nothing(tmp_path):
    """What it does not say is not taken from [default]."""
    assert "root_dir" not in load(tmp_path, GOOD).config_for("acme:special", "x")


def test_patterns_tell_upper_from_lower_case(tmp_path):
    """A key is taken as it is."""
    assert load(tmp_path, GOOD).config_for("ACME-7", "x")["backend"] == "local"


def test_the_key_stands_in_root_dir_and_username_only(tmp_path):
    """Elsewhere ``{key}`` is text."""
    config = load(tmp_path, GOOD).config_for("acme:7", "x")
    assert (config["root_dir"], config["username"]) == ("work/acme:7", "u-acme:7")


@pytest.mark.parametrize("key", ["..", "../../etc", "a/b", "-rf", "a b", ".ssh", "$(id)"])
def test_a_key_cannot_escape_from_its_folder(key, tmp_path):
    """Neither by the file nor by the default without one."""
    for hosts in (load(tmp_path, GOOD), Hosts.local(tmp_path)):
        with pytest.raises(InvalidKey, match="root_dir"):
            hosts.config_for(key, "x")


def test_without_a_file_each_key_has_a_folder(tmp_path):
    """Of this machine."""
    assert Hosts.local(tmp_path).config_for("a", "x") == {"backend": "local", "root_dir": str(tmp_path / "work" / "a")}


@pytest.mark.parametrize("primary", ["nobody", SHARED])
def test_a_key_that_no_rule_names_is_refused(primary, tmp_path):
    """The error names the file and the key."""
    hosts = load(tmp_path, '[[match]]\nkey = "acme:*"\nbackend = "memory"\n')
    with pytest.raises(ConfigError, match=r"hosts\.toml: no \[\[match\]\] fits key"):
        hosts.config_for(primary, "x")


def test_make_backend_makes_the_kind_that_a_rule_names(tmp_path):
    """And hands over the other fields."""
    made = make_backend(backend="local", root_dir=str(tmp_path))
    assert isinstance(made, LocalFilesystemBackend)
    assert isinstance(make_backend(backend="memory"), MemoryBackend)


def test_a_class_of_your_own_gets_every_other_field(tmp_path):
    """``module:Class``."""
    hosts = load(tmp_path, f'[default]\nbackend = "{__name__}:OwnBackend"\ncolour = "red"\n')
    made = make_backend(**hosts.config_for("a", "x"))
    assert type(made).__name__ == "OwnBackend"
    assert made.colour == "red"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("[default", ["not TOML"]),
        ("[defaults]\n", ["unknown table [defaults]", "did you mean 'default'"]),
        ("[match]\nkey = 'a'\n", ["[match]", "double brackets"]),
        ("default = 3\n", ["[default]: must be a table"]),
        ("match = [3]\n", ["[[match]] number 1", "must be a table"]),
        ("match = ['ab']\n", ["[[match]] number 1", "must be a table"]),
        ("[default]\nroot_dir = '/x'\n", ["[default]", "field 'backend' is missing", "local, memory, ssh"]),
        ("[default]\nbackend = 'shh'\n", ["[default]", "field 'backend' = 'shh'", "did you mean 'ssh'"]),
        ("[default]\nbackend = 3\n", ["field 'backend' = 3"]),
        ("[default]\nbackend = 'no_such_module:X'\n", ["cannot be imported", "no_such_module"]),
        ("[default]\nbackend = 'pool:NoSuch'\n", ["cannot be imported", "NoSuch"]),
        ("[default]\nbackend = ':X'\n", ["field 'backend' = ':X'", "cannot be imported"]),
        ("[default]\nbackend = '.a:X'\n", ["field 'backend' = '.a:X'", "cannot be imported"]),
        ("[default]\nbackend = 'pool:PoolError'\n", ["is not a subclass of pool.Backend"]),
        ("[default]\nbackend = 'local'\n", ["[default]", "field 'root_dir' is missing", "'local' needs it"]),
        ("[default]\nbackend = 'memory'\nroot_dirr = '/'\n", ["unknown field 'root_dirr'", "did you mean 'root_dir'"]),
        ("[default]\nbackend = 'memory'\nhandler = 'x'\n", ["unknown field 'handler'"]),
        ("[default]\nbackend = 'memory'\nroot_dir = 3\n", ["field 'root_dir' = 3: must be text"]),
        ("[default]\nbackend = 'memory'\nmax_output = true\n", ["field 'max_output' = True: must be a whole number"]),
        ("[default]\nbackend = 'memory'\nenv = 'A=1'\n", ["field 'env' = 'A=1': must be a table"]),
        ("[default]\nbackend = 'memory'\n[default.env]\nA = 1\n", ["[default]: "]),
        ("[default]\nbackend = 'ssh'\nhost = 'h'\nport = '22'\n", ["field 'port' = '22': must be a whole number"]),
        ("[default]\nbackend = 'ssh'\nhost = 'h'\ninsecure = 1\n", ["field 'insecure' = 1: must be true or false"]),
        ("[[match]]\nbackend = 'memory'\n", ["[[match]] number 1 (key = None)", "field 'key'"]),
        ("[[match]]\nkey = ''\nbackend = 'memory'\n", ["field 'key'", "must be a key or a pattern"]),
        ("[[match]]\nkey = 5\nbackend = 'memory'\n", ["[[match]] number 1 (key = 5)"]),
        (
            "[[match]]\nkey = 'a'\nbackend = 'memory'\n[[match]]\nkey = 'b'\nbackend = 'memory'\nhost = 'x'\n",
            ["[[match]] number 2 (key = 'b')", "unknown field 'host' for backend 'memory'"],
        ),
    ],
)
def test_each_mistake_is_told_with_file_table_field_and_rule(text, parts, tmp_path):
    """At start, not when the first task comes."""
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    for part in ["hosts.toml", *parts]:
        assert part in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    """With the system's reason."""
    with pytest.raises(ConfigError, match=r"missing\.toml.*No such file"):
        Hosts.load(tmp_path / "missing.toml")


def test_a_file_that_is_no_text_is_named(tmp_path):
    """Bytes that are not UTF-8."""
    (tmp_path / "hosts.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"hosts\.toml.*not TOML"):
        Hosts.load(tmp_path / "hosts.toml")


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_the_type_of_every_field_is_known(kind):
    """A new constructor argument needs its rule, or it would fail with a KeyError."""
    assert set(inspect.signature(_kind(kind, "")).parameters) - set(_NOT_IN_FILES) <= set(TYPES)
