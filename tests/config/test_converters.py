"""converters.py: each converter on both sides of its limits."""

import re
from pathlib import Path

import pytest

from config import converters
from config.settings import SETTINGS
from support.paths import ROOT

KEY = "gateway-" + "aB3_-" * 8 + "xyz"
CONVERTERS = {setting.name: setting.converter for setting in SETTINGS}

# --- Values that are accepted, and values that are refused, by a setting that has the converter ---

GOOD = {
    "HOST": ["0.0.0.0", "::", "::1", "fe80::1%eth0", "2001:db8::1", "localhost", "my_service", "a.example.", "1a"],
    "PORT": ["0", "1", "65535", "080"],
    "BACKEND_HOST": ["127.0.0.1", "::1", "localhost", "/run/llama/b.sock", "/ä b/.sock", "/" + "a" * 101 + ".sock"],
    "QUEUE_TIMEOUT": ["0", "0.5", "12.25", "31536000"],
    "REQUEST_TIMEOUT": ["0.001"],
    "MAX_HEADER_LINE_SIZE": ["64", "16777216", "1KiB", "16MiB"],
    "MAX_BUFFERED_BYTES": ["3GiB"],
    "MAX_CONCURRENT_REQUESTS": ["auto", "Auto", "AUTO", "1", "1000000"],
    "LOG_LEVEL": ["debug", "INFO", "Warning", "error", "critical", "WARN", "fatal"],
    "MODEL_NAME": ["m.gguf", "a/b.gguf", "..m", "a..b/c"],
    "MODEL_URL": ["https://h/m.gguf", "HTTPS://h", "http://127.0.0.1:8/m", "http://[::1]:8/m", "http://u:p@LOCALHOST/?x#y"],
    "MODEL_HF": ["a/b", "ggml-org/gemma-3:Q4_K_M"],
    "ALLOW_PATHS": ["*", "/a", "/a/*,/b", " /a , /b ,", "/a*b/%20"],
    "CORS_ORIGINS": ["*", "https://a.example", "http://[::1]:3000", "tauri://localhost", "chrome-extension://abc,http://b:8"],
    "ON_IDLE": ["curl -d 'é' x"],
    "EXTRA_ARGS": ["--jinja -fa on", "--chat-template-kwargs '{\"a\": 1}'", "--alias 'host'", "-hff file"],
    "WORKER_TYPE": ["a", "A-1_b.c", "a" * 94],
    "TLS_CERT_FILE": ["/ä b"],
    "MODELS": ["single", "Router"],
    "MODELS_MAX": ["1", "1000"],
    "MODELS_PRELOAD": ["a", "ggml-org/q-GGUF:Q4_K_M, my model ,é", "m" * 255],
    "DEFAULT_MODEL": ["ggml-org/q-GGUF:Q4_K_M", "my model"],
    "MODEL_ALIASES": ["gpt-4o=qwen3-8b", "a=m, b=m", "a=m,a=m", ""],
}  # fmt: skip

BAD = {
    "HOST": [" ", "[::1]", "1.2.3", "1.2.3.4.5", "256.1.1.1", "-a", ".a", "a b", "a\n", "a\n\nb", "::1%",
             "::1%a\n", "é", "a" * 254],
    "PORT": ["-1", "+5", "5_0", "\u0665", "5.0", "65536", " 1", "1 ", "1\n", "0x10", "1e3", "9" * 20, "x"],
    "BACKEND_HOST": ["b.sock", "./b.sock", "/run/b", "/run/b.sock/", "/a\n.sock", "/" + "a" * 102 + ".sock", "1.2.3"],
    "NGL": ["-1"],
    "QUEUE_TIMEOUT": ["-1", "+1", ".5", "1.", "1,5", "1e3", "inf", "nan", "1s", "31536001", "1" * 20],
    "REQUEST_TIMEOUT": ["0", "0.0009"],
    "MAX_HEADER_LINE_SIZE": ["63", "16777217", "17MiB", "1K", "1KB", "1kib", "1 KiB", "1.5KiB", "-1", "KiB"],
    "MAX_CONCURRENT_REQUESTS": ["0", "automatic", "1000001"],
    "AUTH_ENABLED": ["ture", "2", "t", " true", "enabled", "None"],
    "LOG_LEVEL": ["warnings", "trace"],
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
    "MODELS": ["many", "true"],
    "MODELS_MAX": ["0", "1001"],
    "MODELS_PRELOAD": ["a=b", "a\n", "m" * 256],
    "DEFAULT_MODEL": ["a,b", " a", "a ", "a=b"],
    "MODEL_ALIASES": ["a", "a=", "=m", "a=b=c", "a=a", "a=m,a=n", "a=b,b=m"],
    "BACKEND_API_KEY": ["secret", KEY + "x", KEY[:-1], KEY[:-1] + "=", KEY + "\n"],
}  # fmt: skip


def cases(table: dict[str, list[str]]) -> list[tuple[str, str]]:
    return [(name, text) for name, texts in table.items() for text in texts]


@pytest.mark.parametrize(("name", "text"), cases(GOOD))
def test_value_is_accepted(name: str, text: str) -> None:
    CONVERTERS[name].parse(text)


@pytest.mark.parametrize(("name", "text"), cases(BAD))
def test_value_is_refused_with_a_reason(name: str, text: str) -> None:
    with pytest.raises(ValueError, match=r"^(is|has|does) [ -~]+$"):
        CONVERTERS[name].parse(text)


# --- Parsed values ---


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a=m,a=n", "has the alias 'a' twice"),
        ("a=a", "has the alias 'a' for itself; an alias stands for a model"),
        ("a=b,b=m", "has the alias 'a' for the alias 'b'; an alias stands for a model"),
    ],
)
def test_an_alias_stands_for_one_model(text: str, reason: str) -> None:
    assert converters.MODEL_ALIASES.parse("a=m, b=m") == {"a": "m", "b": "m"}
    with pytest.raises(ValueError, match=f"^{re.escape(reason)}$"):
        converters.MODEL_ALIASES.parse(text)


def test_booleans() -> None:
    for text in ("true", "TRUE", "1", "yes", "on"):
        assert converters.FLAG.parse(text) is True
    for text in ("false", "False", "0", "no", "OFF"):
        assert converters.FLAG.parse(text) is False


def test_sizes_are_bytes_or_binary_multiples() -> None:
    parse = converters.size(1, 1 << 40).parse
    assert [parse(text) for text in ("2000", "3KiB", "2MiB", "1GiB")] == [2000, 3072, 2 << 20, 1 << 30]


def test_numbers_name_the_limit_that_they_exceed() -> None:
    with pytest.raises(ValueError, match=r"^is above 10$"):
        converters.whole(1, 10).parse("11")
    with pytest.raises(ValueError, match=r"^is below 0.5$"):
        converters.decimal(0.5, 10).parse("0.25")


def test_auto_is_none() -> None:
    converter = converters.auto(converters.whole(1, 10))
    assert [converter.parse(text) for text in ("auto", "AUTO", "5")] == [None, None, 5]
    assert converter.accepts == "auto, or a whole number from 1 to 10"


def test_lists_lose_blanks_and_duplicates() -> None:
    assert converters.ROUTES.parse(" /a, /b ,,/a") == ("/a", "/b")
    with pytest.raises(ValueError, match=re.escape("has an entry of the wrong form ('b')")):
        converters.ROUTES.parse("/a,b")


def test_origins_are_as_a_browser_sends_them() -> None:
    given = "https://A.example:443,http://b:80,https://b:80,https://a.example"
    assert converters.ORIGINS.parse(given) == ("https://a.example", "http://b", "https://b:80")


def test_digests_are_lower_case() -> None:
    assert converters.SHA256.parse("A" * 64) == "a" * 64


def test_a_long_value_is_shortened_when_quoted() -> None:
    assert converters.quoted("é\n") == r"'\xe9\n'"
    assert converters.quoted("x" * 80) == repr("x" * 80)
    assert converters.quoted("x" * 81) == repr("x" * 77 + "...")


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("https://h/m", "h"),
        ("HTTP://u:p@LOCALHOST:80?x", "localhost"),
        ("http://[::1]:8/m", "::1"),
        ("http://127.0.0.1#x", "127.0.0.1"),
        ("https://[zz]/m", ""),
        ("https://h:x/", ""),
    ],
)
def test_host_of_a_url(url: str, host: str) -> None:
    assert converters.url_host(url) == host


def test_loopback_hosts() -> None:
    assert all(converters.is_loopback(host) for host in ("localhost", "::1", "127.0.0.1", "127.1.2.3"))
    assert not any(converters.is_loopback(host) for host in ("", "localhost.h", "127.evil.example", "::2", "10.0.0.1"))


# --- Arguments ---


def test_extra_args_are_split_as_a_shell_would() -> None:
    got = converters.ARGS.parse("""--chat-template-kwargs '{"a": 1}' --alias "x y" a\\ b""")
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
def test_extra_args_must_not_set_address_keys_or_model(text: str, hint: str) -> None:
    with pytest.raises(ValueError, match=r"^sets -[a-z_-]+, which is not allowed here \(use .*\)$") as caught:
        converters.ARGS.parse(text)
    assert hint in str(caught.value)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("text", ["--x 'hunter2", '--x "hunter2', "hunter2\\"])
def test_an_unclosed_quote_is_reported_without_the_text(text: str) -> None:
    with pytest.raises(ValueError, match=r"^has an unclosed quote or a backslash at its end$"):
        converters.ARGS.parse(text)


def test_the_docs_name_every_refused_argument() -> None:
    page = (ROOT / "docs" / "CONFIGURATION.md").read_text(encoding="utf-8")
    assert [name for name in converters.REFUSED_ARGS if f"`{name}`" not in page] == []


# --- Files and folders ---


@pytest.mark.parametrize("before", ["", "\ufeff", " \t", "\ufeff\r\n "])
@pytest.mark.parametrize("after", ["", "\n", "\r\n", " \n\n", "\t"])
def test_a_secret_is_read_without_what_editors_and_platforms_add(tmp_path: Path, before: str, after: str) -> None:
    file = tmp_path / "key"
    file.write_bytes(f"{before}{KEY} and\n{KEY}{after}".encode())
    assert converters.read_secret(str(file)) == f"{KEY} and\n{KEY}"


@pytest.mark.parametrize(
    ("text", "link"),
    [("tcp://10.96.0.1:8000", True), ("udp://[fd00::1]:53", True), ("8000", False), ("http://x", False), ("", False)],
)
def test_the_address_of_a_service_is_recognised(text: str, link: bool) -> None:
    assert converters.is_service_link(text) is link


def test_a_secret_file_that_cannot_be_read_is_not_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^the file cannot be read: No such file or directory$"):
        converters.read_secret(str(tmp_path / "none"))
    file = tmp_path / "key"
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"^the file cannot be read: it is not UTF-8 text$"):
        converters.read_secret(str(file))
    file.write_text("x" * 65537)
    with pytest.raises(ValueError, match=r"^the file is longer than 65536 characters$"):
        converters.read_secret(str(file))


def test_the_probe_finds_mounts_and_writable_folders(tmp_path: Path) -> None:
    assert converters.probe_dir(str(tmp_path)) == (False, True)
    assert converters.probe_dir("/")[0] is True
    assert converters.probe_dir(str(tmp_path / "none")) == (False, False)


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
def test_a_mounted_volume_takes_precedence_over_the_images_own_data(mounted: str, writable: str, found: str) -> None:
    def probe(path: str) -> tuple[bool, bool]:
        return path in mounted.split(), path in writable.split()

    assert Path(converters.find_data_dir(probe)) == Path(found)
