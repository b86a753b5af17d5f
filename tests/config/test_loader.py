"""loader.py: where values come from and where they land, complaints at once, secrets never shown."""

import io
import os
from ipaddress import ip_network
from pathlib import Path

import pytest

import keyfile
from config import converters
from config.loader import check_config, load_config
from config.member_rules import parse_rules
from config.settings import (
    PRIVATE,
    SETTINGS,
    SHARED,
    AuthSettings,
    BackendSettings,
    CheapSettings,
    Config,
    ConfigError,
    Limits,
    ListenSettings,
    LogSettings,
    ModelSettings,
    QueueSettings,
    RouterSettings,
    SupervisionSettings,
    TimeoutSettings,
    UsageSettings,
)

KEYS = keyfile.parse(b"a:sk-0123456789abcdef\nb:sk-abcdef0123456789:5\n").entries
KEY = "gateway-" + "aB3_-" * 8 + "xyz"


def no_volume(path: str) -> tuple[bool, bool]:
    return False, False


def load(**environ: str) -> Config:
    return load_config(environ, probe=no_volume)


def complaints(**environ: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load(**environ)
    return caught.value.complaints


def complaint(**environ: str) -> str:
    (line,) = complaints(**environ)
    return line


# --- Defaults and where values land ---


def test_defaults() -> None:
    got = load()
    assert got.listen == ListenSettings("0.0.0.0", 8000, 8001, None, None, ())
    assert got.backend == BackendSettings("127.0.0.1", 8080, None, SHARED)
    assert got.auth == AuthSettings(True, Path("data/api_keys.txt"), 100, None, 2.0, (), False, None)
    assert got.queue == QueueSettings(None, 100, 0.0, 1024, 512 << 20, 300.0, 15.0)
    assert got.cheap == CheapSettings(2, 600, 4 << 20)
    assert got.timeouts == TimeoutSettings(30.0, 30.0, 500, 75.0, 10.0, 600.0, 300.0, 0.0, 2.0)
    assert got.limits == Limits()
    assert got.usage == UsageSettings(Path("data/usage.db"), None, 0.0)
    assert got.supervision == SupervisionSettings(None, 120.0, 5, 0.0, None, 300.0, 7.0, False, False)
    assert got.data_dir == Path("data")
    assert got.cors_origins == got.warnings == ()
    assert got.ui is True
    assert got.member_rules == parse_rules("")


def test_defaults_of_model_and_log() -> None:
    got = load(INSTANCE_ID="box")
    assert got.model == ModelSettings(
        None, None, Path("data/models"), None, None, None, 99, 16384, 0, None, (), None, 0.0, None, 600.0, 10240
    )
    assert got.router == RouterSettings(False, None, 1, (), None, {}, 30.0, 0.0)
    assert got.log == LogSettings(
        "text", "info", Path("data/logs/api_access.log"), Path("data/logs"), "", "llama", "box"
    )


def test_a_default_names_a_file_under_data_dir() -> None:
    got = load(DATA_DIR="/somewhere")
    assert got.auth.keys_file == Path("/somewhere/api_keys.txt")
    assert got.usage.file == Path("/somewhere/usage.db")
    assert got.log.access_file == Path("/somewhere/logs/api_access.log")
    assert load(DATA_DIR="/x", LOG_DIR="$DATA_DIR").log.dir == Path("$DATA_DIR")


def test_instance_id_is_the_pod_or_the_host_name_as_a_file_name() -> None:
    assert load().log.instance_id.replace("-", "") == "".join(c for c in os.uname().nodename if c.isalnum())
    assert load(RUNPOD_POD_ID="../x y").log.instance_id == "---x-y"
    assert len(load(RUNPOD_POD_ID="x" * 200).log.instance_id) == 100


def test_worker_type_names_the_log_folder_unless_log_name_does() -> None:
    assert load(WORKER_TYPE="chat").log.name == "llama-chat"
    assert load(WORKER_TYPE="chat", LOG_NAME="mine").log.name == "mine"


def test_an_empty_value_is_unset_except_for_two_files() -> None:
    names = {setting.name: "" for setting in SETTINGS}
    got = load(**names, BACKEND_API_KEY_FILE="", GATEWAY_PORT="")
    assert got.log.access_file is None
    assert got.usage.file is None
    del names["ACCESS_LOG"], names["USAGE_FILE"]
    assert load(**names) == load()


def test_every_setting_lands_where_its_row_says() -> None:
    given = {
        "HOST": "::1", "PORT": "1", "PORT_HEALTH": "2", "PORT_BACKEND": "3", "BACKEND_HOST": "llama",
        "BACKEND_API_KEY": KEY, "DATA_DIR": "/d", "MODEL_PATH": "/m.gguf", "MODEL_NAME": "a/b.gguf",
        "MODELS_DIR": "/ms", "MODEL_URL": "https://h/x", "MODEL_SHA256": "A" * 64, "NGL": "4", "CTX": "5",
        "THREADS": "6", "PARALLEL": "7", "EXTRA_ARGS": "-a 'b c'", "LLAMA_BIN": "/bin/l", "MODEL_LOAD_TIMEOUT": "8.5",
        "AUTH_ENABLED": "no", "AUTH_KEYS_FILE": "/k", "DEBUG_SHELL": "1", "MAX_REQUESTS_PER_MINUTE": "9",
        "METRICS_AUTH_ENABLED": "off", "KEYS_WATCH_SECONDS": "0", "ALLOW_PATHS": "/a,/b*", "ADMIN_ROUTES": "ON",
        "USAGE_FILE": "/u", "GPU_COST_PER_HOUR": "1.25", "METRICS_BACKEND_SECONDS": "10",
        "MAX_CONCURRENT_REQUESTS": "11", "MAX_QUEUE_SIZE": "12", "QUEUE_TIMEOUT": "13", "MAX_CONNECTIONS": "14",
        "REQUEST_TIMEOUT": "15", "STREAM_IDLE_TIMEOUT": "16", "MAX_REQUEST_DURATION": "17",
        "CLIENT_HEADER_TIMEOUT": "18", "CLIENT_BODY_TIMEOUT": "19", "CLIENT_BODY_MIN_RATE": "600",
        "KEEPALIVE_TIMEOUT": "20",
        "BACKEND_CONNECT_TIMEOUT": "21", "HEALTH_TIMEOUT": "22", "MAX_REQUEST_BODY_SIZE": "1KiB",
        "MAX_BUFFERED_BYTES": "2MiB", "MAX_HEADERS": "25", "MAX_HEADER_LINE_SIZE": "100",
        "MAX_REQUEST_LINE_SIZE": "101", "MAX_REQUEST_HEADER_SIZE": "2KiB",
        "MAX_RESPONSE_HEADER_SIZE": "102", "MAX_JSON_DEPTH": "34", "MAX_BATCH_SIZE": "35", "MEMBER_RULES": "stop=3",
        "CORS_ORIGINS": "https://a", "UI": "off",
        "COLD_START_WAIT": "26", "SSE_HEARTBEAT": "27", "DRAIN_TIMEOUT": "28", "TLS_CERT_FILE": "/c",
        "TLS_KEY_FILE": "/kk", "LOG_FORMAT": "JSON", "LOG_LEVEL": "Debug", "ACCESS_LOG": "/al", "LOG_DIR": "/ld",
        "LOG_NAME": "ln", "WORKER_TYPE": "wt", "INSTANCE_ID": "i", "STATE_FILE": "/s", "WEDGE_TIMEOUT": "29",
        "MAX_RESTARTS": "30", "IDLE_STOP_SECONDS": "31", "ON_IDLE": "echo", "MOCK_BACKEND": "Yes",
        "TRUSTED_PROXIES": "10.0.0.0/8", "MAX_CHEAP_REQUESTS": "32", "MAX_CHEAP_REQUESTS_PER_MINUTE": "33",
        "MAX_CHEAP_BODY_SIZE": "3KiB", "API_KEYS": "a:sk-0123456789abcdef;b:sk-abcdef0123456789:5",
        "HF_TOKEN": " hf_x\n", "MODEL_FETCH_TIMEOUT": "32", "MODEL_FETCH_MIN_RATE": "33", "ON_IDLE_TIMEOUT": "34",
        "PROMPT_CACHE": "Private", "MODELS": "Single", "MODELS_PRESET": "/p.ini", "MODELS_MAX": "3",
        "MODELS_PRELOAD": "chat, embed", "DEFAULT_MODEL": "chat", "MODEL_ALIASES": "gpt-4o=chat",
        "MODEL_SWITCH_AFTER": "35", "MODELS_IDLE_UNLOAD": "36",
    }  # fmt: skip
    assert set(given) | {"MODEL_HF"} == {setting.name for setting in SETTINGS}
    got = load(**given)
    assert got.listen == ListenSettings("::1", 1, 2, Path("/c"), Path("/kk"), (ip_network("10.0.0.0/8"),))
    assert got.backend == BackendSettings("llama", 3, KEY, PRIVATE)
    assert got.auth == AuthSettings(False, Path("/k"), 9, False, 0.0, ("/a", "/b*"), True, KEYS)
    assert got.queue == QueueSettings(11, 12, 13.0, 14, 2 << 20, 26.0, 27.0)
    assert got.cheap == CheapSettings(32, 33, 3072)
    assert got.timeouts == TimeoutSettings(18.0, 19.0, 600, 20.0, 21.0, 15.0, 16.0, 17.0, 22.0)
    assert got.limits == Limits(101, 100, 25, 2048, 1024, 102, 34, 35)
    assert got.log == LogSettings("json", "debug", Path("/al"), Path("/ld"), "wt", "ln", "i")
    assert got.usage == UsageSettings(Path("/u"), 1.25, 10.0)
    assert got.model == ModelSettings(
        "/m.gguf",
        "a/b.gguf",
        Path("/ms"),
        "https://h/x",
        "a" * 64,
        None,
        4,
        5,
        6,
        7,
        ("-a", "b c"),
        "/bin/l",
        8.5,
        "hf_x",
        32.0,
        33,
    )
    assert got.router == RouterSettings(
        False, Path("/p.ini"), 3, ("chat", "embed"), "chat", {"gpt-4o": "chat"}, 35.0, 36.0
    )
    assert got.supervision == SupervisionSettings(Path("/s"), 29.0, 30, 31.0, "echo", 34.0, 28.0, True, True)
    assert got.data_dir == Path("/d")
    assert got.cors_origins == ("https://a",)
    assert got.ui is False
    assert got.member_rules == parse_rules("stop=3")
    assert load(MODEL_HF="ggml-org/tiny:Q4_0").model.hf == "ggml-org/tiny:Q4_0"


def test_data_dir_is_a_mounted_volume_unless_it_is_set() -> None:
    def probe(path: str) -> tuple[bool, bool]:
        return path == "/workspace", True

    assert load_config({}, probe=probe).data_dir == Path("/workspace")
    assert load_config({"DATA_DIR": "/mine"}, probe=probe).data_dir == Path("/mine")


# --- Invalid values ---


@pytest.mark.parametrize(
    ("name", "text"), [("PORT", "-1"), ("AUTH_ENABLED", "ture"), ("MODEL_PATH", "/a\r"), ("HOST", "é")]
)
def test_a_complaint_names_the_setting_and_what_it_accepts(name: str, text: str) -> None:
    line = complaint(**{name: text})
    row = next(setting for setting in SETTINGS if setting.name == name)
    assert line.startswith(f"{name}: the value {text!a} ")
    assert line.endswith(f"; accepted: {row.converter.accepts}")
    assert line.isprintable()


def test_all_booleans_have_the_same_converter() -> None:
    flags = {setting.path for setting in SETTINGS if setting.converter is converters.FLAG}
    slices = {f"{name}.": kind for name, kind in Config.__annotations__.items() if hasattr(kind, "_fields")} | {
        "": Config
    }
    fields = {prefix + name: kind for prefix, part in slices.items() for name, kind in part.__annotations__.items()}
    booleans = {path for path, kind in fields.items() if getattr(kind, "__origin__", None) in (bool, bool | None)}
    assert flags == booleans - {"router.enabled"}  # MODELS=single or router


def test_a_long_value_is_shortened_in_the_complaint() -> None:
    assert len(complaint(LOG_FORMAT="x" * 5000)) < 200


@pytest.mark.parametrize("text", ["--api-key hunter2", "--x 'hunter2"])
def test_the_text_of_extra_args_is_not_shown(text: str) -> None:
    assert "hunter2" not in complaint(EXTRA_ARGS=text)
    out = io.StringIO()
    assert check_config({"EXTRA_ARGS": text}, out, probe=no_volume) == 2
    assert "hunter2" not in out.getvalue()


# --- Secrets ---


def test_a_secret_is_read_from_its_file(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text(f"\ufeff {KEY}\r\n\n")
    assert load(BACKEND_API_KEY_FILE=str(file)).backend.api_key == KEY
    file.write_text(f"{KEY}\n{KEY}")
    assert KEY not in complaint(BACKEND_API_KEY_FILE=str(file))


@pytest.mark.parametrize("name", [setting.name for setting in SETTINGS if setting.secret])
def test_a_secret_and_its_file_exclude_each_other(name: str, tmp_path: Path) -> None:
    file = tmp_path / "secret"
    values = {
        "BACKEND_API_KEY": KEY,
        "MODEL_URL": "https://h/hunter2",
        "ON_IDLE": "echo hunter2",
        "HF_TOKEN": "hunter2",
    }
    text = values.get(name, "hunter2:sk-0123456789abcdef")
    file.write_text(text)
    line = complaint(**{name: text, name + "_FILE": str(file)})
    assert line == f"{name} and {name}_FILE contradict each other: set one of them"


def test_a_secret_file_that_cannot_be_read_is_a_complaint(tmp_path: Path) -> None:
    assert complaint(BACKEND_API_KEY_FILE=str(tmp_path / "none")).endswith("cannot be read: No such file or directory")
    file = tmp_path / "key"
    file.write_bytes(b"\xff\xfe")
    assert complaint(BACKEND_API_KEY_FILE=str(file)).endswith("it is not UTF-8 text")
    file.write_text("x" * 65537)
    assert complaint(BACKEND_API_KEY_FILE=str(file)).endswith("longer than 65536 characters")
    file.write_text("")
    assert complaint(BACKEND_API_KEY_FILE=str(file)).startswith("BACKEND_API_KEY: the value ")


def test_no_complaint_and_no_table_contains_a_secret(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("hunter2")
    for environ in (
        {"BACKEND_API_KEY": "hunter2"},
        {"BACKEND_API_KEY_FILE": "hunter2"},
        {"BACKEND_API_KEY_FILE": str(file)},
        {"MODEL_URL": "ftp://hunter2"},
        {"API_KEYS": "a:hunter2"},
        {"API_KEYS": "a:sk-hunter2-0123456789", "PORT": "x"},
        {"API_KEYS_FILE": str(file)},
        {"MODEL_URL": "http://hunter2/"},
        {"MODEL_URL": "https://u:hunter2@h/", "ON_IDLE": "hunter2", "PORT": "x"},
    ):
        assert "hunter2" not in "".join(complaints(**environ))
        out = io.StringIO()
        assert check_config(environ, out, probe=no_volume) == 2
        assert "hunter2" not in out.getvalue()


# --- Old and misspelt names ---


def test_the_old_name_works_and_warns_once() -> None:
    got = load(GATEWAY_PORT="9000")
    assert got.listen.port == 9000
    assert got.warnings == ("GATEWAY_PORT is an old name; set PORT",)
    assert load(GATEWAY_PORT="9000", PORT="9000").warnings == got.warnings


def test_the_old_name_may_not_differ_from_the_new_one() -> None:
    assert complaint(GATEWAY_PORT="9000", PORT="9001").startswith("PORT and GATEWAY_PORT contradict")


@pytest.mark.parametrize("given", [{}, {"PORT": "9000"}])
def test_a_service_of_that_name_is_no_setting(given: dict[str, str]) -> None:
    service = {"GATEWAY_PORT": "tcp://10.96.0.1:8000", "GATEWAY_SERVICE_HOST": "10.96.0.1", "GATEWAY_SERVICE_PORT": "8"}
    got = load(**service, **given)
    assert got.listen.port == int(given.get("PORT", 8000))
    assert got.warnings == ("GATEWAY_PORT='tcp://10.96.0.1:8000' is a Service's address, not a setting: ignored",)


def test_a_misspelt_name_is_a_warning() -> None:
    assert load(MAX_QUEU_SIZE="1").warnings == ("'MAX_QUEU_SIZE' is not a setting; did you mean MAX_QUEUE_SIZE?",)
    assert load(MODEL_DIR="x").warnings == ("'MODEL_DIR' is not a setting; did you mean MODELS_DIR?",)
    assert load(PARALLELS="2").warnings == ("'PARALLELS' is not a setting; did you mean PARALLEL?",)
    assert load(MODLE_NAME="x").warnings == ("'MODLE_NAME' is not a setting; did you mean MODEL_NAME?",)
    assert load(LAMA_BIN="x").warnings == ("'LAMA_BIN' is not a setting; did you mean LLAMA_BIN?",)
    assert load(HEALTH_PORT="1").warnings == ("'HEALTH_PORT' is not a setting; did you mean PORT_HEALTH?",)
    assert load(LOGLEVEL="debug").warnings == ("'LOGLEVEL' is not a setting; did you mean LOG_LEVEL?",)
    assert load(auth_enabled="false").warnings == ("'auth_enabled' is not a setting; did you mean AUTH_ENABLED?",)
    assert load(MAX_SPEED="1", PATH="/bin", MOCK_SLOTS="1", GATEWAY_PORTS="2", HOSTS="x", LOGNAME="me").warnings == ()


def test_llama_servers_own_variables_are_warned_about() -> None:
    assert load(LLAMA_ARG_CTX_SIZE="1").warnings == (
        "'LLAMA_ARG_CTX_SIZE' does not reach llama-server; use EXTRA_ARGS",
    )


# --- Several settings together ---


def test_all_complaints_are_reported_at_once() -> None:
    lines = complaints(PORT="x", AUTH_ENABLED="ture", TLS_CERT_FILE="/c", MODEL_URL="http://h/", BACKEND_API_KEY="k")
    assert [line.split(":")[0].split(" ")[0] for line in lines] == [
        "PORT", "BACKEND_API_KEY", "AUTH_ENABLED", "TLS_CERT_FILE", "MODEL_URL",
    ]  # fmt: skip


def test_an_invalid_setting_causes_no_second_complaint() -> None:
    assert complaint(DATA_DIR="/a\n").startswith("DATA_DIR")
    assert complaint(WORKER_TYPE="a b").startswith("WORKER_TYPE")
    assert complaint(WORKER_TYPE="a" * 95).startswith("LOG_NAME")
    assert complaint(PORT="x", PORT_HEALTH="8000").startswith("PORT:")
    assert complaint(MODEL_URL="http://h/m", MODEL_SHA256="x").startswith("MODEL_SHA256")
    assert complaint(TLS_KEY_FILE="\n", TLS_CERT_FILE="/c").startswith("TLS_KEY_FILE")
    for name in ("HOST", "BACKEND_HOST", "MODEL_URL", "WEDGE_TIMEOUT", "HEALTH_TIMEOUT", "MAX_BUFFERED_BYTES"):
        assert complaint(**{name: "?"}).startswith(name)


def test_tls_needs_certificate_and_key() -> None:
    assert "TLS_CERT_FILE and TLS_KEY_FILE" in complaint(TLS_CERT_FILE="/c")
    assert "TLS_CERT_FILE and TLS_KEY_FILE" in complaint(TLS_KEY_FILE="/k")
    assert load(TLS_CERT_FILE="/c", TLS_KEY_FILE="/k").listen.tls_key_file == Path("/k")


@pytest.mark.parametrize(
    ("environ", "names"),
    [
        ({"PORT": "1", "PORT_HEALTH": "1"}, "PORT and PORT_HEALTH"),
        ({"PORT_HEALTH": "8000"}, "PORT and PORT_HEALTH"),
        ({"PORT": "8080"}, "PORT and PORT_BACKEND"),
        ({"PORT_HEALTH": "8080", "HOST": "::"}, "PORT_HEALTH and PORT_BACKEND"),
        ({"PORT": "8080", "HOST": "127.0.0.1", "BACKEND_HOST": "localhost"}, "PORT and PORT_BACKEND"),
        ({"PORT": "8080", "HOST": "10.0.0.1", "BACKEND_HOST": "10.0.0.1"}, "PORT and PORT_BACKEND"),
    ],
)
def test_ports_that_are_set_differ_on_one_machine(environ: dict[str, str], names: str) -> None:
    assert complaint(**{"PORT_BACKEND": "8080", **environ}).startswith(names)


@pytest.mark.parametrize(
    ("environ", "ports"),
    [
        ({"PORT": "8080"}, (8080, 8001, 8081)),
        ({"PORT": "8001"}, (8001, 8002, 8080)),
        ({"PORT": "8001", "PORT_HEALTH": "8080"}, (8001, 8080, 8081)),
        ({"PORT": "8001", "PORT_BACKEND": "8002"}, (8001, 8003, 8002)),
        ({"PORT": "8080", "PORT_HEALTH": "8081"}, (8080, 8081, 8082)),
        ({"PORT": "8080", "BACKEND_HOST": "10.0.0.1"}, (8080, 8001, 8080)),
    ],
)
def test_a_port_that_is_not_set_gives_way(environ: dict[str, str], ports: tuple[int, int, int]) -> None:
    got = load(**environ)
    assert (got.listen.port, got.listen.port_health, got.backend.port) == ports
    moved = [port for port, default in zip(ports[1:], (8001, 8080), strict=True) if str(port) not in environ.values()]
    assert len(got.warnings) == sum(port not in (8001, 8080) for port in moved)


def test_what_is_at_its_default_is_known() -> None:
    assert load(PORT="1", CTX="").at_default == {setting.name for setting in SETTINGS} - {"PORT"}


def test_ports_on_two_machines_and_free_ones_may_be_equal() -> None:
    load(PORT="8080", BACKEND_HOST="10.0.0.1")
    load(PORT="8080", HOST="10.0.0.2")
    load(PORT="0", PORT_HEALTH="0")
    load(PORT="8080", BACKEND_HOST="/run/b.sock")


def test_plain_http_needs_a_digest_unless_it_is_loopback() -> None:
    for host in ("h", "10.0.0.1", "127.evil.example", "localhost@h", "localhost.h", "[2001:db8::1]"):
        assert "MODEL_SHA256" in complaint(MODEL_URL=f"HTTP://{host}/m")
        load(MODEL_URL=f"http://{host}/m", MODEL_SHA256="0" * 64)


def test_models_exclude_each_other() -> None:
    assert complaint(MODEL_HF="a/b", MODEL_PATH="/m", MODEL_NAME="m").startswith(
        "MODEL_HF excludes MODEL_PATH and MODEL_NAME"
    )


def test_wedge_timeout_is_longer_than_a_probe() -> None:
    assert complaint(WEDGE_TIMEOUT="2").startswith("WEDGE_TIMEOUT (2 s) must be longer than HEALTH_TIMEOUT (2 s)")
    assert "(0.5 s)" in complaint(WEDGE_TIMEOUT="0.5")
    load(WEDGE_TIMEOUT="2.1")


def test_metrics_authentication_needs_authentication() -> None:
    assert complaint(AUTH_ENABLED="0", METRICS_AUTH_ENABLED="1").startswith("METRICS_AUTH_ENABLED")
    load(METRICS_AUTH_ENABLED="1")


def test_probable_mistakes_are_warnings() -> None:
    assert [line.split(":")[0] for line in load(AUTH_ENABLED="0", MAX_BUFFERED_BYTES="1KiB", ON_IDLE="x").warnings] == [
        "AUTH_ENABLED=false",
        "MAX_REQUEST_BODY_SIZE is above MAX_BUFFERED_BYTES",
        "ON_IDLE never runs",
    ]
    assert load(ON_IDLE="x", IDLE_STOP_SECONDS="1").warnings == ()


@pytest.mark.parametrize("name", ["MAX_REQUEST_LINE_SIZE", "MAX_HEADER_LINE_SIZE"])
def test_a_line_longer_than_its_head_is_a_warning(name: str) -> None:
    warnings = load(**{name: "4KiB", "MAX_REQUEST_HEADER_SIZE": "4095"}).warnings
    assert f"{name} is above MAX_REQUEST_HEADER_SIZE: the longest lines are always refused" in warnings


def test_a_gateway_without_authentication_is_a_warning() -> None:
    served, administered = load(AUTH_ENABLED="0", ADMIN_ROUTES="1").warnings
    assert "every client that reaches the port is served" in served
    assert "every client that reaches the port may drain the gateway and change the model" in administered
    assert load(ADMIN_ROUTES="1").warnings == ()


def test_a_pattern_that_matches_every_path_is_a_warning() -> None:
    for text in ("*", "/a,/*", "/**"):
        (line,) = load(ALLOW_PATHS=text).warnings
        assert line.startswith(f"ALLOW_PATHS={text.rpartition(',')[2]}: every unlisted path of the backend")
        assert "is open to every key" in line
    assert load(ALLOW_PATHS="/,/a/*,/b*").warnings == ()


def test_trusting_every_address_is_a_warning() -> None:
    for text in ("0.0.0.0/0", "10.0.0.1, ::/0"):
        (line,) = load(TRUSTED_PROXIES=text).warnings
        assert line.startswith("TRUSTED_PROXIES contains every address")
    assert load(TRUSTED_PROXIES="10.0.0.1, 2001:db8::/32").warnings == ()


def test_api_keys_are_lines_of_a_keys_file(tmp_path: Path) -> None:
    lines = "# team\na:sk-0123456789abcdef\n\nb:sk-abcdef0123456789:5\n"
    assert load(API_KEYS=lines).auth.api_keys == KEYS
    assert load(API_KEYS=lines.replace("\n", ";")).auth.api_keys == KEYS
    file = tmp_path / "keys"
    file.write_text(lines)
    assert load(API_KEYS_FILE=str(file)).auth.api_keys == KEYS


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a:sk-0123456789abcdef;b:secret", "line 2: a key is 16 to 128 of"),
        ("a:sk-0123456789abcdef;b:sk-0123456789abcdef", "line 2: line 1 has the same key"),
        ("a:sk-0123456789abcdef rank=secret", "line 1: the options are"),
        ("a:sha256", "line 1: a key is 16 to 128 of"),
        ("# a:sk-0123456789abcdef", "it contains no key"),
        (";", "it contains no key"),
        ("a:sk-0123456789abcdef\0", "the file is not text"),
        ("a:secret\udcff", "line 1: a key is 16 to 128 of"),
    ],
)
def test_a_wrong_line_of_api_keys_is_a_complaint_without_its_text(text: str, reason: str) -> None:
    line = complaint(API_KEYS=text)
    assert line.startswith(f"API_KEYS: the value is wrong: {reason}")
    assert "secret" not in line
    assert "0123456789" not in line


@pytest.mark.parametrize("text", ["10.0.0.1/8", "proxy", "10.0.0.1,", "10.0.0.1 10.0.0.2"])
def test_trusted_proxies_are_networks(text: str) -> None:
    line = complaint(TRUSTED_PROXIES=text)
    assert line.startswith(
        f"TRUSTED_PROXIES: the value {text!a} is not a list of networks: a network is like 10.0.0.0/8"
    )


# --- check_config ---


def test_check_config_shows_every_setting_with_value_and_source(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text(KEY)
    out = io.StringIO()
    environ = {
        "BACKEND_API_KEY_FILE": str(file),
        "GATEWAY_PORT": "9",
        "ACCESS_LOG": "",
        "ALLOW_PATHS": "/a",
        "HOST": "::",
    }
    assert check_config(environ, out, probe=no_volume) == 0
    lines = out.getvalue().splitlines()
    assert [line.split(" = ")[0] for line in lines[:-2]] == [setting.name for setting in SETTINGS]
    assert {
        "HOST = ::  [environment]",
        "PORT = 9  [GATEWAY_PORT]",
        "PORT_HEALTH = 8001  [default]",
        "BACKEND_API_KEY = (not shown)  [BACKEND_API_KEY_FILE]",
        "DATA_DIR = ./data  [default]",
        "MODELS_DIR = ./data/models  [default]",
        "MODEL_URL = (none)  [default]",
        "ACCESS_LOG = (empty)  [environment]",
    } <= set(lines)
    assert lines[-2:] == ["warning: GATEWAY_PORT is an old name; set PORT", "Every value has the right form."]


def test_check_config_shows_errors_and_returns_2() -> None:
    out = io.StringIO()
    assert check_config({"PORT": "\x1b[1m", "MODEL_PATH": "/é"}, out, probe=no_volume) == 2
    text = out.getvalue()
    assert "PORT = (refused)  [environment]\n" in text
    assert r"MODEL_PATH = /\xe9  [environment]" in text
    assert text.endswith("\nThe settings are invalid.\n")
    assert "\nerror: PORT: the value '\\x1b[1m' is not a whole number" in text
    assert text.isascii()


@pytest.mark.parametrize(
    "extra",
    [
        "--cache-ram 100",
        "-cram=-1",
        "--no-slots",
        "--slot_save_path /x",
        "--lookup-cache-dynamic f",
        "--spec-type draft-simple,ngram-mod",
        "--models-dir /m",
    ],
)
def test_private_caches_exclude_what_slots_share(extra: str) -> None:
    assert load(EXTRA_ARGS=extra).backend.prompt_cache == SHARED
    with pytest.raises(ConfigError, match="PROMPT_CACHE=private excludes -"):
        load(EXTRA_ARGS=extra, PROMPT_CACHE="private")


@pytest.mark.parametrize("extra", ["", "--cache-ram 0", "--spec-type draft-simple", "-fa on"])
def test_private_caches_allow_all_else(extra: str) -> None:
    assert load(EXTRA_ARGS=extra, PROMPT_CACHE="private").backend.prompt_cache == PRIVATE


# --- Several models ---


@pytest.mark.parametrize("name", ["MODEL_PATH", "MODEL_NAME", "MODEL_URL", "MODEL_HF"])
def test_a_router_has_no_single_model(name: str) -> None:
    values = {"MODEL_HF": "a/b", "MODEL_URL": "https://h/m.gguf"}
    line = complaint(MODELS="router", **{name: values.get(name, "m.gguf")})
    assert line == f"MODELS=router excludes {name}: the models are those of MODELS_DIR and MODELS_PRESET"
    both = complaint(MODELS="router", MODEL_NAME="m", MODEL_SHA256="0" * 64)
    assert both.startswith("MODELS=router excludes MODEL_NAME and MODEL_SHA256:")


def test_a_router_keeps_no_private_caches() -> None:
    assert complaint(MODELS="router", PROMPT_CACHE="private").startswith("PROMPT_CACHE=private excludes MODELS=router:")


@pytest.mark.parametrize(
    ("argument", "instead"),
    [
        ("--models-dir /m", "--models-dir in EXTRA_ARGS: set MODELS_DIR"),
        ("--models_preset=/p", "--models-preset in EXTRA_ARGS: set MODELS_PRESET"),
        ("--models-max 4", "--models-max in EXTRA_ARGS: set MODELS_MAX"),
        ("--models-autoload", "--models-autoload in EXTRA_ARGS: set nothing: the gateway loads models"),
    ],
)
def test_what_a_router_is_told_has_settings(argument: str, instead: str) -> None:
    assert complaint(MODELS="router", EXTRA_ARGS=argument) == f"MODELS=router excludes {instead}"
    assert load(EXTRA_ARGS=argument).warnings == ()


def test_no_more_models_are_loaded_at_the_start_than_fit() -> None:
    assert complaint(MODELS="router", MODELS_PRELOAD="a,b") == (
        "MODELS_PRELOAD names 2 models, but MODELS_MAX=1 are loaded at once"
    )
    assert load(MODELS="router", MODELS_PRELOAD="a,b", MODELS_MAX="2").router.preload == ("a", "b")
    assert load(MODELS="router", MODELS_PRELOAD="a,b", MODEL_ALIASES="b=a").router.aliases == {"b": "a"}


def test_settings_of_the_router_alone_are_warned_about() -> None:
    given = {
        "MODELS_PRESET": "/p.ini", "MODELS_MAX": "2", "MODELS_PRELOAD": "a", "DEFAULT_MODEL": "a",
        "MODEL_ALIASES": "b=a", "MODEL_SWITCH_AFTER": "5", "MODELS_IDLE_UNLOAD": "600",
    }  # fmt: skip
    assert load(**given).warnings == tuple(f"{name} has no effect: it needs MODELS=router" for name in given)
    assert load(**given, MODELS="router").warnings == ()
    assert load(MODELS="single", MODELS_DIR="/m").warnings == ()
    assert complaint(**given, MODELS="?").startswith("MODELS:")
