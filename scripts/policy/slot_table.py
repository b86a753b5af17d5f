"""Which key owns what each of llama-server's slots holds, and which request may have which slot (PROMPT_CACHE=private).

A slot holds the prompt and the answer of the request that it worked on last. A request of another key must not find
them, so a slot changes hands only empty.

A request is `pinned` to one slot, or it is `floating`: llama-server chooses its slot, any that is idle, which the
gateway does not learn. While floating requests of a key are at work, each idle slot is empty or the key's, and no
request of another key is at work. Afterwards all slots are the key's.
"""

from policy.prefix_digests import Digests, common_length

_KEPT_SHARE = 2  # a conversation takes another one's slot if that keeps half of it, though there is an empty one


class Slot:
    """One slot. `owner` is the key whose text it may hold, None: any; `holder` that of the request that has it."""

    __slots__ = ("digests", "holder", "is_empty", "last_used", "number", "owner")

    def __init__(self, number: int) -> None:
        self.number = number
        self.owner: str | None = None
        self.holder: str | None = None
        self.is_empty = False
        self.digests: Digests = ()
        self.last_used = 0

    def is_foreign(self, owner: str) -> bool:
        """Whether it may hold text of another key."""
        return not self.is_empty and self.owner != owner

    def forget(self) -> None:
        """It may hold anything."""
        self.owner, self.is_empty, self.digests = None, False, ()

    def clear(self) -> None:
        """The backend has emptied it."""
        self.owner, self.is_empty, self.digests = None, True, ()

    def own(self, owner: str, digests: Digests) -> None:
        """It will hold a prompt of this key."""
        self.owner, self.is_empty, self.digests = owner, False, digests


class SlotTable:
    """All slots, of which at first nothing is known. `floating` is how many floating requests are at work."""

    def __init__(self) -> None:
        self._slots: list[Slot] = []
        self._strays: list[Slot] = []
        self._uses = 0  # counts up; orders slots by when they were last used
        self._floating_owner = ""
        self.floating = 0
        self.generation = 0  # of llama-server's processes, as far as is known

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def busy(self) -> int:
        return sum(slot.holder is not None for slot in (*self._slots, *self._strays))

    def reset(self, total: int) -> None:
        """The backend may be another process, with `total` slots. Requests that are at work keep their slots.

        A request may be on its way to a slot that there is no more. llama-server would take another one for it, the
        number modulo `total`, so nothing starts before such a request has ended.
        """
        self.generation += 1
        self._strays = [slot for slot in (*self._strays, *self._slots[total:]) if slot.holder is not None]
        self._slots = [*self._slots[:total], *map(Slot, range(len(self._slots), total))]
        for slot in self._slots:
            slot.forget()

    def may_start(self, owner: str, *, floating: bool) -> bool:
        """Whether a request of a key may be sent now."""
        if self.floating and self._floating_owner != owner:
            return False
        if any(slot.holder is not None for slot in self._strays):
            return False
        if floating:
            return all(slot.holder is None or self._is_own(slot, owner) for slot in self._slots)
        return any(slot.holder is None for slot in self._slots)

    def _is_own(self, slot: Slot, owner: str) -> bool:
        """Whether a request of this key has the slot, and nothing of another key is left in it."""
        return slot.holder == owner and not slot.is_foreign(owner)

    def occupy(self, owner: str, digests: Digests) -> Slot:
        """Choose the slot of a pinned request, for which there is an idle one. It may have to be emptied."""
        slot = self._choose(owner, digests)
        slot.holder = owner
        return slot

    def occupy_foreign(self, owner: str) -> list[Slot]:
        """Begin a floating request; return the slots that must be emptied for it, which are busy until then."""
        self._floating_owner = owner
        self.floating += 1
        foreign = [slot for slot in self._slots if slot.holder is None and slot.is_foreign(owner)]
        for slot in foreign:
            slot.holder = owner
        return foreign

    def claim(self, slot: Slot, owner: str, digests: Digests) -> None:
        """A pinned request is about to be sent to its slot."""
        slot.own(owner, digests)
        self._use(slot)

    def claim_all(self, owner: str) -> None:
        """A floating request is about to be sent: it may take any slot."""
        for slot in self._slots:
            if slot.holder is None:
                slot.own(owner, ())
                self._use(slot)

    def end_floating(self) -> None:
        self.floating -= 1

    def _use(self, slot: Slot) -> None:
        self._uses += 1
        slot.last_used = self._uses

    def _choose(self, owner: str, digests: Digests) -> Slot:
        """Return the key's slot with the longest common prefix, else an empty one, else the one unused longest.

        Of several with the same common prefix, the one that loses least.
        """
        idle = [slot for slot in self._slots if slot.holder is None]
        empty = next((slot for slot in idle if slot.is_empty), None)
        own = [(common_length(slot.digests, digests), slot) for slot in idle if slot.owner == owner]
        common, best = max(own, key=_rank, default=(0, None))
        if best is not None and common and (empty is None or common * _KEPT_SHARE >= len(best.digests)):
            return best
        return empty or min(idle, key=lambda slot: slot.last_used)


def _rank(candidate: tuple[int, Slot]) -> tuple[int, int, int]:
    common, slot = candidate
    return common, -len(slot.digests), -slot.last_used
