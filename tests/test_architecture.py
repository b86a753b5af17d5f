"""Which room may import which, and what importing a module must not do."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from support.boot import PATIENCE_S
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
    "boot": "core config",
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
# while it is imported is told by name; the standard library may (asyncio looks for PYTHONASYNCIODEBUG).
IMPORT_PROBE = """
import asyncio, collections.abc, dataclasses, logging, os, signal, sys, threading, typing

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
    before = world()
    os.environ, os.environb = Poisoned(os.environ), Poisoned(os.environb)
    __import__(module)
    os.environ, os.environb = os.environ.real, os.environb.real
    if world() != before:
        raise SystemExit(f"importing {module} turns {before} into {world()}")
    print(module, "imported")

scripts, *modules = sys.argv[1:]
sys.path.insert(0, scripts)
for module in modules:
    sys.stdout.flush()
    if not os.fork():
        probe(module)
        sys.exit()
    os.wait()
"""


@cache
def tree(module: str) -> ast.Module:
    # feature_version refuses syntax that the oldest supported interpreter lacks.
    return ast.parse(
        SCRIPTS.joinpath(*module.split(".")).with_suffix(".py").read_text(encoding="utf-8"), feature_version=(3, 10)
    )


def imports(module: str) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.add("." if node.level else (node.module or "").split(".")[0])
    return names


def test_rooms_import_only_rooms_before_them() -> None:
    before: set[str] = set()
    for room, allowed in ROOMS.items():
        assert set(allowed.split()) <= before, f"{room} may import only rooms that stand above it in the table"
        before.add(room)


@each_module
def test_imports_are_stdlib_or_allowed_rooms(module: str) -> None:
    """A module at the top of scripts/ that is no plain module of the table is a program, and may import every room."""
    room = module.partition(".")[0]
    imported = imports(module) - sys.stdlib_module_names
    assert imported <= SIBLINGS, f"{module} imports what is neither the standard library nor in scripts/"
    if room in ROOMS:
        allowed = {room, *ROOMS[room].split(), *EXCEPTIONS.get(module, "").split()}
        assert imported <= allowed, f"{module}: see ROOMS in {Path(__file__).name}"


@each_module
def test_imports_are_static(module: str) -> None:
    names = {node.id for node in ast.walk(tree(module)) if isinstance(node, ast.Name)}
    assert not names & {"__import__", "exec", "eval"}
    assert "importlib" not in imports(module)


def test_no_sibling_bears_a_stdlib_name() -> None:
    assert not SIBLINGS & sys.stdlib_module_names


@aside
def test_importing_has_no_side_effect(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-B", "-c", IMPORT_PROBE, str(SCRIPTS), *MODULES],
        cwd=tmp_path,
        env=ENVIRON,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.stderr == ""
    assert done.stdout.splitlines() == [f"{module} imported" for module in MODULES]


@each_module
def test_module_has_a_docstring(module: str) -> None:
    assert ast.get_docstring(tree(module))


@each_module
def test_no_function_is_long(module: str) -> None:
    functions = [node for node in ast.walk(tree(module)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = {node.name: (node.end_lineno or 0) - node.lineno + 1 for node in functions}
    assert {name: lines for name, lines in lengths.items() if lines > LONGEST_FUNCTION_LINES} == {}
