"""The helper as one text, to be sent to a host. This module itself stays with the worker."""

import ast
from functools import cache
from pathlib import Path

_MODULES = ("wire", "family", "commands", "durable", "keeper", "follower", "files", "transfers", "program")
"""In the order in which they import one another."""

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
for _name in ("pool", "pool.helper"): sys.modules[_name] = type(sys)(_name)
for _name, _source in {sources!r}:
    _module = sys.modules["pool.helper." + _name] = type(sys)("pool.helper." + _name)
    setattr(sys.modules["pool.helper"], _name, _module)
    exec(compile(_source, _name, "exec"), _module.__dict__)
sys.modules["pool.helper.program"].main(TOKEN, OF_PARENT)
"""


@cache
def bundle() -> bytes:
    """Return the program, without its docstrings, comments and annotations: less to send and to compile."""
    folder = Path(__file__).parent
    sources = [(name, _shorten((folder / f"{name}.py").read_text(encoding="utf-8"))) for name in _MODULES]
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
