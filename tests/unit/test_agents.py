"""The agents of a hosts file: what each mistake is told as, and what a chat gets."""

import inspect
import tomllib

import pytest

from pool import agents as module
from pool.agents import _HIDDEN, _KINDS, GROUP, NO_AGENTS, Agents
from pool.backends.acp import AcpBackend
from pool.backends.local import LocalFilesystemBackend
from pool.backends.opencode import OpencodeBackend
from pool.backends.opencode_server import OpencodeServer
from pool.errors import ConfigError, InvalidKey
from pool.hosts import Hosts, make_backend
from pool.manager import SHARED
from pool.tables import TYPES

GOOD = """
[default]
backend = "local"
root_dir = "/srv/{key}"

[agents.codex]
kind = "acp"
command = ["codex-acp"]
root_dir = "/srv/chats/{key}"
cwd = "in/{key}"
repository = "/srv/git/{key}"
base = "{key}"
env = { A = "{key}" }
secrets = { KEY = { env = "CODEX_KEY" } }
permissions = { default = "deny", read = "allow" }

[agents.remote]
kind = "acp"
command = ["codex-acp"]
where = "host"

[agents.opencode]
kind = "opencode"
command = ["opencode", "serve"]
root_dir = "/srv/chats/{key}"
start_timeout = 5
hang_timeout = 7.5
"""


def parse(text: str) -> Hosts:
    return Hosts.parse(tomllib.loads(text), "hosts.toml")


def agents(text: str = GOOD) -> Agents:
    return parse(text).agents


def acp(fields: str, *, command: str = 'command = ["x"]', root: str = 'root_dir = "/r"') -> str:
    return f'[agents.a]\nkind = "acp"\n{command}\n{root}\n{fields}\n'


def opencode(fields: str, *, root: str = 'root_dir = "/r"') -> str:
    return f'[agents.o]\nkind = "opencode"\n{root}\n{fields}\n'


BAD = [
    ("agents = 3", ["[agents]: must hold a table for each agent"]),
    ("agents = [1]", ["[agents]: must hold a table for each agent"]),
    ("[agents]\na = 3", ["[agents.a]: must be a table"]),
    ("[agents]\na = ['x']", ["[agents.a]: must be a table"]),
    ("[[agents.a]]\nkind = 'acp'", ["[agents.a]: must be a table"]),
    ("[agents.default]\nkind = 'acp'", ["[agents.default]", "'default' is taken", "the chat's own backend"]),
    ("[agents.'']\nkind = 'acp'", ["[agents.]", "empty"]),
    ("[agents.\"a\\nb\"]\nkind = 'acp'", ["[agents.", "control character"]),
    ("[agents.a]", ["[agents.a]: field 'kind' = None: must be one of acp, opencode"]),
    ("[agents.a]\nkind = 'acpp'", ["[agents.a]: field 'kind' = 'acpp': must be one of acp, opencode"]),
    ("[agents.a]\nkind = ['acp']", ["[agents.a]: field 'kind' = ['acp']: must be one of acp, opencode"]),
    ("[agents.a]\nkind = { a = 1 }", ["[agents.a]: field 'kind' = {'a': 1}: must be one of"]),
    ("[agents.a]\nkind = 'acp'\nroot_dir = '/r'", ["[agents.a]: field 'command' is missing", "'acp' needs it"]),
    (acp("", root=""), ["[agents.a]: root_dir is missing", "'worker' needs a folder"]),
    (acp("comand = ['x']"), ["[agents.a]: unknown field 'comand' for agent kind 'acp'; did you mean 'command'?"]),
    (acp("chat = 'c'"), ["[agents.a]: unknown field 'chat'"]),
    (acp("url = 'http://x'"), ["[agents.a]: unknown field 'url' for agent kind 'acp'"]),
    (acp("", command="command = 'codex-acp'"), ["field 'command' = 'codex-acp': must be a list"]),
    (acp("", command="command = []"), ["[agents.a]: command=[]: must be a list"]),
    (acp("", command="command = ['x', 3]"), ["[agents.a]: command=['x', 3]: must be a list"]),
    (acp("", command="command = ['']"), ["[agents.a]: command=['']: must be a list"]),
    (acp("", command='command = ["a\\u0000"]'), ["[agents.a]: command: must not contain a NUL"]),
    (acp("env = ['A']"), ["[agents.a]: field 'env' = ['A']: must be a table"]),
    (acp("env = { A = 1 }"), ["[agents.a]: env A: its value must be text"]),
    (acp("secrets = 'A'"), ["[agents.a]: field 'secrets' = 'A': must be a table"]),
    (acp("secrets = { A = 'plain' }"), ["[agents.a]: secrets: A must be { env = 'VARIABLE' }"]),
    (acp("secrets = { A = { env = 'A', file = '/a' } }"), ["[agents.a]: secrets: A must be"]),
    (acp("secrets = { A = { value = 'x' } }"), ["[agents.a]: secrets: A must be"]),
    (acp("secrets = { A = {} }"), ["[agents.a]: secrets: A must be"]),
    (acp("secrets = { A = { env = '' } }"), ["[agents.a]: secrets: A: must name a variable or a file"]),
    (acp("secrets = { A = { file = 3 } }"), ["[agents.a]: secrets: A: must name a variable or a file"]),
    (acp("secrets = { 'A B' = { env = 'X' } }"), ["[agents.a]: secrets: env name 'A B'", "letters, digits and _"]),
    (acp("permissions = 'maybe'"), ["[agents.a]: permissions: default='maybe': must be 'deny' or 'allow'"]),
    (acp("permissions = true"), ["[agents.a]: field 'permissions' = True: must be 'deny', 'allow' or a table"]),
    (
        acp("permissions = { reed = 'allow' }"),
        ["[agents.a]: permissions: unknown kind 'reed': known are default, read"],
    ),
    (acp("permissions = { read = true }"), ["[agents.a]: permissions: read=True: must be 'deny' or 'allow'"]),
    (acp("permissions = { read = ['allow'] }"), ["[agents.a]: permissions: read=['allow']: must be"]),
    (acp("where = 'moon'"), ["[agents.a]: where='moon': must be 'worker' or 'host'"]),
    (acp("where = 'host'"), ["[agents.a]: root_dir='/r': where = 'host' works in the root_dir of the chat's host"]),
    (acp("repository = 'git/x'"), ["[agents.a]: repository='git/x': must be an absolute path"]),
    (acp("base = 'main'"), ["[agents.a]: base='main': means nothing without repository"]),
    (acp("start_timeout = 0"), ["[agents.a]: start_timeout=0 s: must be more than 0"]),
    (acp("session_timeout = -1"), ["[agents.a]: session_timeout=-1 s: must be more than 0"]),
    (acp("cancel_timeout = nan"), ["[agents.a]: cancel_timeout=nan s: must be more than 0"]),
    (acp("cancel_timeout = '5'"), ["[agents.a]: field 'cancel_timeout' = '5': must be a number of seconds"]),
    (acp("max_line = true"), ["[agents.a]: field 'max_line' = True: must be a whole number of bytes"]),
    (acp("max_line = 0"), ["[agents.a]: max_line=0 bytes: must be more than 0"]),
    (opencode(""), ["[agents.o]: kind 'opencode' needs either command or url"]),
    (opencode("command = ['o']\nurl = 'http://x'"), ["[agents.o]: kind 'opencode' needs either command or url"]),
    (
        opencode("command = ['o', 'serve', '--port=1']"),
        ["[agents.o]: command=['o', 'serve', '--port=1']: leave --port"],
    ),
    (opencode("url = 'x:4096'"), ["[agents.o]: url='x:4096': must begin with http:// or https://"]),
    (opencode("command = ['o']", root=""), ["[agents.o]: root_dir is missing"]),
    (opencode("command = 'opencode serve'"), ["[agents.o]: field 'command' = 'opencode serve': must be a list"]),
    (opencode("command = ['o']\nwhere = 'host'"), ["[agents.o]: unknown field 'where' for agent kind 'opencode'"]),
    (opencode("command = ['o']\nagent = 'x'"), ["[agents.o]: unknown field 'agent'"]),
    (opencode("command = ['o']\npassword = { env = 'P' }"), ["[agents.o]: password: only for a server at url"]),
    (opencode("url = 'http://x'\npassword = 'p'"), ["[agents.o]: field 'password' = 'p': must be a table"]),
    (opencode("url = 'http://x'\npassword = { text = 'p' }"), ["[agents.o]: secrets: password must be"]),
    (opencode("command = ['o']\nhang_timeout = 0"), ["[agents.o]: hang_timeout=0 s: must be more than 0"]),
    (opencode("command = ['o']\npermissions = { bash = 'allow' }"), ["[agents.o]: permissions: unknown kind 'bash'"]),
    ("[agent.a]\nkind = 'acp'", ["unknown table [agent]; did you mean 'agents'?"]),
]


@pytest.mark.parametrize(("text", "parts"), BAD, ids=lambda value: value if isinstance(value, str) else "")
def test_each_mistake_is_told_with_file_table_field_and_rule(text, parts):
    """At start, not when the first turn comes."""
    with pytest.raises(ConfigError) as caught:
        parse(text)
    for part in ["hosts.toml: ", *parts]:
        assert part in str(caught.value)


@pytest.mark.parametrize("kind", sorted(_KINDS))
def test_the_type_of_every_field_is_known(kind):
    """A new constructor argument needs its rule, or it would fail with a KeyError."""
    for maker in _KINDS[kind][:2]:
        if maker is not None:
            assert set(inspect.signature(maker).parameters) - set(_HIDDEN) <= set(TYPES)


@pytest.mark.parametrize("package", ["acp", "httpx", "psutil"])
def test_a_package_that_is_not_installed_is_told_with_the_way_to_have_it(package, monkeypatch):
    """At start; only by a file that has an agent which needs it."""
    find = module.importlib.util.find_spec
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None if name == package else find(name))
    needs = {"acp": ["a"], "httpx": ["o"], "psutil": ["a", "o"]}[package]
    for name, text in (("a", acp("")), ("o", opencode("command = ['o']"))):
        if name not in needs:
            assert name in agents(text)
            continue
        with pytest.raises(ConfigError, match=rf"\[agents\.{name}\]: .*pip install 'celery-warm-pool\[agents\]'"):
            agents(text)


def test_without_agents_none_is_needed(monkeypatch):
    """A pool of build hosts does without those packages."""
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    assert not agents("[default]\nbackend = 'memory'\n")
    assert not NO_AGENTS


# -- what a chat gets


def test_the_key_stands_in_the_folders_only(monkeypatch):
    """``root_dir``, ``cwd`` and ``repository``; elsewhere ``{key}`` is text."""
    config = agents().config_for("c1", "codex")
    assert config == {
        "backend": "acp",
        "chat": "c1",
        "command": ["codex-acp"],
        "root_dir": "/srv/chats/c1",
        "cwd": "in/c1",
        "repository": "/srv/git/c1",
        "base": "{key}",
        "env": {"A": "{key}"},
        "secrets": {"KEY": {"env": "CODEX_KEY"}},
        "permissions": {"default": "deny", "read": "allow"},
    }


def test_a_table_stays_as_it_is():
    """What one chat was given is not what the next one gets."""
    found = agents()
    assert [found.config_for(key, "codex")["root_dir"] for key in ("a", "b")] == ["/srv/chats/a", "/srv/chats/b"]


@pytest.mark.parametrize("key", ["..", "../../etc", "a/b", "-rf", "a b", ".ssh", "$(id)", "a\nb"])
def test_a_chat_cannot_escape_from_its_folder(key):
    """The agent would work in another one's."""
    with pytest.raises(InvalidKey, match="root_dir"):
        agents().config_for(key, "codex")
    with pytest.raises(InvalidKey, match="root_dir"):
        agents().make(key, "opencode")


def test_a_hostile_chat_may_have_an_agent_whose_table_names_no_folder_by_it():
    """Its host's rule has its own say."""
    assert agents().config_for("a/b", "remote")["chat"] == "a/b"


def test_the_server_and_its_chats_each_get_their_own_fields():
    """What both have goes to both."""
    found = agents()
    assert found.config_for(SHARED, "opencode") == {
        "backend": "opencode-server",
        "command": ["opencode", "serve"],
        "start_timeout": 5,
        "hang_timeout": 7.5,
    }
    assert found.config_for("c1", "opencode") == {
        "backend": "opencode",
        "chat": "c1",
        "agent": "opencode",
        "root_dir": "/srv/chats/c1",
        "start_timeout": 5,
    }


def test_a_kind_with_a_process_for_each_chat_has_nothing_to_share():
    """Told by name."""
    with pytest.raises(ConfigError, match=r"hosts\.toml: agent 'codex' has no server that chats share"):
        agents().config_for(SHARED, "codex")


def test_what_is_a_process_counts_as_an_agent():
    """A chat's session on a shared server is none; the server is one."""
    found = agents()
    assert found.group_for("c1", "codex") == GROUP
    assert found.group_for("c1", "opencode") is None
    assert found.group_for(SHARED, "opencode") == GROUP
    assert found.group_for(SHARED, "codex") is None
    assert found.group_for("c1", "default") is None


@pytest.mark.parametrize("agent", ["codexx", "", "default", None, 3, ["codex"], {"codex": 1}])
def test_an_agent_that_there_is_not_is_told_with_those_there_are(agent):
    """Whatever a message brought."""
    with pytest.raises(ConfigError, match=r"hosts\.toml: there is no agent .*codex"):
        agents().check(agent)
    with pytest.raises(ConfigError, match="there is no agent"):
        NO_AGENTS.check(agent)


def test_an_agent_that_there_is_is_returned():
    """By its name."""
    found = agents()
    assert found.check("codex") == "codex"
    assert [name in found for name in ("codex", "opencode", "other")] == [True, True, False]
    assert found


def test_make_returns_the_agent_of_a_chat_not_connected():
    """For what is left of a chat: nothing is started, and it is in no pool."""
    made = agents().make("c1", "codex")
    assert type(made) is AcpBackend
    assert (made.chat, made.status, made.pool) == ("c1", "new", None)
    other = agents().make("c1", "opencode")
    assert type(other) is OpencodeBackend
    assert (other.chat, other.agent) == ("c1", "opencode")


def test_whether_any_agent_speaks_acp():
    """Its SDK takes a while to import."""
    assert agents().speak_acp
    assert not agents(opencode("command = ['o']")).speak_acp
    assert not NO_AGENTS.speak_acp


# -- through the hosts file


def test_an_agent_is_found_before_the_rules_of_keys():
    """The name of any other agent gets the chat's workspace, by its rule."""
    hosts = parse(GOOD)
    assert hosts.config_for("c1", "codex")["backend"] == "acp"
    assert hosts.config_for(SHARED, "opencode")["backend"] == "opencode-server"
    for plain in ("default", "anything"):
        assert hosts.config_for("c1", plain) == {"backend": "local", "root_dir": "/srv/c1"}
    with pytest.raises(ConfigError):
        hosts.config_for(SHARED, "anything")


def test_agents_need_no_rule_for_keys():
    """A file may have nothing else."""
    hosts = parse(acp(""))
    assert hosts.config_for("c1", "a")["chat"] == "c1"
    with pytest.raises(ConfigError, match="no \\[default\\]"):
        hosts.config_for("c1", "default")


@pytest.mark.parametrize(
    ("primary", "agent", "kind"),
    [
        ("c1", "codex", AcpBackend),
        ("c1", "remote", AcpBackend),
        ("c1", "opencode", OpencodeBackend),
        (SHARED, "opencode", OpencodeServer),
        ("c1", "default", LocalFilesystemBackend),
    ],
)
def test_what_the_file_says_can_be_made(primary, agent, kind):
    """The pool's factory knows every kind."""
    assert type(make_backend(**parse(GOOD).config_for(primary, agent))) is kind


def test_a_kind_of_agent_is_no_backend_of_a_key():
    """It belongs under [agents]."""
    with pytest.raises(ConfigError, match="field 'backend' = 'acp': must be one of local, memory, ssh"):
        parse("[default]\nbackend = 'acp'\ncommand = ['x']\n")
