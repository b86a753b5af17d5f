"""body_scan.py: bodies are read as they come, a little in each turn of the loop."""

import asyncio
from collections.abc import Callable, Coroutine, Sequence

from http1.json_members import Members
from http1.member_screen import MemberScreen
from proxy.body_scan import BodyScan, BodyScans

SCREEN = MemberScreen(("n",), ("prompt",))
DENSE = b'{"a": [' + b"{}," * 100_000 + b'0], "n": 3}'


class StepClock:
    """Each look at it takes as long as a fourth of a turn."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        self.now_s += 0.00025
        return self.now_s


def pieces_of(body: bytes, size: int) -> list[bytes | bytearray]:
    return [body[at : at + size] for at in range(0, len(body), size)]


def read_at_once(pieces: Sequence[bytes | bytearray], screen: MemberScreen | None = None) -> Members | None:
    scan = BodyScan(pieces, screen, is_complete=True)
    while scan.step():
        pass
    assert scan.waiter.done
    return scan.waiter.result()


def n_of(members: Members | None) -> object:
    assert members is not None
    return members.found["n"].value


def test_a_body_is_read_whatever_its_pieces() -> None:
    for size in (1, 2, 3, 7, 100):
        assert n_of(read_at_once(pieces_of(b'{"a": "n", "n": 3}', size))) == 3
    assert n_of(read_at_once(pieces_of(DENSE, 70_001))) == 3


def test_a_body_that_has_none_of_the_members_is_not_read() -> None:
    for body in (b"", b'{"a": "x", "stream": true}', b'{"prompt": "[n]"}', b'{"a": "\\u00e9"}' * 9000):
        assert read_at_once([body], SCREEN) is None


def test_a_member_torn_between_pieces_is_seen() -> None:
    for body in (b'{"a": 1, "n": 3}', b'{"\\u006e": 3}', b'{"prompt"  :  [1], "n": 3}'):
        for size in range(1, len(body)):
            assert n_of(read_at_once(pieces_of(body, size), SCREEN)) == 3


def test_a_body_that_is_nested_deeply_over_several_pieces_is_read() -> None:
    screen = MemberScreen(("n",), (), max_depth=9)
    assert read_at_once([b"[" * 4, b"[" * 4, b"1" + b"]" * 8], screen) is None
    members = read_at_once([b"[" * 4, b"[" * 4, b"[[1" + b"]" * 10], screen)
    assert members is not None
    assert members.depth == 10


def test_a_body_is_read_as_it_comes() -> None:
    pieces: list[bytes | bytearray] = []
    scan = BodyScan(pieces, SCREEN, is_complete=False)
    scans = BodyScans(lambda: 0.0)

    async def play() -> Members | None:
        scans.read_on(scan)
        pieces.append(bytearray(b'{"n"'))
        scans.read_on(scan)
        pieces[0] += b": 3, "
        scans.read_on(scan)
        pieces.append(b'"a": 1}')
        scans.read_on(scan)
        assert not scan.waiter.done
        scan.complete()
        scans.read_on(scan)
        return await scan.waiter.wait()

    assert n_of(asyncio.run(play())) == 3


def turns_of(*bodies: bytes, cancelled: int | None = None) -> tuple[list[int], int]:
    """Which bodies are known first, and how many turns of the loop pass until all are."""
    known: list[int] = []

    def note(number: int) -> Callable[[], None]:
        return lambda: known.append(number)

    async def play() -> int:
        scans = BodyScans(StepClock())
        begun = [BodyScan([body], None, is_complete=True) for body in bodies]
        for number, scan in enumerate(begun):
            scan.waiter.on_done = note(number)
            scans.read_on(scan)
        if cancelled is not None:
            begun[cancelled].cancel()
        turns = 0
        while len(known) < len(bodies) - (cancelled is not None):
            turns += 1
            await asyncio.sleep(0)
        for _ in range(20):
            await asyncio.sleep(0)
        return turns

    turns = asyncio.run(play())
    return known, turns


def test_a_small_body_is_known_at_once() -> None:
    assert turns_of(b'{"n": 3}') == ([0], 0)
    assert turns_of(b"") == ([0], 0)


def test_a_large_body_is_read_in_turns_and_a_small_one_passes_it() -> None:
    known, turns = turns_of(DENSE, DENSE, b'{"n": 3}')
    assert known[0] == 2
    assert sorted(known) == [0, 1, 2]
    assert turns > 10


def test_a_body_full_of_addresses_is_read_in_many_steps_and_all_are_seen() -> None:
    body = b'{"a": {"source": {' + b'"url": "http://a/",' * 1500 + b'"url": "http://b/"}}, "n": 3}'
    scan = BodyScan([body], None, is_complete=True)
    steps = 1
    while scan.step():
        steps += 1
    members = scan.waiter.result()
    assert (n_of(members), members and members.urls) == (3, ("http://a/", "http://b/"))
    assert steps > len(body) // 2500


def test_a_body_is_read_now_only_if_that_takes_no_more_than_two_turns() -> None:
    def read_now(body: bytes) -> tuple[Members | None, int]:
        scan = CountedScan([body], None, is_complete=True)
        return BodyScans(StepClock()).read_now(scan), scan.taken

    members, _ = read_now(b'{"a": "%b", "n": 3}' % (b"x" * 60_000))
    assert n_of(members) == 3
    assert read_now(b'{"a": [' + b"[[]],[]," * 7000 + b'0], "n": 3}') == (None, 10)


def test_a_cancelled_scan_says_nothing_and_holds_up_no_other() -> None:
    for cancelled in range(3):
        known, _ = turns_of(DENSE, DENSE, DENSE, cancelled=cancelled)
        assert set(known) == {0, 1, 2} - {cancelled}


def test_a_request_that_fails_holds_up_no_other() -> None:
    known: list[int] = []

    def fail() -> None:
        raise RuntimeError("no matter what")

    async def play() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
        scans = BodyScans(StepClock())
        for on_done in (fail, lambda: known.append(1)):
            scan = BodyScan([DENSE], None, is_complete=True)
            scan.waiter.on_done = on_done
            scans.read_on(scan)
        for _ in range(200):
            await asyncio.sleep(0)

    asyncio.run(play())
    assert known == [1]


def test_a_form_is_read_by_its_boundary() -> None:
    form = b'--X\r\nContent-Disposition: form-data; name="n"\r\n\r\n3\r\n--X--\r\n'
    scan = BodyScan([form], None, is_complete=True, boundary=b"X")
    while scan.step():
        pass
    assert n_of(scan.waiter.result()) == "3"


class Steps:
    """The steps that are taken in bodies. Time passes in steps only."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.taken: list[str] = []  # whose steps
        self.scans = BodyScans(lambda: self.now_s)

    def begin(self, name: str, count: int, cost_s: float = 0.002, then: Callable[[], None] | None = None) -> None:
        """Read a body in so many steps. Its key is the first letter of its name."""
        scan = SteppedScan(self, name, count, cost_s)
        scan.waiter.on_done = then
        self.scans.read_on(scan)

    async def first(self, count: int) -> None:
        """Wait until so many steps were taken."""
        while len(self.taken) < count:
            await asyncio.sleep(0)

    async def all(self) -> str:
        """Return the names of the bodies whose steps were taken, once nothing is to be read, and begin anew."""
        for _ in range(200):
            await asyncio.sleep(0)
        taken, self.taken = " ".join(self.taken), []
        return taken


class CountedScan(BodyScan):
    """Counts the steps that are taken."""

    taken = 0

    def step(self) -> bool:
        self.taken += 1
        return super().step()


class SteppedScan(BodyScan):
    """A body that takes a number of steps of the same length."""

    def __init__(self, steps: Steps, name: str, count: int, cost_s: float) -> None:
        super().__init__([], None, is_complete=True, key_id=name[0])
        self.steps, self.name, self.count, self.cost_s = steps, name, count, cost_s

    def step(self) -> bool:
        self.steps.taken.append(self.name)
        self.steps.now_s += self.cost_s
        self.count -= 1
        if not self.count:
            self.waiter.set_result(None)
        return self.count > 0


def played(play: Callable[[Steps], Coroutine[None, None, str]]) -> str:
    return asyncio.run(play(Steps()))


def test_keys_take_turns_and_then_the_bodies_of_a_key() -> None:
    async def play(steps: Steps) -> str:
        for name in ("b1", "b2", "b3", "a1", "c1", "c2"):
            steps.begin(name, 3)
        return await steps.all()

    assert played(play) == "b1 a1 c1 b1 a1 c2 b2 a1 c1 b3 c2 b1 c1 b2 c2 b3 b2 b3"


def test_keys_get_the_same_time_however_long_their_steps_take() -> None:
    async def play(steps: Steps) -> str:
        steps.begin("b1", 3, cost_s=0.008)
        steps.begin("a1", 8, cost_s=0.002)
        return await steps.all()

    assert played(play) == "b1 a1 a1 a1 a1 b1 a1 a1 a1 a1 b1"


def test_a_key_that_comes_has_no_credit_for_the_time_before() -> None:
    async def play(steps: Steps) -> str:
        steps.begin("b1", 9)
        await steps.first(5)
        steps.begin("a1", 9)
        return await steps.all()

    assert played(play) == "b1 b1 b1 b1 b1 " + "a1 b1 " * 4 + "a1 a1 a1 a1 a1"


def test_a_key_that_comes_back_has_not_got_rid_of_the_time_that_it_used() -> None:
    async def play(steps: Steps) -> str:
        steps.begin("b1", 2, cost_s=0.008)
        steps.begin("a1", 9)
        await steps.first(6)
        steps.begin("b2", 1)
        return await steps.all()

    assert played(play) == "b1 a1 a1 a1 a1 b1 a1 a1 a1 a1 b2 a1"


def test_what_a_key_used_is_forgotten_once_nothing_is_to_be_read() -> None:
    async def play(steps: Steps) -> str:
        steps.begin("b1", 3, cost_s=0.008)
        await steps.all()
        steps.begin("a1", 3)
        steps.begin("b2", 2)
        return await steps.all()

    assert played(play) == "a1 b2 a1 b2 a1"


def test_a_body_that_is_begun_while_another_ends_keeps_its_place() -> None:
    """The handler of a request may begin to read the next one at once."""

    async def play(steps: Steps) -> str:
        steps.begin("b1", 2, then=lambda: steps.begin("b2", 2))
        steps.begin("a1", 4)
        return await steps.all()

    assert played(play) == "b1 a1 b1 a1 b2 a1 b2 a1"
