"""sliding_window.py: what counts, and until when. tests/test_auth.py and tests/policy/test_token_limiter.py use it."""

from core.sliding_window import BUCKET_S, WINDOW_S, SlidingWindow, WindowTable


def test_what_arrives_together_expires_together() -> None:
    window = SlidingWindow()
    window.add(100.0, 5)
    window.add(100.5, 7)
    window.add(100.0 + BUCKET_S, 1)
    assert (len(window.buckets), window.total) == (2, 13)
    window.expire(100.4 + WINDOW_S)
    assert window.total == 13
    window.expire(100.5 + WINDOW_S)
    assert (window.total, window.next_expiry_s) == (1, 161.0)
    assert window.reset_s(150.0) == 11.0
    window.expire(161.0)
    assert (window.total, window.reset_s(161.0)) == (0, 0.0)


def test_a_part_is_removed_where_it_arrived() -> None:
    window = SlidingWindow()
    window.add(100.0, 5)
    window.add(110.0, 5)
    window.remove(100.0, 3)
    assert [bucket.count for bucket in window.buckets] == [2, 5]
    window.remove(110.0, 5)
    window.add(110.0, 1)
    assert [bucket.count for bucket in window.buckets] == [2, 1]
    window.remove(120.0, 9)
    assert window.total == 3


def test_the_wait_is_until_less_counts() -> None:
    window = SlidingWindow()
    window.add(100.0, 5)
    window.add(110.0, 5)
    assert window.wait_s(10, 115.0) == 45.0
    assert window.wait_s(5, 115.0) == 55.0


def test_a_table_drops_the_windows_of_which_nothing_counts() -> None:
    table = WindowTable(100.0)
    table.add_key("alice", 100.0).add(100.0, 5)
    table.add_key("bob", 150.0).add(150.0, 7)
    assert (table.used("alice", 150.0), table.used("carol", 150.0)) == ((5, 10.0), (0, 0.0))
    table.add_key("carol", 161.0)
    assert sorted(table) == ["bob", "carol"]
    assert table.used("bob", 161.0) == (7, 49.0)
