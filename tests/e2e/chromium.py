"""A headless Chromium that a test drives, over the pipe of its DevTools protocol. It needs no package.

    with Chromium(path, folder) as chromium:
        tab = chromium.open_tab(url)
        tab.wait_for("document.querySelector('#text')")
        tab.type("hello")
        tab.press("Enter")

A tab keeps what its console says, and each violation of a Content-Security-Policy.
"""

import base64
import json
import os
import queue
import shutil
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

PATIENCE_S = 60.0
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"),
    *("--hide-scrollbars", "--remote-debugging-pipe"),
)
# key: code, key code, text
KEYS = {
    "Enter": ("Enter", 13, "\r"),
    "Tab": ("Tab", 9, ""),
    "Escape": ("Escape", 27, ""),
    "Space": ("Space", 32, " "),
    "ArrowDown": ("ArrowDown", 40, ""),
}
SHIFT = 8
WATCH = """
window.violations = [];
document.addEventListener("securitypolicyviolation", (event) => {
  const told = `${event.effectiveDirective} blocks ${event.blockedURI} (${event.sourceFile}:${event.lineNumber})`;
  window.violations.push(told);
  console.error(`CSP: ${told}`);
});
"""


class Chromium:
    """The browser's process. Each tab has a context of its own: no storage and no cache is shared."""

    def __init__(self, path: str, folder: Path) -> None:
        self._path = path
        self._profile = folder / "profile"
        self._log = folder / "chromium.log"
        self._answers: dict[int, queue.Queue[dict[str, Any]]] = {}
        self._tabs: dict[str, Tab] = {}
        self._number = 0

    def __enter__(self) -> "Chromium":
        # Chromium reads its commands from descriptor 3 and writes to 4.
        commands, self._commands = os.pipe()
        self._events, events = os.pipe()
        shell = f'exec "$@" 3<&{commands} 4>&{events}'
        command = [
            "bash",
            "-c",
            shell,
            "chromium",
            self._path,
            *FLAGS,
            f"--user-data-dir={self._profile}",
            "about:blank",
        ]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=(commands, events)
            )
        os.close(commands)
        os.close(events)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with suppress(OSError):
            self._send({"id": 0, "method": "Browser.close"})
        try:
            self._process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join(PATIENCE_S)
        os.close(self._commands)
        os.close(self._events)
        shutil.rmtree(self._profile, ignore_errors=True)

    def _send(self, message: dict[str, Any]) -> None:
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._commands, data) :]

    def _read(self) -> None:
        held = b""
        while piece := os.read(self._events, 1 << 16):
            *whole, held = (held + piece).split(b"\0")
            for each in whole:
                self._take(json.loads(each))

    def _take(self, message: dict[str, Any]) -> None:
        if "id" in message:
            waiting = self._answers.pop(message["id"], None)
            if waiting is not None:
                waiting.put(message)
        elif (tab := self._tabs.get(message.get("sessionId", ""))) is not None:
            tab.note(message["method"], message["params"])

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """Send a command, and return its result. Raises AssertionError if it fails."""
        self._number += 1
        number = self._number
        waiting = self._answers[number] = queue.Queue(1)
        target = {} if session is None else {"sessionId": session}
        self._send({"id": number, "method": method, "params": parameters, **target})
        try:
            answer = waiting.get(timeout=PATIENCE_S)
        except queue.Empty:
            raise AssertionError(f"no answer to {method}:\n{self._log.read_text(errors='replace')[-4000:]}") from None
        assert "error" not in answer, (method, answer["error"])
        return dict(answer["result"])

    def open_tab(self, url: str, width: int = 1280, height: int = 800, *, dark: bool = False) -> "Tab":
        """Open an address in a new context."""
        context = self.call("Target.createBrowserContext")["browserContextId"]
        target = self.call("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        tab = self._tabs[session] = Tab(self, session, context)
        tab.prepare(width, height, dark=dark)
        tab.open(url)
        return tab


class Tab:
    """A page in the browser."""

    def __init__(self, chromium: Chromium, session: str, context: str) -> None:
        self._chromium = chromium
        self._session = session
        self._context = context
        self.console: list[str] = []
        self.violations: list[str] = []
        self.failed: list[str] = []  # requests that got a status of 400 or more, or none

    def note(self, method: str, parameters: dict[str, Any]) -> None:
        if method == "Runtime.consoleAPICalled":
            text = " ".join(str(each.get("value", each.get("description", ""))) for each in parameters["args"])
            self.console.append(f"{parameters['type']}: {text}")
            if text.startswith("CSP: "):
                self.violations.append(text)
        elif method == "Runtime.exceptionThrown":
            details = parameters["exceptionDetails"]
            self.console.append(f"exception: {details.get('exception', {}).get('description', details['text'])}")
        elif method == "Log.entryAdded":
            entry = parameters["entry"]
            self.console.append(f"{entry['source']}: {entry['text']}")
            if "Content Security Policy" in entry["text"]:
                self.violations.append(entry["text"])
        elif method == "Network.responseReceived" and parameters["response"]["status"] >= 400:
            self.failed.append(f"{parameters['response']['status']} {parameters['response']['url']}")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self._chromium.call(method, self._session, **parameters)

    def prepare(self, width: int, height: int, *, dark: bool) -> None:
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Page.addScriptToEvaluateOnNewDocument", source=WATCH)
        self.resize(width, height)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def resize(self, width: int, height: int) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    def open(self, url: str) -> None:
        result = self.call("Page.navigate", url=url)
        assert "errorText" not in result, result

    def close(self) -> None:
        self._chromium.call("Target.disposeBrowserContext", browserContextId=self._context)

    def evaluate(self, expression: str) -> Any:
        """Return the value of an expression, or of the promise that it is. Raises AssertionError if it throws."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait_for(self, expression: str, within_s: float = PATIENCE_S) -> Any:
        """Evaluate until the value is true, or an element; return it. A page may be replaced meanwhile."""
        give_up_s = time.monotonic() + within_s
        error: object = None
        while time.monotonic() < give_up_s:
            try:
                if value := self.evaluate(f"((value) => value instanceof Node || value)({expression})"):
                    return value
            except AssertionError as problem:
                error = problem
            time.sleep(0.05)
        shown = self.evaluate("document.body ? document.body.innerText : ''")
        raise AssertionError(f"never true: {expression}\n{error}\n{shown[:2000]}\n" + "\n".join(self.console[-20:]))

    # --- The keyboard ---

    def type(self, text: str) -> None:
        """Insert text where the focus is."""
        self.call("Input.insertText", text=text)

    def press(self, key: str, *, shift: bool = False) -> None:
        code, number, text = KEYS[key]
        one = {"key": " " if key == "Space" else key, "code": code, "windowsVirtualKeyCode": number}
        one["modifiers"] = SHIFT if shift else 0
        self.call(
            "Input.dispatchKeyEvent",
            type="keyDown" if text else "rawKeyDown",
            **one,
            **({"text": text} if text else {}),
        )
        self.call("Input.dispatchKeyEvent", type="keyUp", **one)

    # --- What it looks like ---

    def sideways_pixels(self) -> int:
        """Return by how many pixels the page is wider than the window."""
        return int(self.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth"))

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def axe_findings(self, axe: Path, least: tuple[str, ...] = ("serious", "critical")) -> list[str]:
        """Return what axe-core finds in the page, with the elements that are concerned."""
        self.evaluate(axe.read_text() + "; true")
        found = json.loads(self.evaluate("axe.run().then((result) => JSON.stringify(result.violations))"))
        return [
            f"{each['impact']} {each['id']}: {[node['html'][:120] for node in each['nodes']]}"
            for each in found
            if each["impact"] in least
        ]
