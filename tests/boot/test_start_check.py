"""start_check.py: what a start would refuse, without a start. test_start_sh.py compares it with real starts."""

import io
import socket
from pathlib import Path

import pytest

from boot.start_check import check_start
from support.boot import program
from support.fileserver import Site, serve
from support.ports import free_ports

GGUF = b"GGUF" + bytes(5000)


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    """Settings with which everything would start."""
    port, port_health, port_backend = free_ports(3)
    (tmp_path / "m.gguf").write_bytes(GGUF)
    return {
        "HOST": "127.0.0.1",
        "PORT": str(port),
        "PORT_HEALTH": str(port_health),
        "PORT_BACKEND": str(port_backend),
        "DATA_DIR": str(tmp_path / "data"),
        "API_KEYS": "first:sk-first-0123456789abcdef",
        "MODEL_PATH": str(tmp_path / "m.gguf"),
        "LLAMA_BIN": str(program(tmp_path / "llama", "/bin/true", "")),
    }


def checked(environ: dict[str, str], *, gateway_alone: bool = False, **more: str) -> tuple[int, list[str]]:
    """Return the exit status, and the lines after the settings."""
    out = io.StringIO()
    status = check_start({**environ, **more}, out, gateway_alone=gateway_alone)
    lines = out.getvalue().splitlines()
    return status, [line for line in lines if " = " not in line]


def test_what_would_start_has_no_error_and_makes_nothing(environ: dict[str, str], tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    lines = ["Every value has the right form.", "Nothing else would keep it from starting."]
    assert checked(environ) == (0, lines)
    assert checked(environ, MODEL_PATH="", MODEL_HF="a/b") == (0, lines)
    assert checked(environ, MODEL_PATH="/none", LLAMA_BIN="/none", MOCK_BACKEND="true") == (0, lines)
    assert sorted(tmp_path.iterdir()) == before


def test_keys_that_share_the_prompt_cache_are_warned_of(environ: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("alice:sk-alice-0123456789abcdef\nalice:sk-alice-fedcba9876543210\n")
    more = {"AUTH_KEYS_FILE": str(tmp_path / "keys"), "API_KEYS": ""}
    assert not any(line.startswith("warning") for line in checked(environ, **more)[1])
    more["API_KEYS"] = "bob:sk-bob-0123456789abcdef"
    status, lines = checked(environ, **more)
    assert status == 0
    assert [line.partition(",")[0] for line in lines if line.startswith("warning")] == ["warning: PROMPT_CACHE=shared"]
    assert not any(line.startswith("warning") for line in checked(environ, **more, PROMPT_CACHE="private")[1])


def key_warnings(environ: dict[str, str], **more: str) -> list[str]:
    status, lines = checked(environ, API_KEYS="", PROMPT_CACHE="private", **more)
    assert status == 0
    return [line.removeprefix("warning: keys: ") for line in lines if line.startswith("warning: keys: ")]


def test_what_is_wrong_with_the_keys_is_warned_of(environ: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "keys"
    file = {"AUTH_KEYS_FILE": str(path)}
    make_one = "no request is accepted until there is a key: key_mgmt.py generate --name NAME"
    cannot_read = f"the keys file {path} (AUTH_KEYS_FILE) cannot be read: "
    assert key_warnings(environ, **file) == [f"{cannot_read}No such file or directory; {make_one}"]
    assert key_warnings(environ, **file, AUTH_ENABLED="false") == []
    path.mkdir()
    assert key_warnings(environ, **file) == [
        f"{cannot_read}not a regular file; no request is accepted until that is mended"
    ]
    path.rmdir()
    path.write_text("bob\n")
    complaint, reason = key_warnings(environ, **file)
    assert complaint.startswith("line 1")
    assert reason == "no key line is valid; no request is accepted until that is mended"
    path.write_text("# none\n")
    assert key_warnings(environ, **file) == [make_one]
    path.write_text("bob\nalice:sk-alice-0123456789abcdef\n")
    assert key_warnings(environ, **file) == [complaint]


def test_a_log_folder_that_cannot_be_written_keeps_nothing_from_starting(environ: dict[str, str]) -> None:
    status, lines = checked(environ, LOG_DIR="/dev/null/x")
    assert status == 0
    assert [line for line in lines if line.startswith("warning")] == [
        "warning: the log of llama-server cannot be kept in /dev/null/x/llama (LOG_DIR, DATA_DIR): Not a directory"
    ]


def test_wrong_settings_are_all_that_is_reported(environ: dict[str, str]) -> None:
    status, lines = checked(environ, PORT="x", MODEL_PATH="/none")
    assert (status, len(lines), lines[-1]) == (2, 2, "The settings are invalid.")


def test_everything_that_is_wrong_is_reported_and_the_first_decides(environ: dict[str, str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        more = {"PORT": port, "MODEL_PATH": "/none", "TLS_CERT_FILE": "/none", "TLS_KEY_FILE": "/none"}
        status, lines = checked(environ, **more, LOG_DIR="/dev/null/x", STATE_FILE="/dev/null/y/z")
    assert status == 2
    assert lines[1].startswith("warning: the log of llama-server cannot be kept in /dev/null/x")
    assert lines[1].endswith(" (LOG_DIR, DATA_DIR): Not a directory")
    assert [line.partition(": ")[2].partition(":")[0] for line in lines[2:-1]] == [
        *("TLS_CERT_FILE, TLS_KEY_FILE", "PORT", "STATE_FILE", "MODEL_PATH")
    ]
    assert lines[-1] == "A start would end with status 2."


@pytest.mark.parametrize(
    ("site", "settings", "reason"),
    [
        (Site(GGUF), {}, ""),
        (Site(b"<html>"), {}, "is a web page, not a GGUF file"),
        (Site(b""), {}, "is empty"),
        (Site(GGUF, statuses=[403]), {}, "cannot be fetched: HTTP status 403"),
        (Site(GGUF, statuses=[503]), {}, "cannot be fetched: HTTP status 503"),
        (Site(GGUF, sized=False), {"MODEL_SHA256": ""}, "does not send the file's length: set MODEL_SHA256"),
        (Site(GGUF), {"MODELS_DIR": "/dev/null/models"}, "cannot be written: Not a directory"),
    ],
)
def test_a_url_is_asked_for_its_first_bytes(
    environ: dict[str, str], site: Site, settings: dict[str, str], reason: str
) -> None:
    with serve(site) as url:
        given = {"MODEL_PATH": "", "MODEL_URL": f"{url}/x.gguf", "MODEL_SHA256": "0" * 64, **settings}
        status, lines = checked(environ, **given)
    assert len(site.seen) == 1
    failed = 6 if "503" in reason else 3  # 6: it may pass
    assert (status, reason in "".join(lines)) == (failed if reason else 0, True)


def test_of_a_download_that_is_there_only_the_file_is_checked(environ: dict[str, str], tmp_path: Path) -> None:
    given = {"MODEL_PATH": "", "MODEL_URL": "https://models.example/m.gguf", "MODELS_DIR": str(tmp_path)}
    assert checked(environ, **given)[0] == 0
    assert checked(environ, **given, MODEL_SHA256="0" * 64)[0] == 3


def test_what_is_not_checked_of_a_mock_is_said(environ: dict[str, str]) -> None:
    status, lines = checked(environ, MODEL_PATH="", MODELS="router", MODELS_PRESET="/none", MOCK_BACKEND="true")
    not_checked = "MOCK_BACKEND: the mock's models are not checked (MODELS_DIR, MODELS_PRESET, MODELS_PRELOAD)"
    assert (status, [line for line in lines if "models" in line]) == (0, [f"warning: {not_checked}"])


def test_a_url_without_a_file_name_is_one_error(environ: dict[str, str]) -> None:
    status, lines = checked(environ, MODEL_PATH="", MODEL_URL="https://models.example/")
    assert (status, len(lines)) == (3, 3)


def test_a_llama_server_that_cannot_be_executed_is_found(environ: dict[str, str], tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    wrong.write_bytes(b"\x7fELF but not really")
    wrong.chmod(0o755)
    status, lines = checked(environ, LLAMA_BIN=str(wrong))
    assert (status, "it is not a program for this machine" in lines[1]) == (2, True)
    assert checked(environ, LLAMA_BIN="/none")[0] == 2


def test_a_gateway_alone_needs_no_model_and_its_certificate(environ: dict[str, str]) -> None:
    alone = {name: value for name, value in environ.items() if name not in ("MODEL_PATH", "LLAMA_BIN")}
    assert checked(alone, gateway_alone=True)[0] == 0
    assert checked(alone)[0] == 3
    assert checked(alone, gateway_alone=True, TLS_CERT_FILE="/none", TLS_KEY_FILE="/none")[0] == 2
    assert checked(alone, gateway_alone=True, MODEL_PATH="/none", LLAMA_BIN="/bin/true")[0] == 3
    assert checked(alone, gateway_alone=True, LLAMA_BIN="/none")[0] == 3


def test_the_models_of_a_router_are_checked(environ: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / "chat.gguf").write_bytes(GGUF)
    given = {"MODEL_PATH": "", "MODELS": "router", "MODELS_DIR": str(folder)}
    assert checked(environ, **given)[0] == 0
    status, lines = checked(environ, **given, MODELS_PRELOAD="chta")
    assert (status, lines[1]) == (3, "error: MODELS_PRELOAD: there is no model chta (there are chat)")
    status, lines = checked(environ, **given, MODELS_PRESET="/none.ini")
    assert (status, lines[1]) == (3, "error: MODELS_PRESET: /none.ini cannot be read: No such file or directory")
    assert checked(environ, **given, MODELS_PRELOAD="chta", MOCK_BACKEND="true")[0] == 0


def test_a_gateway_alone_may_be_in_front_of_a_router(environ: dict[str, str]) -> None:
    alone = {name: value for name, value in environ.items() if name not in ("MODEL_PATH", "LLAMA_BIN")}
    assert checked(alone, gateway_alone=True, MODELS="router")[0] == 0
    assert checked(alone, gateway_alone=True, MODELS="router", MODELS_PRESET="/none", LLAMA_BIN="/bin/true")[0] == 3
