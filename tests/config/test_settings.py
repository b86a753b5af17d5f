"""settings.py: the fields of Config, and the table that is made from them."""

import re
from types import UnionType
from typing import get_args, get_origin

import pytest

from config.settings import ALIASES, OFF_WHEN_EMPTY, SETTINGS, Config, ConfigError, Limits, Setting

NAMES = {setting.name for setting in SETTINGS}


def test_names_and_paths_are_unique() -> None:
    assert len({setting.name for setting in SETTINGS}) == len({setting.path for setting in SETTINGS}) == len(SETTINGS)


def test_help_is_whole_sentences() -> None:
    for setting in SETTINGS:
        assert setting.help[0].isupper() or setting.help.startswith("llama-server")
        assert setting.help.endswith(".")
        assert "|" not in setting.help + setting.converter.accepts


def test_the_data_folder_is_read_before_what_is_in_it() -> None:
    assert SETTINGS[0].name == "DATA_DIR"


@pytest.mark.parametrize(
    "setting", [setting for setting in SETTINGS if setting.default is not None], ids=lambda setting: setting.name
)
def test_a_default_becomes_what_its_field_is(setting: Setting) -> None:
    part, _, field = setting.path.rpartition(".")
    assert setting.default is not None
    annotation = (Config.__annotations__[part] if part else Config).__annotations__[field]
    types = get_args(annotation.__origin__) if isinstance(annotation.__origin__, UnionType) else [annotation.__origin__]
    value = setting.converter.parse(setting.default)
    assert isinstance(value, tuple(get_origin(each) or each for each in types))


def test_default_limits() -> None:
    assert Limits() == Limits(8192, 8192, 64, 65536, 32 * 1024 * 1024, 65536, 100, 2048)


def test_settings_are_immutable() -> None:
    with pytest.raises(AttributeError):
        Limits().headers = 1  # type: ignore[misc]


def test_slices_are_named_after_their_attribute() -> None:
    slices = {
        name: kind.__name__
        for name, kind in Config.__annotations__.items()
        if re.search("Settings$|Limits", getattr(kind, "__name__", ""))
    }
    assert slices.pop("limits") == "Limits"
    assert slices == {name: name.capitalize().removesuffix("s") + "Settings" for name in slices}


def test_a_config_error_has_one_line_per_complaint() -> None:
    error = ConfigError(("A: bad", "B: bad"))
    assert str(error) == "A: bad\nB: bad"
    assert error.complaints == ("A: bad", "B: bad")


def test_aliases_and_exceptions_name_settings() -> None:
    assert set(ALIASES.values()) <= NAMES
    assert not set(ALIASES) & NAMES
    assert OFF_WHEN_EMPTY <= NAMES
