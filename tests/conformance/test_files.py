"""Reading and writing files, over every kind of backend."""

import os
import stat as stat_bits
import time

import pytest

from pool.errors import ConfigError, FileMissing, FileOperationFailed

NAMES = [
    " ", "a b", "new\nline", "tab\t", "-rf", "--", "é☃𝄞", "quo'te\"", "$(id)", "*", "~", "back\\slash", "...", ".hidden",
    "n" * 200, "☃" * 66,
]  # fmt: skip


@pytest.mark.parametrize("data", ["", "text\n", "é☃𝄞\r\n\n", "x" * 70_000])
def test_text_comes_back_as_it_was_written(backend, data):
    """Text is stored as UTF-8, line ends untouched."""
    backend.write("file", data)
    assert backend.read("file") == data
    assert backend.stat("file").size == len(data.encode())


@pytest.mark.parametrize("data", [b"", bytes(range(256)), os.urandom(5 << 20)], ids=["empty", "all", "5MB"])
def test_bytes_come_back_as_they_were_written(backend, data):
    """Binary content passes unchanged, whatever its size."""
    backend.write("file", data)
    assert backend.read("file", encoding=None) == data


def test_bytearrays_and_views_can_be_written(backend):
    """Whatever holds bytes will do."""
    backend.write("a", bytearray(b"one"))
    backend.write("b", memoryview(b"two"))
    assert (backend.read("a"), backend.read("b")) == ("one", "two")


@pytest.mark.parametrize("data", [None, 1, ["a"]])
def test_what_is_no_content_is_refused(backend, data):
    """Only text and bytes can be written."""
    with pytest.raises(ConfigError, match="data"):
        backend.write("file", data)
    assert backend.readdir() == []


def test_invalid_utf8_in_a_file_is_replaced(backend):
    """A file that is no text can be read as text all the same; another encoding may be asked for."""
    backend.write("file", b"a\xff\xe9")
    assert backend.read("file") == "a��"
    assert backend.read("file", encoding="latin-1") == "aÿé"
    with pytest.raises(ConfigError, match="encoding"):
        backend.read("file", encoding="nonsense")


def test_writing_makes_the_parents(backend):
    """Missing folders on the way are made."""
    backend.write("a/b/c/file", "x")
    assert (backend.readdir("a/b"), backend.read("a/b/c/file")) == (["c"], "x")


def test_overwriting_replaces_content_and_keeps_the_mode(shell, sh):
    """A shorter file leaves nothing of a longer one; permissions stay; a new file has the ordinary ones."""
    sh.write("script", "a long first version")
    assert stat_bits.S_IMODE(sh.stat("script").mode) == 0o644
    sh.exec("chmod 751 script")
    sh.write("script", "short")
    assert sh.read("script") == "short"
    assert stat_bits.S_IMODE(sh.stat("script").mode) == 0o751


def test_a_write_leaves_no_temporary_file(backend):
    """What is written beside the file is gone afterwards."""
    for n in range(5):
        backend.write("file", f"{n}")
    assert backend.readdir() == ["file"]


def test_a_reader_sees_the_old_content_or_the_new(shell, sh):
    """Replacing a file is one step: the old file lives on for who has it open."""
    sh.write("file", "old")
    with (shell.root / "file").open() as reader:
        sh.write("file", "new")
        assert reader.read() == "old"
    assert sh.read("file") == "new"


def test_a_write_that_fails_leaves_everything_as_it_was(backend):
    """Writing onto a folder, or below a file, changes nothing."""
    backend.write("folder/file", "x")
    for path in ("folder", "folder/file/below", "."):
        with pytest.raises(FileOperationFailed):
            backend.write(path, "y")
    assert (backend.readdir(), backend.readdir("folder"), backend.read("folder/file")) == (["folder"], ["file"], "x")


def test_writing_through_a_symlink_inside_the_root_keeps_the_link(shell, sh):
    """The file that a link names is replaced, not the link."""
    sh.write("real", "1")
    sh.exec("ln -s real link")
    sh.write("link", "2")
    assert sh.read("real") == "2"
    assert (shell.root / "link").is_symlink()


def test_readdir_is_sorted_and_holds_names_only(backend):
    """Names without dots, files and folders alike, in order."""
    for name in ("b", "a", "C", ".h"):
        backend.write(name, "")
    backend.mkdir("d")
    assert backend.readdir() == backend.readdir(".") == [".h", "C", "a", "b", "d"]
    assert backend.readdir("d") == []


def test_readdir_of_many(sh):
    """A thousand names arrive."""
    sh.exec("i=1000; while [ $i -lt 2000 ]; do : > f$i; i=$((i+1)); done")
    assert sh.readdir() == [f"f{n}" for n in range(1000, 2000)]


def test_mkdir_can_be_repeated(backend):
    """A folder that exists is fine, parents are made; a file in the way is not."""
    backend.mkdir("a/b/c")
    backend.mkdir("a/b/c")
    backend.mkdir(".")
    assert backend.stat("a/b/c").is_dir
    backend.write("file", "")
    with pytest.raises(FileOperationFailed):
        backend.mkdir("file")
    with pytest.raises(FileOperationFailed):
        backend.mkdir("file/below")


def test_exists_tells_files_folders_and_nothing(backend):
    """True for whatever is there; a path below a file is not there."""
    backend.write("folder/file", "")
    names = ("folder", "folder/file", ".", "no", "no/no", "folder/file/no")
    assert [backend.exists(name) for name in names] == [True, True, True, False, False, False]


def test_exists_of_a_dangling_symlink_is_false(sh):
    """A link to nothing is nothing."""
    sh.exec("ln -s nothing link")
    assert not sh.exists("link")


def test_stat_tells_size_time_and_kind(backend):
    """Size in bytes, time in seconds since 1970, and whether it is a folder."""
    backend.write("file", "12345")
    backend.mkdir("folder")
    file, folder = backend.stat("file"), backend.stat("folder")
    assert (file.size, file.is_dir, folder.is_dir) == (5, False, True)
    assert (stat_bits.S_ISREG(file.mode), stat_bits.S_ISDIR(folder.mode)) == (True, True)
    assert abs(file.mtime - time.time()) < 600


def test_rm_removes_files_and_empty_folders(backend):
    """The plain form takes what holds nothing."""
    backend.write("file", "")
    backend.mkdir("folder")
    backend.rm("file")
    backend.rm("folder")
    assert backend.readdir() == []


def test_rm_of_a_full_folder_needs_recursive(backend):
    """Nothing is removed by accident."""
    backend.write("folder/sub/file", "")
    with pytest.raises(FileOperationFailed):
        backend.rm("folder")
    assert backend.exists("folder/sub/file")
    backend.rm("folder", recursive=True)
    assert backend.readdir() == []


def test_rm_recursive_takes_a_file_too(backend):
    """Recursive is about folders; a file is simply removed."""
    backend.write("file", "")
    backend.rm("file", recursive=True)
    assert backend.readdir() == []


def test_the_root_itself_is_not_removed(backend):
    """No spelling of the root is accepted."""
    backend.write("a/file", "x")
    for path in (".", "/", "a/..", "./"):
        with pytest.raises(ConfigError, match="root"):
            backend.rm(path, recursive=True)
    assert backend.read("a/file") == "x"


def test_rm_of_a_symlink_removes_the_link_only(shell, sh):
    """Whether it names a file, a folder or something outside, also with recursive."""
    sh.write("folder/file", "x")
    sh.exec(f"ln -s folder/file f; ln -s folder d; ln -s '{shell.outside}' o; ln -s nowhere n")
    sh.rm("f")
    sh.rm("d", recursive=True)
    sh.rm("o", recursive=True)
    sh.rm("n")
    assert sh.readdir() == ["folder"]
    assert sh.read("folder/file") == "x"
    assert (shell.outside / "secret").read_text() == "secret"


def test_rm_recursive_does_not_follow_links_in_the_tree(shell, sh):
    """What links in a removed folder point to stays."""
    sh.write("keep/file", "x")
    sh.exec(
        f"mkdir -p tree/sub; ln -s '{shell.outside}' tree/sub/out; ln -s ../keep tree/keep; ln -s tree/sub tree/loop"
    )
    sh.rm("tree", recursive=True)
    assert sh.readdir() == ["keep"]
    assert sh.read("keep/file") == "x"
    assert (shell.outside / "secret").exists()


def test_rename_moves_files_and_folders(backend):
    """Content goes along."""
    backend.write("a/file", "x")
    backend.rename("a/file", "a/other")
    backend.rename("a", "b")
    assert (backend.readdir(), backend.readdir("b"), backend.read("b/other")) == (["b"], ["other"], "x")


def test_rename_replaces_an_existing_file(backend):
    """The target's old content is gone."""
    backend.write("a", "new")
    backend.write("b", "old")
    backend.rename("a", "b")
    assert (backend.readdir(), backend.read("b")) == (["b"], "new")
    backend.rename("b", "b")
    assert backend.read("b") == "new"


def test_rename_does_not_mix_files_and_folders(backend):
    """A file does not replace a folder, nor a folder a file, nor a folder go below itself."""
    backend.write("file", "x")
    backend.write("full/inner", "y")
    for source, target in (("file", "full"), ("full", "file"), ("full", "full/sub")):
        with pytest.raises(FileOperationFailed):
            backend.rename(source, target)
    assert (backend.read("file"), backend.read("full/inner"), backend.readdir()) == ("x", "y", ["file", "full"])


def test_rename_of_a_symlink_moves_the_link(shell, sh):
    """The link goes, its target stays."""
    sh.write("file", "x")
    sh.exec("ln -s file link")
    sh.rename("link", "moved")
    assert sh.readdir() == ["file", "moved"]
    assert (shell.root / "moved").is_symlink()


def test_touch_makes_a_file_or_moves_its_time(backend):
    """An empty file with its folders, or the time set to now, content kept."""
    backend.touch("a/new")
    assert backend.read("a/new") == ""
    backend.write("old", "x")
    backend.touch("old")
    backend.touch("a")
    assert backend.read("old") == "x"


def test_touch_sets_the_time_of_an_old_file(sh):
    """Whatever it was, it is about now."""
    sh.exec("touch -t 200001010000 old")
    sh.touch("old")
    assert abs(sh.stat("old").mtime - time.time()) < 600


@pytest.mark.parametrize("operation", ["read", "readdir", "stat", "rm"])
def test_a_missing_file_is_file_missing(backend, operation):
    """The error is ours and Python's own, and names operation and path."""
    with pytest.raises(FileMissing, match=rf"{operation} 'no/such'") as caught:
        getattr(backend, operation)("no/such")
    assert isinstance(caught.value, FileNotFoundError)
    assert (caught.value.errno, caught.value.filename) == (2, "no/such")


def test_rename_of_what_is_missing(backend):
    """A missing source, and a missing folder of the target, are both missing files."""
    with pytest.raises(FileMissing):
        backend.rename("no", "other")
    backend.write("file", "x")
    with pytest.raises(FileMissing):
        backend.rename("file", "no/file")
    assert backend.read("file") == "x"


@pytest.mark.parametrize("operation", ["read", "rm"])
def test_the_wrong_kind_is_a_failure_but_not_missing(backend, operation):
    """A folder is no file."""
    backend.write("folder/file", "")
    with pytest.raises(FileOperationFailed) as caught:
        getattr(backend, operation)("folder")
    assert not isinstance(caught.value, FileMissing)


def test_readdir_of_a_file_fails(backend):
    """A file is no folder."""
    backend.write("file", "")
    with pytest.raises(FileOperationFailed):
        backend.readdir("file")


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_strange_names(backend, name):
    """A name is only a name, for every operation."""
    backend.write(name, "x")
    assert (backend.readdir(), backend.read(name), backend.stat(name).size) == ([name], "x", 1)
    backend.touch(name)
    backend.rename(name, "plain")
    backend.rename("plain", name)
    assert backend.exists(name)
    backend.rm(name)
    backend.mkdir(name)
    backend.write(f"{name}/{name}", "y")
    assert backend.readdir(name) == [name]
    backend.rm(name, recursive=True)
    assert backend.readdir() == []


def test_a_name_that_is_no_utf8(sh):
    """Names are bytes on a disk: those that are no text come as Python's own functions give them."""
    sh.exec(r'd=$(printf "d\351"); mkdir "$d"; echo x > "$d/f"')
    assert sh.readdir() == ["d\udce9"]
    assert sh.read("d\udce9/f") == "x\n"
    assert sh.exec("cat f", cwd="d\udce9").stdout == "x\n"
    sh.rm("d\udce9", recursive=True)
    assert sh.readdir() == []


def test_no_permission_is_told(shell, sh):
    """EACCES for who is not root."""
    if sh.exec("id -u").stdout.strip() == "0":
        pytest.skip("root may do everything")
    sh.mkdir("closed")
    sh.exec("chmod 500 closed")
    with pytest.raises(FileOperationFailed, match=r"[Pp]ermission denied") as caught:
        sh.write("closed/file", "x")
    assert caught.value.errno == 13
    assert sh.readdir("closed") == []
