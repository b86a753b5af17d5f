"""models.py: what the router's list says, and how the gateway follows it and gives its orders.

tests/behaviour/test_models.py has the whole over sockets.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable

import pytest

from backend.models import ListedModel, ModelHooks, Models, parse_list, reason_of
from core.errors import BACKEND_MALFORMED, BACKEND_TIMEOUT, BACKEND_UNAVAILABLE, GatewayError
from core.tasks import end_tasks
from policy.model_names import ModelNames
from policy.model_queue import SharedLimits
from policy.model_scheduler import LoadState, ModelScheduler
from support.clock import Clock
from support.memory_transport import run as run_without_sleep

POLL_S = 0.01  # of the loop, which sets its time forward in place of waiting


class FakeRouter:
    """Answers the gateway's requests. `failing`: it does not answer."""

    def __init__(self, *names: str) -> None:
        self.states = dict.fromkeys(names, "unloaded")
        self.exit_codes: dict[str, int] = {}
        self.orders: list[str] = []
        self.refusal: tuple[int, bytes] | None = None
        self.failing = False
        self.is_slow = self.is_locked = False  # its models answer too late
        self.takes_orders = True
        self.dead: set[str] = set()  # models whose process has ended, which it has not noticed
        self.hung: set[str] = set()  # models that do not answer as long as they are here
        self.hanging = 0  # requests to them
        self.loads = True  # at once; else a model that is to be loaded is loading
        self.status = 200
        self.listening = asyncio.Event()
        self.targets: list[bytes] = []

    async def __call__(self, target: bytes) -> tuple[int, bytes]:
        self.targets.append(target)
        if self.failing:
            raise GatewayError(BACKEND_UNAVAILABLE)
        if any(target.endswith(b"model=" + name.encode()) for name in self.dead):
            return 500, b"proxy error: Could not establish connection"
        self.hanging += 1
        try:
            while any(target.endswith(b"model=" + name.encode()) for name in self.hung):
                await asyncio.sleep(POLL_S)
        finally:
            self.hanging -= 1
        if target.startswith(b"/props"):
            if self.is_slow:
                raise GatewayError(BACKEND_TIMEOUT)
            if self.is_locked:
                return 401, b"{}"
            return 200, b'{"total_slots": 4}'
        data = []
        for name, state in self.states.items():
            failed = {"failed": True, "exit_code": self.exit_codes[name]} if name in self.exit_codes else {}
            data.append({"id": name, "status": {"value": state, **failed}})
        return self.status, json.dumps({"data": data}).encode()

    async def post(self, target: bytes, body: bytes) -> tuple[int, bytes]:
        if not self.takes_orders:
            raise GatewayError(BACKEND_UNAVAILABLE)
        action, name = target.rpartition(b"/")[2].decode(), json.loads(body)["model"]
        self.orders.append(f"{action} {name}")
        if self.refusal is not None:
            return self.refusal
        loaded = "loaded" if self.loads else "loading"
        self.states[name] = loaded if action == "load" else "unloaded"
        return 200, b'{"success":true}'

    async def listen(self, target: bytes, on_data: Callable[[], None]) -> None:
        self.listening.set()
        on_data()
        raise GatewayError(BACKEND_UNAVAILABLE)


class Watched:
    """The models of a router, and the loop that follows it."""

    def __init__(self, *names: str, max_loaded: int = 1, supervised: bool = False) -> None:
        self.clock = Clock()
        self.router = FakeRouter(*names)
        limits = SharedLimits(0)
        scheduler = ModelScheduler(limits, self.clock, max_loaded=max_loaded, switch_after_s=30.0)
        self.loads: list[tuple[str, str]] = []
        self.reasons: dict[str, str] = {}
        self.deaths: list[str] = []
        self.models = Models(
            self.router,
            scheduler,
            ModelNames({}, None),
            self.clock,
            ModelHooks(
                on_load=lambda name, result, seconds: self.loads.append((name, result)),
                on_death=self.deaths.append,
                at_work=lambda name: (),
                reasons=(lambda: self.reasons) if supervised else None,
            ),
        )
        limits.on_change = self.models.wake

    async def until(self, condition: Callable[[], object]) -> None:
        async def wait() -> None:
            while not condition():
                await asyncio.sleep(POLL_S)
                self.models.wake()

        await asyncio.wait_for(wait(), 60)

    def state(self, name: str) -> LoadState:
        return self.models.find(name).state


def watched(
    *names: str, max_loaded: int = 1, supervised: bool = False
) -> Callable[[Callable[[Watched], Awaitable[None]]], Callable[[], None]]:
    def decorate(test: Callable[[Watched], Awaitable[None]]) -> Callable[[], None]:
        def run() -> None:
            async def call() -> None:
                made = Watched(*names, max_loaded=max_loaded, supervised=supervised)
                await made.models.prepare()
                loops = [asyncio.ensure_future(loop) for loop in (made.models.watch(), made.models.listen())]
                try:
                    await test(made)
                finally:
                    await end_tasks(loops)
                    await made.models.close()

            run_without_sleep(call())

        run.__name__, run.__doc__ = test.__name__, test.__doc__
        return run

    return decorate


# --- The list ---


def test_the_list_is_read() -> None:
    entries = [
        {"id": "a", "created": 5, "aliases": ["x"], "status": {"value": "loaded"}, "meta": {"n_ctx": 512}},
        {"id": "b", "status": {"value": "sleeping"}, "meta": None},
        {"id": "c", "status": {"value": "loading"}},
        {"id": "d", "status": {"value": "unloaded", "failed": True, "exit_code": 9}},
        {"id": "e", "status": {"value": "downloading", "failed": True, "exit_code": "x"}, "meta": {"n_ctx": "many"}},
        {"id": "f"},
    ]
    assert parse_list(json.dumps({"data": entries}).encode()) == [
        ListedModel("a", LoadState.LOADED, ("x",), 5, 512, None),
        ListedModel("b", LoadState.LOADED, (), 0, None, None),
        ListedModel("c", LoadState.LOADING, (), 0, None, None),
        ListedModel("d", LoadState.UNLOADED, (), 0, None, 9),
        ListedModel("e", LoadState.UNLOADED, (), 0, None, None),
        ListedModel("f", LoadState.UNLOADED, (), 0, None, None),
    ]


@pytest.mark.parametrize(
    "page",
    [
        b"",
        b"{}",
        b"[]",
        b'{"data": 1}',
        b'{"data": [1]}',
        b'{"data": [{}]}',
        b'{"data": [{"id": "a", "created": 1e999}]}',
        b"[" * 100_000,
    ],
)
def test_what_is_no_list_is_an_error(page: bytes) -> None:
    with pytest.raises(GatewayError) as error:
        parse_list(page)
    assert error.value.kind is BACKEND_MALFORMED


@pytest.mark.parametrize(("page", "reason"), [(b'{"error": {"message": "no."}}', "no"), (b"{}", ""), (b"x", "")])
def test_the_routers_reason_is_read(page: bytes, reason: str) -> None:
    assert reason_of(page) == reason


# --- Orders ---


@watched("chat", "code")
async def test_a_model_is_loaded_and_its_slots_are_asked_for(router: Watched) -> None:
    waiting = router.models.find("chat").queue.acquire("alice")
    await router.until(lambda: waiting.running)
    assert router.router.orders == ["load chat"]
    assert b"/props?autoload=false&model=chat" in router.router.targets
    assert router.models.find("chat").queue.slots == 4
    assert router.loads == [("chat", "ok")]
    assert router.models.states() == {"chat": "loaded", "code": "unloaded"}


@watched("chat")
async def test_a_model_that_is_slow_is_asked_for_its_slots_again(router: Watched) -> None:
    router.router.is_slow = True
    waiting = router.models.find("chat").queue.acquire("alice")
    await router.until(lambda: router.router.targets.count(b"/props?autoload=false&model=chat") > 1)
    assert router.state("chat") is LoadState.LOADING
    router.router.is_slow = False
    await router.until(lambda: waiting.running)
    assert router.models.find("chat").queue.slots == 4


@watched("chat")
async def test_an_order_that_the_router_does_not_take_is_given_again(router: Watched) -> None:
    router.router.takes_orders = False
    waiting = router.models.find("chat").queue.acquire("alice")
    chat = router.models.find("chat")
    await router.until(lambda: chat.paused_until_s > router.clock())
    assert waiting.waiting is not None
    assert not waiting.waiting.done()
    router.router.takes_orders = True
    router.clock.advance(2)
    await router.until(lambda: waiting.running)


@watched("chat", "code", max_loaded=2)
async def test_no_load_is_lost_because_the_router_does_not_take_another_order(router: Watched) -> None:
    router.router.takes_orders = False
    waiting = [router.models.find(name).queue.acquire("alice") for name in ("chat", "code")]
    code = router.models.find("code")
    await router.until(lambda: code.paused_until_s > router.clock())
    router.router.takes_orders = True
    router.clock.advance(2)
    await router.until(lambda: all(each.running for each in waiting))
    assert router.loads == [("chat", "ok"), ("code", "ok")]


@watched("chat")
async def test_a_refusal_without_a_reason_has_its_status(router: Watched) -> None:
    router.router.refusal = (500, b"")
    waiting = router.models.find("chat").queue.acquire("alice")
    await router.until(lambda: waiting.waiting is not None and waiting.waiting.done())
    assert waiting.waiting is not None
    assert str(waiting.waiting.exception()) == "The model chat could not be loaded: status 500."
    assert router.loads == [("chat", "failed")]


@pytest.mark.parametrize("told", [False, True])
def test_the_death_of_a_loaded_model_is_reported_once(told: bool) -> None:
    @watched("chat")
    async def play(router: Watched) -> None:
        waiting = router.models.find("chat").queue.acquire("alice")
        await router.until(lambda: waiting.running)
        waiting.release()
        router.router.exit_codes["chat"], router.router.states["chat"] = 1, "unloaded"
        if told:  # by the router's answer to a request
            router.models.note_ended(router.models.find("chat"))
        router.models.look_soon()
        await router.until(lambda: router.deaths)
        router.models.look_soon()
        looks = len(router.router.targets)
        await router.until(lambda: len(router.router.targets) > looks)
        assert router.deaths == ["chat"]

    play()


@watched("chat")
async def test_a_model_whose_end_the_router_has_not_noticed_is_loaded_again_once_it_has(router: Watched) -> None:
    chat = router.models.find("chat")
    chat.queue.acquire("alice")
    await router.until(lambda: chat.state is LoadState.LOADED)
    router.router.dead.add("chat")
    router.models.note_ended(chat)
    waiting = chat.queue.acquire("bob").waiting
    assert waiting is not None
    for _ in range(3):
        router.clock.advance(1)
        looks = len(router.router.targets)
        router.models.look_soon()
        await router.until(lambda looks=looks: len(router.router.targets) > looks + 1)
        assert (chat.state, waiting.done()) == (LoadState.UNLOADED, False)
    assert router.router.orders == ["load chat"]
    router.router.dead.clear()
    router.router.states["chat"], router.router.exit_codes["chat"] = "unloaded", 9
    await router.until(lambda: chat.state is LoadState.LOADED or router.clock.advance(0.1))
    await waiting
    assert router.loads == [("chat", "ok")] * 2
    assert router.deaths == ["chat"]


@watched("chat")
async def test_a_model_that_answers_has_not_ended(router: Watched) -> None:
    chat = router.models.find("chat")
    chat.queue.acquire("alice")
    await router.until(lambda: chat.state is LoadState.LOADED)
    router.models.note_ended(chat)
    assert chat.state is LoadState.UNLOADED
    await router.until(lambda: chat.state is LoadState.LOADED)
    assert (router.router.orders, router.deaths) == (["load chat"], [])


@watched("chat")
async def test_a_model_that_refuses_the_gateways_key_tells_each_request(router: Watched) -> None:
    router.router.is_locked = True
    waiting = router.models.find("chat").queue.acquire("alice")
    await router.until(lambda: waiting.running)
    assert router.models.find("chat").queue.slots == 1


@watched("chat")
async def test_a_model_that_is_listed_as_loaded_for_long_has_not_ended_though_it_is_silent(router: Watched) -> None:
    chat = router.models.find("chat")
    chat.queue.acquire("alice")
    await router.until(lambda: chat.state is LoadState.LOADED)
    router.router.dead.add("chat")
    router.models.note_ended(chat)
    router.clock.advance(4.9)
    asked = router.router.targets.count(b"/props?autoload=false&model=chat")
    await router.until(lambda: router.router.targets.count(b"/props?autoload=false&model=chat") > asked + 1)
    assert chat.state is LoadState.UNLOADED
    router.clock.advance(0.2)
    await router.until(lambda: chat.state is LoadState.LOADED)
    assert (router.router.orders, router.deaths) == (["load chat"], [])


@pytest.mark.parametrize("was_ended", [False, True])
def test_what_a_router_said_before_it_ended_is_not_followed(was_ended: bool) -> None:
    """It ends while a model is asked whether it lives, or for its slots."""

    @watched("chat")
    async def play(router: Watched) -> None:
        chat = router.models.find("chat")
        chat.queue.acquire("alice")
        if was_ended:
            await router.until(lambda: chat.state is LoadState.LOADED)
            router.models.note_ended(chat)
        router.router.hung.add("chat")
        await router.until(lambda: router.router.hanging)
        router.models.note_down()
        router.router.states["chat"] = "unloaded"
        router.router.hung.clear()
        await router.until(lambda: not router.router.hanging)
        for _ in range(9):  # what was waited for goes on
            await asyncio.sleep(0)
        assert chat.state is LoadState.UNLOADED
        chat.queue.acquire("alice")
        await router.models.prepare()
        await router.until(lambda: chat.state is LoadState.LOADED)

    play()


@pytest.mark.parametrize("is_late", [False, True])
def test_the_end_of_a_model_that_the_router_has_no_more_is_forgotten(is_late: bool) -> None:
    @watched("chat", "embed")
    async def play(router: Watched) -> None:
        chat = router.models.find("chat")
        chat.queue.acquire("alice")
        await router.until(lambda: chat.state is LoadState.LOADED)
        if not is_late:
            router.models.note_ended(chat)
        del router.router.states["chat"]
        router.models.look_soon()
        await router.until(lambda: "chat" not in router.models.listed)
        if is_late:
            router.models.note_ended(chat)
        router.router.states["chat"] = "loaded"
        router.router.dead.add("chat")
        router.models.look_soon()
        await router.until(lambda: router.models.states().get("chat") == "loaded")

    play()


@watched("chat")
async def test_a_model_that_was_unloaded_in_order_has_not_died(router: Watched) -> None:
    waiting = router.models.find("chat").queue.acquire("alice")
    await router.until(lambda: waiting.running)
    waiting.release()
    router.router.states["chat"] = "unloaded"
    router.models.note_ended(router.models.find("chat"))
    looks = len(router.router.targets)
    await router.until(lambda: len(router.router.targets) > looks)
    assert router.deaths == []


async def failed(router: Watched, reason: str | None) -> str:
    """Let a load of chat fail; return what its requests are told. The supervisor has the reason a moment later."""
    router.router.takes_orders = True
    router.router.loads = False
    chat = router.models.find("chat")
    router.clock.advance(60)  # a pause after a failure is over
    waiting = chat.queue.acquire("alice")
    await router.until(lambda: chat.state is LoadState.LOADING)
    router.router.exit_codes["chat"], router.router.states["chat"] = 1, "unloaded"
    if reason is not None:
        asyncio.get_running_loop().call_soon(router.reasons.update, {"chat": reason})
    router.models.look_soon()
    await router.until(lambda: waiting.waiting is not None and waiting.waiting.done())
    assert waiting.waiting is not None
    return str(waiting.waiting.exception())


@watched("chat", supervised=True)
async def test_a_failed_load_is_told_in_llama_servers_words_without_folders(router: Watched) -> None:
    reason = "ended with exit status 1; bad model: cannot open '/srv/models/a b/chat.gguf', see /etc/x"
    for _ in range(2):  # the second time nothing is new
        told = await failed(router, reason)
        assert told == (
            "The model chat could not be loaded: it ended with exit status 1; bad model: cannot open"
            " 'chat.gguf', see x."
        )


@watched("chat", supervised=True)
async def test_a_failed_load_without_words_is_told_by_its_exit_status(router: Watched) -> None:
    assert await failed(router, None) == "The model chat could not be loaded: its process ended with status 1."


@watched("chat")
async def test_a_model_that_another_client_has_loaded_meanwhile_is_taken(router: Watched) -> None:
    router.router.refusal = (400, b'{"error": {"message": "model is already running"}}')
    router.router.states["chat"] = "loading"
    waiting = router.models.find("chat").queue.acquire("alice")
    await router.until(lambda: router.router.orders or router.state("chat") is LoadState.LOADING)
    router.router.states["chat"] = "loaded"
    router.models.look_soon()
    await router.until(lambda: waiting.running)


@watched("chat")
async def test_a_model_that_is_not_unloaded_is_told_again(router: Watched) -> None:
    chat = router.models.find("chat")
    chat.queue.acquire("alice").release()
    router.router.states["chat"] = "loaded"
    router.models.look_soon()
    await router.until(lambda: router.state("chat") is LoadState.LOADED)
    router.router.refusal = (500, b"")
    chat.close()
    chat.set_state(LoadState.UNLOADING)
    router.clock.advance(16)
    await router.until(lambda: router.router.orders == ["unload chat"])
    router.router.states["chat"] = "unloaded"
    router.models.look_soon()
    await router.until(lambda: router.state("chat") is LoadState.UNLOADED)


@watched("chat")
async def test_what_others_do_is_followed(router: Watched) -> None:
    for state in ("loading", "loaded", "unloaded"):
        router.router.states["chat"] = state
        router.models.look_soon()
        await router.until(lambda state=state: router.state("chat") == state)  # type: ignore[misc]
    assert router.loads == [("chat", "ok")]
    router.models.note_ended(router.models.find("chat"))
    assert router.state("chat") is LoadState.UNLOADED


@watched("chat")
async def test_a_list_that_cannot_be_read_changes_nothing(router: Watched) -> None:
    router.router.states["chat"] = "loaded"
    router.router.status = 500
    router.models.look_soon()
    await router.until(lambda: len(router.router.targets) > 3)
    assert router.state("chat") is LoadState.UNLOADED
    router.router.status = 200
    router.models.look_soon()
    await router.until(lambda: router.state("chat") is LoadState.LOADED)
    router.models.note_ended(router.models.find("chat"))
    assert router.state("chat") is LoadState.UNLOADED


def test_a_router_that_does_not_answer_is_not_prepared() -> None:
    async def prepare() -> None:
        made = Watched("chat")
        made.router.failing = True
        with pytest.raises(GatewayError):
            await made.models.prepare()
        watching = asyncio.ensure_future(made.models.watch())
        made.models.look_soon()
        for _ in range(5):
            await asyncio.sleep(0)
        await end_tasks([watching])
        assert len(made.router.targets) == 1

    asyncio.run(prepare())
