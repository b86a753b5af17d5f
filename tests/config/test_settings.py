"""settings.py: the table, and the page that is made from it."""

from config.schema import Config
from config.settings import ALIASES, OFF_WHEN_EMPTY, SETTINGS

NAMES = {setting.name for setting in SETTINGS}


def test_names_and_paths_are_unique() -> None:
    assert len({setting.name for setting in SETTINGS}) == len({setting.path for setting in SETTINGS}) == len(SETTINGS)


def test_help_is_whole_sentences() -> None:
    for setting in SETTINGS:
        assert setting.help[0].isupper() or setting.help.startswith("llama-server")
        assert setting.help.endswith(".")
        assert "|" not in setting.help + setting.converter.accepts


def test_each_path_is_an_attribute_of_config() -> None:
    for setting in SETTINGS:
        part, _, attribute = setting.path.rpartition(".")
        fields = Config.__annotations__[part]._fields if part else Config._fields
        assert attribute in fields, setting.name


def test_each_attribute_of_config_has_a_setting() -> None:
    paths = {setting.path for setting in SETTINGS}
    for part, kind in Config.__annotations__.items():
        for attribute in getattr(kind, "_fields", ()):
            assert f"{part}.{attribute}" in paths


def test_aliases_and_exceptions_name_settings() -> None:
    assert set(ALIASES.values()) <= NAMES
    assert not set(ALIASES) & NAMES
    assert OFF_WHEN_EMPTY <= NAMES
