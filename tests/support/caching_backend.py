"""A backend that models llama-server's slots and what they hold, for tests of what keys learn from each other.

`Model` decides like llama-server b11434: which slot a request gets, what it finds there, and what it leaves. A prompt
is its text's characters. Each answer reports how many of them were in the slot. `seen` has what each request found,
with the request's own key, so that a test can tell whose text it was.
"""

import asyncio
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from support.backend import LAST_CHUNK, STREAM_HEAD, Backend, Call, Ended, Step, answer, chunk, event, send

_PINNING = ("/chat/completions", "/completions", "/completion", "/responses")
_ERASE = re.compile(rb"/slots/(\d+)\?action=erase")
_OK = b'{"id_slot": 0, "n_erased": 1}'


@dataclass
class ModelSlot:
    """A slot: the text that it holds, the key whose text that is, and whether a request is at work in it."""

    text: str = ""
    owner: str = ""
    busy: bool = False
    used: int = 0


@dataclass
class Found:
    """What one request found: how many characters of its prompt, and the key that left them."""

    key: str
    cached: int
    owner: str


@dataclass
class Model:
    """The slots. It can empty slots (`erases`) and list them (`lists`); with a `host_cache` prompts outlive that.

    `delay` returns for how many iterations of the loop a request's text is made into tokens.
    """

    total: int = 4
    erases: bool = True
    lists: bool = True
    host_cache: bool = False
    delay: Callable[[], int] = lambda: 0
    seen: list[Found] = field(default_factory=list)
    kept: set[str] = field(default_factory=set)
    uses: int = 0
    processes: int = 1

    def __post_init__(self) -> None:
        self.slots = [ModelSlot() for _ in range(self.total)]
        self._freed = asyncio.Condition()
        self._erasing: asyncio.Event | None = None

    def restart(self, backend: Backend, total: int) -> None:
        """It crashes, with all that is at work, and starts again."""
        self.processes += 1
        self.total = total
        self.slots = [ModelSlot() for _ in range(total)]
        self.kept.clear()
        for connection in backend.open:
            connection.transport.abort()

    # --- One task ---

    def choose(self, path: str, body: dict[str, Any], prompt: str) -> ModelSlot | None:
        """The slot of a task; None if it has to wait."""
        wanted = body.get("id_slot", -1)
        if path.endswith(_PINNING) and isinstance(wanted, int) and wanted >= 0:
            slot = self.slots[wanted % len(self.slots)]
            return None if slot.busy else slot
        idle = [slot for slot in self.slots if not slot.busy]
        if not idle:
            return None
        best = max(idle, key=lambda slot: common(slot.text, prompt))
        if common(best.text, prompt) > len(prompt) / 10:
            return best
        return min(idle, key=lambda slot: slot.used)

    def begin(self, slot: ModelSlot, key: str, path: str, body: dict[str, Any], prompt: str) -> int:
        """Start a task; return how much of its prompt was found."""
        cached = common(slot.text, prompt)
        if path.endswith(_PINNING) and body.get("cache_prompt") is False:
            cached = 0
        if self.host_cache and any(common(text, prompt) > cached for text in self.kept):
            cached = max(common(text, prompt) for text in self.kept)
        self.kept.add(slot.text)
        self.seen.append(Found(key, cached, slot.owner))
        self.uses += 1
        slot.text, slot.owner, slot.busy, slot.used = prompt, key, True, self.uses
        return cached

    async def take(self, process: int, key: str, path: str, body: dict[str, Any], prompt: str) -> tuple[ModelSlot, int]:
        """Wait for a slot, and start a task of one process. Raises Ended if it has crashed."""
        async with self._freed:
            while process == self.processes and (slot := self.choose(path, body, prompt)) is None:
                await self._freed.wait()
            if process != self.processes:
                raise Ended
            return slot, self.begin(slot, key, path, body, prompt)

    async def free(self, slot: ModelSlot) -> None:
        async with self._freed:
            slot.busy = False
            self._freed.notify_all()

    def hold_erase(self) -> asyncio.Event:
        """Never finish the next order to empty a slot. The event is set once it has come."""
        self._erasing = asyncio.Event()
        return self._erasing

    async def erase(self, number: int) -> None:
        """Empty a slot, once it is idle."""
        if self._erasing is not None:
            self._erasing.set()
            self._erasing = None
            await asyncio.get_running_loop().create_future()
        async with self._freed:
            slot = self.slots[number % len(self.slots)]
            while slot.busy:
                await self._freed.wait()
            slot.text = slot.owner = ""


def common(one: str, other: str) -> int:
    """How many characters two texts have in common, from the first on."""
    length = min(len(one), len(other))
    return next((at for at in range(length) if one[at] != other[at]), length)


def prompts_of(body: dict[str, Any]) -> list[str]:
    """The prompt of each task of a body."""
    given = body.get("prompt", body.get("input", body.get("documents", body.get("messages", ""))))
    listed = given if isinstance(given, list) and all(isinstance(each, str) for each in given) else [given]
    texts = [each if isinstance(each, str) else json.dumps(each) for each in listed]
    return [text for text in texts for _ in range(body.get("n") or 1)]


def install(backend: Backend, model: Model) -> None:
    """Let a scripted backend answer as the model does."""

    def own(call: Call) -> tuple[Step, ...] | None:
        if call.target == b"/slots" and model.lists:
            return (_list(model),)
        erase = _ERASE.fullmatch(call.target)
        if erase is not None:
            return (_erase(model, int(erase[1])),) if model.erases else (send(answer(b"{}", b"501 Not Implemented")),)
        if call.target == b"/completion":
            return (_work(model, "gateway"),)
        return None

    backend.own_steps = own
    backend.choose = lambda call: (_work(model, _key_of(call)),)


def _key_of(call: Call) -> str:
    """The client's key, as the test has put it into the request."""
    return call.fields[b"x-client"].decode()


def _list(model: Model) -> Step:
    async def step(call: Call) -> None:
        listed = [{"id": number, "is_processing": slot.busy} for number, slot in enumerate(model.slots)]
        await send(answer(json.dumps(listed).encode()))(call)

    return step


def _erase(model: Model, number: int) -> Step:
    async def step(call: Call) -> None:
        await model.erase(number)
        await send(answer(_OK))(call)

    return step


def _work(model: Model, key: str) -> Step:
    """Work on all tasks of a request, and answer; `"hold": true` works until the client leaves."""

    async def step(call: Call) -> None:
        text = call.body
        body = json.loads(text) if text.startswith(b"{") else {"prompt": text.decode("latin-1")}
        work = Work(model, key, call, body)
        cached = max(await asyncio.gather(*map(work.run, prompts_of(body))))
        last = json.dumps({"timings": {"cache_n": cached, "prompt_n": 1, "predicted_n": 1}})
        if body.get("stream"):
            await send(chunk(event(last)) + LAST_CHUNK)(call)
        else:
            await send(answer(last.encode()))(call)

    return step


class Work:
    """The tasks of one request. Each is queued after a while, whether the client is still there or not."""

    def __init__(self, model: Model, key: str, call: Call, body: dict[str, Any]) -> None:
        self._model, self._key, self._call, self._body = model, key, call, body
        self._has_begun = False

    async def run(self, prompt: str) -> int:
        """Run one task; return how much of its prompt was found."""
        model, call, body, process = self._model, self._call, self._body, self._model.processes
        for _ in range(model.delay()):
            await asyncio.sleep(0)
        slot, cached = await model.take(process, self._key, call.target.decode(), body, prompt)
        try:
            if body.get("stream") and not self._has_begun:
                self._has_begun = True
                await send(STREAM_HEAD + chunk(event('{"delta": "x"}')))(call)
            if body.get("hold"):
                await call.gone.wait()
        except Ended:
            return cached
        finally:
            await model.free(slot)
        return cached
