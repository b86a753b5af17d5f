"""config.py and accept.py: each converter on both sides of its limits, complaints at once, secrets never shown."""

import io
import os
from pathlib import Path

import pytest

import accept
import config
from config import SETTINGS, Config, ConfigError
from http1 import Limits

PAGE = Path(__file__).parent.parent / "docs" / "CONFIGURATION.md"
KEY = "gateway-" + "aB3_-" * 8 + "xyz"


def nowhere(path: str) -> tuple[bool, bool]:
    return False, False


def load(**environ: str) -> Config:
    return config.load_config(environ, probe=nowhere)


def complaints(**environ: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load(**environ)
    assert str(caught.value) == "\n".join(caught.value.complaints)
    return caught.value.complaints


def complaint(**environ: str) -> str:
    (line,) = complaints(**environ)
    return line


def page_with_table(page: str) -> str:
    before, begin, rest = page.partition("<!-- settings: made by config.markdown_table() -->\n")
    _, end, after = rest.partition("<!-- end of settings -->")
    return before + begin + config.markdown_table() + end + after


# Defaults and where values land


def test_defaults_are_those_of_the_design():
    got = load()
    assert got.listen == config.Listen("0.0.0.0", 8000, 8001, None, None)
    assert got.backend == config.Backend("127.0.0.1", 8080, None)
    assert got.auth == config.Auth(True, Path("data/api_keys.txt"), 100, False, 2.0, (), False)
    assert got.queue == config.Queue(None, 100, 0.0, 1024, 256 << 20, 300.0, 15.0)
    assert got.timeouts == config.Timeouts(30.0, 30.0, 75.0, 10.0, 300.0, 300.0, 0.0, 2.0)
    assert got.limits == Limits()
    assert got.usage == config.Usage(Path("data/usage.db"), None, 0.0)
    assert got.supervision == config.Supervision(None, 120.0, 5, 0.0, None, 7.0, False, False)
    assert got.data_dir == Path("data")
    assert got.cors_origins == got.warnings == ()


def test_defaults_of_model_and_log():
    got = load(INSTANCE_ID="box")
    assert got.model == config.Model(
        None, None, Path("data/models"), None, None, None, 99, 16384, 0, None, (), None, 0.0
    )
    assert got.log == config.Log(
        "text", "info", Path("data/logs/api_access.log"), Path("data/logs"), "llama", "", "box"
    )


def test_a_default_names_a_file_under_data_dir():
    got = load(DATA_DIR="/somewhere")
    assert got.auth.keys_file == Path("/somewhere/api_keys.txt")
    assert got.usage.file == Path("/somewhere/usage.db")
    assert got.log.access_file == Path("/somewhere/logs/api_access.log")
    assert load(DATA_DIR="/x", LOG_DIR="$DATA_DIR").log.dir == Path("$DATA_DIR")


def test_instance_id_is_the_host_name_as_a_file_name():
    assert load().log.instance_id.replace("-", "") == "".join(c for c in os.uname().nodename if c.isalnum())


def test_worker_type_names_the_log_folder_unless_log_name_does():
    assert load(WORKER_TYPE="chat").log.name == "llama-chat"
    assert load(WORKER_TYPE="chat", LOG_NAME="mine").log.name == "mine"


def test_an_empty_value_is_as_unset_but_for_two_files():
    names = {setting.name: "" for setting in SETTINGS}
    got = load(**names, BACKEND_API_KEY_FILE="", GATEWAY_PORT="")
    assert got.log.access_file is None
    assert got.usage.file is None
    del names["ACCESS_LOG"], names["USAGE_FILE"]
    assert load(**names) == load()


def test_every_setting_lands_where_its_row_says():
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
        "CLIENT_HEADER_TIMEOUT": "18", "CLIENT_BODY_TIMEOUT": "19", "KEEPALIVE_TIMEOUT": "20",
        "BACKEND_CONNECT_TIMEOUT": "21", "HEALTH_TIMEOUT": "22", "MAX_REQUEST_BODY_SIZE": "1KiB",
        "MAX_BUFFERED_BYTES": "2MiB", "MAX_HEADERS": "25", "MAX_HEADER_LINE_SIZE": "100",
        "MAX_REQUEST_LINE_SIZE": "101", "MAX_RESPONSE_HEADER_SIZE": "102", "CORS_ORIGINS": "https://a",
        "COLD_START_WAIT": "26", "SSE_HEARTBEAT": "27", "DRAIN_TIMEOUT": "28", "TLS_CERT_FILE": "/c",
        "TLS_KEY_FILE": "/kk", "LOG_FORMAT": "JSON", "LOG_LEVEL": "Debug", "ACCESS_LOG": "/al", "LOG_DIR": "/ld",
        "LOG_NAME": "ln", "WORKER_TYPE": "wt", "INSTANCE_ID": "i", "STATE_FILE": "/s", "WEDGE_TIMEOUT": "29",
        "MAX_RESTARTS": "30", "IDLE_STOP_SECONDS": "31", "ON_IDLE": "echo", "MOCK_BACKEND": "Yes",
    }  # fmt: skip
    assert set(given) | {"MODEL_HF"} == {setting.name for setting in SETTINGS}
    got = load(**given)
    assert got.listen == config.Listen("::1", 1, 2, Path("/c"), Path("/kk"))
    assert got.backend == config.Backend("llama", 3, KEY)
    assert got.auth == config.Auth(False, Path("/k"), 9, False, 0.0, ("/a", "/b*"), True)
    assert got.queue == config.Queue(11, 12, 13.0, 14, 2 << 20, 26.0, 27.0)
    assert got.timeouts == config.Timeouts(18.0, 19.0, 20.0, 21.0, 15.0, 16.0, 17.0, 22.0)
    assert got.limits == Limits(101, 100, 25, 1024, 102)
    assert got.log == config.Log("json", "debug", Path("/al"), Path("/ld"), "ln", "wt", "i")
    assert got.usage == config.Usage(Path("/u"), 1.25, 10.0)
    assert got.model == config.Model(
        "/m.gguf", "a/b.gguf", Path("/ms"), "https://h/x", "a" * 64, None, 4, 5, 6, 7, ("-a", "b c"), "/bin/l", 8.5
    )
    assert got.supervision == config.Supervision(Path("/s"), 29.0, 30, 31.0, "echo", 28.0, True, True)
    assert got.data_dir == Path("/d")
    assert got.cors_origins == ("https://a",)
    assert load(MODEL_HF="ggml-org/tiny:Q4_0").model.hf == "ggml-org/tiny:Q4_0"


# Converters: both sides of each rule

GOOD = {
    "HOST": ["0.0.0.0", "::", "::1", "fe80::1%eth0", "2001:db8::1", "localhost", "my_service", "a.example.", "1a"],
    "PORT": ["0", "1", "65535", "080"],
    "QUEUE_TIMEOUT": ["0", "0.5", "12.25", "31536000"],
    "REQUEST_TIMEOUT": ["0.001"],
    "MAX_HEADER_LINE_SIZE": ["64", "16777216", "1KiB", "16MiB"],
    "MAX_BUFFERED_BYTES": ["3GiB"],
    "MAX_CONCURRENT_REQUESTS": ["auto", "Auto", "AUTO", "1", "1000000"],
    "LOG_LEVEL": ["debug", "INFO", "Warning", "error", "critical"],
    "MODEL_NAME": ["m.gguf", "a/b.gguf", "..m", "a..b/c"],
    "MODEL_URL": ["https://h/m.gguf", "HTTPS://h", "http://127.0.0.1:8/m", "http://[::1]:8/m", "http://u:p@LOCALHOST/?x#y"],
    "MODEL_HF": ["a/b", "ggml-org/gemma-3:Q4_K_M"],
    "ALLOW_PATHS": ["*", "/a", "/a/*,/b", " /a , /b ,", "/a*b/%20"],
    "CORS_ORIGINS": ["*", "https://a.example", "http://[::1]:3000", "tauri://localhost", "chrome-extension://abc,http://b:8"],
    "ON_IDLE": ["curl -d 'é' x"],
    "EXTRA_ARGS": ["--jinja -fa on", "--chat-template-kwargs '{\"a\": 1}'", "--alias 'host'", "-hff file"],
    "WORKER_TYPE": ["a", "A-1_b.c", "a" * 94],
    "TLS_CERT_FILE": ["/ä b"],
}  # fmt: skip

BAD = {
    "HOST": [" ", "[::1]", "1.2.3", "1.2.3.4.5", "256.1.1.1", "-a", ".a", "a b", "a\n", "a\n\nb", "::1%",
             "::1%a\n", "é", "a" * 254],
    "PORT": ["-1", "+5", "5_0", "\u0665", "5.0", "65536", " 1", "1 ", "1\n", "0x10", "1e3", "9" * 20, "x"],
    "NGL": ["-1"],
    "QUEUE_TIMEOUT": ["-1", "+1", ".5", "1.", "1,5", "1e3", "inf", "nan", "1s", "31536001", "1" * 20],
    "REQUEST_TIMEOUT": ["0", "0.0009"],
    "MAX_HEADER_LINE_SIZE": ["63", "16777217", "17MiB", "1K", "1KB", "1kib", "1 KiB", "1.5KiB", "-1", "KiB"],
    "MAX_CONCURRENT_REQUESTS": ["0", "automatic", "1000001"],
    "AUTH_ENABLED": ["ture", "2", "t", " true", "enabled", "None"],
    "LOG_LEVEL": ["warn", "trace"],
    "LOG_FORMAT": ["xml"],
    "MODEL_PATH": ["/a\r", "\x1b"],
    "MODEL_NAME": ["/a", "..", "../a", "a/../b", "a/..", "a\n"],
    "MODEL_URL": ["ftp://h/m", "file:///m", "h/m", "https://", "https:///m", "https://h /m", "https://[zz]/m", "https://h:x/"],
    "MODEL_HF": ["a", "-a/b", "a/b/c", "a/b:", "a b/c", "é/b"],
    "MODEL_SHA256": ["a" * 63, "a" * 65, "g" * 64],
    "ALLOW_PATHS": ["a", "/a?b", "/a#b", "/a b", "/é", "**", "/a,b"],
    "CORS_ORIGINS": ["a.example", "https://a/", "https://a/b", "null", "*,https://a", "https://*.a", "https://a:b", "https://"],
    "EXTRA_ARGS": ["'", '"a', "a\\"],
    "WORKER_TYPE": ["a/b", ".a", "a b", "a" * 101],
    "ACCESS_LOG": ["/a\n"],
    "BACKEND_API_KEY": ["secret", KEY + "x", KEY[:-1], KEY[:-1] + "=", KEY + "\n"],
}  # fmt: skip


def cases(table: dict[str, list[str]]) -> list[tuple[str, str]]:
    return [(name, text) for name, texts in table.items() for text in texts]


@pytest.mark.parametrize(("name", "text"), cases(GOOD))
def test_value_is_accepted(name: str, text: str):
    others = {"TLS_CERT_FILE": {"TLS_KEY_FILE": "/k"}}.get(name, {})
    load(**{name: text}, **others)


@pytest.mark.parametrize(("name", "text"), cases(BAD))
def test_value_is_refused_by_name_with_what_is_accepted(name: str, text: str):
    line = complaint(**{name: text})
    row = next(setting for setting in SETTINGS if setting.name == name)
    assert line.startswith(f"{name}: the value ")
    assert line.endswith(f"; accepted: {row.converter.accepts}")
    assert line.isprintable()


def test_pitfall_08_one_boolean_parser_and_an_unknown_word_is_fatal():
    flags = [setting.name for setting in SETTINGS if setting.converter is accept.FLAG]
    assert flags == ["AUTH_ENABLED", "METRICS_AUTH_ENABLED", "ADMIN_ROUTES", "DEBUG_SHELL", "MOCK_BACKEND"]
    for word in ("true", "TRUE", "1", "yes", "on"):
        assert load(AUTH_ENABLED=word).auth.enabled is True
    for word in ("false", "False", "0", "no", "OFF"):
        assert load(AUTH_ENABLED=word).auth.enabled is False
    assert "'ture'" in complaint(AUTH_ENABLED="ture")


def test_pitfall_27_numbers_are_ascii_digits_only():
    for text in ("+5", "5_0", "-5", "\u0665"):
        assert "is not a whole number" in complaint(MAX_HEADERS=text)


def test_sizes_are_octets_or_binary_multiples():
    assert load(MAX_REQUEST_BODY_SIZE="2000").limits.body_bytes == 2000
    assert load(MAX_REQUEST_BODY_SIZE="3KiB").limits.body_bytes == 3072
    assert load(MAX_BUFFERED_BYTES="1GiB").queue.max_buffered_bytes == 1 << 30


def test_a_long_value_is_cut_in_the_complaint():
    assert len(complaint(LOG_FORMAT="x" * 5000)) < 200


def test_origins_are_as_a_browser_sends_them():
    given = "https://A.example:443,http://b:80,https://b:80,https://a.example"
    assert load(CORS_ORIGINS=given).cors_origins == ("https://a.example", "http://b", "https://b:80")


# EXTRA_ARGS


def test_pitfall_11_extra_args_are_split_as_a_shell_would():
    got = load(EXTRA_ARGS="""--chat-template-kwargs '{"a": 1}' --alias "x y" a\\ b""").model.extra_args
    assert got == ("--chat-template-kwargs", '{"a": 1}', "--alias", "x y", "a b")


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("--host 0.0.0.0", "BACKEND_HOST"),
        ("--host=0.0.0.0", "BACKEND_HOST"),
        ("-fa on '--port' 1", "PORT_BACKEND"),
        ("--reuse_port", "PORT_BACKEND"),
        ("--api-key hunter2", "BACKEND_API_KEY"),
        ("--api_key=hunter2", "BACKEND_API_KEY"),
        ("--api-key-file hunter2", "BACKEND_API_KEY"),
        ("--api_key_file hunter2", "BACKEND_API_KEY"),
        ("--ssl-key-file hunter2", "TLS_KEY_FILE"),
        ("--api-prefix /x", "no prefix"),
        ("--hf-token hunter2", "HF_TOKEN"),
        ("-m hunter2", "MODEL_PATH"),
        ("--model_url hunter2", "MODEL_URL"),
        ("-hf hunter2", "MODEL_HF"),
    ],
)
def test_pitfall_11_extra_args_may_not_set_address_keys_or_model(text: str, hint: str):
    line = complaint(EXTRA_ARGS=text)
    assert line.startswith("EXTRA_ARGS: the value sets -")
    assert hint in line
    assert "hunter2" not in line
    out = io.StringIO()
    assert config.check_config({"EXTRA_ARGS": text}, out, probe=nowhere) == 2
    assert "hunter2" not in out.getvalue()


def test_an_unbalanced_quote_is_named_and_the_words_are_not_shown():
    line = complaint(EXTRA_ARGS="--x 'hunter2")
    assert "quote" in line
    assert "hunter2" not in line


# Secrets


def test_a_secret_comes_from_its_file_without_the_line_end(tmp_path: Path):
    file = tmp_path / "key"
    for end in ("", "\n", "\r\n"):
        file.write_bytes((KEY + end).encode())
        assert load(BACKEND_API_KEY_FILE=str(file)).backend.api_key == KEY
    file.write_text(KEY + "\n\n")
    assert KEY not in complaint(BACKEND_API_KEY_FILE=str(file))


@pytest.mark.parametrize("name", [setting.name for setting in SETTINGS if setting.secret])
def test_a_secret_and_its_file_exclude_each_other(name: str, tmp_path: Path):
    file = tmp_path / "secret"
    text = {"BACKEND_API_KEY": KEY, "MODEL_URL": "https://h/hunter2", "ON_IDLE": "echo hunter2"}[name]
    file.write_text(text)
    line = complaint(**{name: text, name + "_FILE": str(file)})
    assert line == f"{name} and {name}_FILE contradict each other: set one of them"


def test_a_secret_file_that_cannot_be_read_is_a_complaint(tmp_path: Path):
    assert complaint(BACKEND_API_KEY_FILE=str(tmp_path / "none")).endswith("cannot be read: No such file or directory")
    file = tmp_path / "key"
    file.write_bytes(b"\xff\xfe")
    assert complaint(BACKEND_API_KEY_FILE=str(file)).endswith("it is not UTF-8 text")
    file.write_text("x" * 65537)
    assert complaint(BACKEND_API_KEY_FILE=str(file)).endswith("longer than 65536 characters")
    file.write_text("")
    assert complaint(BACKEND_API_KEY_FILE=str(file)).startswith("BACKEND_API_KEY: the value ")


def test_no_complaint_and_no_table_echoes_a_secret(tmp_path: Path):
    file = tmp_path / "key"
    file.write_text("hunter2")
    for environ in (
        {"BACKEND_API_KEY": "hunter2"},
        {"BACKEND_API_KEY_FILE": "hunter2"},
        {"BACKEND_API_KEY_FILE": str(file)},
        {"MODEL_URL": "ftp://hunter2"},
        {"MODEL_URL": "http://hunter2/"},
        {"MODEL_URL": "https://u:hunter2@h/", "ON_IDLE": "hunter2", "PORT": "x"},
    ):
        assert "hunter2" not in "".join(complaints(**environ))
        out = io.StringIO()
        assert config.check_config(environ, out, probe=nowhere) == 2
        assert "hunter2" not in out.getvalue()


# Old and misspelt names


def test_the_old_name_works_and_warns_once():
    got = load(GATEWAY_PORT="9000")
    assert got.listen.port == 9000
    assert got.warnings == ("GATEWAY_PORT is an old name; set PORT",)
    assert load(GATEWAY_PORT="9000", PORT="9000").warnings == got.warnings


def test_the_old_name_may_not_differ_from_the_new_one():
    assert complaint(GATEWAY_PORT="9000", PORT="9001").startswith("PORT and GATEWAY_PORT contradict")


def test_a_misspelt_name_is_a_warning():
    assert load(MAX_QUEU_SIZE="1").warnings == ("'MAX_QUEU_SIZE' is not a setting; is MAX_QUEUE_SIZE meant?",)
    assert load(MODEL_DIR="x").warnings == ("'MODEL_DIR' is not a setting; is MODELS_DIR meant?",)
    assert load(MAX_SPEED="1", PATH="/bin", MOCK_SLOTS="1", GATEWAY_PORTS="2").warnings == ()


def test_llama_servers_own_variables_are_warned_about():
    assert load(LLAMA_ARG_CTX_SIZE="1").warnings == (
        "'LLAMA_ARG_CTX_SIZE' does not reach llama-server; use EXTRA_ARGS",
    )


# Several settings together


def test_all_complaints_come_at_once():
    lines = complaints(PORT="x", AUTH_ENABLED="ture", TLS_CERT_FILE="/c", MODEL_URL="http://h/", BACKEND_API_KEY="k")
    assert [line.split(":")[0].split(" ")[0] for line in lines] == [
        "PORT", "BACKEND_API_KEY", "AUTH_ENABLED", "TLS_CERT_FILE", "MODEL_URL",
    ]  # fmt: skip


def test_a_setting_that_cannot_be_read_causes_no_second_complaint():
    assert complaint(DATA_DIR="/a\n").startswith("DATA_DIR")
    assert complaint(WORKER_TYPE="a b").startswith("WORKER_TYPE")
    assert complaint(WORKER_TYPE="a" * 95).startswith("LOG_NAME")
    assert complaint(PORT="x", PORT_HEALTH="8000").startswith("PORT:")
    assert complaint(MODEL_URL="http://h/m", MODEL_SHA256="x").startswith("MODEL_SHA256")
    assert complaint(TLS_KEY_FILE="\n", TLS_CERT_FILE="/c").startswith("TLS_KEY_FILE")
    for name in ("HOST", "BACKEND_HOST", "MODEL_URL", "WEDGE_TIMEOUT", "HEALTH_TIMEOUT", "MAX_BUFFERED_BYTES"):
        assert complaint(**{name: "?"}).startswith(name)


def test_tls_takes_certificate_and_key():
    assert "TLS_CERT_FILE and TLS_KEY_FILE" in complaint(TLS_CERT_FILE="/c")
    assert "TLS_CERT_FILE and TLS_KEY_FILE" in complaint(TLS_KEY_FILE="/k")
    assert load(TLS_CERT_FILE="/c", TLS_KEY_FILE="/k").listen.tls_key_file == Path("/k")


@pytest.mark.parametrize(
    ("environ", "names"),
    [
        ({"PORT": "8001"}, "PORT and PORT_HEALTH"),
        ({"PORT": "8080"}, "PORT and PORT_BACKEND"),
        ({"PORT_HEALTH": "8080", "HOST": "::"}, "PORT_HEALTH and PORT_BACKEND"),
        ({"PORT": "8080", "HOST": "127.0.0.1", "BACKEND_HOST": "localhost"}, "PORT and PORT_BACKEND"),
        ({"PORT": "8080", "HOST": "10.0.0.1", "BACKEND_HOST": "10.0.0.1"}, "PORT and PORT_BACKEND"),
    ],
)
def test_ports_on_one_machine_differ(environ: dict[str, str], names: str):
    assert complaint(**environ).startswith(names)


def test_ports_on_two_machines_and_free_ones_may_be_equal():
    load(PORT="8080", BACKEND_HOST="10.0.0.1")
    load(PORT="8080", HOST="10.0.0.2")
    load(PORT="0", PORT_HEALTH="0")


def test_plain_http_needs_a_digest_unless_it_is_loopback():
    for host in ("h", "10.0.0.1", "127.evil.example", "localhost@h", "localhost.h", "[2001:db8::1]"):
        assert "MODEL_SHA256" in complaint(MODEL_URL=f"HTTP://{host}/m")
        load(MODEL_URL=f"http://{host}/m", MODEL_SHA256="0" * 64)


def test_models_exclude_each_other():
    assert complaint(MODEL_HF="a/b", MODEL_PATH="/m", MODEL_NAME="m").startswith(
        "MODEL_HF excludes MODEL_PATH and MODEL_NAME"
    )


def test_a_wedge_is_longer_than_a_probe():
    assert complaint(WEDGE_TIMEOUT="2").startswith("WEDGE_TIMEOUT (2 s) must be longer than HEALTH_TIMEOUT (2 s)")
    assert "(0.5 s)" in complaint(WEDGE_TIMEOUT="0.5")
    load(WEDGE_TIMEOUT="2.1")


def test_metrics_cannot_ask_for_a_key_that_nobody_has():
    assert complaint(AUTH_ENABLED="0", METRICS_AUTH_ENABLED="1").startswith("METRICS_AUTH_ENABLED")
    load(METRICS_AUTH_ENABLED="1")


def test_doubtful_settings_are_warnings():
    assert [line.split(":")[0] for line in load(AUTH_ENABLED="0", MAX_BUFFERED_BYTES="1KiB", ON_IDLE="x").warnings] == [
        "AUTH_ENABLED=false",
        "MAX_REQUEST_BODY_SIZE is above MAX_BUFFERED_BYTES",
        "ON_IDLE never runs",
    ]
    assert load(ON_IDLE="x", IDLE_STOP_SECONDS="1").warnings == ()


def test_what_an_open_gateway_lets_anybody_do_is_a_warning():
    served, administered = load(AUTH_ENABLED="0", ADMIN_ROUTES="1").warnings
    assert "whoever reaches the port is served" in served
    assert "whoever reaches the port may drain the gateway and change the backend's model" in administered
    assert load(ADMIN_ROUTES="1").warnings == ()


def test_a_path_that_stands_for_all_is_a_warning():
    for text in ("*", "/a,/*", "/**"):
        (line,) = load(ALLOW_PATHS=text).warnings
        assert line.startswith(f"ALLOW_PATHS={text.rpartition(',')[2]}: every path of the backend's")
        assert "is open to every key" in line
    assert load(ALLOW_PATHS="/,/a/*,/b*").warnings == ()


# The data folder


@pytest.mark.parametrize(
    ("mounted", "writable", "found"),
    [
        ("/runpod-volume /workspace /data", "/runpod-volume /workspace /data", "/runpod-volume"),
        ("/workspace", "/runpod-volume /workspace /data", "/workspace"),
        ("/workspace /data", "/data", "/data"),
        ("/workspace", "/data", "/data"),
        ("", "/data /workspace", "/data"),
        ("/data /workspace", "", "data"),
        ("", "", "data"),
    ],
)
def test_pitfall_10_a_mounted_volume_goes_before_the_images_own_data(mounted: str, writable: str, found: str):
    def probe(path: str) -> tuple[bool, bool]:
        return path in mounted.split(), path in writable.split()

    assert config.load_config({}, probe=probe).data_dir == Path(found)
    assert config.load_config({"DATA_DIR": "/mine"}, probe=probe).data_dir == Path("/mine")


def test_the_real_probe_tells_mounts_and_writable_folders(tmp_path: Path):
    assert accept.probe_dir(str(tmp_path)) == (False, True)
    assert accept.probe_dir("/")[0] is True
    assert accept.probe_dir(str(tmp_path / "none")) == (False, False)


# What people see


def test_check_config_shows_every_setting_with_value_and_source(tmp_path: Path):
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
    assert config.check_config(environ, out, probe=nowhere) == 0
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
    assert lines[-2:] == ["warning: GATEWAY_PORT is an old name; set PORT", "The settings are good."]


def test_check_config_shows_what_is_wrong_and_ends_with_2():
    out = io.StringIO()
    assert config.check_config({"PORT": "\x1b[1m", "MODEL_PATH": "/é"}, out, probe=nowhere) == 2
    text = out.getvalue()
    assert "PORT = (refused)  [environment]\n" in text
    assert r"MODEL_PATH = /\xe9  [environment]" in text
    assert text.endswith("\nThe settings cannot be used.\n")
    assert "\nerror: PORT: the value '\\x1b[1m' is not a whole number" in text
    assert text.isascii()


def test_names_and_places_are_unique_and_sentences_are_whole():
    assert len({setting.name for setting in SETTINGS}) == len({setting.path for setting in SETTINGS}) == len(SETTINGS)
    for setting in SETTINGS:
        assert setting.text[0].isupper() or setting.text.startswith("llama-server")
        assert setting.text.endswith(".")
        assert "|" not in setting.text + setting.converter.accepts


def test_the_docs_hold_the_table_that_settings_make():
    page = PAGE.read_text(encoding="utf-8")
    assert page == page_with_table(page), "put what config.markdown_table() returns between the page's two markers"


def test_the_docs_name_every_refused_argument():
    page = PAGE.read_text(encoding="utf-8")
    assert [name for name in accept.REFUSED_ARGS if f"`{name}`" not in page] == []
