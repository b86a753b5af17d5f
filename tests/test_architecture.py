"""The module table of docs/DESIGN.md as data: who may import whom, and what importing anything must not do."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from support.together import ENVIRON, aside

SCRIPTS = Path(__file__).parent.parent / "scripts"
LONGEST_FUNCTION_LINES = 60

# module: the siblings that it may import. A new module is a new line.
TABLE = {
    # layer 0: data, grammar, output; nothing of ours
    "errors": "",
    "keyfile": "",
    "metrics": "",
    "logs": "",
    "meter": "",
    "accept": "",
    "signals": "",
    "descriptors": "",
    # layer 1: rules, without a socket
    "http1": "errors",
    "bodies": "errors http1",
    "routes": "errors",
    "auth": "errors keyfile",
    "usage": "meter",
    "admission": "errors",
    "cors": "errors http1",
    # layer 2: the settings, what is known of the backend, and one peer's bytes
    "waiting": "errors",
    "turns": "waiting",
    "readiness": "errors",
    "slots": "admission errors waiting",
    "backend_page": "errors metrics",
    "config": "accept http1",
    "wire": "turns waiting",
    "tls": "config waiting",
    "client_wire": "bodies errors http1 turns waiting wire",
    "backend_wire": "errors http1 turns waiting wire",
    "plan": "auth cors errors http1 routes",
    # layer 3: one exchange
    "exchange": "auth errors logs metrics plan usage",
    "answer": "bodies client_wire errors http1 plan",
    "heartbeat": "answer errors",
    "relay": "answer backend_wire bodies client_wire errors http1 turns usage waiting",
    # layer 4: the gateway put together
    "parts": "admission answer auth backend_page backend_wire client_wire config cors exchange logs metrics plan"
    " readiness relay routes slots tls turns usage waiting",
    "local": "answer auth client_wire errors metrics parts plan readiness usage",
    "callers": "auth client_wire errors parts plan routes",
    "request": "admission answer auth backend_wire bodies callers client_wire errors exchange heartbeat http1 local"
    " parts plan readiness relay routes usage waiting",
    "connection": "client_wire errors exchange parts request",
    "gateway": "client_wire config connection descriptors errors exchange logs parts signals tls turns waiting",
    # the boot
    "probes": "",
    "processes": "",
    "run_dir": "",
    "boot_log": "",
    "exit_words": "",
    "model_download": "",
    "watchdog": "probes",
    "llama": "config",
    "gpu": "config logs",
    "preflight": "config llama",
    "model_files": "config gpu llama logs model_download",
    "backend_process": "boot_log config exit_words llama logs probes processes watchdog",
    "supervisor": "backend_process boot_log config exit_words llama logs model_files preflight probes processes run_dir"
    " signals watchdog",
    # other programs
    "health_server": "config logs signals",
    "key_mgmt": "accept keyfile usage",
    "bench_client": "",
    "bench_stats": "bench_client",
    "bench_report": "bench_stats",
    "bench_html": "bench_report bench_stats",
    "benchmark": "bench_client bench_html bench_report bench_stats",
    "mock_wire": "",
    "mock_backend": "mock_wire",
    "quickstart": "config keyfile llama preflight probes",
}

MODULES = sorted(path.stem for path in SCRIPTS.glob("*.py"))
each_module = pytest.mark.parametrize("module", MODULES)

# Runs in a process of its own. Whoever in scripts/ touches the environment while it is imported is told by name; the
# standard library may (asyncio looks for PYTHONASYNCIODEBUG).
IMPORT_PROBE = """
import collections.abc, logging, os, signal, sys, threading

class Poisoned(collections.abc.MutableMapping):
    def __init__(self, real):
        self.real = real
    def touch(self):
        frame = sys._getframe(2)
        while (name := frame.f_code.co_filename).startswith("<frozen") or name.endswith(("/os.py", "_abc.py")):
            frame = frame.f_back
        if os.path.dirname(name) == scripts:
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

scripts, module = sys.argv[1:]
sys.path.insert(0, scripts)
before = world()
os.environ, os.environb = Poisoned(os.environ), Poisoned(os.environb)
__import__(module)
os.environ, os.environb = os.environ.real, os.environb.real
if world() != before:
    raise SystemExit(f"importing {module} turns {before} into {world()}")
print("imported")
"""


@cache
def tree(module: str) -> ast.Module:
    # feature_version refuses syntax that the oldest supported interpreter lacks.
    return ast.parse((SCRIPTS / f"{module}.py").read_text(encoding="utf-8"), feature_version=(3, 10))


def imports(module: str) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.add("." if node.level else (node.module or "").split(".")[0])
    return names


def test_every_module_has_a_row() -> None:
    assert set(MODULES) <= set(TABLE)


def test_the_table_has_no_cycle() -> None:
    above: set[str] = set()
    for module, allowed in TABLE.items():
        assert set(allowed.split()) <= above, f"{module} may import only what stands above it"
        above.add(module)


@each_module
def test_imports_are_stdlib_or_allowed_siblings(module: str) -> None:
    assert imports(module) - sys.stdlib_module_names <= set(TABLE[module].split())


@each_module
def test_imports_are_static(module: str) -> None:
    names = {node.id for node in ast.walk(tree(module)) if isinstance(node, ast.Name)}
    assert not names & {"__import__", "exec", "eval"}
    assert "importlib" not in imports(module)


def test_no_sibling_bears_a_stdlib_name() -> None:
    assert not set(MODULES) & sys.stdlib_module_names


@each_module
@aside
def test_importing_has_no_side_effect(module: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-B", "-c", IMPORT_PROBE, str(SCRIPTS), module],
        cwd=tmp_path,
        env=ENVIRON,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "imported\n", "")


@each_module
def test_module_has_a_docstring(module: str) -> None:
    assert ast.get_docstring(tree(module))


@each_module
def test_no_function_is_long(module: str) -> None:
    functions = [node for node in ast.walk(tree(module)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = {node.name: (node.end_lineno or 0) - node.lineno + 1 for node in functions}
    assert {name: lines for name, lines in lengths.items() if lines > LONGEST_FUNCTION_LINES} == {}
