"""slot_isolation.py: leases in order, slots emptied before they change hands, and backends that are found unfit."""

import asyncio
import json
from typing import Any

import pytest

from backend.fetch import PageTooLong
from backend.slot_isolation import SlotIsolation, SlotLease
from backend.slots import UnfitBackend
from core.errors import BACKEND_TIMEOUT, BACKEND_UNAVAILABLE, GatewayError
from support.caching_backend import Model, ModelSlot
from support.clock import Clock
from support.memory_transport import memory_test, run, turns_until

DIGESTS = (b"a",)
ERASED = (200, b'{"id_slot": 0, "n_erased": 1}')


class Backend:
    """Two slots. `cached` is what it finds of a prompt that it has seen before the slots were emptied."""

    def __init__(self) -> None:
        self.erased: list[int] = []
        self.prompts: list[str] = []
        self.erase_answer = ERASED
        self.completion_status = 200
        self.cached = 0
        self.slots: object = [{}, {}]
        self.listings: list[object] = []  # of slots, one after the other
        self.is_gone = self.stalls = False
        self.reports_total = True
        self._going_on = asyncio.Event()

    def go_on(self) -> None:
        """Let go what stalls."""
        self.listings: list[object] = []  # of slots, one after the other
        self.is_gone = self.stalls = False
        self._going_on.set()

    async def fetch(self, target: bytes) -> tuple[int, bytes]:
        if target == b"/props":
            return 200, b'{"total_slots": 2}' if self.reports_total else b"{}"
        assert target == b"/slots"
        if self.slots is None:
            raise PageTooLong
        return 200, json.dumps(self.listings.pop(0) if self.listings else self.slots).encode()

    async def post(self, target: bytes, body: bytes) -> tuple[int, bytes]:
        if self.is_gone:
            raise GatewayError(BACKEND_UNAVAILABLE)
        if target.startswith(b"/slots/"):
            self.erased.append(int(target[7:8]))
            if self.stalls:
                await self._going_on.wait()
            return self.erase_answer
        prompt = json.loads(body)["prompt"]
        cached = self.cached if prompt in self.prompts else 0
        self.prompts.append(prompt)
        return self.completion_status, json.dumps({"timings": {"cache_n": cached}}).encode()


class Around:
    def __init__(self, clock: Clock) -> None:
        self.backend = Backend()
        self.clock = clock
        self.gone: list[bool] = []
        self.isolation = SlotIsolation(
            self.backend.fetch, self.backend.post, self.clock, lambda: self.gone.append(True)
        )

    async def prepare(self) -> None:
        assert await self.isolation.prepare(5) == 2
        self.backend.erased.clear()

    async def lease(self, owner: str, *, floating: bool = False) -> SlotLease:
        lease = self.isolation.lease(owner, None if floating else DIGESTS)
        await asyncio.wait_for(lease.acquire(), 5)
        return lease


with_isolation = memory_test(Around)


@with_isolation
async def test_a_slot_is_emptied_for_another_key_only(around: Around) -> None:
    await around.prepare()
    for owner in ("alice", "alice"):
        lease = await around.lease(owner)
        assert (lease.slot, lease.is_valid) == (0, True)
        lease.release()
    assert around.backend.erased == [0]  # of which nothing was known
    (await around.lease("bob")).release()
    (await around.lease("carol")).release()
    assert around.backend.erased == [0, 1, 0]
    assert around.isolation.handovers == 1


@with_isolation
async def test_leases_are_granted_in_order(around: Around) -> None:
    await around.prepare()
    alice = await around.lease("alice")
    bob = asyncio.ensure_future(around.lease("bob", floating=True))
    carol = asyncio.ensure_future(around.lease("carol"))
    await asyncio.sleep(0)
    assert not bob.done()
    alice.release()
    (await bob).release()
    (await carol).release()
    assert around.isolation.table.busy == around.isolation.table.floating == 0


@with_isolation
async def test_a_lease_can_be_given_up_while_it_waits(around: Around) -> None:
    await around.prepare()
    alice = await around.lease("alice")
    bob, carol = around.isolation.lease("bob", None), around.isolation.lease("carol", DIGESTS)
    waiting, next_one = asyncio.ensure_future(bob.acquire()), asyncio.ensure_future(carol.acquire())
    await turns_until(lambda: carol.ready)
    assert not carol.is_valid  # it comes after bob's
    bob.release()
    waiting.cancel()
    await turns_until(next_one.done)
    assert (carol.is_valid, carol.slot) == (True, 1)
    alice.release()


@with_isolation
async def test_a_lease_that_is_given_up_before_it_waits_has_taken_nothing(around: Around) -> None:
    await around.prepare()
    around.isolation.lease("alice", None).release()
    assert around.isolation.table.busy == around.isolation.table.floating == 0
    (await around.lease("bob")).release()


@with_isolation
async def test_the_next_request_of_a_key_starts_as_soon_as_the_slots_are_emptied_for_its_first_one(
    around: Around,
) -> None:
    await around.prepare()
    around.backend.stalls = True
    first, second = (asyncio.ensure_future(around.lease("alice", floating=True)) for _ in range(2))
    await turns_until(lambda: around.backend.erased)
    assert not second.done()
    around.backend.go_on()
    for lease in (await second, await first):
        assert lease.is_valid
        lease.release()
    assert around.backend.erased == [0, 1]


@with_isolation
async def test_a_lease_can_be_given_up_while_its_slot_is_emptied(around: Around) -> None:
    await around.prepare()
    around.backend.stalls = True
    lease = around.isolation.lease("alice", None)
    waiting = asyncio.ensure_future(lease.acquire())
    await turns_until(lambda: around.backend.erased)
    lease.release()
    lease.release()
    waiting.cancel()
    around.backend.stalls = False
    (await around.lease("bob", floating=True)).release()
    assert around.backend.erased == [0, 0, 1]


@pytest.mark.parametrize("answer", [(501, b"{}"), (200, b"{}")])
@with_isolation
async def test_a_slot_that_is_not_emptied_is_an_error(around: Around, answer: tuple[int, bytes]) -> None:
    await around.prepare()
    around.backend.erase_answer = answer
    lease = around.isolation.lease("alice", DIGESTS)
    with pytest.raises(GatewayError) as caught:
        await lease.acquire()
    assert caught.value.kind is BACKEND_UNAVAILABLE
    lease.release()
    assert around.isolation.table.busy == 0


@with_isolation
async def test_slots_whose_list_a_request_has_made_too_long_are_emptied(around: Around) -> None:
    around.backend.slots = None
    assert await around.isolation.prepare(5) == 2
    assert set(around.backend.erased) == {0, 1}
    around.backend.reports_total = False
    with pytest.raises(UnfitBackend, match="does not list its slots"):
        await around.isolation.prepare(5)


@pytest.mark.parametrize(("floating", "emptied", "next_emptied"), [(False, [0], [1]), (True, [0, 1], [0, 1])])
@with_isolation
async def test_a_lease_is_not_valid_for_another_process(
    around: Around, floating: bool, emptied: list[int], next_emptied: list[int]
) -> None:
    await around.prepare()
    lease = await around.lease("alice", floating=floating)
    await around.isolation.prepare(5)
    assert around.backend.erased == emptied  # a request is at work: it is not checked again
    assert not lease.is_valid
    lease.release()
    assert (await around.lease("alice", floating=floating)).is_valid
    assert around.backend.erased == [*emptied, *next_emptied]


@pytest.mark.parametrize("floating", [False, True])
@with_isolation
async def test_nothing_starts_while_the_backend_may_be_ending(around: Around, floating: bool) -> None:
    await around.prepare()
    before = await around.lease("alice")
    around.isolation.pause()
    assert not before.is_valid
    before.release()
    waiting = asyncio.ensure_future(around.lease("alice", floating=floating))
    await asyncio.sleep(0)
    assert (waiting.done(), around.backend.erased) == (False, [0])
    await around.prepare()
    assert (await waiting).is_valid


@with_isolation
async def test_a_lease_that_waits_when_the_backend_may_be_ending_waits_no_longer(around: Around) -> None:
    await around.prepare()
    for _ in range(2):
        await around.lease("alice")
    waiting = asyncio.ensure_future(around.lease("bob"))
    left = around.isolation.lease("carol", DIGESTS)
    leaving = asyncio.ensure_future(left.acquire())
    for _ in range(3):  # wait_for has a task of its own
        await asyncio.sleep(0)
    leaving.cancel()
    around.isolation.pause()
    lease = await waiting
    assert (lease.is_valid, lease.is_outdated, lease.slot) == (False, True, None)
    for each in (lease, left):
        each.release()


@with_isolation
async def test_a_backend_that_ends_while_a_slot_is_emptied_is_told(around: Around) -> None:
    await around.prepare()
    around.backend.is_gone = True
    with pytest.raises(GatewayError):
        await around.lease("alice")
    assert around.gone == [True]


@pytest.mark.parametrize(
    "flaw", [{"completion_status": 503}, {"erase_answer": (503, b"{}")}, {"slots": [[{}, {}], [{}]]}], ids=str
)
@with_isolation
async def test_a_backend_that_is_another_one_in_the_middle_of_the_check_is_neither_fit_nor_unfit(
    around: Around, flaw: dict[str, Any]
) -> None:
    if "slots" in flaw:
        around.backend.listings = flaw["slots"]
    else:
        vars(around.backend).update(flaw)
    with pytest.raises(GatewayError) as caught:
        await around.isolation.prepare(5)
    assert caught.value.kind is BACKEND_UNAVAILABLE


@pytest.mark.parametrize(("floating", "unknown"), [(False, [0, 1]), (True, [0])])
@with_isolation
async def test_a_lease_that_was_begun_with_another_process_says_nothing_about_this_ones_slots(
    around: Around, floating: bool, unknown: list[int]
) -> None:
    await around.prepare()
    (await around.lease("bob")).release()
    around.backend.stalls = True
    lease = around.isolation.lease("alice", None if floating else DIGESTS)
    acquiring = asyncio.ensure_future(lease.acquire())
    await turns_until(lambda: around.backend.erased == [0, 1 - floating])
    await around.isolation.prepare(5)
    around.backend.go_on()
    await acquiring
    assert not lease.is_valid
    lease.release()
    around.backend.erased.clear()
    (await around.lease("alice", floating=True)).release()
    assert around.backend.erased == unknown


@pytest.mark.parametrize(
    ("flaw", "message"),
    [
        ({"erase_answer": (501, b"{}")}, "--slot-save-path"),
        ({"erase_answer": (200, b"{}")}, "--slot-save-path"),
        ({"erase_answer": (501, b"{}"), "completion_status": 501}, "--slot-save-path"),  # for embeddings
        ({"cached": 20}, "--cache-ram 0"),
        ({"slots": {}}, "--slots"),
    ],
)
@with_isolation
async def test_a_backend_that_cannot_keep_the_promise_is_unfit(
    around: Around, flaw: dict[str, object], message: str
) -> None:
    vars(around.backend).update(flaw)
    with pytest.raises(UnfitBackend, match=message):
        await around.isolation.prepare(5)
    vars(around.backend).update(vars(Backend()))
    with pytest.raises(UnfitBackend, match=message):  # it is not asked each time
        await around.isolation.prepare(5)
    around.clock.advance(6)
    assert await around.isolation.prepare(5) == 2


@with_isolation
async def test_a_backend_for_embeddings_keeps_no_prompts_elsewhere(around: Around) -> None:
    around.backend.completion_status = 501
    await around.isolation.prepare(5)
    assert len(around.backend.prompts) == 1


@with_isolation
async def test_a_backend_that_does_not_respond_is_not_unfit(around: Around) -> None:
    around.backend.stalls = True
    with pytest.raises(GatewayError) as caught:
        await around.isolation.prepare(5)
    assert caught.value.kind is BACKEND_TIMEOUT


# --- What the check leaves, and what it finds ---

SECRET = "what alice has asked"


class CachingBackend:
    """A backend that has only the slots of a model, and its cache of prompts in host memory."""

    def __init__(self, model: Model) -> None:
        self._model = model

    async def fetch(self, target: bytes) -> tuple[int, bytes]:
        assert target == b"/slots"
        return 200, json.dumps([{} for _ in self._model.slots]).encode()

    async def post(self, target: bytes, body: bytes) -> tuple[int, bytes]:
        model, given = self._model, json.loads(body)
        if target.startswith(b"/slots/"):
            await model.erase(int(target[7:8]))
            return ERASED
        slot, cached = await model.take(model.processes, "gateway", target.decode(), given, given["prompt"])
        await model.free(slot)
        return 200, json.dumps({"timings": {"cache_n": cached}}).encode()


class Stubborn(Model):
    """Takes an empty slot, else the one that was used last: what is in the others stays there."""

    def choose(self, path: str, body: dict[str, Any], prompt: str) -> ModelSlot | None:
        own = next((slot for slot in self.slots if slot.text == prompt), None)
        empty = next((slot for slot in self.slots if not slot.text), None)
        return own or empty or max(self.slots, key=lambda slot: slot.used)


def isolate(model: Model) -> SlotIsolation:
    backend = CachingBackend(model)
    return SlotIsolation(backend.fetch, backend.post, Clock(), lambda: None)


def test_the_check_finds_prompts_that_are_kept_once_another_one_has_their_slot() -> None:
    with pytest.raises(UnfitBackend, match="--cache-ram 0"):
        run(isolate(Model(host_cache=True)).prepare(5))


def test_the_check_moves_no_text_of_a_key_out_of_its_slot() -> None:
    model = Model(host_cache=True)
    model.slots = [ModelSlot(SECRET, "alice") for _ in model.slots]
    with pytest.raises(UnfitBackend):
        run(isolate(model).prepare(5))
    assert SECRET not in model.kept


def test_the_check_takes_no_prompt_that_is_still_in_its_slot_for_one_that_is_kept_elsewhere() -> None:
    assert run(isolate(Stubborn()).prepare(5)) == 4


def test_the_check_leaves_nothing_in_the_slots() -> None:
    model = Model()
    run(isolate(model).prepare(5))
    assert model.seen
    assert {slot.text for slot in model.slots} == {""}
