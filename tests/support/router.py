"""A scripted backend as a router of several models: it loads and unloads as it is told, when the test lets it.

    router = Router(stack.backend, "chat", "code")

Loads end at once unless `holds_loads`; then they end with `finish(name)` or `fail(name, status)`. Requests of clients
get the scripts of the backend.
"""

import json
from urllib.parse import parse_qs

from support.backend import STREAM_HEAD, Backend, Call, Step, answer, chunk, event, send, stall

REFUSED = b"400 Bad Request"


def refusal(message: str) -> bytes:
    error = {"error": {"code": 400, "message": message, "type": "invalid_request_error"}}
    return answer(json.dumps(error).encode(), REFUSED)


class Router:
    """`orders` has what it was told, such as "load chat". `slots` is that of each model."""

    def __init__(self, backend: Backend, *names: str, slots: int = 2) -> None:
        self.states = dict.fromkeys(names, "unloaded")
        self.exit_codes: dict[str, int] = {}
        self.aliases: dict[str, list[str]] = {}
        self.orders: list[str] = []
        self.slots = slots
        self.busy = 0  # how many of them the GET /slots of each model shows at work
        self.holds_loads = False
        self.refuses: str | None = None  # an order to load, with this message
        self._listeners: list[Call] = []
        self._backend = backend
        backend.own_steps = self._own_steps

    def finish(self, name: str) -> None:
        """A load has ended well."""
        self._set(name, "loaded")

    def fail(self, name: str, status: int = 1) -> None:
        """A load has failed, or a model has died."""
        self.exit_codes[name] = status
        self._set(name, "unloaded")

    def _set(self, name: str, state: str) -> None:
        self.states[name] = state
        for call in self._listeners:
            if not call.gone.is_set():
                call.connection.transport.write(chunk(event("{}")))

    def _own_steps(self, call: Call) -> tuple[Step, ...] | None:
        path, _, query = call.target.decode().partition("?")
        model = parse_qs(query).get("model", [""])[0]
        if path == "/models/sse":
            self._listeners.append(call)
            return send(STREAM_HEAD), stall()
        if path == "/models":
            return (send(answer(self.page())),)
        if path in ("/models/load", "/models/unload"):
            return (send(self._obey(path.rpartition("/")[2], json.loads(call.body)["model"])),)
        if path == "/props":
            return (send(answer(b'{"total_slots": %d}' % self.slots)),)
        if path == "/slots":
            listed = [{"id": number, "is_processing": number < self.busy} for number in range(self.slots)]
            return (send(answer(json.dumps(listed).encode()) if self.states.get(model) == "loaded" else refusal("no")),)
        return None

    def page(self) -> bytes:
        return json.dumps({"object": "list", "data": list(map(self._entry, self.states))}).encode()

    def _entry(self, name: str) -> dict[str, object]:
        status: dict[str, object] = {"value": self.states[name], "args": ["--model", f"/secret/{name}.gguf"]}
        if name in self.exit_codes and self.states[name] == "unloaded":
            status |= {"failed": True, "exit_code": self.exit_codes[name]}
        meta = {"meta": {"n_ctx": 4096}} if self.states[name] == "loaded" else {}
        return {"id": name, "created": 7, "aliases": self.aliases.get(name, []), "status": status, **meta}

    def _obey(self, action: str, name: str) -> bytes:
        self.orders.append(f"{action} {name}")
        if action == "load" and self.refuses is not None:
            return refusal(self.refuses)
        self.exit_codes.pop(name, None)
        if action == "load":
            self._set(name, "loading" if self.holds_loads else "loaded")
        else:
            self._set(name, "unloaded")
        return answer(b'{"success":true}')
