"""slot_table.py: whose slots are whose, and which one a request gets."""

from policy.prefix_digests import Digests
from policy.slot_table import Slot, SlotTable

A: Digests = (b"a", b"b", b"c")
B: Digests = (b"x", b"y")


class Around:
    """A table of empty slots."""

    def __init__(self, total: int = 3) -> None:
        self.table = SlotTable()
        self.table.reset(total)
        slots = [self.table.occupy("", ()) for _ in range(total)]
        for slot in slots:
            slot.is_empty, slot.holder = True, None

    def begin(self, owner: str, digests: Digests) -> Slot:
        slot = self.table.occupy(owner, digests)
        self.table.claim(slot, owner, digests)
        return slot

    def run(self, owner: str, digests: Digests) -> int:
        slot = self.begin(owner, digests)
        slot.holder = None
        return slot.number

    def float_all(self, owner: str) -> list[int]:
        foreign = self.table.occupy_foreign(owner)
        for slot in foreign:
            slot.holder = None
        self.table.claim_all(owner)
        return [slot.number for slot in foreign]


def test_a_conversation_goes_to_its_own_slot() -> None:
    around = Around()
    assert around.run("alice", A) == 0
    assert around.run("alice", B) == 1
    assert around.run("alice", (*A, b"d")) == 0
    assert around.run("alice", (*B, b"z")) == 1


def test_of_two_slots_with_the_same_prefix_the_one_that_loses_least_is_taken() -> None:
    around = Around()
    busy = around.begin("alice", A)
    around.run("alice", (*A, b"d"))
    busy.holder = None
    assert around.run("alice", (*A, b"d", b"e")) == 1
    assert around.run("alice", A) == 0


def test_a_prefix_of_another_key_does_not_count() -> None:
    around = Around()
    assert around.run("alice", A) == 0
    assert around.run("bob", A) == 1
    assert around.run("alice", A) == 0


def test_a_conversation_that_keeps_less_than_half_of_another_one_takes_an_empty_slot() -> None:
    around = Around()
    around.run("alice", A)
    assert around.run("alice", (b"a", b"other")) == 1


def test_without_an_empty_slot_the_one_unused_longest_is_emptied() -> None:
    around = Around(2)
    around.run("alice", A)
    around.run("bob", B)
    slot = around.table.occupy("carol", (b"c",))
    assert (slot.number, slot.is_foreign("carol")) == (0, True)
    assert not slot.is_foreign("alice")


def test_a_slot_of_which_nothing_is_known_is_foreign_to_all() -> None:
    table = SlotTable()
    table.reset(1)
    assert table.occupy("alice", ()).is_foreign("alice")


def test_a_request_starts_only_in_an_idle_slot() -> None:
    around = Around(1)
    around.begin("alice", A)
    assert not around.table.may_start("alice", floating=False)
    assert around.table.may_start("alice", floating=True)


def test_a_floating_request_starts_only_while_no_other_key_is_at_work() -> None:
    around = Around()
    slot = around.begin("alice", A)
    assert not around.table.may_start("bob", floating=True)
    assert around.table.may_start("bob", floating=False)
    slot.holder = None
    assert around.table.may_start("bob", floating=True)


def test_a_floating_request_waits_until_no_slot_is_being_emptied() -> None:
    around = Around(1)
    around.run("alice", A)
    slot = around.table.occupy("bob", B)
    assert not around.table.may_start("alice", floating=True)
    assert not around.table.may_start("bob", floating=True)
    around.table.claim(slot, "bob", B)
    assert around.table.may_start("bob", floating=True)


def test_while_a_floating_request_is_at_work_only_its_key_starts_others() -> None:
    around = Around()
    around.run("alice", A)
    assert around.float_all("bob") == [0]
    for floating in (True, False):
        assert around.table.may_start("bob", floating=floating)
        assert not around.table.may_start("alice", floating=floating)
    around.table.end_floating()
    assert around.table.may_start("alice", floating=False)


def test_after_a_floating_request_all_slots_are_its_keys() -> None:
    around = Around()
    around.float_all("bob")
    around.table.end_floating()
    assert around.table.occupy("alice", A).is_foreign("alice")
    assert around.float_all("bob") == []


def test_a_new_process_of_the_backend_may_hold_anything_and_have_other_slots() -> None:
    around = Around()
    slot = around.begin("alice", A)
    generation = around.table.generation
    around.table.reset(2)
    assert (len(around.table), around.table.generation) == (2, generation + 1)
    assert around.table.busy == 1
    assert slot.is_foreign("alice")
    assert not around.table.may_start("alice", floating=True)  # the slot may hold anything


def test_nothing_starts_while_a_request_may_be_on_its_way_to_a_slot_that_is_gone() -> None:
    around = Around()
    around.begin("alice", A)
    stray = [around.begin("alice", A), around.begin("alice", B)][-1]
    around.table.reset(2)
    for total in (2, 4):  # llama-server would take slot 0 for it; and another process follows
        assert around.table.busy == 3
        for floating in (True, False):
            assert not around.table.may_start("alice", floating=floating)
        around.table.reset(total)
    stray.holder = None
    assert around.table.busy == 2
    assert around.table.may_start("alice", floating=False)
