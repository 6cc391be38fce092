"""No path leads out of the root, over every kind of backend."""

import pathlib

import pytest

from pool.errors import ConfigError, PathEscapeError

OPERATIONS = {
    "read": lambda b, path: b.read(path),
    "write": lambda b, path: b.write(path, "evil"),
    "readdir": lambda b, path: b.readdir(path),
    "mkdir": lambda b, path: b.mkdir(path),
    "exists": lambda b, path: b.exists(path),
    "stat": lambda b, path: b.stat(path),
    "rm": lambda b, path: b.rm(path),
    "rm -r": lambda b, path: b.rm(path, recursive=True),
    "rename from": lambda b, path: b.rename(path, "here"),
    "rename to": lambda b, path: b.rename("mine", path),
    "touch": lambda b, path: b.touch(path),
    "cwd": lambda b, path: b.exec("true", cwd=path),
    "scope": lambda b, path: b.scope(path).read("secret"),
}


@pytest.fixture(params=OPERATIONS)
def operate(request):
    return OPERATIONS[request.param]


def test_an_absolute_path_is_taken_as_relative(backend):
    """Unless it is under the root already."""
    backend.write("/a/file", "x")
    assert backend.read("a/file") == backend.read("//a//./file") == backend.read("a/../a/file") == "x"


def test_an_absolute_path_under_the_root_is_itself(rig, backend):
    """What readers of a command's output know as the full path can be given back."""
    backend.write(f"{rig.root}/a/file", "x")
    assert backend.read("a/file") == backend.read(f"{rig.root}/b/../a/file") == "x"
    assert backend.readdir(str(rig.root)) == ["a"]


def test_a_path_object_is_a_path(backend):
    """`pathlib` and bytes are accepted like text."""
    backend.write(pathlib.PurePosixPath("a") / "file", "x")
    assert backend.read(b"a/file") == "x"


@pytest.mark.parametrize(
    "path", ["..", "../outside/secret", "a/../../outside/secret", "/../outside", "./..", "a/../.."]
)
def test_dots_do_not_leave_the_root(rig, backend, operate, path):
    """Refused by their letters, for every operation, whether there is something or not."""
    backend.write("mine", "x")
    with pytest.raises(PathEscapeError):
        operate(backend, path)
    assert (backend.readdir(), backend.read("mine")) == (["mine"], "x")


def test_no_symlink_in_a_path_leaves_the_root(shell, sh, operate):
    """A link in the middle of a path is no way out, for any operation."""
    sh.write("mine", "x")
    sh.exec(f"ln -s '{shell.outside}' out; ln -s .. up; ln -s out/.. far")
    folders = operate in (OPERATIONS["cwd"], OPERATIONS["readdir"])
    name = "." if folders else "secret"
    for path in (f"out/{name}", f"up/outside/{name}", f"far/outside/{name}"):
        with pytest.raises(PathEscapeError):
            operate(sh, path)
    assert (shell.outside / "secret").read_text() == "secret"
    assert [file.name for file in shell.outside.iterdir()] == ["secret"]
    assert sh.read("mine") == "x"


@pytest.mark.parametrize("name", ["read", "write", "readdir", "mkdir", "exists", "stat", "touch", "cwd", "scope"])
def test_no_symlink_at_the_end_of_a_path_leaves_the_root(shell, sh, name):
    """A link that is the path itself is not followed to the outside, not even to something that is not there yet."""
    sh.exec(f"ln -s '{shell.outside}' out; ln -s '{shell.outside}/secret' file; ln -s '{shell.outside}/new' new")
    links = {"readdir": ["out"], "cwd": ["out"], "scope": ["out"]}.get(name, ["out", "file", "new"])
    for path in links:
        with pytest.raises(PathEscapeError):
            OPERATIONS[name](sh, path)
    assert (shell.outside / "secret").read_text() == "secret"
    assert [file.name for file in shell.outside.iterdir()] == ["secret"]


def test_a_symlink_that_stays_inside_is_followed(shell, sh):
    """Relative or absolute, as long as it ends in the root."""
    sh.write("folder/file", "x")
    sh.exec(f"ln -s folder rel; ln -s '{shell.root}/folder' abs; ln -s ../folder/file folder/again")
    assert [sh.read(path) for path in ("rel/file", "abs/file", "folder/again")] == ["x"] * 3


def test_a_root_that_is_a_symlink_works(shell, sh):
    """The root may be reached through a link: that is the owner's choice, and no escape."""
    sh.exec("mkdir real; ln -s real link")
    backend = shell.backend(root_dir=str(shell.root / "link"))
    backend.write("a/file", "x")
    assert backend.exec("cat file", cwd="a").stdout == "x"
    assert sh.read("real/a/file") == "x"


def test_a_folder_whose_name_begins_like_the_root_is_outside(shell, sh):
    """/root2 is not under /root."""
    sh.exec(f"mkdir '{shell.root}2'; ln -s '{shell.root}2' twin")
    with pytest.raises(PathEscapeError):
        sh.write("twin/file", "x")


@pytest.mark.parametrize("path", ["", None, 1, ["a"], "a\0b", "\ud800"], ids=ascii)
def test_what_is_no_path_is_refused(backend, operate, path):
    """Empty, NUL, not text: a ConfigError that says so, for every operation."""
    backend.write("mine", "x")
    if operate is OPERATIONS["cwd"] and not path:
        return  # no cwd: the root
    with pytest.raises(ConfigError, match="path"):
        operate(backend, path)
    assert backend.readdir() == ["mine"]
