"""request_record.py: what a record says before anything has happened, and the ids of requests."""

from accounting.request_record import CLIENT_CLOSED_REQUEST, Outcome, RequestRecord, Stage, request_ids
from support.records import CHAT


def test_a_new_record_says_that_nothing_has_happened_yet() -> None:
    new = RequestRecord(b"req-1", "192.0.2.7", CHAT, 100.0, Stage.AUTHENTICATING)
    assert (new.id, new.peer, new.prepared, new.started_s, new.stage) == (
        b"req-1",
        "192.0.2.7",
        CHAT,
        100.0,
        Stage.AUTHENTICATING,
    )
    assert (new.key_id, new.outcome, new.refusal, new.usage_source) == ("-", Outcome.DONE, None, None)
    assert (new.queued_s, new.left_queue_s, new.first_byte_s) == (0, 0, 0)
    assert (new.backend_status, new.is_unfinished) == (0, False)


def test_a_response_that_was_not_sent_has_the_status_that_nginx_gives_it() -> None:
    new = RequestRecord(b"req-1", "192.0.2.7", CHAT, 100.0, Stage.READING_HEAD)
    assert new.status == CLIENT_CLOSED_REQUEST == 499


def test_ids_count_up() -> None:
    ids = request_ids()
    first, second = next(ids), next(ids)
    assert first.startswith(b"req-")
    assert (first[-2:], second[-2:], first[:-2]) == (b"-1", b"-2", second[:-2])


def test_ids_are_unique_across_processes() -> None:
    one, other = request_ids(), request_ids()
    made = [next(ids) for ids in (one, one, other, other)]
    assert len(set(made)) == 4
