"""token_estimates.py: what is charged for that no report counts it."""

import json
import random
from math import ceil, inf
from typing import Any

import pytest

from accounting.request_record import LeftWork, Outcome, RequestRecord
from accounting.token_counter import TokenCounter
from accounting.token_estimates import OVERRUN_TOKENS, TOKENS_PER_BYTE, UNREPORTED_MARGIN, TokenEstimator, limit_of
from accounting.usage_reports import Tokens
from backend.generation_watch import Generated
from backend.left_stream import Shown, Span
from policy.token_limits import ONE_ANSWER, TokensAsked
from support.paths import TESTS
from support.records import ANSWER, CHAT, EVENTS, PING, counted, prepare, record
from support.records import left_record as left

COMPLETIONS = prepare("POST", "/v1/completions")
NATIVE = prepare("POST", "/completion")
FAILURE = b'data: {"error":{"message":"x"}}\n\n'
EMBEDDINGS = prepare("POST", "/v1/embeddings")
OTHER = prepare("GET", "/v1/models")


def tokens_of(made: RequestRecord, estimator: TokenEstimator | None = None) -> Tokens | None:
    return (estimator or TokenEstimator()).tokens_of(made)


def taught() -> TokenEstimator:
    """Return an estimator that has seen a response: 10 tokens for 40 bytes of a body, 40 tokens/s."""
    estimator = TokenEstimator()
    seen = record(bytes_in=40)
    estimator.learn([seen], [estimator.tokens_of(seen)])
    return estimator


# --- Reports ---


AS_FORMATTED = (TESTS / "answers" / "chat.json").read_bytes()


def test_a_report_of_the_first_of_several_choices_is_not_that_of_all() -> None:
    """It may end exactly as the report of the only one does."""
    choices = b'"choices":[{"index":0,"text":"%b"},{"index":1,"text":"%b"}]' % (b"x" * 400, b"x" * 400)
    timings = AS_FORMATTED[AS_FORMATTED.rindex(b'"timings"') :].strip()
    source = b"{" + choices + b"," + timings
    alone = tokens_of(record(COMPLETIONS, usage_source=source))
    both = tokens_of(record(COMPLETIONS, usage_source=source, asked=TokensAsked(choices=2)))
    assert alone is not None
    assert both is not None
    assert (alone.completion, alone.estimated) == (6, 0)
    assert both.estimated > 0
    assert both.completion == 6 + both.estimated


def test_a_response_as_llama_server_formats_it() -> None:
    assert tokens_of(record(usage_source=AS_FORMATTED)) == Tokens(28, 27, 6, 0.349, 0.736)
    assert tokens_of(record(usage_source=AS_FORMATTED, asked=TokensAsked(choices=2))) == Tokens(28, 27, 6, 0.349, 0.736)


@pytest.mark.parametrize("source", [ANSWER, counted(ANSWER)])
def test_what_is_reported_is_no_estimate(source: object) -> None:
    assert tokens_of(record(usage_source=source)) == Tokens(10, 3, 20, 350.0, 500.0)


def test_a_request_that_used_nothing_has_no_tokens() -> None:
    assert tokens_of(record(PING)) is None
    assert tokens_of(record(usage_source=None)) is None
    assert tokens_of(record(usage_source=counted(b"\x1f\x8b"))) is None


def test_an_error_of_llama_servers_own_is_charged_by_the_time() -> None:
    """A grammar that ends before it may is one, after all that was generated."""
    failed = tokens_of(record(usage_source=None, backend_status=500), taught())
    assert failed == Tokens(0, 0, 50, estimated=50)
    limited = record(usage_source=None, backend_status=500, asked=TokensAsked(max_tokens=7, choices=2))
    assert tokens_of(limited, taught()) == Tokens(0, 0, 14, estimated=14)
    assert tokens_of(record(usage_source=None, backend_status=503), taught()) is None
    assert tokens_of(record(EMBEDDINGS, usage_source=None, backend_status=500), taught()) is None


# --- Clients that left ---


def test_the_prompt_of_a_client_that_left_is_estimated_by_its_body() -> None:
    tokens = tokens_of(left(EMBEDDINGS))
    assert tokens == Tokens(30, 0, 0, estimated=30)
    tokens = tokens_of(left(bytes_in=400), taught())
    assert tokens is not None
    assert tokens.prompt == 100


def test_an_estimate_by_the_body_is_no_larger_than_what_the_prompts_can_have() -> None:
    """llama-server ignores members that it does not know, and an image has fewer tokens than its bytes."""
    unlimited, limited = (tokens_of(left(EMBEDDINGS, bytes_in=1 << 20, prompt_limit=most)) for most in (None, 8000))
    assert unlimited is not None
    assert unlimited.prompt > 300_000
    assert limited == Tokens(8000, 0, 0, estimated=8000)
    assert tokens_of(left(EMBEDDINGS, prompt_limit=8000)) == Tokens(30, 0, 0, estimated=30)
    stream = tokens_of(left(usage_source=counted(EVENTS[0]), bytes_in=1 << 20, prompt_limit=8000))
    assert stream is not None
    assert stream.prompt == 8000


def test_an_estimate_by_the_body_is_no_larger_than_what_any_slot_keeps() -> None:
    large: dict[str, Any] = {"bytes_in": 1 << 20, "prompt_limit": 8000}
    whole = left(generated=Generated(None, None, False, most_prompt=90), **large)
    stream = left(usage_source=counted(EVENTS[0]), shown=Shown(False, most_prompt=90), **large)
    several = left(generated=Generated(None, None, False, most_prompt=90), asked=TokensAsked(prompts=3), **large)
    for each, prompt in ((whole, 90), (stream, 90), (several, 270)):
        tokens = tokens_of(each)
        assert tokens is not None
        assert tokens.prompt == prompt


def test_what_was_generated_for_a_client_that_left_is_estimated_by_the_time() -> None:
    # 25 tokens of the prompt at 20/s leave 0.25 s of the 1.25 s, and llama-server notices after a second.
    tokens = tokens_of(left(), taught())
    assert tokens == Tokens(25, 0, 40, estimated=65)
    assert tokens_of(left(asked=TokensAsked(choices=2)), taught()) == Tokens(25, 0, 80, estimated=105)
    assert tokens_of(left(asked=TokensAsked(choices=2, max_tokens=7)), taught()) == Tokens(25, 0, 14, estimated=39)


def test_what_the_backend_was_seen_to_generate_precedes_the_time() -> None:
    assert tokens_of(left(generated=Generated(7, None, False)), taught()) == Tokens(25, 0, 7, estimated=32)
    assert tokens_of(left(generated=Generated(7, 30, False)), taught()) == Tokens(30, 0, 7, estimated=37)
    assert tokens_of(left(generated=Generated(7, 30, True)), taught()) == Tokens(30, 0, 7)
    assert tokens_of(left(generated=Generated(0, None, False)), taught()) == Tokens(25, 0, 0, estimated=25)


def test_prompts_that_follow_each_other_generate_in_as_many_slots_as_they_had() -> None:
    """The first one's prompt has been read long before all have."""
    many = {"asked": TokensAsked(prompts=100), "bytes_in": 10_000}
    generated = Generated(None, None, False, 4)
    assert tokens_of(left(generated=generated, **many), taught()) == Tokens(2500, 0, 4 * 40, estimated=2500 + 4 * 40)


@pytest.mark.parametrize("outcome", [Outcome.TIMED_OUT, Outcome.TRUNCATED])
def test_a_request_that_the_gateway_gave_up_is_charged_likewise(outcome: str) -> None:
    assert tokens_of(left(outcome=outcome), taught()) == Tokens(25, 0, 40, estimated=65)


def test_a_request_that_the_backend_did_not_answer_is_not_charged() -> None:
    assert tokens_of(left(outcome=Outcome.REFUSED)) is None
    assert tokens_of(left(OTHER)) is None


def test_a_stream_that_was_left_is_charged_for_its_events_and_its_prompt() -> None:
    tokens = tokens_of(left(usage_source=counted(*EVENTS)))
    assert tokens == Tokens(30, 0, 1 + OVERRUN_TOKENS, estimated=31 + OVERRUN_TOKENS)  # the first has the role only
    assert tokens_of(left(usage_source=counted(*EVENTS), asked=TokensAsked(max_tokens=2))) == Tokens(
        30, 0, 2, estimated=32
    )
    cut = tokens_of(left(usage_source=counted(*EVENTS), outcome=Outcome.TRUNCATED))  # it did not go on
    assert cut == Tokens(30, 0, 1, estimated=31)


def test_a_stream_of_which_the_backend_could_not_send_all_is_charged_by_the_time() -> None:
    tokens = tokens_of(left(usage_source=counted(*EVENTS), is_behind=True, first_byte_s=9.0, ended_s=12.25), taught())
    assert tokens == Tokens(25, 0, 80, estimated=105)
    capped = left(
        usage_source=counted(*EVENTS), is_behind=True, first_byte_s=9.0, ended_s=12.25, asked=TokensAsked(max_tokens=50)
    )
    assert tokens_of(capped, taught()) == Tokens(25, 0, 50, estimated=75)
    short = left(usage_source=counted(*EVENTS), is_behind=True, asked=TokensAsked(max_tokens=5000))
    tokens = tokens_of(short, TokenEstimator())  # no speed has been learned
    assert tokens is not None
    assert tokens.completion == 5000
    long = left(
        usage_source=counted(*EVENTS),
        is_behind=True,
        first_byte_s=9.0,
        ended_s=12.25,
        asked=TokensAsked(max_tokens=999),
    )
    assert tokens_of(long, taught()) == Tokens(25, 0, 80, estimated=105)


def test_a_stream_that_was_left_with_much_fewer_events_than_usual_is_charged_a_quarter_of_the_usual() -> None:
    """It may have generated what makes no event, or was slowed down by others."""
    late = {"usage_source": counted(*EVENTS), "first_byte_s": 9.0, "ended_s": 12.25}  # the prompt took 1.25 s
    assert tokens_of(left(**late), taught()) == Tokens(25, 0, 20, estimated=45)
    assert tokens_of(left(**late, worked_until_s=15.25), taught()) == Tokens(25, 0, 50, estimated=75)
    assert tokens_of(left(**late, worked_until_s=15.25, asked=TokensAsked(max_tokens=7)), taught()) == Tokens(
        25, 0, 7, estimated=32
    )


def test_what_is_charged_by_the_time_is_so_until_the_backend_was_seen_to_stop() -> None:
    tokens = tokens_of(left(worked_until_s=106.0), taught())
    assert tokens == Tokens(25, 0, 160, estimated=185)  # in 5.25 s, of which the prompt took 1.25 s
    role = counted(EVENTS[0])
    assert tokens_of(left(usage_source=role, worked_until_s=106.0), taught()) == tokens


def test_a_stream_that_was_left_before_its_first_event_is_charged_by_the_time() -> None:
    tokens = tokens_of(left(usage_source=TokenCounter(CHAT.route.label)), taught())
    assert tokens == Tokens(25, 0, 40, estimated=65)


def test_a_stream_whose_slots_show_no_more_is_charged_for_its_events_alone() -> None:
    """Others have slowed it down, or its prompt was being read: the time says nothing then."""
    begun, counting = TokenCounter(CHAT.route.label), counted(*EVENTS)
    (of_none, all_of_none), (of_some, all_of_some) = (
        [
            tokens_of(left(usage_source=source, shown=Shown(shows), worked_until_s=150.0), taught())
            for shows in (False, True)
        ]
        for source in (begun, counting)
    )
    assert of_none is not None
    assert all_of_none is not None
    assert of_some is not None
    assert all_of_some is not None
    assert (all_of_none.completion, all_of_some.completion) == (3, 4)
    assert of_none.completion > 1000
    assert of_some.completion > 400


@pytest.mark.parametrize("has_all", [False, True])
@pytest.mark.parametrize("source", [TokenCounter(CHAT.route.label), counted(*EVENTS)])
def test_a_stream_whose_slot_is_known_is_charged_what_that_shows(source: TokenCounter, has_all: bool) -> None:
    shown = Shown(has_all, Span(300, 300), Span(70, 70))
    assert tokens_of(left(usage_source=source, shown=shown), taught()) == Tokens(300, 0, 70, estimated=370)


def test_a_stream_whose_slot_is_one_of_a_few_is_charged_no_less_and_no_more_than_they_show() -> None:
    many, few = Shown(True, Span(300, 900), Span(70, inf)), Shown(False, Span(2, 9), Span(1, 3))
    source = counted(*EVENTS)
    assert tokens_of(left(usage_source=source, shown=many), taught()) == Tokens(300, 0, 70, estimated=370)
    assert tokens_of(left(usage_source=source, shown=few), taught()) == Tokens(9, 0, 3, estimated=12)


def test_a_stream_whose_slot_is_not_known_is_charged_no_more_than_any_slot_shows() -> None:
    """Its time may be that of others."""
    none, some = TokenCounter(CHAT.route.label), counted(*EVENTS)
    for source in (none, some):
        tokens = tokens_of(left(usage_source=source, shown=Shown(False, most=40), worked_until_s=9000.0), taught())
        assert tokens is not None
        assert tokens.completion == 40 + OVERRUN_TOKENS
    several = left(usage_source=some, shown=Shown(False, most=40), worked_until_s=9000.0, asked=TokensAsked(choices=2))
    tokens = tokens_of(several, taught())
    assert tokens is not None
    assert tokens.completion == 2 * (40 + OVERRUN_TOKENS)


def test_a_stream_is_charged_no_more_than_its_slot_keeps_with_the_prompt() -> None:
    """Its time is that of other keys' slow steps, and another slot has shown thousands of tokens."""
    none, some = TokenCounter(CHAT.route.label), counted(*EVENTS)
    for source in (none, some):
        for whole, prompt, completion in ((130, 25, 105), (26, 25, 4 if source is some else 3), (20, 20, None)):
            shown = Shown(False, most=5074, most_total=whole)
            tokens = tokens_of(left(usage_source=source, shown=shown, worked_until_s=9000.0), taught())
            assert tokens is not None
            assert tokens.prompt == prompt
            assert tokens.completion == (completion or (4 if source is some else 3))


def test_a_stream_that_was_far_ahead_is_not_charged_by_what_a_later_task_shows_in_its_slot() -> None:
    for is_behind, may_be_reused, is_certain in ((True, True, False), (True, False, True), (False, True, True)):
        shown = Shown(False, most=40, may_be_reused=may_be_reused)
        assert (LeftWork(is_behind=is_behind).with_shown(shown).shown is shown) is is_certain


def test_a_prompt_is_charged_no_more_tokens_than_its_body_can_have() -> None:
    """The slot that shows more is another key's."""
    shown = Shown(True, Span(2503, 2504), Span(7, 7))
    tokens = tokens_of(left(usage_source=counted(*EVENTS), shown=shown, bytes_in=60), taught())
    assert tokens == Tokens(60 + 512, 0, 7, estimated=60 + 512 + 7)


def test_a_prompt_that_is_known_to_be_long_is_charged_although_the_key_has_padded_bodies() -> None:
    estimator = TokenEstimator()
    estimator.learn([record(bytes_in=900_000)], [Tokens(9, 0, 1)])
    left_at_once = left(usage_source=counted(EVENTS[0]), bytes_in=2000, asked=TokensAsked(prompt_bytes=1900))
    tokens = tokens_of(left_at_once, estimator)
    assert tokens is not None
    assert tokens.prompt == 570


def test_of_a_stream_with_several_answers_a_slot_shows_the_prompt_of_one() -> None:
    shown, source = Shown(True, Span(300, 300), Span(2, 2)), counted(*EVENTS, *EVENTS)
    several = [
        tokens_of(left(COMPLETIONS, usage_source=source, shown=shown, asked=asked), taught())
        for asked in (TokensAsked(choices=2), TokensAsked(prompts=2))
    ]
    assert [each.prompt for each in several if each is not None] == [300, 600]
    assert [each.completion for each in several if each is not None] == [9, 9]


def test_what_no_slot_shows_is_not_charged_by_the_time() -> None:
    """Of a request that waits behind others' prompts, nothing is generated however long it takes."""
    for most, completion in ((0, 3), (20, 60), (9999, 1960)):
        seen = Generated(None, None, is_exact=False, most=most)
        tokens = tokens_of(left(generated=seen, worked_until_s=151.0, asked=TokensAsked(max_tokens=5000)), taught())
        assert tokens is not None
        assert abs(tokens.completion - completion) < 5, most


def test_a_choice_without_its_report_is_charged_for_its_events() -> None:
    done = b'data: {"choices":[{"finish_reason":"stop","index":0}],"timings":{"prompt_n":4,"predicted_n":1}}\n\n'
    source = counted(*EVENTS, *EVENTS, *EVENTS, done)
    assert tokens_of(left(usage_source=source, asked=TokensAsked(choices=2), outcome=Outcome.TRUNCATED)) == Tokens(
        4, 0, 6, estimated=5
    )
    assert tokens_of(record(usage_source=source, asked=TokensAsked(choices=2))) == Tokens(4, 0, 6, estimated=5)
    assert tokens_of(record(usage_source=source)) == Tokens(4, 0, 1)


def test_choices_whose_events_each_report_their_own_tokens_are_charged_for_all() -> None:
    """With `return_progress` and `timings_per_token` the last event reports what its choice has so far."""
    choice = b'data: {"choices":[{"finish_reason":null,"index":%d,"delta":{}}],'
    progress = choice % 0 + b'"prompt_progress":{"total":9},"timings":{"prompt_n":9,"predicted_n":0}}'
    role = b'{"choices":[{"finish_reason":null,"index":0,"delta":{"role":"assistant"}}]}'
    each = choice + b'"timings":{"prompt_n":9,"predicted_n":%d}}'
    events = [each % (index, number) for number in range(1, 51) for index in range(4)]
    pieces = [event + b"\n\n" for event in (progress, role, *events)]
    tokens = tokens_of(left(usage_source=counted(*pieces), asked=TokensAsked(choices=4), outcome=Outcome.TRUNCATED))
    assert tokens == Tokens(9, 0, 200, estimated=200)
    alone = tokens_of(left(usage_source=counted(*pieces[:3], *pieces[6::4]), outcome=Outcome.TRUNCATED))
    assert alone == Tokens(9, 0, 50, estimated=50)


# --- Responses without their reports ---


def test_a_response_that_was_asked_for_without_its_report_is_charged_by_its_text() -> None:
    text = json.dumps({"content": "x" * 100}).encode()
    tokens = tokens_of(record(NATIVE, usage_source=text, bytes_in=50))
    assert tokens == Tokens(15, 0, 38, estimated=53)
    assert tokens_of(record(NATIVE, usage_source=text, bytes_in=50, asked=TokensAsked(max_tokens=9))) == Tokens(
        15, 0, 9, estimated=24
    )


def test_a_response_is_charged_at_least_half_of_what_the_time_makes_likely() -> None:
    """A grammar can make each token one letter, which the text alone does not show."""
    text = json.dumps({"content": "a" * 30}).encode()
    alone, taught_first = (tokens_of(record(NATIVE, usage_source=text), each) for each in (None, taught()))
    assert alone is not None
    assert taught_first is not None
    assert (alone.completion, taught_first.completion) == (12, 25)


@pytest.mark.parametrize("name", ["tokens", "completion_probabilities"])
@pytest.mark.parametrize("several", [False, True])
def test_tokens_that_a_response_lists_are_counted(name: str, several: bool) -> None:
    """A client that asked for these alone has all that was generated, and no report."""
    one = {name: [7] * 600}
    raw = json.dumps([one, {name: "?"}, one] if several else one).encode()
    asked = TokensAsked(prompts=3) if several else TokensAsked()
    tokens = tokens_of(record(NATIVE, usage_source=raw, bytes_in=10, asked=asked), taught())
    assert tokens is not None
    assert tokens.completion == (1200 if several else 600)
    assert tokens.estimated > 600


def test_until_a_speed_is_learned_a_response_without_report_is_charged_what_it_was_allowed() -> None:
    hidden = record(NATIVE, usage_source=b'{"model":"m"}', bytes_in=10, asked=TokensAsked(max_tokens=1000))
    assert tokens_of(hidden) == Tokens(3, 0, 1000, estimated=1003)
    learned = tokens_of(hidden, taught())
    assert learned is not None
    assert 20 < learned.completion < 100


def test_a_response_without_report_and_text_is_charged_by_the_time() -> None:
    tokens = tokens_of(record(NATIVE, usage_source=b'{"id_slot":1}', bytes_in=10), taught())
    assert tokens is not None
    assert tokens.completion > 20


def test_a_stream_without_report_is_charged_at_least_half_of_what_the_time_makes_likely() -> None:
    """Half a character makes no event, and `response_fields` leave the report out of the last one."""
    hidden, shown = counted(*EVENTS), counted(*EVENTS * 40)
    several = TokensAsked(choices=2)
    tokens = [
        tokens_of(record(usage_source=source, asked=asked), taught())
        for source, asked in ((hidden, ONE_ANSWER), (hidden, several), (shown, ONE_ANSWER))
    ]
    assert [(each.completion, each.estimated) for each in tokens if each is not None] == [(25, 28), (50, 53), (79, 82)]


def test_until_a_speed_is_learned_a_stream_without_report_is_charged_what_it_was_allowed() -> None:
    for source, completion in ((counted(*EVENTS), 1000), (counted(*EVENTS, FAILURE), 12)):
        tokens = tokens_of(record(usage_source=source, asked=TokensAsked(max_tokens=1000)))
        assert tokens is not None
        assert tokens.completion == completion


def test_a_stream_that_has_failed_is_charged_as_one_without_a_report() -> None:
    """llama-server may have generated half characters, or what a grammar ended, until it failed."""
    for failure in (FAILURE, b'event: error\ndata: {"type":"error","error":{"message":"x"}}\n\n'):
        tokens = tokens_of(record(usage_source=counted(*EVENTS, failure)), taught())
        assert tokens is not None
        assert tokens.completion == 25


def test_a_stream_that_was_left_after_its_report_is_charged_what_that_says() -> None:
    done = b'data: {"choices":[{"finish_reason":"stop","index":0}],"timings":{"prompt_n":4,"predicted_n":2}}\n\n'
    source = counted(*EVENTS, done)
    assert tokens_of(left(usage_source=source, worked_until_s=150.0), taught()) == Tokens(4, 0, 2, estimated=0)


def test_a_list_has_at_least_half_of_the_tokens_that_the_time_makes_likely() -> None:
    """llama-server lists neither the tokens of a stop word nor those that end within a character."""
    listed = [
        tokens_of(
            record(NATIVE, usage_source=json.dumps({"completion_probabilities": [1] * number}).encode()), taught()
        )
        for number in (7, 40)
    ]
    assert [each.completion for each in listed if each is not None] == [25, 40]


@pytest.mark.parametrize("has_list", [False, True])
def test_further_choices_have_as_many_tokens_of_a_stop_word_as_the_first(*, has_list: bool) -> None:
    logprobs = {"logprobs": {"content": [{"token": "x"}] * 5}} if has_list else {}
    choices = [{"index": index, "text": "xxxxx", "finish_reason": "stop", **logprobs} for index in range(4)]
    raw = json.dumps({"choices": choices, "timings": {"prompt_n": 1, "predicted_n": 305}}).encode()
    asked = [TokensAsked(choices=4), TokensAsked(choices=4, has_stop=True), TokensAsked(4, 1, 310, has_stop=True)]
    usual, with_stop, limited = [tokens_of(record(COMPLETIONS, usage_source=raw, asked=each)) for each in asked]
    assert usual is not None
    assert with_stop is not None
    assert limited is not None
    assert usual.completion in (range(1220, 1400) if has_list else range(400))  # a list must have had all tokens
    assert with_stop.completion in range(1200, 1300)
    assert limited.completion in range(1200, 1236)


def test_a_list_without_the_token_that_ended_a_choice_is_a_whole_one() -> None:
    listed = {"logprobs": {"content": [{"token": "x"}] * 5}}
    choices = [{"index": index, "text": "x" * 20, "finish_reason": "stop", **listed} for index in range(3)]
    raw = json.dumps({"choices": choices, "timings": {"prompt_n": 1, "predicted_n": 6}}).encode()
    asked = TokensAsked(choices=3)
    assert tokens_of(record(COMPLETIONS, usage_source=raw, asked=asked)) == Tokens(1, 0, 16)


def test_a_choice_that_the_limit_has_ended_has_that_many_tokens_whatever_its_list_has() -> None:
    """Tokens that end within a character are in no list."""
    listed = {"logprobs": {"content": [{"token": "x"}] * 201}}
    choices = [{"index": index, "text": "x" * 804, "finish_reason": "length", **listed} for index in range(4)]
    raw = json.dumps({"choices": choices, "timings": {"prompt_n": 1, "predicted_n": 801}}).encode()
    tokens = tokens_of(record(COMPLETIONS, usage_source=raw, asked=TokensAsked(choices=4, max_tokens=801)))
    assert tokens == Tokens(1, 0, 3204)


def test_a_choice_that_the_limit_has_ended_has_no_tokens_of_a_stop_word() -> None:
    choices = [
        {"index": index, "text": "x" * 5, "finish_reason": "stop" if index == 0 else "length"} for index in (0, 1)
    ]
    raw = json.dumps({"choices": choices, "timings": {"prompt_n": 1, "predicted_n": 305}}).encode()
    tokens = tokens_of(record(COMPLETIONS, usage_source=raw, asked=TokensAsked(choices=2, has_stop=True)))
    assert tokens is not None
    assert tokens.completion < 400


def test_an_answer_that_was_asked_for_alone_has_no_further_choices() -> None:
    """What looks like some may be arguments of a tool."""
    choices = [{"index": index, "text": "x" * 400} for index in range(3)]
    raw = json.dumps({"choices": choices, "timings": {"prompt_n": 1, "predicted_n": 6}, "": 1}).encode()
    tokens = tokens_of(record(COMPLETIONS, usage_source=raw))
    assert tokens is not None
    assert tokens.completion == 6


def test_half_a_report_counts() -> None:
    half = b'{"content":"xxxx","tokens_predicted":6}'
    assert tokens_of(record(NATIVE, usage_source=half, bytes_in=10)) == Tokens(3, 0, 6, estimated=3)


def test_an_embedding_without_a_report_is_charged_for_its_prompt() -> None:
    embedding = b'[{"index":0,"embedding":[[0.5,0.25]]}]'
    assert tokens_of(record(EMBEDDINGS, usage_source=embedding, bytes_in=10)) == Tokens(3, 0, 0, estimated=3)


# --- Whole responses with several choices ---


def whole(counts: list[int], texts: list[str], reasons: list[str], prompt: int = 5) -> bytes:
    choices = [
        {"index": at, "text": text, "finish_reason": why}
        for at, (text, why) in enumerate(zip(texts, reasons, strict=True))
    ]
    timings = {"cache_n": 0, "prompt_n": prompt, "predicted_n": counts[0]}
    return json.dumps({"choices": choices, "timings": timings}, separators=(",", ":")).encode()


def test_choices_that_the_limit_ended_have_as_many_tokens_as_the_first() -> None:
    raw = whole([100], ["a" * 300, "b" * 200, "c" * 400], ["length"] * 3)
    assert tokens_of(record(COMPLETIONS, usage_source=raw, asked=TokensAsked(choices=3))) == Tokens(5, 0, 300)
    assert tokens_of(record(COMPLETIONS, usage_source=raw, asked=TokensAsked(choices=3, max_tokens=100))) == Tokens(
        5, 0, 300
    )


def test_prompts_of_a_whole_response_are_estimated_and_share_the_limit() -> None:
    raw = whole([100], ["a" * 300, "b" * 200], ["length"] * 2)
    tokens = tokens_of(
        record(COMPLETIONS, usage_source=raw, asked=TokensAsked(prompts=2, max_tokens=100), bytes_in=100)
    )
    assert tokens == Tokens(30, 0, 200, estimated=25)


@pytest.mark.parametrize("seed", range(40))
def test_other_choices_are_charged_no_less_than_generated_and_at_most_a_quarter_above(seed: int) -> None:
    """Texts of 200 to 600 tokens with 1 to 7 bytes each, as a model's are."""
    dice = random.Random(seed)
    counts = [dice.randrange(200, 600) for _ in range(3)]
    texts = ["".join("x" * dice.randrange(1, 8) for _ in range(count - 1)) for count in counts]
    raw = whole(counts, texts, ["stop"] * 3)
    tokens = tokens_of(record(COMPLETIONS, usage_source=raw, asked=TokensAsked(choices=3)))
    assert tokens is not None
    assert sum(counts) <= tokens.completion <= 1.25 * sum(counts)
    assert tokens.estimated == tokens.completion - counts[0]


def test_no_choice_is_charged_above_the_limit() -> None:
    raw = whole([10], ["a" * 40, "b" * 4000], ["stop", "stop"])
    assert tokens_of(record(COMPLETIONS, usage_source=raw, asked=TokensAsked(choices=2, max_tokens=50))) == Tokens(
        5, 0, 60, estimated=50
    )


def test_choices_with_log_probabilities_are_exact() -> None:
    logprobs = {"content": [{"token": "a"}] * 7}
    choices = [{"index": 0, "text": "a"}, {"index": 1, "text": "b", "logprobs": logprobs}]
    raw = json.dumps({"choices": choices, "timings": {"prompt_n": 2, "predicted_n": 3}}).encode()
    assert tokens_of(record(COMPLETIONS, usage_source=raw, asked=TokensAsked(choices=2))) == Tokens(2, 0, 10)


# --- Learning ---


def test_a_key_learns_only_from_its_own_requests() -> None:
    estimator = taught()
    assert estimator.prompt_tokens("alice", CHAT.route.label, 100) == 25
    assert estimator.prompt_tokens("bob", CHAT.route.label, 100) == 30


def test_what_a_body_has_besides_its_prompt_makes_no_prompt_cheaper() -> None:
    """Bodies with much that is no prompt teach that a byte has next to no tokens."""
    estimator = TokenEstimator()
    padded = record(NATIVE, usage_source=b'{"timings":{"prompt_n":1,"predicted_n":1}}', bytes_in=900_000)
    estimator.learn([padded], [estimator.tokens_of(padded)])
    hidden = record(NATIVE, usage_source=b'{"content":"a"}', bytes_in=1000, asked=TokensAsked(prompt_bytes=900))
    tokens = tokens_of(hidden, estimator)
    assert tokens is not None
    assert tokens.prompt == 270


def test_text_is_measured_from_time_to_time() -> None:
    estimator = TokenEstimator()
    native = b'{"content":"%b","timings":{"prompt_n":2,"predicted_n":50}}'
    for ended_s, size in ((100.0, 100), (101.0, 1000), (111.0, 100)):
        seen = record(NATIVE, usage_source=native % (b"x" * size), ended_s=ended_s)
        estimator.learn([seen], [estimator.tokens_of(seen)])
    tokens = tokens_of(record(NATIVE, usage_source=b'{"content":"%b"}' % (b"x" * 100)), estimator)
    assert tokens is not None
    assert tokens.completion == ceil(50 * UNREPORTED_MARGIN)


def test_nothing_is_learned_from_estimates_or_nothing() -> None:
    for records, tokens in (
        ([left()], [Tokens(1000, 0, 1000, estimated=2000)]),
        ([record(bytes_in=0), record(PING)], [Tokens(1000, 0, 0), None]),
        ([record(usage_source=b"{}")], [Tokens(0, 0, 5)]),
    ):
        estimator = TokenEstimator()
        estimator.learn(records, tokens)
        assert estimator.prompt_tokens("alice", CHAT.route.label, 100) == round(100 * TOKENS_PER_BYTE)


def test_lessons_are_a_second_apart() -> None:
    estimator = taught()
    for ended_s, expected in ((102.5, 25), (103.0, 33)):
        seen = record(bytes_in=10, ended_s=ended_s)
        estimator.learn([seen], [estimator.tokens_of(seen)])
        assert estimator.prompt_tokens("alice", CHAT.route.label, 100) == expected


@pytest.mark.parametrize(("completion", "teaches"), [(1, False), (7, False), (8, True)])
def test_the_time_of_a_few_tokens_says_nothing_of_the_speed(completion: int, *, teaches: bool) -> None:
    estimator = TokenEstimator()
    estimator.learn([record(bytes_in=0)], [Tokens(3, 0, completion, predicted_ms=0.001)])
    assert (tokens_of(left(), estimator) != tokens_of(left())) == teaches


def choices_of(key_id: str, estimator: TokenEstimator) -> int:
    """Return what a key is charged for two choices of 100 bytes, of which the first has a report of 10 tokens."""
    choices = [{"index": index, "text": "x" * 100, "finish_reason": "stop"} for index in range(2)]
    source = json.dumps({"choices": choices, "timings": {"prompt_n": 1, "predicted_n": 10}}).encode()
    asked = TokensAsked(choices=2)
    tokens = estimator.tokens_of(record(COMPLETIONS, usage_source=source, key_id=key_id, asked=asked))
    assert tokens is not None
    return tokens.completion


def test_no_lesson_makes_text_nearly_free() -> None:
    estimator = TokenEstimator()
    seen = record(NATIVE, usage_source=b'{"content":"%b","timings":{"prompt_n":2,"predicted_n":9}}' % (b"x" * 4000))
    estimator.learn([seen], [estimator.tokens_of(seen)])
    text = json.dumps({"content": "x" * 1000}).encode()
    tokens = tokens_of(record(NATIVE, usage_source=text, ended_s=100.75), estimator)
    assert tokens is not None
    assert tokens.completion == ceil(1000 * TOKENS_PER_BYTE / 2 * UNREPORTED_MARGIN)


@pytest.mark.parametrize(("text_bytes", "teaches"), [(1, False), (31, False), (32, True)])
def test_no_key_teaches_how_many_tokens_the_text_of_another_has(text_bytes: int, *, teaches: bool) -> None:
    """Control tokens have no text."""
    estimator = TokenEstimator()
    usual = choices_of("alice", TokenEstimator())
    text = json.dumps({"content": "x" * text_bytes}).encode()
    seen = record(NATIVE, usage_source=text, key_id="bob", bytes_in=0)
    estimator.learn([seen], [Tokens(1, 0, 9000)])
    assert choices_of("alice", estimator) == usual
    assert (choices_of("bob", estimator) != usual) == teaches
    assert choices_of("bob", estimator) < 10 + 100  # a token in each byte at most


def test_each_model_has_a_speed_of_its_own() -> None:
    estimator = TokenEstimator()
    estimator.learn([record(bytes_in=0, model="fast")], [Tokens(100, 0, 1000, prompt_ms=1.0, predicted_ms=1000.0)])
    fast, slow, unnamed = (tokens_of(left(model=model), estimator) for model in ("fast", "slow", "-"))
    assert fast is not None
    assert fast.completion > 1000
    assert slow == unnamed == tokens_of(left())


def with_speeds(*lessons: tuple[str, float, int]) -> TokenEstimator:
    """Return an estimator that has seen answers: the key of each, when it ended, and its tokens per second."""
    estimator = TokenEstimator()
    for key_id, ended_s, speed in lessons:
        seen = record(bytes_in=0, key_id=key_id, ended_s=ended_s)
        estimator.learn([seen], [Tokens(1, 0, speed, predicted_ms=1000.0)])
    return estimator


@pytest.mark.parametrize(
    ("lessons", "speed"),
    [
        ([("alice", 998.0, 10)], 10),
        ([("bob", 998.0, 10)], 10),
        ([("bob", 997.0, 400), ("alice", 998.0, 10)], 400),
        ([("bob", 996.0, 400), ("carol", 997.0, 200), ("alice", 998.0, 10)], 300),
        ([("bob", 401.0, 400), ("alice", 998.0, 10)], 10),
        ([("alice", 300.0, 10), ("bob", 401.0, 400)], 10),
        ([("bob", 400.0, 300), ("carol", 401.0, 400)], 400),
    ],
)
def test_a_key_that_slows_its_answers_down_is_charged_by_what_others_have_seen(
    lessons: list[tuple[str, float, int]], speed: int
) -> None:
    source = json.dumps({"content": ""}).encode()
    made = record(NATIVE, usage_source=source, left_queue_s=1000.0, ended_s=1002.0)
    tokens = tokens_of(made, with_speeds(*lessons))
    assert tokens is not None
    assert tokens.completion == 2 * speed


def test_a_prompt_that_was_found_in_the_cache_says_nothing_of_the_speed() -> None:
    estimator = TokenEstimator()
    estimator.learn([record(bytes_in=0)], [Tokens(100, 100, 0, prompt_ms=9.0)])
    assert tokens_of(left(), estimator) == tokens_of(left())


def test_no_more_time_than_the_request_took_is_spent_on_its_prompt() -> None:
    """Else a client that leaves while a long prompt is read had tokens back."""
    long = {"bytes_in": 100_000, "left_queue_s": 101.0}
    assert tokens_of(left(**long)) == Tokens(30_000, 0, 0, estimated=30_000)
    counting = tokens_of(left(**long, usage_source=counted(*EVENTS), first_byte_s=101.0), taught())
    assert counting is not None
    assert counting.completion == 1 + OVERRUN_TOKENS


def test_a_stream_that_sent_more_than_it_was_allowed_is_charged_for_what_it_sent() -> None:
    sent = counted(*EVENTS * 5)
    assert tokens_of(left(usage_source=sent, asked=TokensAsked(max_tokens=4))) == Tokens(30, 0, 9, estimated=39)


def test_a_request_that_teaches_nothing_delays_no_lesson() -> None:
    estimator = TokenEstimator()
    estimator.learn([record(PING, ended_s=100.0)], [None])
    seen = record(bytes_in=10, ended_s=100.1)
    estimator.learn([seen], [Tokens(20, 0, 1)])
    assert estimator.prompt_tokens("alice", CHAT.route.label, 10) == 20


def test_the_limit_is_that_of_all_choices() -> None:
    assert limit_of(record()) is None
    assert limit_of(record(asked=TokensAsked(max_tokens=5, choices=2, prompts=3))) == 30


def test_of_a_long_list_each_choice_has_its_part_and_the_stop_word_besides() -> None:
    token = {"token": "x", "top_logprobs": [{"token": "y" * 200}] * 9}
    choices = [{"index": index, "text": "x", "logprobs": {"content": [token] * 5}} for index in range(4)]
    source = TokenCounter(COMPLETIONS.route.label)
    source.feed(json.dumps({"choices": choices, "timings": {"prompt_n": 1, "predicted_n": 305}}).encode())
    tokens = tokens_of(record(COMPLETIONS, usage_source=source, asked=TokensAsked(4, has_stop=True)))
    assert tokens is not None
    assert tokens.completion >= 4 * 300
