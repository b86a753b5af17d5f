"""Which room may import which, and what importing a module must not do."""

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

from support.boot import PATIENCE_S
from support.python_source import parse
from support.together import ENVIRON, aside

SCRIPTS = Path(__file__).parent.parent / "scripts"
LONGEST_FUNCTION_LINES = 60

# Each room, and the rooms and plain modules before it that it may import. A new room is a new line.
ROOMS = {
    "core": "",
    "keyfile": "",
    "metrics": "",
    "config": "core keyfile",
    "auth": "core keyfile",
    "http1": "core config",
    "policy": "core config http1 auth",
    "transport": "core config http1",
    "backend": "core config http1 policy transport metrics",
    "accounting": "core config http1 policy transport backend auth metrics",
    "proxy": "core config http1 policy transport backend accounting auth metrics",
    "boot": "core config auth",
    "bench": "",
    "mock": "",
}
# Modules that may import more than their room, and why.
EXCEPTIONS: dict[str, str] = {}

MODULES = sorted(
    ".".join(path.relative_to(SCRIPTS).with_suffix("").parts)
    for path in SCRIPTS.rglob("*.py")
    if path.stem != "__init__"
)
SIBLINGS = {module.partition(".")[0] for module in MODULES}
each_module = pytest.mark.parametrize("module", MODULES)

# Runs in a process of its own, and imports each module in a child of that. Whoever in scripts/ touches the environment
# while it is imported is told by name; the standard library may (asyncio looks for PYTHONASYNCIODEBUG). A module comes
# after those that it imports. The process then imports it, too, so that its importers need not do so again.
IMPORT_PROBE = """
import asyncio, collections.abc, dataclasses, gc, logging, os, signal, sys, threading, typing

class Poisoned(collections.abc.MutableMapping):
    def __init__(self, real):
        self.real = real
    def touch(self):
        frame = sys._getframe(2)
        while (name := frame.f_code.co_filename).startswith("<frozen") or name.endswith(("/os.py", "_abc.py")):
            frame = frame.f_back
        if name.startswith(scripts + os.sep):
            raise SystemExit(f"{name}:{frame.f_lineno} touches the environment")
        return self.real
    def __getitem__(self, name): return self.touch()[name]
    def __setitem__(self, name, value): self.touch()[name] = value
    def __delitem__(self, name): del self.touch()[name]
    def __iter__(self): return iter(self.touch())
    def __len__(self): return len(self.touch())
    def __contains__(self, name): return name in self.touch()
    def copy(self): return self.touch().copy()

def world():
    handlers = [signal.getsignal(number) for number in sorted(signal.valid_signals()) if number not in (32, 33)]
    return handlers, threading.active_count(), list(logging.root.handlers), logging.root.level, os.listdir(".")

def probe(module):
    if module in sys.modules:  # its package has imported it: begin again with it
        for name in [name for name in sys.modules if name.partition(".")[0] in tops]:
            del sys.modules[name]
    before = world()
    os.environ, os.environb = Poisoned(os.environ), Poisoned(os.environb)
    __import__(module)
    os.environ, os.environb = os.environ.real, os.environb.real
    if world() != before:
        raise SystemExit(f"importing {module} turns {before} into {world()}")
    print(module, "imported")

scripts, *modules = sys.argv[1:]
tops = {module.partition(".")[0] for module in modules} - {"__main__"}
sys.path.insert(0, scripts)
gc.disable()
for module in modules:
    sys.stdout.flush()
    if not os.fork():
        probe(module)
        sys.stdout.flush()
        os._exit(0)  # what happens at the exit is seen when this process ends, for all modules
    _, status = os.wait()
    if status == 0:
        __import__(module)
"""


class Source(NamedTuple):
    """What the rules read of one module. Its tree is not kept: the collector of garbage would visit it ever again."""

    imports: frozenset[str]  # what is at the top of the name of each module that it imports; "." is a relative import
    needs: frozenset[str]  # the modules of scripts/ that are imported whenever this one is
    names: frozenset[str]
    has_docstring: bool
    lengths: Sequence[tuple[str, int]]  # its functions, and how many lines each has


@cache
def source(module: str) -> Source:
    text = SCRIPTS.joinpath(*module.split(".")).with_suffix(".py").read_text(encoding="utf-8")
    tree = parse(text)
    nodes = list(ast.walk(tree))
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return Source(
        frozenset(name.partition(".")[0] or "." for name in imported(nodes)),
        frozenset(imported(tree.body)) & set(MODULES),
        frozenset(node.id for node in nodes if isinstance(node, ast.Name)),
        bool(ast.get_docstring(tree)),
        [(node.name, (node.end_lineno or 0) - node.lineno + 1) for node in functions],
    )


def imported(nodes: Iterable[ast.AST]) -> Iterator[str]:
    """The full names of the modules that these statements import, and of what they import from them."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parent = "." * node.level + (node.module or "")
            yield parent
            yield from (f"{parent}.{alias.name}" for alias in node.names)


def test_rooms_import_only_rooms_before_them() -> None:
    before: set[str] = set()
    for room, allowed in ROOMS.items():
        assert set(allowed.split()) <= before, f"{room} may import only rooms that stand above it in the table"
        before.add(room)


@each_module
def test_imports_are_stdlib_or_allowed_rooms(module: str) -> None:
    """A module at the top of scripts/ that is no plain module of the table is a program, and may import every room."""
    room = module.partition(".")[0]
    names = source(module).imports - sys.stdlib_module_names
    assert names <= SIBLINGS, f"{module} imports what is neither the standard library nor in scripts/"
    if room in ROOMS:
        allowed = {room, *ROOMS[room].split(), *EXCEPTIONS.get(module, "").split()}
        assert names <= allowed, f"{module}: see ROOMS in {Path(__file__).name}"


@each_module
def test_imports_are_static(module: str) -> None:
    assert not source(module).names & {"__import__", "exec", "eval"}
    assert "importlib" not in source(module).imports


def test_no_sibling_bears_a_stdlib_name() -> None:
    assert not SIBLINGS & sys.stdlib_module_names


@aside
def test_importing_has_no_side_effect(tmp_path: Path) -> None:
    order = list(TopologicalSorter({module: source(module).needs for module in MODULES}).static_order())
    done = subprocess.run(
        [sys.executable, "-B", "-c", IMPORT_PROBE, str(SCRIPTS), *order],
        cwd=tmp_path,
        env=ENVIRON,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.stderr == "", (
        f"importing scripts/ prints nothing; mend the last file that is named here:\n{done.stderr}"
    )
    assert done.stdout.splitlines() == [f"{module} imported" for module in order]


@each_module
def test_module_has_a_docstring(module: str) -> None:
    assert source(module).has_docstring


@each_module
def test_no_function_is_long(module: str) -> None:
    assert [(name, lines) for name, lines in source(module).lengths if lines > LONGEST_FUNCTION_LINES] == []
