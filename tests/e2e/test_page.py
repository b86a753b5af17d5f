"""The pages in a real browser: llama-server's own and the gateway's, with the real llama-server behind them."""

import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from chromium import Chromium, Tab
from stack import OPERATOR_KEY, TEAM_KEY, Gateway, LlamaServer, eventually, fetch, running

OTHER_KEY = "sk-e2e-other-0123456789abcdef"
WRONG_KEY = "sk-e2e-wrong-0123456789abcdef"
QUESTION = "the cat is on the moon"
# pdf.js in llama-server's page looks whether it may use eval, and does without it.
PROBE = re.compile(r"CSP: script-src blocks eval \(\S+/_app/immutable/bundle\.\S+\)")
BUTTON = "[...document.querySelectorAll('button')].find((each) => /{0}/.test(each.ariaLabel || each.innerText))"
FOCUSED = (
    "((each) => each.tagName === 'BUTTON' ? each.ariaLabel || each.innerText : each.tagName)(document.activeElement)"
)


class Early(Gateway):
    """A gateway that need not be ready: its backend may not have started."""

    def is_ready(self) -> bool:
        return fetch(f"{self.url}/ping")[0] == 200


def with_keys(gateway: Gateway, *keys: str) -> None:
    """Let these keys be in force, and no others."""
    lines = [f"key{number}:{key}:1000000" for number, key in enumerate(keys)]
    Path(gateway.settings["AUTH_KEYS_FILE"]).write_text(
        "\n".join([*lines, f"ops:{OPERATOR_KEY}:100 role=operator", ""])
    )


@pytest.fixture(scope="module")
def chromium(browser: tuple[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    with Chromium(browser[0], tmp_path_factory.mktemp("chromium")) as found:
        yield found


@pytest.fixture(scope="module")
def axe(browser: tuple[str, Path]) -> Path:
    return browser[1] / "node_modules" / "axe-core" / "axe.min.js"


@pytest.fixture(scope="module")
def with_page(
    llama_bin: str, model: Path, page_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LlamaServer]:
    """A llama-server with its page, and with one slot."""
    yield from running(LlamaServer(tmp_path_factory.mktemp("page"), llama_bin, model, 1, page_folder))


@pytest.fixture(scope="module")
def front(with_page: LlamaServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    gateway = Gateway(tmp_path_factory.mktemp("front"), with_page, KEYS_WATCH_SECONDS="0.2")
    with_keys(gateway, TEAM_KEY, OTHER_KEY)
    yield from running(gateway)


@pytest.fixture
def tab(chromium: Chromium, front: Gateway) -> Iterator[Tab]:
    opened = chromium.open_tab(f"{front.url}/")
    yield opened
    opened.close()


# --- llama-server's page ---


def tab_to(tab: Tab, name: str) -> None:
    """Press Tab until the button with this name, or the element of this kind, has the focus."""
    for _ in range(40):
        if re.search(name, str(tab.evaluate(FOCUSED))):
            return
        tab.press("Tab")
    raise AssertionError(f"Tab does not lead to {name}")


def enter_key(tab: Tab, key: str) -> None:
    """Enter a key into llama-server's page, with the keyboard alone."""
    tab.wait_for(BUTTON.format("Enter API Key"))
    tab_to(tab, "Enter API Key")
    tab.press("Enter")
    tab.wait_for("document.querySelector('input')")
    tab_to(tab, "INPUT")
    tab.type(key)
    tab.press("Enter")


def ask(tab: Tab, question: str = QUESTION) -> None:
    tab.wait_for("document.querySelector('textarea')")
    tab_to(tab, "TEXTAREA")
    tab.type(question)
    tab.press("Enter")


def shown(tab: Tab) -> str:
    return str(tab.evaluate("document.body.innerText"))


def test_a_key_is_entered_a_chat_streams_and_stop_frees_the_slot(tab: Tab, with_page: LlamaServer) -> None:
    enter_key(tab, TEAM_KEY)
    ask(tab)
    tab.wait_for(BUTTON.format("^Stop"))
    eventually(with_page.busy, lambda busy: busy == 1, 10)
    before = len(shown(tab))
    eventually(lambda: len(shown(tab)), lambda length: length > before, 10)
    tab.evaluate(BUTTON.format("^Stop") + ".click()")
    with_page.all_free()
    tab.resize(320, 640)
    assert tab.sideways_pixels() == 0
    assert [each for each in tab.violations if not PROBE.fullmatch(each)] == []


def test_another_key_sees_nothing_of_the_first(tab: Tab, chromium: Chromium, front: Gateway) -> None:
    enter_key(tab, TEAM_KEY)
    ask(tab, "my secret is in this question")
    tab.wait_for(BUTTON.format("^Stop"))
    second = chromium.open_tab(f"{front.url}/")
    enter_key(second, OTHER_KEY)
    second.wait_for("document.querySelector('textarea')")
    assert "secret" not in shown(second)
    fields = f"{{headers: {{Authorization: 'Bearer {OTHER_KEY}'}}}}"
    assert second.evaluate(f"fetch('./slots', {fields}).then((answer) => answer.status)") == 403
    second.close()
    tab.evaluate(BUTTON.format("^Stop") + ".click()")


def test_a_wrong_key_leads_nowhere(tab: Tab) -> None:
    enter_key(tab, WRONG_KEY)
    tab.wait_for("/denied|invalid/i.test(document.body.innerText)")
    assert not tab.evaluate("!!document.querySelector('textarea')")
    assert "403" not in " ".join(tab.failed)


def test_a_revoked_key_is_refused_in_the_page(tab: Tab, front: Gateway) -> None:
    enter_key(tab, OTHER_KEY)
    tab.wait_for("document.querySelector('textarea')")
    with_keys(front, TEAM_KEY)
    try:
        eventually(lambda: fetch(f"{front.url}/v1/models", OTHER_KEY)[0], lambda status: status == 401, 10)
        ask(tab)
        tab.wait_for("/invalid API key|Access denied/i.test(document.body.innerText)")
    finally:
        with_keys(front, TEAM_KEY, OTHER_KEY)
    eventually(lambda: fetch(f"{front.url}/v1/models", OTHER_KEY)[0], lambda status: status == 200, 10)


def test_a_stranger_gets_every_file_as_it_is(front: Gateway, page_folder: Path) -> None:
    files = {f"/{path.relative_to(page_folder)}": path for path in page_folder.rglob("*") if path.is_file()}
    assert len(files) > 60
    for target, path in files.items():
        assert fetch(front.url + target) == (200, path.read_bytes()), target
    for target in ("/slots", "/props", "/v1/models", "/tools", "/_app/", "/_app/../slots", "/.git/config"):
        assert fetch(front.url + target)[0] == 401, target


# --- The gateway's own pages ---


@pytest.fixture
def own(chromium: Chromium, backend: LlamaServer, tmp_path: Path) -> Iterator[tuple[Gateway, Tab]]:
    """A gateway in front of a llama-server without a page, and a tab with the gateway's own chat, as on a phone."""
    gateway = Gateway(tmp_path, backend, KEYS_WATCH_SECONDS="0.2")
    with_keys(gateway, TEAM_KEY, OTHER_KEY)
    for _ in running(gateway):
        tab = chromium.open_tab(f"{gateway.url}/", 320, 640, dark=True)
        yield gateway, tab
        tab.close()
        assert tab.violations == []


def test_the_own_chat_with_the_keyboard_alone(own: tuple[Gateway, Tab], backend: LlamaServer, axe: Path) -> None:
    _, tab = own
    tab.wait_for("document.activeElement.id === 'key'")
    assert (tab.sideways_pixels(), tab.axe_findings(axe)) == (0, [])
    tab.type(WRONG_KEY)
    tab.press("Enter")
    tab.wait_for("/Missing or invalid API key/.test(document.getElementById('key-error').textContent)")
    tab.evaluate("document.getElementById('key').value = ''")
    tab.type(TEAM_KEY)
    tab.press("Enter")
    tab.wait_for("document.activeElement.id === 'text'")
    assert tab.evaluate("document.getElementById('model').value") == "tiny"
    tab.type("the cat")
    tab.press("Enter", shift=True)
    tab.type("and the dog")
    tab.press("Enter")
    tab.wait_for("document.querySelectorAll('article').length === 2")
    assert tab.wait_for("document.querySelector('article.mine p').textContent") == "the cat\nand the dog"
    tab.wait_for("document.querySelector('article:not(.mine) p')?.textContent.length > 200")
    tab.press("Escape")
    tab.wait_for("document.getElementById('state').textContent === 'Stopped.'")
    backend.all_free()
    assert (tab.sideways_pixels(), tab.axe_findings(axe)) == (0, [])
    tab.wait_for("document.activeElement.id === 'text'")
    tab_to(tab, "New chat")
    tab.press("Enter")
    tab.wait_for("document.querySelectorAll('article').length === 0")


def test_a_key_of_the_own_chat_is_revoked_and_another_sees_nothing(own: tuple[Gateway, Tab]) -> None:
    gateway, tab = own
    tab.wait_for("document.activeElement.id === 'key'")
    tab.type(TEAM_KEY)
    tab.press("Enter")
    tab.wait_for("document.activeElement.id === 'text'")
    tab.type(QUESTION)
    tab.press("Enter")
    tab.wait_for("document.querySelector('article:not(.mine) p')")
    tab.press("Escape")
    tab.wait_for("document.activeElement.id === 'text'")
    assert tab.evaluate("sessionStorage.length + localStorage.length + document.cookie.length") == 1
    with_keys(gateway, OTHER_KEY)
    eventually(lambda: fetch(f"{gateway.url}/v1/models", TEAM_KEY)[0], lambda status: status == 401, 10)
    tab.type("again")
    tab.press("Enter")
    tab.wait_for("document.activeElement.id === 'key'")
    assert "invalid API key" in shown(tab)
    tab.type(OTHER_KEY)
    tab.press("Enter")
    tab.wait_for("document.activeElement.id === 'text'")
    assert "cat" not in shown(tab)


def test_a_page_that_is_opened_while_the_model_loads(
    chromium: Chromium, llama_bin: str, model: Path, page_folder: Path, axe: Path, tmp_path: Path
) -> None:
    late = LlamaServer(tmp_path, llama_bin, model, 1, page_folder)
    gateway = Early(tmp_path, late)
    gateway.start()
    tab = chromium.open_tab(f"{gateway.url}/", 320, 640)
    try:
        tab.wait_for("document.getElementById('title').textContent === 'The model is loading'")
        tab.wait_for("document.getElementById('since').textContent")
        assert (tab.sideways_pixels(), tab.axe_findings(axe), tab.violations) == (0, [], [])
        late.start()
        tab.wait_for("/Enter API Key/.test(document.body.innerText)")
    finally:
        tab.close()
        gateway.end(signal.SIGTERM)
        late.end(signal.SIGTERM)


def test_the_own_chat_in_light_on_a_wide_window(own: tuple[Gateway, Tab], chromium: Chromium, axe: Path) -> None:
    gateway, _ = own
    tab = chromium.open_tab(f"{gateway.url}/")
    tab.wait_for("document.activeElement.id === 'key'")
    assert tab.axe_findings(axe) == []
    tab.type(TEAM_KEY)
    tab.press("Enter")
    tab.wait_for("document.activeElement.id === 'text'")
    tab.type("x")
    tab.press("Enter")
    tab.wait_for("document.querySelector('article:not(.mine) p')")
    tab.press("Escape")
    tab.wait_for("document.getElementById('state').textContent === 'Stopped.'")
    assert tab.axe_findings(axe) == []
    tab.close()
