"""tools/collect.sh: what a bug report needs, and no secret."""

import subprocess
import sys
from pathlib import Path

from support.boot import PATIENCE_S
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
    data = data_folder(tmp_path)
    # An engine whose containers have this clone where the image has the product, and this folder of data.
    (tmp_path / "log").write_text(LOG)
    engine = tmp_path / "bin" / "docker"
    engine.write_text(
        f'#!/usr/bin/env bash\ncd {tmp_path}\necho "$@" >> asked\nverb=$1\nshift\n'
        '[[ $verb == exec ]] || { printf "%s %s " "$verb" "${@: -1}"; cat log; exit; }\n'
        "shift\n"
        f'LOG_NAME=llama DATA_DIR={data} exec "${{@//"/opt/llama-gguf-inference"/{ROOT}}}"\n'
    )
    engine.chmod(0o755)
    done = collect(tmp_path, "--container", "my-llama")
    assert done.returncode == 0, done.stderr
    report = (tmp_path / "llama-gateway-report.txt").read_text()
    assert secrets_in(report) == []
    assert "logs my-llama main: model loaded" in report
    assert "inspect my-llama" in report
    assert f"DATA_DIR = {data}" in report
    asked = (tmp_path / "asked").read_text()
    assert "exec my-llama python3 /opt/llama-gguf-inference/scripts/gateway.py --check-config\n" in asked
    assert str(ROOT) not in asked


@aside
def test_wrong_usage_is_an_error(tmp_path: Path) -> None:
    assert "collect.sh --container NAME" in collect(tmp_path, "--help").stdout
    assert collect(tmp_path, "--nope").returncode == 2
    done = collect(tmp_path, "--env", "none")
    assert (done.returncode, done.stderr) == (2, "collect: error: --env: none cannot be read\n")
    assert not (tmp_path / "llama-gateway-report.txt").exists()
