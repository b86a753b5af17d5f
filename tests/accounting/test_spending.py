"""spending.py: what quotas are compared with, over changes of the day, the month and the clock."""

from accounting.spending import Spending

DAY, NEXT_DAY, NEXT_MONTH = "2026-01-30", "2026-01-31", "2026-02-01"


def test_what_is_added_counts_for_its_day_and_its_month() -> None:
    spending = Spending()
    spending.add(DAY, {"alice": 5, "bob": 1})
    spending.add(NEXT_DAY, {"alice": 2})
    assert (spending.of_day(DAY, "alice"), spending.of_day(NEXT_DAY, "alice")) == (5, 2)
    assert (spending.of_month(NEXT_DAY, "alice"), spending.of_month(DAY, "bob")) == (7, 1)
    assert (spending.of_day(NEXT_MONTH, "alice"), spending.of_month(NEXT_MONTH, "alice")) == (0, 0)


def test_what_was_spent_before_and_elsewhere_counts_as_well() -> None:
    spending = Spending()
    spending.add(DAY, {"alice": 1})
    spending.before = {DAY: {"alice": 10}, "2026-01-01": {"alice": 20}, "2025-12-31": {"alice": 40}}
    spending.elsewhere = {DAY: {"alice": 100, "bob": 7}}
    assert (spending.of_day(DAY, "alice"), spending.of_month(DAY, "alice")) == (111, 131)
    assert (spending.of_day(DAY, "bob"), spending.of_month(NEXT_DAY, "bob")) == (7, 7)


def test_a_clock_that_is_set_back_past_midnight_forgets_nothing() -> None:
    spending = Spending()
    spending.before = {"2026-01-31": {"alice": 40}}
    spending.add(NEXT_MONTH, {"alice": 1})
    spending.add(NEXT_DAY, {"alice": 5})
    assert spending.of_day(NEXT_MONTH, "alice") == 1
    assert (spending.of_day(NEXT_DAY, "alice"), spending.of_month(NEXT_DAY, "alice")) == (45, 45)


def test_few_days_stay_in_memory() -> None:
    spending = Spending()
    for number in range(100):
        spending.add(f"day {number:02}", {"alice": 1})
    assert [spending.of_day(f"day {number:02}", "alice") for number in (0, 35, 36, 99)] == [0, 0, 1, 1]
