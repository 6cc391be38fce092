"""What is sent to a host: it must be at home there."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import pool
from pool.helper import bundle as bundling
from pool.helper import wire
from pool.helper.bundle import BOOT, bundle
from tests.support.helper_program import Program

FOLDER = Path(pool.__file__).parent / "helper"
SENT = [FOLDER / f"{name}.py" for name in bundling._MODULES]

OLD = {
    "errno": {"E2BIG", "EAGAIN", "EDQUOT", "EIO", "EMFILE", "ENFILE", "ENOMEM", "ENOSPC", "EPERM"},
    "os": set(
        "O_CREAT O_DIRECTORY O_EXCL O_NOFOLLOW O_NONBLOCK O_RDONLY O_RDWR O_TRUNC O_WRONLY"
        " WEXITSTATUS WIFEXITED WTERMSIG _exit chdir chmod close devnull"
        " dup2 environb execve fork fsencode ftruncate getcwdb getpid getppid kill killpg listdir makedirs mkdir open path pipe pread read rename replace rmdir"
        " set_blocking set_inheritable setsid stat stat_result strerror sysconf umask unlink urandom utime wait4 waitpid"
        " write WNOHANG".split()
    ),
    "resource": {"RLIMIT_NOFILE", "getrlimit"},
    "select": {"POLLIN", "POLLOUT", "poll"},
    "signal": set(
        "SIGCHLD SIGCONT SIGHUP SIGINT SIGKILL SIGPIPE SIGQUIT SIGTERM SIGXFSZ SIG_BLOCK SIG_DFL SIG_IGN SIG_SETMASK"
        " SIG_UNBLOCK pthread_sigmask set_wakeup_fd signal".split()
    ),
    "sys": {"maxsize", "platform"},
    "threading": {"Condition", "Thread"},
    "time": {"clock_gettime", "monotonic", "sleep", "time"},
}
"""What Python 3.6 has of the modules that change most."""

NEWER = {("os", "posix_spawn"), ("os", "POSIX_SPAWN_DUP2")}
"""Used where an AttributeError is expected."""


def sources():
    """The modules as they arrive on a host; packages are empty."""
    dicts = [node.value for node in ast.walk(ast.parse(bundle())) if isinstance(node, ast.Assign)]
    return ast.literal_eval(next(value for value in dicts if isinstance(value, ast.Dict)))


def test_a_host_s_python_can_read_it():
    """It is Python 3.6, the start of it too; and that even an older one understands, to say what it is."""
    sent = sources()
    assert [name for name, text in sent.items() if text] == [f"pool.helper.{path.stem}" for path in SENT]
    for text in [bundle().decode("ascii"), BOOT, *sent.values()]:
        ast.parse(text, feature_version=(3, 6))
        assert not [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.JoinedStr | ast.NamedExpr)]


@pytest.mark.parametrize("path", SENT, ids=lambda path: path.stem)
def test_it_uses_what_python_3_6_has(path):
    """Of the modules whose contents have grown since."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    used = {
        (node.value.id, node.attr)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in OLD
    }
    assert {(module, name) for module, name in used if name not in OLD[module]} <= NEWER
    guards = {ast.unparse(node.type) for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler) and node.type}
    assert not used & NEWER or any("AttributeError" in guard for guard in guards)


def test_it_is_small():
    """What every new connection sends: comments and docstrings stay here."""
    assert len(bundle()) < 60_000
    assert b'"""' not in bundle()
    assert b"One command on the host" not in bundle()


def test_it_is_the_same_each_time():
    """Whoever makes it."""
    script = "import sys; from pool.helper.bundle import bundle; sys.stdout.buffer.write(bundle())"
    done = subprocess.run([sys.executable, "-c", script], cwd=FOLDER.parents[1], capture_output=True, check=True)
    assert done.stdout == bundle()


def test_it_does_not_depend_on_the_folder_it_is_made_in():
    """No path of the worker's machine is in it."""
    assert str(FOLDER).encode() not in bundle()
    assert b"/home/" not in bundle()
    assert b"/root/" not in bundle()


def boot(*arguments, send=b"", python=sys.executable):
    return subprocess.run(
        [python, "-I", "-S", "-c", BOOT, *arguments], input=send, capture_output=True, check=False, timeout=60
    )


def test_a_program_that_was_cut_off_is_not_run():
    """It says so."""
    done = boot("1000", "token", send=b"print('ran')")
    assert (done.returncode, done.stdout, done.stderr) == (1, b"", b"cut off\n")


def test_only_the_program_is_read():
    """What follows it is for the program."""
    source = b"import os; os.write(1, TOKEN.encode() + os.read(0, 100))"
    assert boot(str(len(source)), "token ", send=source + b"the rest").stdout == b"token the rest"


def pythons():
    """Every other Python of this machine, and this one."""
    found = [shutil.which(f"python3.{minor}") for minor in range(6, 20)]
    ran = {path: subprocess.run([path, "-V"], capture_output=True, check=False).returncode for path in found if path}
    works = [path for path, code in ran.items() if code == 0]
    return [sys.executable, *works]


@pytest.mark.parametrize("python", pythons())
def test_it_runs_on_the_pythons_that_are_here(python):
    """None of them needs anything installed."""
    with Program(python=python) as program:
        call = program.run("echo out; exit 3")
        assert (bytes(call.out), call.code) == (b"out\n", 3)
        number = program.exec("setsid sleep 1000 & echo $$; wait")
        program.wait_out(number, b"\n")
        program.send(wire.KILL, number)
        assert program.wait(number).code in (137, 143)
        assert program.operate("readdir", "/", "/").payload
        assert program.hang_up() == 0
        assert program.errors() == ""
