"""``make lint`` and ``make types`` as tests, so that one command checks everything."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.light

ROOT = Path(__file__).parents[2]


def test_style(call: Callable[..., str]) -> None:
    call("ruff", "check", "--quiet", "--output-format=concise")


def test_format(call: Callable[..., str]) -> None:
    call("ruff", "format", "--check", "--quiet")


def test_types(call: Callable[..., str]) -> None:
    call("basedpyright", "--pythonpath", sys.executable)


# --- what no linter here forbids -----------------------------------------------------------------------------------

BANNED_MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
BANNED_CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen"}
BANNED_ARGUMENTS = {"allow_pickle", "trust_remote_code", "shell"}


def unsafe(source: str, name: str) -> list[str]:
    """Code that runs what a file or a stranger says: ``path:line: what``."""
    return [f"{name}:{line}: {what}" for line, what in _unsafe(ast.parse(source))]


def _unsafe(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            yield from ((node.lineno, f"import {n}") for n in names if n.split(".")[0] in BANNED_MODULES)
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            given = {k.arg: ast.unparse(k.value) for k in node.keywords}
            if called in BANNED_CALLS:
                yield node.lineno, f"{called}()"
            if called == "torch.load" and given.get("weights_only") != "True":
                yield node.lineno, "torch.load() without weights_only=True"
            if called in ("yaml.load", "yaml.load_all") and "Safe" not in ast.unparse(node):
                yield node.lineno, f"{called}() without a safe loader"
            yield from ((node.lineno, f"{a}={given[a]}") for a in BANNED_ARGUMENTS & {*given} if given[a] != "False")
        elif isinstance(node, ast.ExceptHandler):
            everything = node.type is None or ast.unparse(node.type) in ("Exception", "BaseException")
            if everything and all(isinstance(n, ast.Pass) or _is_ellipsis(n) for n in node.body):
                yield node.lineno, "every exception swallowed"


def _is_ellipsis(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and node.value.value is ...


def test_no_file_can_run_code() -> None:
    paths = [p for top in ("src", "benchmarks") for p in sorted((ROOT / top).rglob("*.py"))]
    found = [u for p in paths for u in unsafe(p.read_text(encoding="utf-8"), p.relative_to(ROOT).as_posix())]
    assert found == []


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("import pickle", "import pickle"),
        ("from joblib.memory import Memory", "import joblib.memory"),
        ("eval(text)", "eval()"),
        ("torch.load(path)", "torch.load() without weights_only=True"),
        ("torch.load(path, weights_only=flag)", "torch.load() without weights_only=True"),
        ("yaml.load(text, Loader=yaml.FullLoader)", "yaml.load() without a safe loader"),
        ("numpy.load(path, allow_pickle=True)", "allow_pickle=True"),
        ("subprocess.run(text, shell=True)", "shell=True"),
        ("try: f()\nexcept Exception: pass", "every exception swallowed"),
    ],
)
def test_unsafe_code_is_seen(source: str, what: str) -> None:
    assert [u.partition(": ")[2] for u in unsafe(source, "x.py")] == [what]


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()",
        "torch.load(path, weights_only=True)",
        "yaml.load(text, Loader=yaml.SafeLoader)",
        "re.compile(text)",
    ],
)
def test_safe_code_is_let_through(source: str) -> None:
    assert unsafe(source, "x.py") == []
