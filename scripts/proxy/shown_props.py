"""GET /props: all of it for operators; for other keys what a chat page needs, without the paths of the machine."""

import asyncio
import json
from collections.abc import Mapping
from functools import partial
from urllib.parse import parse_qs, urlencode

from auth import Caller
from backend.readiness import READY, Readiness
from core.errors import BACKEND_MALFORMED, BACKEND_TIMEOUT, DRAINING, LOADING, GatewayError
from core.off_loop import run_off_loop
from policy.model_names import ModelNames
from policy.prepared_request import PreparedRequest
from proxy.lifecycle import Lifecycle
from proxy.page_files import MAX_AT_ONCE, Fetch
from proxy.relay import backend_error
from transport.client_protocol import ClientProtocol

# fmt: off
_SHOWN = frozenset((
    "total_slots", "model_ftype", "modalities", "media_marker", "endpoint_slots", "endpoint_props", "endpoint_metrics",
    "ui", "webui", "ui_settings", "webui_settings", "chat_template", "chat_template_tool_use", "chat_template_caps",
    "bos_token", "eos_token", "build_info", "is_sleeping", "role", "max_instances", "models_autoload",
    "cors_proxy_enabled",
))
# fmt: on
_GENERATION = "default_generation_settings"
_SHOWN_OF_GENERATION = ("n_ctx", "params")  # older llama-servers tell all of a slot there
_NAMED = ("model_path", "model_alias")  # may be paths
_MAX_BYTES = 1 << 20


class ShownProps:
    """Asks the backend for its properties, and says what a caller may read of them."""

    def __init__(
        self,
        fetch: Fetch,
        readiness: Readiness,
        lifecycle: Lifecycle,
        request_s: float,
        names: ModelNames | None = None,
    ) -> None:
        """`request_s` bounds the wait for the backend, in seconds. `names` are those of several models."""
        self._fetch = fetch
        self._readiness = readiness
        self._lifecycle = lifecycle
        self._request_s = request_s
        self._names = names
        self._free: asyncio.Semaphore | None = None

    async def find(self, client: ClientProtocol, prepared: PreparedRequest, caller: Caller) -> tuple[int, bytes]:
        """Return the status and the body of the answer.

        Raises DRAINING, LOADING, MODEL_NOT_FOUND, MODEL_NOT_ALLOWED, or the backend's own error.
        """
        if self._lifecycle.draining:
            raise GatewayError(DRAINING)
        if self._readiness.has_news():
            await client.run(self._readiness.catch_up(), self._request_s, LOADING)
        if self._readiness.state != READY:
            raise GatewayError(LOADING, self._readiness.detail or "The model is loading.")
        target = self._target(prepared.target, caller)
        status, page = await client.run(self._ask(target), self._request_s, BACKEND_TIMEOUT)
        if caller.is_operator:
            return status, page
        if status != 200:
            raise backend_error(status, page)
        return 200, await client.wait_for(run_off_loop(partial(shown, page)), self._request_s, BACKEND_TIMEOUT)

    def _target(self, target: bytes, caller: Caller) -> bytes:
        if self._names is not None:
            named = model_of(target)
            return shown_target(self._names.resolve(named, caller.models) if named else None)
        return target if caller.is_operator else shown_target(model_of(target))

    async def _ask(self, target: bytes) -> tuple[int, bytes]:
        if self._free is None:
            self._free = asyncio.Semaphore(MAX_AT_ONCE)
        async with self._free:
            fetched = await self._fetch(target, b"", _MAX_BYTES)
        return fetched.head.status, b"".join(fetched.pieces)


def model_of(target: bytes) -> str | None:
    """Return the model that the query of a target names."""
    return parse_qs(target.partition(b"?")[2].decode("ascii", "replace")).get("model", [None])[-1]


def shown_target(model: str | None) -> bytes:
    """Return the target that asks for the properties of a model, and does not load it."""
    models = {} if model is None else {"model": model}
    return b"/props?" + urlencode({**models, "autoload": "false"}).encode()


def shown(page: bytes) -> bytes:
    """Return the properties that every key may read. Raises BACKEND_MALFORMED if they are no JSON object."""
    try:
        props = json.loads(page)
    except (ValueError, RecursionError):
        props = None
    if not isinstance(props, Mapping):
        raise GatewayError(BACKEND_MALFORMED, "The backend's properties are not a JSON object.")
    found = {name: value for name, value in props.items() if name in _SHOWN}
    generation = props.get(_GENERATION)
    if isinstance(generation, Mapping):
        found[_GENERATION] = {name: generation[name] for name in _SHOWN_OF_GENERATION if name in generation}
    for name in _NAMED:
        if isinstance(props.get(name), str):
            found[name] = props[name].replace("\\", "/").rpartition("/")[2]
    return json.dumps(found).encode()
