"""suspects.py: which requests are blamed for a death of the backend, and what follows."""

import pytest

from core.errors import CALLER_PAUSED, REQUEST_HELD_BACK, GatewayError
from policy.suspects import CUT_S, DEATHS_S, HELD_S, MAX_PAUSE_S, PAUSE_S, Suspect, Suspects
from support.clock import Clock


def suspect(name: str) -> Suspect:
    """`a1` is a request of the key a."""
    return Suspect(name[0], name.encode())


class World:
    def __init__(self, shared_key: str = "") -> None:
        self.clock = Clock()
        self.at_work: list[Suspect] = []
        self.models: dict[str, str] = {}  # of the requests at work, by name
        self.suspects = Suspects(self._works, self.clock, shared_key)

    def _works(self, model: str | None) -> list[Suspect]:
        return [each for each in self.at_work if model in (None, self.models.get(each.digest.decode()))]

    def die(self, *names: str) -> None:
        """The backend dies while it works on these."""
        self.at_work = [suspect(name) for name in names]
        self.suspects.note_cut()
        self.at_work = []
        self.suspects.note_down()

    def fate(self, name: str) -> str:
        try:
            return "alone" if self.suspects.must_run_alone(suspect(name)) else "free"
        except GatewayError as error:
            return "held" if error.kind is REQUEST_HELD_BACK else error.kind.code

    def pause_s(self, key_id: str) -> int:
        try:
            self.suspects.check_caller(key_id)
        except GatewayError as error:
            return error.retry_after_s or 0 if error.kind is CALLER_PAUSED else -1
        return 0


def test_without_a_death_nothing_is_looked_at() -> None:
    world = World()
    assert not world.suspects.active
    world.suspects.note_down()
    world.at_work = [suspect("a1")]
    world.suspects.note_cut()
    world.suspects.note_alive()
    world.suspects.note_down()
    assert not world.suspects.active
    world.suspects.note_cut()
    world.clock.advance(CUT_S + 1)
    world.suspects.note_down()
    assert not world.suspects.active


def test_the_log_says_whose_requests_were_at_work_and_what_follows(caplog: pytest.LogCaptureFixture) -> None:
    world = World()
    world.die("a1", "b1")
    world.die("a1", "c1")
    world.die("a2")
    assert caplog.messages == [
        "llama-server ended while it worked on requests of the keys a, b",
        "llama-server ended while it worked on requests of the keys a, c",
        "a request of key a is held back for an hour: it was at work alone, or in two deaths",
        "llama-server ended while it worked on requests of the keys a",
        "a request of key a is held back for an hour: it was at work alone, or in two deaths",
        "key a gets nothing for 60 s: its requests were at work in most of the last deaths",
    ]


def test_a_model_dies_alone() -> None:
    """What other models worked on, or were left with, is no suspect."""
    world = World()
    world.models = {"a1": "chat", "b1": "embed"}
    world.at_work = [suspect("a1"), suspect("b1")]
    world.suspects.abandon(suspect("c1"), "embed")
    world.suspects.note_cut("chat")
    world.suspects.note_down()
    assert [world.fate(name) for name in ("a1", "b1", "c1")] == ["held", "free", "free"]
    world.suspects.abandon(suspect("c1"), "embed")
    world.suspects.note_cut("embed")
    world.suspects.note_down()
    assert [world.fate(name) for name in ("b1", "c1")] == ["alone", "alone"]


def test_models_that_die_within_a_moment_have_suspects_of_their_own() -> None:
    for order in (("chat", "embed"), ("embed", "chat")):
        world = World()
        world.models = {"a1": "chat", "b1": "embed"}
        world.at_work = [suspect("a1"), suspect("b1")]
        world.suspects.note_cut("chat")
        world.suspects.note_cut("embed")
        world.suspects.note_down(order[0])
        assert [world.fate(name) for name in ("a1", "b1")] == (
            ["held", "free"] if order[0] == "chat" else ["free", "held"]
        )
        world.suspects.note_down(order[1])
        assert [world.fate(name) for name in ("a1", "b1")] == ["held", "held"]
        assert world.suspects.deaths == 2


def test_if_the_backend_ends_with_all_its_models_that_is_one_death() -> None:
    world = World()
    world.models = {"a1": "chat", "b1": "embed"}
    world.at_work = [suspect("a1"), suspect("b1")]
    world.suspects.note_cut("chat")
    world.suspects.note_cut()
    world.suspects.note_down()
    assert [world.fate(name) for name in ("a1", "b1")] == ["alone", "alone"]
    world.suspects.note_down()
    world.suspects.note_down("chat")
    assert world.suspects.deaths == 1
    world.suspects.note_cut("embed")  # its connections alone were seen to end
    world.suspects.note_down()
    assert world.fate("b1") == "held"


def test_a_cut_on_purpose_says_nothing_of_a_model() -> None:
    world = World()
    world.models = {"a1": "chat"}
    world.at_work = [suspect("a1")]
    world.suspects.note_cut("chat")
    world.suspects.note_alive()
    world.suspects.note_down("chat")
    assert world.fate("a1") == "held"


def test_what_was_alone_in_a_death_is_held_back_for_an_hour() -> None:
    world = World()
    world.die("b1")
    assert world.suspects.active
    assert (world.fate("b1"), world.fate("b2"), world.fate("a1")) == ("held", "free", "free")
    world.clock.advance(HELD_S - 1)
    assert world.fate("b1") == "held"
    world.clock.advance(1)
    assert world.fate("b1") != "held"
    world.suspects.check_caller("b")
    assert not world.suspects.active


def test_what_was_at_work_in_two_deaths_is_held_back_and_the_others_are_cleared() -> None:
    world = World()
    world.die("a1", "b1")
    assert (world.fate("a1"), world.fate("b1")) == ("alone", "alone")
    world.suspects.clear(suspect("a1"))
    assert world.fate("a1") == "free"
    world.die("a2", "b1")
    assert (world.fate("a2"), world.fate("b1")) == ("free", "held")
    assert not world.suspects.is_limited("a")
    assert world.suspects.is_limited("b")


def test_a_request_that_is_answered_between_two_deaths_is_not_held_back() -> None:
    world = World()
    for number in range(5):
        world.die("a1", f"b{number}")
        world.suspects.clear(suspect("a1"))
    assert world.fate("a1") == "free"
    assert world.pause_s("a") == 0
    assert world.pause_s("b") > 0


def test_a_request_whose_client_has_left_is_a_suspect_for_a_while() -> None:
    world = World()
    world.suspects.abandon(suspect("b1"))
    world.die("a1")
    assert (world.fate("a1"), world.fate("b1")) == ("alone", "alone")
    world.suspects.abandon(suspect("b2"))
    world.clock.advance(60)
    world.die("c1")
    assert (world.fate("c1"), world.fate("b2")) == ("held", "free")


def test_of_two_suspects_the_one_whose_client_has_left_ran_first() -> None:
    world = World()
    world.die("a1", "b1")
    world.suspects.abandon(suspect("b1"))
    world.die("a1")
    assert (world.fate("a1"), world.fate("b1")) == ("free", "held")


def test_a_key_gets_one_request_at_a_time_then_none_for_a_while() -> None:
    world = World()
    world.die("b1")
    assert (world.suspects.is_limited("b"), world.pause_s("b")) == (False, 0)
    world.die("b2")
    assert (world.suspects.is_limited("b"), world.pause_s("b")) == (True, 0)
    world.die("b3")
    assert world.pause_s("b") == PAUSE_S
    world.clock.advance(PAUSE_S - 0.5)
    assert world.pause_s("b") == 1
    world.clock.advance(1)
    assert world.pause_s("b") == 0
    world.die("b4")
    assert world.pause_s("b") == 2 * PAUSE_S
    for number in range(5, 20):
        world.die(f"b{number}")
    assert world.pause_s("b") == MAX_PAUSE_S
    assert (world.suspects.is_limited("a"), world.pause_s("a")) == (False, 0)
    world.clock.advance(DEATHS_S + 1)
    assert (world.suspects.is_limited("b"), world.pause_s("b")) == (False, 0)


def test_only_most_deaths_count_against_a_key() -> None:
    world = World()
    for number in range(3):
        world.die(f"a{number}")
        world.die(f"b{number}")
    assert (world.pause_s("a"), world.pause_s("b")) == (0, 0)


def test_what_is_too_long_ago_is_forgotten_also_for_everyones_key() -> None:
    for shared in ("", "-"):
        world = World(shared)
        world.die("-1", "-2")
        world.clock.advance(HELD_S + 1)
        world.suspects.check_caller("-")
        assert not world.suspects.active
        assert world.fate("-1") == "free"


def test_a_request_that_was_at_work_again_is_a_suspect_for_an_hour_from_then_on() -> None:
    """The others are suspects no longer than theirs."""
    world = World()
    world.die("a1", "b1")
    world.clock.advance(HELD_S / 2)
    world.die("b1", "c1")  # it is found out
    world.die("a1", "d1")
    world.clock.advance(HELD_S / 2)
    world.suspects.check_caller("e")
    assert [world.fate(name) for name in ("a1", "b1")] == ["held", "held"]
    world.clock.advance(HELD_S / 2)
    world.suspects.check_caller("e")
    assert not world.suspects.active


def test_a_suspect_that_is_so_again_keeps_none_of_the_others() -> None:
    world = World()
    world.die("a1", "x1")
    world.die("b1", "x2")
    world.clock.advance(HELD_S - 1)
    world.die("a1", "x3")
    world.clock.advance(1)
    world.suspects.check_caller("e")
    assert [world.fate(name) for name in ("a1", "b1")] == ["held", "free"]


def test_a_suspect_is_one_for_longer_than_its_death_counts_against_its_key() -> None:
    world = World()
    world.die("a1", "b1")
    world.clock.advance(DEATHS_S + 1)
    world.suspects.check_caller("a")
    assert world.suspects.active
    assert world.fate("a1") == "alone"


def test_a_death_whose_request_was_found_out_counts_against_no_other_key() -> None:
    world = World()
    world.die("a1", "b1")
    world.die("a1", "b2")
    assert (world.suspects.is_limited("a"), world.suspects.is_limited("b")) == (True, False)


def test_a_cut_that_led_to_no_death_is_not_the_next_ones() -> None:
    world = World()
    world.at_work = [suspect("a1")]
    world.suspects.note_cut()
    world.clock.advance(CUT_S + 1)
    world.die("b1")
    assert [world.fate(name) for name in ("a1", "b1")] == ["free", "held"]


def test_what_was_left_before_a_death_is_at_work_in_no_later_one() -> None:
    world = World()
    world.suspects.abandon(suspect("c1"))
    world.die("a1")
    world.die("b1")
    assert [world.fate(name) for name in ("c1", "b1")] == ["alone", "held"]


def test_a_key_that_is_everyones_is_not_paused() -> None:
    world = World("-")
    for number in range(4):
        world.die(f"-{number}")
    assert (world.suspects.is_limited("-"), world.pause_s("-")) == (False, 0)
    assert world.fate("-1") == "held"


def test_a_death_with_requests_at_work_is_known_for_a_moment() -> None:
    world = World()
    assert not world.suspects.was_cut_recently()
    world.at_work = [suspect("b1")]
    world.suspects.note_cut()
    assert world.suspects.was_cut_recently()
    world.suspects.note_down()
    assert world.suspects.was_cut_recently()
    world.clock.advance(CUT_S + 1)
    assert not world.suspects.was_cut_recently()


def test_what_is_kept_is_bounded() -> None:
    world = World()
    world.die(*[f"a{number}" for number in range(5000)])
    world.die("b1")
    assert world.pause_s("b") == 0
    assert sum(world.fate(f"a{number}") == "alone" for number in range(5000)) == 4095


@pytest.mark.parametrize("names", [("b1", "c1"), ("b1", "b2")])
def test_two_that_die_together_twice_are_both_held_back(names: tuple[str, str]) -> None:
    world = World()
    world.die(*names)
    world.die(*names)
    assert [world.fate(name) for name in names] == ["held", "held"]


def test_what_is_cut_a_moment_later_is_of_the_same_death() -> None:
    world = World()
    world.at_work = [suspect("a1")]
    world.suspects.note_cut()
    world.at_work = [suspect("b1")]
    world.suspects.note_cut()
    world.suspects.note_down()
    assert [world.fate(name) for name in ("a1", "b1")] == ["held", "free"]
