"""The helper as one text, to be sent to a host. This module itself stays with the worker."""

import ast
from functools import cache
from pathlib import Path

_MODULES = (
    "wire", "family", "trust", "commands", "durable", "keeper", "follower", "fence", "files", "transfers", "program",
)  # fmt: skip
"""In the order in which they import one another. There, as here, each is compiled when it is first imported."""

# Reads the bundle, whose length is the first argument, and runs it; the other arguments are those of `program.main`.
BOOT = """\
import sys
if sys.version_info < (3, 6): sys.exit("its python3 is %d.%d, 3.6 is needed" % sys.version_info[:2])
import os
n, b = int(sys.argv[1]), b""
while len(b) < n:
    d = os.read(0, n - len(b))
    if not d: sys.exit("cut off")
    b += d
exec(compile(b, "pool-helper", "exec"), {"TOKEN": sys.argv[2], "OF_PARENT": "bare" in sys.argv})
"""

_LOADER = """\
import sys
SOURCES = {sources!r}
class Importer:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name in SOURCES:
            return type(sys.__spec__)(name, Importer, is_package=not SOURCES[name])
    @staticmethod
    def create_module(spec):
        pass
    @staticmethod
    def exec_module(module):
        exec(compile(SOURCES[module.__name__], module.__name__, "exec"), module.__dict__)
sys.meta_path.insert(0, Importer)
from pool.helper.program import main
main(TOKEN, OF_PARENT)
"""


@cache
def bundle() -> bytes:
    """Return the program, without its docstrings, comments and annotations: less to send and to compile."""
    folder = Path(__file__).parent
    sources = {
        f"pool.helper.{name}": _shorten((folder / f"{name}.py").read_text(encoding="utf-8")) for name in _MODULES
    }
    sources |= {"pool": "", "pool.helper": ""}
    return _LOADER.format(sources=sources).encode("ascii")


def _shorten(source: str) -> str:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            node.returns = None
            for argument in [*node.args.args, *node.args.kwonlyargs, *filter(None, [node.args.vararg])]:
                argument.annotation = None
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            kept = [part for part in node.body if not _is_text(part)]
            node.body = kept or [ast.Pass()]
    return ast.unparse(tree)


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
