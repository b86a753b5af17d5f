"""How llama-server is started, and which variables are kept from it."""

import os
import stat
import sys
from pathlib import Path

import pytest

from boot.llama_server import (
    BinaryNotFound,
    command,
    environment,
    find_binary,
    may_use_gpu,
    models_folder,
    router_environment,
    works_in_one_thread,
)
from config.loader import load_config
from config.settings import Config, ConfigError
from support.paths import SCRIPTS

KEY_FILE = Path("/run/key")
SLOTS = Path("/run/slots")


def configured(**settings: str) -> Config:
    return load_config({"DATA_DIR": "/d", **settings})


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
    assert command(configured(**settings), "/m/a.gguf", KEY_FILE, SLOTS) == [
        str(binary), "--host", "127.0.0.2", "--port", "9", "--api-key-file", "/run/key", "-m", "/m/a.gguf",
        "-ngl", "7", "-c", "512", "-t", "3", "-np", "2", "--metrics", "--jinja", "-fa", "on",
    ]  # fmt: skip


def test_a_setting_without_a_value_is_not_passed_on(tmp_path: Path) -> None:
    binary = executable(tmp_path / "llama-server")
    argv = command(configured(LLAMA_BIN=str(binary), MODEL_HF="a/b:Q4_K_M"), None, KEY_FILE, SLOTS)
    assert argv[7:] == ["-hf", "a/b:Q4_K_M", "-ngl", "99", "-c", "16384"]


def test_with_private_caches_slots_can_be_emptied_and_nothing_moves_between_them(tmp_path: Path) -> None:
    binary = executable(tmp_path / "llama-server")
    settings = {"LLAMA_BIN": str(binary), "PROMPT_CACHE": "private", "EXTRA_ARGS": "--kv-unified"}
    private = ["--slots", "--slot-save-path", "/run/slots", "--cache-ram", "0", "--no-kv-unified"]
    argv = command(configured(**settings), "/m", KEY_FILE, SLOTS)
    assert argv[-9:] == [*private, "-np", "4", "--kv-unified"]
    argv = command(configured(**settings, PARALLEL="2"), "/m", KEY_FILE, SLOTS)
    assert argv[-9:] == ["-np", "2", *private, "--kv-unified"]


def router_argv(tmp_path: Path, **settings: str) -> list[str]:
    binary = executable(tmp_path / "llama-server")
    return command(configured(LLAMA_BIN=str(binary), MODELS="router", **settings), None, KEY_FILE, SLOTS)[7:]


def test_a_router_gets_its_models_and_loads_none_by_itself(tmp_path: Path) -> None:
    assert router_argv(tmp_path, MODELS_MAX="3", PARALLEL="2", EXTRA_ARGS="--jinja") == [
        *("--models-dir", "/d/models", "--models-max", "3", "--no-models-autoload"),
        *("-ngl", "99", "-c", "16384", "-np", "2", "--jinja"),
    ]


def test_with_a_preset_a_router_gets_only_what_is_set(tmp_path: Path) -> None:
    """Its arguments go before those of a model's section."""
    preset = ["--models-preset", "/p.ini", "--models-max", "1", "--no-models-autoload"]
    assert router_argv(tmp_path, MODELS_PRESET="/p.ini") == preset
    both = router_argv(tmp_path, MODELS_PRESET="/p.ini", MODELS_DIR="/ms", CTX="16384", NGL="5")
    assert both == ["--models-dir", "/ms", *preset, "-ngl", "5", "-c", "16384"]
    assert models_folder(configured(MODELS="router", MODELS_PRESET="/p.ini")) is None


def test_a_routers_children_require_its_key_and_see_no_other_programs_downloads() -> None:
    config = configured(MODELS="router")
    assert router_environment({"PATH": "/bin"}, config, "secret") == {
        "PATH": "/bin",
        "LLAMA_CACHE": "/d/models",
        "LLAMA_API_KEY": "secret",
    }
    assert "LLAMA_CACHE" not in router_environment({"HF_HOME": "/h"}, config, "secret")


def test_the_mock_replaces_llama_server() -> None:
    argv = command(configured(MOCK_BACKEND="true"), None, KEY_FILE, SLOTS)
    assert argv[:2] == [sys.executable, str(SCRIPTS / "mock_backend.py")]
    assert argv[2:8] == ["--host", "127.0.0.1", "--port", "8080", "--api-key-file", "/run/key"]


@pytest.mark.parametrize(
    ("settings", "cores", "one"),
    [
        ({}, ["0-1", "0-1"], True),
        ({}, ["0", "1"], os.cpu_count() == 1),
        ({"THREADS": "2"}, ["0-1", "0-1"], False),
        ({"THREADS": "1"}, ["0", "1"], True),
        ({"EXTRA_ARGS": "--threads 1"}, ["0", "1"], True),
        ({"EXTRA_ARGS": "-tb=1"}, ["0", "1"], True),
        ({"EXTRA_ARGS": "-t 4 -tb 2"}, ["0-1", "0-1"], False),
    ],
)
def test_how_many_threads_compute(tmp_path: Path, settings: dict[str, str], cores: list[str], one: bool) -> None:
    for number, siblings in enumerate(cores):
        folder = tmp_path / f"cpu{number}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(siblings + "\n")
    assert works_in_one_thread(configured(**settings).model, tmp_path) is one


def test_a_gpu_is_a_device_that_layers_are_offloaded_to(tmp_path: Path) -> None:
    assert not may_use_gpu(configured().model, tmp_path)
    (tmp_path / "dri").mkdir()
    (tmp_path / "dri" / "renderD128").touch()
    assert may_use_gpu(configured().model, tmp_path)
    assert not may_use_gpu(configured(NGL="0").model, tmp_path)


def test_a_unix_socket_needs_no_port() -> None:
    argv = command(configured(MOCK_BACKEND="true", BACKEND_HOST="/run/b.sock"), None, KEY_FILE, SLOTS)
    assert argv[2:6] == ["--host", "/run/b.sock", "--api-key-file", "/run/key"]


def test_extra_args_are_split_as_a_shell_splits_them(tmp_path: Path) -> None:
    binary = executable(tmp_path / "llama-server")
    extra = """--chat-template-kwargs '{"enable_thinking": false}' --alias "my model" $HOME `id`"""
    argv = command(configured(LLAMA_BIN=str(binary), EXTRA_ARGS=extra), "/m", KEY_FILE, SLOTS)
    assert argv[-6:] == ["--chat-template-kwargs", '{"enable_thinking": false}', "--alias", "my model", "$HOME", "`id`"]


@pytest.mark.parametrize(
    "extra", ["--host 0.0.0.0", "--port=1", "--api-key x", "--api_key_file=/x", "--api-key-file x"]
)
def test_extra_args_may_not_set_host_port_or_keys(extra: str) -> None:
    with pytest.raises(ConfigError, match="EXTRA_ARGS"):
        configured(EXTRA_ARGS=extra)


def test_the_binary_is_llama_bin_else_the_first_on_the_path(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    first = executable(tmp_path / "bin" / "llama-server")
    other = executable(tmp_path / "other")
    path = str(tmp_path / "bin")
    assert find_binary(configured(LLAMA_BIN=str(other)).model, path) == str(other)
    assert find_binary(configured().model, path) == str(first)
    with pytest.raises(BinaryNotFound, match="neither /app/llama-server nor on the PATH"):
        find_binary(configured().model, str(tmp_path))
    for wrong in (tmp_path / "none", tmp_path, KEY_FILE):
        with pytest.raises(BinaryNotFound, match="is not an executable file"):
            find_binary(configured(LLAMA_BIN=str(wrong)).model, path)


def test_secrets_and_variables_that_set_options_are_left_out() -> None:
    gone = {
        "AIP_MODE": "PREDICTION", "AIP_PREDICT_ROUTE": "/p", "LLAMA_ARG_HOST": "0.0.0.0", "LLAMA_API_KEY": "second",
        "LLAMA_SERVER_ROUTER_PORT": "1", "BACKEND_API_KEY": "gateway-", "BACKEND_API_KEY_FILE": "/k",
        "MODEL_URL": "https://signed", "ON_IDLE": "curl -H token", "API_KEYS": "a:sk", "API_KEYS_FILE": "/k",
    }  # fmt: skip
    kept = {"PATH": "/bin", "HF_TOKEN": "hf", "CUDA_VISIBLE_DEVICES": "0", "LD_LIBRARY_PATH": "/app"}
    assert environment({**gone, **kept, "HF_TOKEN_FILE": "/t"}, configured().model) == kept
    assert environment({}, configured(HF_TOKEN="hf").model) == {"HF_TOKEN": "hf"}


def test_a_hugging_face_model_is_cached_in_models_dir_by_default() -> None:
    model = configured(MODEL_HF="a/b").model
    assert environment({}, model) == {"LLAMA_CACHE": "/d/models"}
    assert environment({"HF_HOME": "/h"}, model) == {"HF_HOME": "/h"}
