"""What the supervisor asks llama-server as a router: the states of its models, and to load or unload one."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from urllib.parse import urlencode

from boot.probes import Address, ProbeResponse, probe

RUNNING = frozenset(("loading", "loaded", "sleeping"))
_NOT_SUPPORTED = 501


@dataclass(frozen=True)
class ModelState:
    """A model as GET /models lists it. `status` is llama-server's word; `port` is its process's, None before a load.

    `exit_code` is that of a process that has failed, None if none has.
    """

    name: str
    status: str
    port: int | None = None
    exit_code: int | None = None

    @property
    def running(self) -> bool:
        return self.status in RUNNING


class RouterClient:
    """Requests to one router, each with a deadline. `listener` is the identity of its listener (see core.listener)."""

    def __init__(self, address: Address, key: str, timeout_s: float) -> None:
        self.listener: int | None = None
        self._address = address
        self._key = key
        self._timeout_s = timeout_s

    async def models(self) -> Mapping[str, ModelState] | None:
        """Return the states of all models by name; None if the router does not tell them."""
        return parse_models(await self._ask("/models"))

    async def load(self, name: str) -> str:
        """Begin to load a model; return why it is not loaded, or ""."""
        return _refusal(await self._ask("/models/load", {"model": name}))

    async def unload(self, name: str) -> str:
        """Begin to end a model; return why it is not ended, or ""."""
        return _refusal(await self._ask("/models/unload", {"model": name}))

    async def slots_respond(self, name: str, timeout_s: float) -> bool:
        """Return whether the loop of a loaded model answers. The question loads none.

        A response of the router itself, that it cannot reach the model, does not count.
        """
        path = f"/slots?{urlencode({'model': name, 'autoload': 'false'})}"
        response = await self._ask(path, timeout_s=timeout_s)
        return response is not None and (response.status < 500 or response.status == _NOT_SUPPORTED)

    async def _ask(self, path: str, body: object = None, timeout_s: float | None = None) -> ProbeResponse | None:
        limit_s = self._timeout_s if timeout_s is None else timeout_s
        data = None if body is None else json.dumps(body).encode()
        return await probe(self._address, path, limit_s, self._key, listener=self.listener, body=data)


def parse_models(response: ProbeResponse | None) -> Mapping[str, ModelState] | None:
    """Parse GET /models; None if it is not a router's list."""
    try:
        rows = json.loads(response.body)["data"] if response and response.status == 200 else None
        return None if rows is None else {row["id"]: _parse_row(row) for row in rows}
    except (ValueError, TypeError, KeyError):
        return None


def _parse_row(row: Mapping[str, object]) -> ModelState:
    status = row["status"]
    if not isinstance(status, dict):
        raise TypeError("not a router's row")
    exit_code = status.get("exit_code") if status.get("failed") else None
    return ModelState(str(row["id"]), str(status["value"]), _port(status.get("args", ())), exit_code)


def _port(arguments: Sequence[str]) -> int | None:
    following = dict(pairwise(arguments))
    port = following.get("--port", "")
    return int(port) if port.isdigit() and port != "0" else None


def _refusal(response: ProbeResponse | None) -> str:
    """Return the message of a response that is an error; "" if it is none."""
    if response is None:
        return "llama-server does not answer"
    if response.status == 200:
        return ""
    try:
        return str(json.loads(response.body)["error"]["message"])
    except (ValueError, TypeError, KeyError):
        return f"llama-server answers with status {response.status}"
