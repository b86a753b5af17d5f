"""tools/collect.sh: what a bug report needs, and no secret."""

import shutil
import subprocess
import sys
from pathlib import Path

from support.boot import PATIENCE_S, program
from support.fileserver import Site, serve
from support.paths import ROOT
from support.together import ENVIRON, aside

COLLECT = ROOT / "tools" / "collect.sh"
SECRETS = {
    "a key": "sk-AbCdEfGhIjKlMnOp0123456789",
    "a hash": "5f" * 32,
    "backend": "backend-secret-0123456789",
    "a token": "hf_AbCdEfGhIjKlMnOp",
    "a signature": "X-Signature-0123456789",
    "a password": "pass-0123456789",
    "a bearer": "eyJhbGciOi.J9.abc-def",
    "a value in JSON": "json-secret-0123",
}
LOG = f"""main: model loaded
main: 'Authorization: Bearer {SECRETS["a bearer"]}'
curl -H 'x-api-key: {SECRETS["a key"]}' https://user:{SECRETS["a password"]}@h/x.gguf?sig={SECRETS["a signature"]}
HF_TOKEN={SECRETS["a token"]}
{{"api_key": "{SECRETS["a value in JSON"]}", "port": 8080}}
alice:sha256${SECRETS["a hash"]}:60
"""


def collect(folder: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    env = {"PATH": f"{folder / 'bin'}:{Path(sys.executable).parent}:{ENVIRON['PATH']}", **environ}
    return subprocess.run(
        [COLLECT, *arguments], cwd=folder, env=env, capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )


def data_folder(folder: Path) -> Path:
    logs = folder / "data" / "logs" / "llama"
    logs.mkdir(parents=True)
    (logs / "latest").write_text(LOG)
    (folder / "bin").mkdir()
    return folder / "data"


def secrets_in(text: str) -> list[str]:
    return [name for name, secret in SECRETS.items() if secret in text]


@aside
def test_the_report_has_what_is_needed_and_no_secret(tmp_path: Path) -> None:
    data = data_folder(tmp_path)
    with serve(Site(statuses=[503])) as url:
        (tmp_path / "env").write_text(
            f"# settings\nHOST='127.0.0.1'\nPORT={url.rpartition(':')[2]}\nDATA_DIR=\"{data}\"\n"
            f"BACKEND_API_KEY='{SECRETS['backend']}'\nHF_TOKEN={SECRETS['a token']}\n"
            f"MODEL_URL='https://user:{SECRETS['a password']}@h/m.gguf?s={SECRETS['a signature']}'\n"
        )
        done = collect(tmp_path, "--env", "env", "--out", "report.txt")
    assert done.returncode == 0, done.stderr
    report = (tmp_path / "report.txt").read_text()
    assert secrets_in(LOG) != []
    assert secrets_in(report) == []
    assert (tmp_path / "report.txt").stat().st_mode & 0o077 == 0
    version = (ROOT / "VERSION").read_text().strip()
    for needed in (version, "main: model loaded", f"DATA_DIR = {data}", "=== GPU", "\n503 ", '"port": 8080'):
        assert needed in report, needed


@aside
def test_a_container_is_asked_through_its_engine(tmp_path: Path) -> None:
    data_folder(tmp_path)
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    # An engine whose containers are this folder.
    engine = program(tmp_path / "bin" / "docker", sys.executable, str(tmp_path / "engine.py"))
    assert engine.exists()
    (tmp_path / "engine.py").write_text(
        "import os, subprocess, sys\n"
        "verb, *rest = sys.argv[1:]\n"
        f"rest = [each.replace('/opt/llama-gguf-inference', {str(tmp_path)!r}) for each in rest]\n"
        "if verb == 'exec': os.execvpe(rest[1], rest[1:], {**os.environ, 'LOG_NAME': 'llama', "
        f"'DATA_DIR': {str(tmp_path / 'data')!r}}})\n"
        f"print(verb, rest[-1], {LOG!r})\n"
    )
    done = collect(tmp_path, "--container", "my-llama")
    assert done.returncode == 0, done.stderr
    report = (tmp_path / "llama-gateway-report.txt").read_text()
    assert secrets_in(report) == []
    assert "logs my-llama main: model loaded" in report
    assert "inspect my-llama" in report


@aside
def test_wrong_usage_is_an_error(tmp_path: Path) -> None:
    assert "collect.sh --container NAME" in collect(tmp_path, "--help").stdout
    assert collect(tmp_path, "--nope").returncode == 2
    done = collect(tmp_path, "--env", "none")
    assert (done.returncode, done.stderr) == (2, "collect: error: --env: none cannot be read\n")
    assert not (tmp_path / "llama-gateway-report.txt").exists()
