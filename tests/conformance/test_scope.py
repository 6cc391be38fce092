"""A scope is the same backend, seen from one of its folders."""

import pytest

from pool.backends.base import BackendStatus
from pool.errors import BackendClosed, FileMissing, PathEscapeError


def test_files_of_a_scope_are_below_its_folder(backend):
    """Paths start at the scope's folder, which the first write makes."""
    scope = backend.scope("a/b")
    scope.write("file", "x")
    assert (scope.read("file"), scope.read("/file"), backend.read("a/b/file")) == ("x", "x", "x")
    assert scope.readdir() == ["file"]


def test_scopes_nest(backend):
    """A scope of a scope is below both."""
    inner = backend.scope("a").scope("b").scope("/c")
    inner.write("file", "x")
    assert backend.read("a/b/c/file") == "x"
    assert inner.readdir() == ["file"]


def test_commands_of_a_scope_start_in_its_folder(sh):
    """cwd counts from the scope."""
    scope = sh.scope("a").scope("b")
    scope.write("c/file", "x")
    assert scope.exec("ls").stdout == "c\n"
    assert scope.exec("cat file", cwd="c").stdout == "x"


def test_the_environment_of_scopes_adds_up(rig):
    """Backend, outer scope, inner scope, call: the later wins."""
    backend = rig.backend(env={"A": "0", "B": "0", "C": "0", "D": "0"})
    backend.mkdir("a/b")
    scope = backend.scope("a", env={"B": "1", "C": "1", "D": "1"}).scope("b", env={"C": "2", "D": "2"})
    assert scope.exec('echo "$A$B$C$D"', env={"D": "3"}).stdout == "0123\n"
    assert backend.exec('echo "$A$B$C$D"').stdout == "0000\n"


@pytest.mark.parametrize("path", ["..", "../sibling", "x/../../sibling"])
def test_a_scope_is_not_left_by_dots(backend, path):
    """Not even into the rest of the backend's own root."""
    backend.write("sibling", "x")
    backend.mkdir("a")
    scope = backend.scope("a")
    for attempt in (
        scope.read,
        scope.readdir,
        scope.scope,
        lambda p: scope.write(p, "y"),
        lambda p: scope.exec("true", cwd=p),
    ):
        with pytest.raises(PathEscapeError):
            attempt(path)
    assert backend.read("sibling") == "x"


def test_a_scope_through_a_symlink_inside_its_root_works(sh):
    """``current -> releases/1``, as deployments have it: for files and commands alike."""
    sh.exec("mkdir -p releases/1; ln -s releases/1 current")
    scope = sh.scope("current")
    scope.write("file", "x")
    assert scope.exec("cat file").stdout == "x"
    assert sh.read("releases/1/file") == "x"


def test_a_scope_is_not_left_by_a_symlink(sh):
    """A link in the scope to elsewhere in the root is an escape from the scope."""
    sh.write("sibling/file", "x")
    sh.exec("mkdir a; ln -s ../sibling a/link")
    scope = sh.scope("a")
    for attempt in (
        lambda: scope.read("link/file"),
        lambda: scope.write("link/new", "y"),
        lambda: scope.exec("true", cwd="link"),
    ):
        with pytest.raises(PathEscapeError):
            attempt()
    assert sh.readdir("sibling") == ["file"]


def test_a_scope_whose_folder_is_a_link_to_the_outside_is_refused(shell, sh):
    """Making a scope of a link does not make its target the root."""
    sh.exec(f"ln -s '{shell.outside}' out; ln -s .. up; mkdir sub; ln -s ../out sub/out")
    for scope in (sh.scope("out"), sh.scope("up/outside"), sh.scope("sub").scope("out")):
        with pytest.raises(PathEscapeError):
            scope.read("secret")
        with pytest.raises(PathEscapeError):
            scope.readdir()
        with pytest.raises(PathEscapeError):
            scope.write("new", "evil")
        with pytest.raises(PathEscapeError):
            scope.exec("touch ran")
    assert [file.name for file in shell.outside.iterdir()] == ["secret"]


def test_a_scope_in_a_scope_does_not_leave_the_outer_one_by_a_link(sh):
    """The inner scope's folder must be inside the outer scope, links resolved."""
    sh.write("sibling/file", "x")
    sh.exec("mkdir a; ln -s ../sibling a/link")
    with pytest.raises(PathEscapeError):
        sh.scope("a").scope("link").read("file")


def test_a_scope_of_a_missing_folder(backend):
    """Commands and readdir say that it is missing; mkdir makes it."""
    scope = backend.scope("later")
    assert not scope.exists(".")
    with pytest.raises(FileMissing):
        scope.readdir()
    with pytest.raises(FileMissing):
        scope.exec("true")
    scope.mkdir(".")
    assert scope.readdir() == []
    scope.exec("true")


def test_a_scope_can_be_made_before_the_first_connect(rig):
    """Nothing is connected by making one."""
    backend = rig.backend()
    scope = backend.scope("a")
    assert scope.status is backend.status is BackendStatus.NEW
    scope.write("file", "x")
    assert scope.status is backend.status is BackendStatus.CONNECTED
    assert backend.readdir() == ["a"]


def test_destroying_a_scope_does_nothing(backend):
    """The connection belongs to the backend."""
    scope = backend.scope("a")
    scope.write("file", "x")
    scope.destroy()
    assert (scope.read("file"), backend.read("a/file")) == ("x", "x")


def test_a_scope_ends_with_its_backend(backend):
    """No use after destroy, not through a scope either."""
    scope = backend.scope("a")
    scope.write("file", "x")
    backend.destroy()
    for attempt in (lambda: scope.read("file"), lambda: scope.exec("true"), lambda: scope.scope("b").mkdir(".")):
        with pytest.raises(BackendClosed):
            attempt()
    assert scope.status is BackendStatus.CLOSED
