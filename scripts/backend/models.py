"""The models of a llama-server that runs as a router: it looks which are loaded, and loads and unloads as is decided.

The state comes from GET /models alone. The router's stream of events (GET /models/sse) only says when to look; without
it, the gateway looks now and then, and often while a model loads.
"""

import asyncio
import contextlib
import json
import logging
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from typing import Any, Protocol
from urllib.parse import quote

from backend.generation_watch import AtWork
from backend.slots import Fetch, SlotReclaimer, UnfitBackend, total_slots
from core.errors import BACKEND_MALFORMED, BACKEND_TIMEOUT, GatewayError
from policy.model_names import ModelNames
from policy.model_scheduler import LoadState, Model, ModelScheduler, Order

log = logging.getLogger("gateway")

_LOOK_S = 2.0  # between two looks, if the router reports no change
_LOOK_LOADING_S = 0.1  # while a model is loaded or unloaded
_SHORTEST_S = 0.001
_LISTEN_AGAIN_S = 5.0
_ORDER_S = 30.0  # for the router to take an order
_UNLOAD_AGAIN_S = 15.0  # a model that is still there is told again
_POSTPONED_S = 1.0
_NOTICED_S = 5.0  # in which the router notices that a model's process has ended
_ANSWER_S = 0.5  # for a process that lives to answer
_MAX_MODELS = 1000
_STATES = {"loaded": LoadState.LOADED, "sleeping": LoadState.LOADED, "loading": LoadState.LOADING}
_REASON_S = 1.0  # for the supervisor to read in llama-server's output why a model has failed
_REASON_LOOK_S = 0.1
# The folders of a path, which clients need not know; between quotes they may have spaces.
_FOLDERS = re.compile(r"""(?<=')/[^']*/|(?<=")/[^"]*/|(?<![^\s=(:])/(?:[^\s'"/]+/)+""")
_LIMIT_REACHED = "limit reached"  # by models that another client has loaded


class RouterFetcher(Protocol):
    """Sends requests to the router (see BackendFetcher)."""

    def __call__(self, target: bytes) -> Awaitable[tuple[int, bytes]]: ...

    def post(self, target: bytes, body: bytes) -> Awaitable[tuple[int, bytes]]: ...

    def listen(self, target: bytes, on_data: Callable[[], None]) -> Awaitable[None]: ...


@dataclass(frozen=True, slots=True)
class ListedModel:
    """One entry of the router's list. `exit_status` is that of its last process if it has failed."""

    name: str
    state: LoadState
    aliases: tuple[str, ...]
    created_at: int
    context: int | None
    exit_status: int | None


def parse_list(page: bytes) -> list[ListedModel]:
    """Read the router's answer to GET /models. Raises BACKEND_MALFORMED."""
    try:
        entries = json.loads(page)["data"]
        return [_listed(entry) for entry in entries[:_MAX_MODELS]]
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        raise GatewayError(BACKEND_MALFORMED, "llama-server's list of models cannot be read.") from None


def _listed(entry: Mapping[str, Any]) -> ListedModel:
    status = entry.get("status") or {}
    exit_status = status.get("exit_code") if status.get("failed") else None
    context = (entry.get("meta") or {}).get("n_ctx")
    return ListedModel(
        name=str(entry["id"]),
        state=_STATES.get(str(status.get("value")), LoadState.UNLOADED),
        aliases=tuple(map(str, entry.get("aliases") or ())),
        created_at=int(entry.get("created") or 0),
        context=context if type(context) is int else None,
        exit_status=exit_status if type(exit_status) is int else None,
    )


@dataclass(frozen=True)
class ModelHooks:
    """What the models need of the gateway, and report to it.

    `on_load` gets each load's model, result ("ok" or "failed") and duration in seconds. `on_death` gets a model whose
    process has died while it was loaded. `at_work` returns the requests on which a model should be working.
    `reasons` returns why models have failed, as the supervisor has read it in llama-server's output; None without a
    supervisor.
    """

    on_load: Callable[[str, str, float], None]
    on_death: Callable[[str], None]
    at_work: Callable[[str], Sequence[AtWork]]
    reasons: Callable[[], Mapping[str, str]] | None = None


class Models:
    """What is known of the models, and the loop that carries out the scheduler's orders."""

    def __init__(
        self,
        fetch: RouterFetcher,
        scheduler: ModelScheduler,
        names: ModelNames,
        clock: Callable[[], float],
        hooks: ModelHooks,
        slots: int | None = None,
    ) -> None:
        """`slots` is how many requests each model may get at once; None: as many as it has slots."""
        self._slots = slots
        self.scheduler = scheduler
        self.names = names
        self.listed: dict[str, ListedModel] = {}
        self.contexts: dict[str, int] = {}  # of models that were loaded once, in tokens
        self._reclaimers: dict[str, SlotReclaimer] = {}
        self._fetch = fetch
        self._clock = clock
        self._hooks = hooks
        self._ended_s: dict[str, float] = {}  # when models ended of which the list has not said so yet
        self._earlier: dict[str, str | None] = {}  # the reason of a model's last failure, when it began to load
        self._is_up = False
        self._woken = asyncio.Event()
        self._must_look = False
        self._look_at_s = 0.0  # by the loop's clock
        self._looking = asyncio.Lock()

    def states(self) -> dict[str, str]:
        """Return the state of each model by its name."""
        return {name: model.state.value for name, model in self.scheduler.models.items()}

    def find(self, name: str) -> Model:
        return self.scheduler.models[name]

    def reclaimer(self, name: str) -> SlotReclaimer:
        """Return what releases the slots of cancelled requests of a model."""
        return self._reclaimers[name]

    @property
    def pending_releases(self) -> int:
        return sum(map(len, self._reclaimers.values()))

    def wake(self) -> None:
        """Something has changed in the queues: look whether anything follows from it."""
        self._woken.set()

    def on_tick(self, now_s: float) -> None:
        """Decide again what is due, by the clock."""
        for model in self.scheduler.models.values():
            model.queue.on_tick(now_s)
        if now_s >= self.scheduler.next_s:
            self.wake()

    def look_soon(self) -> None:
        """The router may know something new."""
        self._must_look = True
        self._woken.set()

    def note_ended(self, model: Model) -> None:
        """The router has said that a model is not loaded any more."""
        if model.state is LoadState.LOADED and self.scheduler.models.get(model.name) is model:
            self.scheduler.ended(model)
            self._ended_s[model.name] = self._clock()
        self.look_soon()

    # --- The router's process ---

    async def prepare(self) -> None:
        """The router is about to be ready: learn its models. Raises GatewayError if it does not answer."""
        self._is_up = True
        try:
            await self._look()
        except GatewayError:
            self._is_up = False
            raise
        self._plan_look()

    def note_down(self) -> None:
        """The router is gone, and its models with it."""
        self._is_up = False
        for model in self.scheduler.models.values():
            self.scheduler.ended(model)

    async def close(self) -> None:
        for reclaimer in self._reclaimers.values():
            await reclaimer.close()

    # --- The loops ---

    async def watch(self) -> None:
        """Look, decide and order, until cancelled."""
        while True:
            await self._wait()
            if not self._is_up:
                continue
            try:
                if self._must_look or asyncio.get_running_loop().time() >= self._look_at_s:
                    await self._look()
                if self._is_up:  # the router may have ended meanwhile
                    await self._carry_out()
                self._plan_look()
            except GatewayError as error:  # readiness notices if the router is gone
                log.debug("models: %s", error.message)
                self._must_look = True
                await asyncio.sleep(_LOOK_LOADING_S)

    async def listen(self) -> None:
        """Look whenever the router reports a change, until cancelled."""
        while True:
            if self._is_up:
                try:
                    await self._fetch.listen(b"/models/sse", self.look_soon)
                except GatewayError as error:
                    log.debug("models: no events: %s", error.message)
            await asyncio.sleep(_LISTEN_AGAIN_S if self._is_up else _LOOK_LOADING_S)

    async def _wait(self) -> None:
        """Wait until something is due."""
        wait_s: float | None = None
        if self._is_up:
            look_in_s = self._look_at_s - asyncio.get_running_loop().time()
            wait_s = max(min(look_in_s, self.scheduler.next_s - self._clock()), _SHORTEST_S)
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._woken.wait(), wait_s)
        self._woken.clear()

    def _plan_look(self) -> None:
        changing = (LoadState.LOADING, LoadState.UNLOADING)
        is_changing = self._ended_s or any(model.state in changing for model in self.scheduler.models.values())
        self._look_at_s = asyncio.get_running_loop().time() + (_LOOK_LOADING_S if is_changing else _LOOK_S)

    # --- What the router has ---

    async def _look(self) -> None:
        """Look at the router's list. Raises GatewayError."""
        async with self._looking:
            self._must_look = False
            status, page = await self._fetch(b"/models")
            if status != 200:
                raise GatewayError(BACKEND_MALFORMED, f"llama-server's list of models has status {status}.")
            listed = {entry.name: entry for entry in parse_list(page)}
            if self._is_up:
                self._take_names(listed)
                for entry in listed.values():
                    await self._follow(self.scheduler.models[entry.name], entry)

    def _take_names(self, listed: dict[str, ListedModel]) -> None:
        self.listed = listed
        self.contexts.update({entry.name: entry.context for entry in listed.values() if entry.context is not None})
        known = self.scheduler.models
        for name in [name for name in known if name not in listed]:
            self.scheduler.remove(name)
            self._ended_s.pop(name, None)
        for name in [name for name in listed if name not in known]:
            self.scheduler.add(name)
            if name not in self._reclaimers:  # a model may come back while its slots are still to be released
                self._reclaimers[name] = SlotReclaimer(self._fetch_of(name), partial(self._hooks.at_work, name))
        self.names.update({entry.name: entry.aliases for entry in listed.values()})

    def _fetch_of(self, name: str) -> Fetch:
        """Return what requests pages of one model."""
        query = b"?autoload=false&model=" + quote(name, safe="").encode()
        return lambda target: self._fetch(target + query)

    async def _follow(self, model: Model, entry: ListedModel) -> None:
        """Let what is known of a model follow the router's list."""
        scheduler, was = self.scheduler, model.state
        if model.name in self._ended_s and not await self._follow_end(model, entry):
            return
        if was is LoadState.UNLOADING:
            if entry.state is LoadState.UNLOADED:
                scheduler.ended(model)
            return
        if entry.state is was:
            return
        if entry.state is LoadState.LOADED:
            await self._follow_loaded(model)
        elif entry.state is LoadState.LOADING:
            scheduler.loading(model)
        elif was is LoadState.LOADING:
            self._fail(model, await self._reason(model.name, _ended_with(entry)))
        else:
            failed = entry.exit_status is not None
            if failed:
                log.warning("the model %s has ended: %s", model.name, _ended_with(entry))
                self._hooks.on_death(model.name)
            scheduler.ended(model, _ended_with(entry) if failed else "")

    async def _follow_end(self, model: Model, entry: ListedModel) -> bool:
        """Return whether the list is to be believed as to a model that was said to have ended.

        It is not if the router has not noticed the end. It does so soon, so a model that is listed for longer has not
        ended, though it does not answer.
        """
        is_recent = self._clock() < self._ended_s[model.name] + _NOTICED_S
        if entry.state is LoadState.LOADED and is_recent and not await self._answers(model):
            return False
        del self._ended_s[model.name]
        if entry.state is LoadState.UNLOADED and entry.exit_status is not None:
            self._hooks.on_death(model.name)
        return True

    async def _answers(self, model: Model) -> bool:
        """Whether a model's process answers."""
        try:
            status, _ = await asyncio.wait_for(self._fetch_of(model.name)(b"/props"), _ANSWER_S)
        except (GatewayError, asyncio.TimeoutError):
            return False
        return status == HTTPStatus.OK

    async def _follow_loaded(self, model: Model) -> None:
        began_s = model.since_s if model.state is LoadState.LOADING else None
        try:
            slots = self._slots or await total_slots(self._fetch_of(model.name))
        except GatewayError:  # it does not answer now: the next look asks again
            return
        except UnfitBackend as error:  # each request for the model is told so
            log.error("the model %s: %s", model.name, error)
            slots = 1
        if not self._is_up:  # the router has ended meanwhile
            return
        self._reclaimers[model.name].reset()
        self.scheduler.loaded(model, slots)
        if began_s is not None:
            self._hooks.on_load(model.name, "ok", model.load_s)
            log.info("the model %s is loaded: %d requests at a time", model.name, slots)

    # --- Orders ---

    async def _carry_out(self) -> None:
        """Give the orders that are due. If the router does not take one, the loads that are left are put off."""
        left = self.scheduler.orders()
        try:
            while left:
                await self._order(left[0])
                del left[0]
        except GatewayError:
            for order in left:
                if order.load:
                    self.scheduler.postpone(order.model, _POSTPONED_S)
            raise
        for model in self.scheduler.models.values():
            if model.state is LoadState.UNLOADING and self._clock() >= model.since_s + _UNLOAD_AGAIN_S:
                model.set_state(LoadState.UNLOADING)
                await self._order(Order(model, load=False))

    async def _order(self, order: Order) -> None:
        """Tell the router to load or unload a model."""
        model = order.model
        if order.load and model.name in self._ended_s:  # as long as the router takes it for loaded, it would refuse
            self.scheduler.postpone(model, _LOOK_LOADING_S)
            return
        action = "load" if order.load else "unload"
        log.info("the model %s is to be %sed", model.name, action)
        if self._hooks.reasons is not None:
            self._earlier[model.name] = self._hooks.reasons().get(model.name)
        body = json.dumps({"model": model.name}).encode()
        try:
            work = self._fetch.post(b"/models/" + action.encode(), body)
            status, page = await asyncio.wait_for(work, _ORDER_S)
        except (GatewayError, asyncio.TimeoutError):
            raise GatewayError(BACKEND_TIMEOUT, f"llama-server does not {action} a model.") from None
        self._must_look = True
        self.wake()
        if status != 200 and order.load:
            await self._look_at_refusal(model, reason_of(page) or f"status {status}")

    async def _look_at_refusal(self, model: Model, reason: str) -> None:
        """The router has not begun a load: perhaps because another client was faster."""
        status, page = await self._fetch(b"/models")
        listed = {entry.name: entry for entry in parse_list(page)} if status == 200 else {}
        if model.name in listed and listed[model.name].state is not LoadState.UNLOADED:
            return
        if _LIMIT_REACHED in reason:
            self.scheduler.postpone(model, _POSTPONED_S)
        else:
            self._fail(model, f"The model {model.name} could not be loaded: {reason}.")

    async def _reason(self, name: str, ending: str) -> str:
        """Return why a model could not be loaded: in llama-server's words if they are known, else by how it ended."""
        found = None
        if self._hooks.reasons is not None:
            for _ in range(round(_REASON_S / _REASON_LOOK_S)):
                found = self._hooks.reasons().get(name)
                if found not in (
                    None,
                    self._earlier.get(name),
                ):  # if it fails for the same reason again, nothing changes
                    break
                await asyncio.sleep(_REASON_LOOK_S)
        why = ending if found is None else f"it {_FOLDERS.sub('', found)}"
        return f"The model {name} could not be loaded: {why}."

    def _fail(self, model: Model, reason: str) -> None:
        log.warning("%s", reason)
        self._hooks.on_load(model.name, "failed", self._clock() - model.since_s)
        self.scheduler.failed(model, reason)


def _ended_with(entry: ListedModel) -> str:
    if entry.exit_status is None:
        return "llama-server has ended it"
    return f"its process ended with status {entry.exit_status}"


def reason_of(page: bytes) -> str:
    """Return the message of an error of llama-server's; empty if there is none."""
    try:
        return str(json.loads(page)["error"]["message"]).rstrip(".")
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""
