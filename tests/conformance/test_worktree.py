"""A git worktree for each chat: made once, used again, removed only when nothing is lost by it."""

import shlex
import shutil

import pytest

from pool.backends.worktree import Worktree, worktree_name
from pool.errors import BackendUnavailable
from pool.runtime import loop_thread
from tests.support.services import require_service

IDENTITY = "-c user.name=T -c user.email=t@example.org"


@pytest.fixture
def repository(shell, sh):
    """A repository with one commit, beside the root; its path."""
    require_service("git", shutil.which("git"))
    path = str(shell.root / "repository")  # made by the account that works there, as it would be in real life
    sh.exec(
        f"git init -q -b main repository && cd repository && echo one > file && git add file"
        f" && git {IDENTITY} commit -qm one"
    )
    return path


@pytest.fixture
def worktree(repository):
    return Worktree("chat:1", repository, None)


def make(worktree, sh):
    loop_thread().run(worktree.make(sh))


def remove(worktree, sh):
    return loop_thread().run(worktree.remove(sh))


def git(sh, repository, command):
    return sh.exec(f"git -C {shlex.quote(repository)} {IDENTITY} {command}").stdout.strip()


def branches(sh, repository):
    return set(git(sh, repository, "branch --format='%(refname:short)'").split())


def test_a_worktree_is_made_on_a_branch_of_its_own(sh, repository, worktree):
    """With the repository's files, from its HEAD."""
    make(worktree, sh)
    assert sh.read(f"{worktree.path}/file") == "one\n"
    assert sh.exec("git branch --show-current", cwd=worktree.path).stdout == f"{worktree.branch}\n"
    assert branches(sh, repository) == {"main", worktree.branch}


def test_it_starts_from_its_base(sh, repository):
    """A branch, or a commit."""
    first = git(sh, repository, "rev-parse HEAD")
    git(sh, repository, "commit -qm two --allow-empty")
    based = Worktree("based", repository, first)
    make(based, sh)
    assert sh.exec("git rev-parse HEAD", cwd=based.path).stdout.strip() == first


def test_one_that_is_there_is_used_again(sh, repository, worktree):
    """As it was left."""
    make(worktree, sh)
    sh.write(f"{worktree.path}/new", "work")
    make(Worktree("chat:1", repository, None), sh)
    assert sh.read(f"{worktree.path}/new") == "work"


def test_one_whose_folder_was_lost_is_made_anew_with_its_commits(sh, repository, worktree):
    """The branch is still there, and so is git's note of the old folder."""
    make(worktree, sh)
    sh.exec(f"echo two > file && git {IDENTITY} commit -qam two", cwd=worktree.path)
    sh.rm(worktree.path, recursive=True)
    make(worktree, sh)
    assert sh.read(f"{worktree.path}/file") == "two\n"


def test_a_clean_one_is_removed_with_its_branch(sh, repository, worktree):
    """Nothing is lost by it, and nothing is told as kept."""
    make(worktree, sh)
    assert remove(worktree, sh) == {"worktree": worktree.path, "removed": True, "branch": "", "why": ""}
    assert not sh.exists(worktree.path)
    assert branches(sh, repository) == {"main"}
    assert len(git(sh, repository, "worktree list").splitlines()) == 1


@pytest.mark.parametrize("change", ["echo new > untracked", "echo more >> file", "rm file"])
def test_a_dirty_one_is_kept_and_told(sh, repository, worktree, change):
    """Whatever was changed; and it can still be worked on."""
    make(worktree, sh)
    sh.exec(change, cwd=worktree.path)
    before = sh.exec("git status --porcelain", cwd=worktree.path).stdout
    told = remove(worktree, sh)
    assert (told["worktree"], told["removed"], told["branch"]) == (worktree.path, False, worktree.branch)
    assert "modified or untracked files" in told["why"]
    assert sh.exec("git status --porcelain", cwd=worktree.path).stdout == before != ""


def test_commits_that_are_merged_nowhere_keep_the_branch(sh, repository, worktree):
    """The folder goes, the work stays, and the caller is told where."""
    make(worktree, sh)
    sh.exec(f"echo two > file && git {IDENTITY} commit -qam two", cwd=worktree.path)
    told = remove(worktree, sh)
    assert (told["removed"], told["branch"]) == (True, worktree.branch)
    assert "merged nowhere" in told["why"]
    assert not sh.exists(worktree.path)
    assert branches(sh, repository) == {"main", worktree.branch}
    make(worktree, sh)
    assert sh.read(f"{worktree.path}/file") == "two\n"


def test_commits_that_are_merged_do_not_keep_the_branch(sh, repository, worktree):
    """They are elsewhere."""
    make(worktree, sh)
    sh.exec(f"echo two > file && git {IDENTITY} commit -qam two", cwd=worktree.path)
    git(sh, repository, f"merge -q {worktree.branch}")
    told = remove(worktree, sh)
    assert (told["removed"], told["branch"], told["why"]) == (True, "", "")
    assert branches(sh, repository) == {"main"}


def test_a_remove_can_be_repeated(sh, repository, worktree):
    """Also for a chat that never had one."""
    assert remove(worktree, sh)["removed"]
    make(worktree, sh)
    for _ in range(2):
        assert remove(worktree, sh) == {"worktree": worktree.path, "removed": True, "branch": "", "why": ""}


def test_a_branch_that_is_kept_for_another_reason_is_told(sh, repository, worktree):
    """Somebody has it checked out elsewhere."""
    make(worktree, sh)
    sh.exec("git checkout -q --detach", cwd=worktree.path)
    git(sh, repository, f"checkout -q {worktree.branch}")
    told = remove(worktree, sh)
    assert (told["removed"], told["branch"]) == (True, worktree.branch)
    assert told["why"]


HOSTILE = [
    "../../x",
    "a b",
    "-rf",
    "; touch pwned",
    "$(touch pwned)",
    "`x`",
    "ü" * 100,
    ".",
    "@{-1}",
    "a..b",
    "x.lock",
    "'",
]


def test_chat_ids_of_any_kind_get_worktrees_of_their_own(sh, shell, repository):
    """Whatever git and the shell think of them; each under ``worktrees``, each with a valid branch."""
    chats = [Worktree(chat, repository, None) for chat in HOSTILE]
    for chat in chats:
        make(chat, sh)
    assert set(sh.readdir("worktrees")) == {chat.path.removeprefix("worktrees/") for chat in chats}
    assert branches(sh, repository) == {"main", *(chat.branch for chat in chats)}
    assert not list(shell.root.rglob("pwned"))
    for chat in chats:
        assert remove(chat, sh)["removed"]
    assert branches(sh, repository) == {"main"}


def test_names_of_chats_do_not_meet():
    """Though their plain letters are the same, or cut off."""
    chats = [*HOSTILE, "a-b", "a/b", "a:b", "A-b", "x" * 50, "x" * 51]
    assert len({worktree_name(chat).lower() for chat in chats}) == len(chats)
    assert all(len(worktree_name(chat)) <= 51 for chat in chats)


def test_a_repository_in_an_odd_place_is_fine(sh, shell, repository):
    """A path with spaces and quotes."""
    odd = f'{shell.root}/-it\'s a "$HOME"'
    sh.exec(f"mv repository {shlex.quote(odd)}")
    worktree = Worktree("c", odd, None)
    make(worktree, sh)
    assert remove(worktree, sh)["removed"]


@pytest.mark.parametrize(
    ("name", "base", "told"),
    [
        ("missing", None, "missing"),
        (".", None, "not a git repository"),
        ("repository", "no-such-branch", "no-such-branch"),
        ("repository", "--detach", "--detach"),
    ],
)
def test_a_worktree_that_cannot_be_made_says_why(sh, shell, repository, name, base, told):
    """With what the shell or git said; only a person can help."""
    worktree = Worktree("c", f"{shell.root}/{name}".removesuffix("/."), base)
    with pytest.raises(BackendUnavailable) as caught:
        make(worktree, sh)
    assert (caught.value.reason, caught.value.retry_after) == ("setup", None)
    assert told in str(caught.value)
    assert not sh.exists(f"{worktree.path}/.git")
    assert branches(sh, repository) == {"main"}


def test_a_remove_without_its_repository_keeps_and_says_why(sh, repository, worktree):
    """The folder may hold work that nobody else has."""
    make(worktree, sh)
    sh.exec("mv repository elsewhere")
    told = remove(worktree, sh)
    assert told["removed"] is False
    assert told["why"]
    assert sh.exists(f"{worktree.path}/file")
