"""model_table.py: which models a folder and a preset have."""

from pathlib import Path

import pytest

from mock.model_table import find_models


def test_a_folder_has_a_model_for_each_file_and_sub_folder(tmp_path: Path) -> None:
    for name in (
        "a.gguf",
        "mmproj-a.gguf",
        "notes.txt",
        "set/x-00001-of-00002.gguf",
        "set/x-00002-of-00002.gguf",
        "seeing/mmproj.gguf",
        "seeing/see.gguf",
        "empty/readme",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    models = find_models(str(tmp_path), "")
    assert {name: Path(model.options["model"]).name for name, model in models.items()} == {
        "a": "a.gguf",
        "seeing": "see.gguf",
        "set": "x-00001-of-00002.gguf",
    }


def test_a_preset_adds_models_and_options(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").touch()
    preset = tmp_path / "p.ini"
    preset.write_text("[*]\nctx-size = 5\n[a]\nalias = b, c\n[d]\nmodel = /d.gguf\n")
    models = find_models(str(tmp_path), str(preset))
    assert models["a"].options == {"model": str(tmp_path / "a.gguf"), "ctx-size": "5", "alias": "b, c"}
    assert (models["a"].source, models["a"].aliases, models["d"].aliases) == ("preset", ["b", "c"], [])
    preset.write_text("[a\n")
    with pytest.raises(ValueError, match="failed to parse server config file"):
        find_models("", str(preset))


def test_a_row_has_the_arguments_and_the_preset(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").touch()
    row = find_models(str(tmp_path), "")["a"].describe()
    assert row["status"] == {
        "value": "unloaded",
        "args": ["mock_backend.py", "--model", str(tmp_path / "a.gguf")],
        "preset": f"[a]\nmodel = {tmp_path / 'a.gguf'}\n",
    }
