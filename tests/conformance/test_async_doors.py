"""The awaitable doors, from any event loop, keep the promises of the blocking ones."""

import asyncio

import pytest

from pool.errors import BackendClosed, CommandFailed, CommandTimeout, ConfigError, FileMissing, PathEscapeError
from tests.support.processes import has_pid, wait_gone, wait_pid
from tests.support.waiting import PATIENCE


def test_files(rig, run):
    """Every file operation."""

    async def main():
        backend = rig.backend()
        await backend.awrite("a/file", "x")
        assert await backend.aread("a/file") == "x"
        assert await backend.aread("a/file", encoding=None) == b"x"
        await backend.atouch("a/other")
        assert await backend.areaddir("a") == ["file", "other"]
        await backend.amkdir("b")
        await backend.arename("a/other", "b/moved")
        assert (await backend.aexists("a/other"), await backend.aexists("b/moved")) == (False, True)
        assert (await backend.astat("a/file")).size == 1
        await backend.arm("b", recursive=True)
        assert await backend.areaddir() == ["a"]
        with pytest.raises(FileMissing):
            await backend.aread("no")
        with pytest.raises(PathEscapeError):
            await backend.aread("../no")
        scope = backend.scope("a")
        assert await scope.areaddir() == ["file"]
        await backend.adestroy()
        await backend.adestroy()
        with pytest.raises(BackendClosed):
            await backend.aread("a/file")

    run(main())


def test_commands(rig, run):
    """Results, failures and refusals."""

    async def main():
        backend = rig.backend()
        result = await backend.aexec("echo out; echo err >&2", env={"A": "1"})
        assert (result.exit_code, result.stdout, result.stderr) == (0, "out\n", "err\n")
        assert (await backend.aexec("exit 3", check=False)).exit_code == 3
        with pytest.raises(CommandFailed):
            await backend.aexec("exit 3")
        with pytest.raises(ConfigError):
            await backend.aexec("")

    run(main())


def test_timeout(shell, run):
    """The group is killed."""

    async def main():
        backend = shell.backend()
        for seconds in PATIENCE:
            with pytest.raises(CommandTimeout):
                await backend.aexec("echo $$ > pid; sleep 1000", timeout=seconds)
            if has_pid(shell.root / "pid"):
                break

    run(main())
    wait_gone(wait_pid(shell.root / "pid"))


def test_many_at_once(shell, run):
    """More than there are channels, together with file operations."""

    async def main():
        backend = shell.backend()

        async def one(number):
            await backend.awrite(f"f{number}", str(number))
            return (await backend.aexec(f"cat f{number}")).stdout

        assert await asyncio.gather(*(one(n) for n in range(30))) == [str(n) for n in range(30)]

    run(main())


def test_on_output(shell, run):
    """Whole characters, in order, and the rest of a cut one at the end, before the call returns."""
    pieces = []

    async def main():
        await shell.backend().aexec(
            r"printf 'a\342'; sleep 0.2; printf '\230\203b'; sleep 0.2; printf '\303'; echo e >&2",
            on_output=lambda piece, stream: pieces.append((piece, stream)),
        )

    run(main())
    assert "".join(piece for piece, stream in pieces if stream == "stdout") == "a☃b�"
    assert "".join(piece for piece, stream in pieces if stream == "stderr") == "e\n"


def test_on_output_of_a_failed_command(shell, run):
    """What it wrote last arrives before the error."""
    pieces = []

    async def main():
        with pytest.raises(CommandFailed):
            await shell.backend().aexec(
                r"printf 'a\303'; exit 1", on_output=lambda piece, _stream: pieces.append(piece)
            )

    run(main())
    assert "".join(pieces) == "a�"


def test_an_exception_in_on_output_ends_that_command_only(shell, run):
    """It is raised to its caller, the command is gone, and others on the same connection go on."""

    def on_output(_piece, _stream):
        raise ValueError("enough")

    async def main():
        backend = shell.backend()
        other = asyncio.create_task(backend.aexec("while [ ! -e go ]; do sleep 0.05; done; echo other"))
        with pytest.raises(ValueError, match="enough"):
            await backend.aexec("echo $$ > pid; echo x; sleep 1000", on_output=on_output)
        await backend.atouch("go")
        assert (await other).stdout == "other\n"
        assert backend.status == "connected"

    run(main())
    wait_gone(wait_pid(shell.root / "pid"))
