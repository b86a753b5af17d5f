"""The board in a real browser, with the real llama-server behind the gateway."""

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from chromium import Chromium, Tab
from stack import ENDLESS, OPERATOR_KEY, TEAM_KEY, Gateway, LlamaServer, eventually, fetch, running

OTHER_KEY = "sk-e2e-other-0123456789abcdef"
WRONG_KEY = "sk-e2e-wrong-0123456789abcdef"
SHOWN = "!document.getElementById('board').hidden"
ASKED = "!document.getElementById('keyform').hidden"
FOCUSED = "document.activeElement.id || document.activeElement.innerText"


@pytest.fixture(scope="module")
def chromium(browser: tuple[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    with Chromium(browser[0], tmp_path_factory.mktemp("chromium")) as found:
        yield found


@pytest.fixture(scope="module")
def axe(browser: tuple[str, Path]) -> Path:
    return browser[1] / "node_modules" / "axe-core" / "axe.min.js"


def write_keys(gateway: Gateway, *lines: str) -> None:
    team = f"team:{TEAM_KEY}:1000000 tokens_per_day=1000000"
    Path(gateway.settings["AUTH_KEYS_FILE"]).write_text(
        "\n".join([team, *lines, f"ops:{OPERATOR_KEY} role=operator", ""])
    )


@pytest.fixture(scope="module")
def front(backend: LlamaServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    settings = {"KEYS_WATCH_SECONDS": "0.2", "MAX_CONCURRENT_REQUESTS": "1", "MODEL_NAME": "tiny.gguf"}
    gateway = Gateway(tmp_path_factory.mktemp("front"), backend, **settings)
    write_keys(gateway, f"other:{OTHER_KEY}:1000000")
    yield from running(gateway)


@pytest.fixture
def tab(chromium: Chromium, front: Gateway) -> Iterator[Tab]:
    opened = chromium.open_tab(f"{front.url}/ui")
    yield opened
    opened.close()


def enter(tab: Tab, key: str) -> None:
    """Enter a key with the keyboard alone: the form has the focus."""
    tab.wait_for(ASKED)
    tab.type(key)
    tab.press("Enter")


def text(tab: Tab, name: str) -> str:
    return str(tab.evaluate(f"document.getElementById('{name}').innerText"))


def tab_to(tab: Tab, name: str) -> None:
    for _ in range(20):
        if tab.evaluate(FOCUSED) == name:
            return
        tab.press("Tab")
    raise AssertionError(f"Tab does not lead to {name}")


@contextmanager
def chat(front: Gateway, key: str = TEAM_KEY) -> Iterator[None]:
    """A chat that goes on, or waits, until the block ends."""
    body = json.dumps({"messages": [{"role": "user", "content": "the cat"}], "max_tokens": ENDLESS, "stream": True})
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {key}\r\nContent-Length: {len(body)}"
    )
    with socket.create_connection(("127.0.0.1", front.port)) as client:
        client.sendall(f"{head}\r\n\r\n{body}".encode())
        thread = threading.Thread(target=lambda: client.makefile("rb").read(), daemon=True)
        thread.start()
        try:
            yield
        finally:
            client.shutdown(socket.SHUT_RDWR)
            thread.join(30)


def check(tab: Tab, axe: Path) -> None:
    """Nothing was blocked, nothing is wider than a small phone, and axe-core finds nothing serious."""
    assert tab.violations == []
    assert not [line for line in tab.console if line.startswith(("exception", "error"))]
    assert tab.axe_findings(axe) == []
    tab.resize(320, 640)
    assert tab.sideways_pixels() == 0
    assert tab.axe_findings(axe) == []
    tab.resize(1280, 800)


def test_a_key_is_entered_and_kept_in_the_tab_alone(tab: Tab, axe: Path) -> None:
    tab.wait_for(ASKED)
    check(tab, axe)
    enter(tab, WRONG_KEY)
    tab.wait_for("document.getElementById('key-error').innerText")
    assert "invalid API key" in text(tab, "key-error")
    assert tab.evaluate("sessionStorage.length") == 0
    enter(tab, TEAM_KEY)
    tab.wait_for(SHOWN)
    assert text(tab, "about") == "tiny · key team"
    assert tab.evaluate("document.cookie + localStorage.length") == "0"
    tab.evaluate("window.old = true; location.reload()")
    tab.wait_for(f"!window.old && {SHOWN}")
    tab_to(tab, "leave")
    tab.press("Enter")
    tab.wait_for(ASKED)
    assert tab.evaluate("sessionStorage.length") == 0


def test_numbers_move_while_a_chat_runs_and_a_second_key_sees_none_of_them(
    chromium: Chromium, tab: Tab, front: Gateway, axe: Path
) -> None:
    enter(tab, OPERATOR_KEY)
    tab.wait_for(SHOWN)
    other = chromium.open_tab(f"{front.url}/ui")
    enter(other, OTHER_KEY)
    other.wait_for(SHOWN)
    with chat(front):
        cells = "[...document.querySelectorAll('#slots td')].map((cell) => cell.innerText).join('|')"
        tab.wait_for(f"{cells}.startsWith('team|/v1/chat/completions|')")
        tab.wait_for("Number(document.getElementById('pace').innerText.replace(',', '')) > 0")
        assert text(tab, "busy") == "1 of 1"
        before = tab.evaluate(cells)
        tab.wait_for(f"{cells} !== {json.dumps(before)}")
        with chat(front, OTHER_KEY):
            tab.wait_for(
                "document.querySelector('#queue td') && document.getElementById('queue').innerText.includes('other')"
            )
            other.wait_for("document.querySelector('#queue td')")
            check(tab, axe)
        assert "team" not in other.evaluate("document.body.innerText")
        assert text(other, "busy") == "0"
    tab.wait_for("document.getElementById('requests').innerText.includes('cancelled')")
    assert "team" not in other.evaluate("document.body.innerText")
    check(other, axe)
    other.close()


def test_the_keys_are_reloaded_after_a_confirmation(tab: Tab, front: Gateway, axe: Path) -> None:
    enter(tab, OPERATOR_KEY)
    tab.wait_for(SHOWN)
    tab_to(tab, "reload")
    tab.press("Enter")
    tab.wait_for("document.getElementById('ask').open")
    assert tab.evaluate(FOCUSED) == "Cancel"
    assert tab.axe_findings(axe) == []
    tab.press("Escape")
    tab.wait_for("!document.getElementById('ask').open")
    assert text(tab, "done") == ""
    tab_to(tab, "reload")
    tab.press("Enter")
    tab.wait_for("document.getElementById('ask').open")
    tab_to(tab, "ask-yes")
    tab.press("Enter")
    tab.wait_for("document.getElementById('done').innerText")
    assert text(tab, "done") == "3 keys are in force."


def test_a_key_that_is_revoked_ends_the_view(tab: Tab, front: Gateway) -> None:
    enter(tab, OTHER_KEY)
    tab.wait_for(SHOWN)
    assert tab.evaluate("document.getElementById('drain').hidden") is True
    write_keys(front)
    tab.wait_for(ASKED)
    assert text(tab, "key-error") == "This key is not valid any more."
    assert tab.evaluate("document.getElementById('board').hidden") is True
    write_keys(front, f"other:{OTHER_KEY}:1000000")
    eventually(lambda: fetch(f"{front.url}/v1/models", OTHER_KEY)[0], lambda status: status == 200, 10)


def test_a_drain_is_confirmed_and_stops_the_gateway(chromium: Chromium, backend: LlamaServer, tmp_path: Path) -> None:
    gateway = Gateway(tmp_path, backend)
    gateway.start()
    assert gateway.process is not None
    process = gateway.process
    tab = chromium.open_tab(f"{gateway.url}/ui")
    enter(tab, OPERATOR_KEY)
    tab.wait_for(SHOWN)
    tab_to(tab, "drain")
    tab.press("Enter")
    tab.wait_for("document.getElementById('ask').open")
    tab.press("Enter")  # Cancel has the focus
    tab.wait_for("!document.getElementById('ask').open")
    assert process.poll() is None
    tab_to(tab, "drain")
    tab.press("Enter")
    tab.wait_for("document.getElementById('ask').open")
    tab_to(tab, "ask-yes")
    tab.press("Enter")
    assert process.wait(15) == 0
    tab.wait_for("/stopping|No connection/.test(document.getElementById('notice').innerText)")
    assert tab.violations == []
    tab.close()
    assert gateway.end(15) == 0


def test_a_gateway_that_comes_back_is_found_again(chromium: Chromium, backend: LlamaServer, tmp_path: Path) -> None:
    gateway = Gateway(tmp_path, backend)
    for number in range(2):
        gateway.start()
        if number == 0:
            tab = chromium.open_tab(f"{gateway.url}/ui")
            enter(tab, TEAM_KEY)
        tab.wait_for(SHOWN + " && document.getElementById('notice').hidden")
        assert gateway.end(15) == 0
        tab.wait_for("!document.getElementById('notice').hidden")
    tab.close()


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_colours_have_enough_contrast(chromium: Chromium, front: Gateway, axe: Path, dark: bool) -> None:
    tab = chromium.open_tab(f"{front.url}/ui", dark=dark)
    enter(tab, OPERATOR_KEY)
    tab.wait_for(SHOWN)
    fetch(f"{front.url}/nowhere", TEAM_KEY)
    tab.wait_for("document.querySelector('#failures td')")
    assert tab.axe_findings(axe) == []
    tab.close()
