"""schema.py: the types of the settings."""

import pytest

from config.schema import Config, ConfigError, Limits


def test_default_limits() -> None:
    assert Limits() == Limits(8192, 8192, 64, 65536, 32 * 1024 * 1024, 65536)


def test_settings_are_immutable() -> None:
    with pytest.raises(AttributeError):
        Limits().headers = 1  # type: ignore[misc]


def test_slices_are_named_after_their_attribute() -> None:
    slices = {name: kind.__name__ for name, kind in Config.__annotations__.items() if hasattr(kind, "_fields")}
    assert slices.pop("limits") == "Limits"
    assert slices == {name: name.capitalize().removesuffix("s") + "Settings" for name in slices}


def test_a_config_error_has_one_line_per_complaint() -> None:
    error = ConfigError(("A: bad", "B: bad"))
    assert str(error) == "A: bad\nB: bad"
    assert error.complaints == ("A: bad", "B: bad")
