"""How llama-server is called, and what it does not get to see."""

import stat
import sys
from pathlib import Path

import pytest

import config
import llama
from config import Config
from llama import NoBinary, command, environment, find_binary

KEY_FILE = Path("/run/key")


def configured(**settings: str) -> Config:
    return config.load_config({"DATA_DIR": "/d", **settings})


def executable(path: Path) -> Path:
    path.write_text("#!/bin/sh\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_the_command_line_has_all_settings_and_no_key(tmp_path: Path) -> None:
    binary = executable(tmp_path / "llama-server")
    settings = {
        "LLAMA_BIN": str(binary), "BACKEND_HOST": "127.0.0.2", "PORT_BACKEND": "9", "NGL": "7", "CTX": "512",
        "THREADS": "3", "PARALLEL": "2", "METRICS_BACKEND_SECONDS": "15", "EXTRA_ARGS": "--jinja -fa on",
        "BACKEND_API_KEY": "gateway-" + "k" * 43,
    }  # fmt: skip
    assert command(configured(**settings), "/m/a.gguf", KEY_FILE) == [
        str(binary), "--host", "127.0.0.2", "--port", "9", "--api-key-file", "/run/key", "-m", "/m/a.gguf",
        "-ngl", "7", "-c", "512", "-t", "3", "-np", "2", "--metrics", "--jinja", "-fa", "on",
    ]  # fmt: skip


def test_what_is_not_set_is_left_to_llama_server(tmp_path: Path) -> None:
    binary = executable(tmp_path / "llama-server")
    argv = command(configured(LLAMA_BIN=str(binary), MODEL_HF="a/b:Q4_K_M"), None, KEY_FILE)
    assert argv[7:] == ["-hf", "a/b:Q4_K_M", "-ngl", "99", "-c", "16384"]


def test_the_mock_takes_llama_servers_place() -> None:
    argv = command(configured(MOCK_BACKEND="true"), None, KEY_FILE)
    assert argv[:2] == [sys.executable, str(llama.HERE / "mock_backend.py")]
    assert argv[2:8] == ["--host", "127.0.0.1", "--port", "8080", "--api-key-file", "/run/key"]


def test_pitfall_11_extra_args_are_split_as_a_shell_would(tmp_path: Path) -> None:
    binary = executable(tmp_path / "llama-server")
    extra = """--chat-template-kwargs '{"enable_thinking": false}' --alias "my model" $HOME `id`"""
    argv = command(configured(LLAMA_BIN=str(binary), EXTRA_ARGS=extra), "/m", KEY_FILE)
    assert argv[-6:] == ["--chat-template-kwargs", '{"enable_thinking": false}', "--alias", "my model", "$HOME", "`id`"]


@pytest.mark.parametrize(
    "extra", ["--host 0.0.0.0", "--port=1", "--api-key x", "--api_key_file=/x", "--api-key-file x"]
)
def test_pitfall_11_extra_args_may_not_set_host_port_or_keys(extra: str) -> None:
    with pytest.raises(config.ConfigError, match="EXTRA_ARGS"):
        configured(EXTRA_ARGS=extra)


def test_the_binary_is_the_set_one_else_the_first_on_the_path(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    first = executable(tmp_path / "bin" / "llama-server")
    other = executable(tmp_path / "other")
    path = str(tmp_path / "bin")
    assert find_binary(configured(LLAMA_BIN=str(other)).model, path) == str(other)
    assert find_binary(configured().model, path) == str(first)
    with pytest.raises(NoBinary, match="neither /app/llama-server nor on the PATH"):
        find_binary(configured().model, str(tmp_path))
    for wrong in (tmp_path / "none", tmp_path, KEY_FILE):
        with pytest.raises(NoBinary, match="is not an executable file"):
            find_binary(configured(LLAMA_BIN=str(wrong)).model, path)


def test_the_environment_is_scrubbed() -> None:
    gone = {
        "AIP_MODE": "PREDICTION", "AIP_PREDICT_ROUTE": "/p", "LLAMA_ARG_HOST": "0.0.0.0", "LLAMA_API_KEY": "second",
        "LLAMA_SERVER_ROUTER_PORT": "1", "BACKEND_API_KEY": "gateway-", "BACKEND_API_KEY_FILE": "/k",
        "MODEL_URL": "https://signed", "ON_IDLE": "curl -H token",
    }  # fmt: skip
    kept = {"PATH": "/bin", "HF_TOKEN": "hf", "CUDA_VISIBLE_DEVICES": "0", "LD_LIBRARY_PATH": "/app"}
    assert environment({**gone, **kept}, configured().model) == kept


def test_a_hugging_face_model_is_cached_where_models_lie() -> None:
    model = configured(MODEL_HF="a/b").model
    assert environment({}, model) == {"LLAMA_CACHE": "/d/models"}
    assert environment({"HF_HOME": "/h"}, model) == {"HF_HOME": "/h"}
