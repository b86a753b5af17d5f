"""router_models.py: which models a folder and a preset have, and everything for which no router would start."""

from pathlib import Path

import pytest

from boot.model_errors import ModelError
from boot.router_models import RouterModels, find_models
from config.loader import load_config


def write(folder: Path, *names: str, content: bytes = b"GGUF") -> Path:
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_bytes(content)
    return folder


def found(folder: Path, environ: dict[str, str] | None = None, **settings: str) -> RouterModels:
    """Find the models of a folder, if no setting says otherwise."""
    models = {} if "MODELS_PRESET" in settings else {"MODELS_DIR": str(folder)}
    given = {"MODELS": "router", "DATA_DIR": str(folder / "data"), **models, **settings}
    return find_models(load_config(given), environ or {})


def complaint(folder: Path, **settings: str) -> str:
    with pytest.raises(ModelError) as caught:
        found(folder, **settings)
    return str(caught.value)


def preset(folder: Path, text: str) -> str:
    (folder / "models.ini").write_text(text)
    return str(folder / "models.ini")


def test_a_folder_has_a_model_for_each_file_and_each_folder_in_it(tmp_path: Path) -> None:
    names = ("chat.gguf", "embed.Q8.gguf", "mmproj-chat.gguf", "mtp-chat.gguf", "notes.txt", "x.gguf.part")
    write(tmp_path, *names, "set/big-00002-of-00002.gguf", "set/big-00001-of-00002.gguf", "empty/readme")
    write(tmp_path, "seeing/see.gguf", "seeing/mmproj-F16.gguf", "seeing/deeper/other.gguf")
    models = {model.name: model for model in found(tmp_path).models}
    assert set(models) == {"chat", "embed.Q8", "set", "seeing"}
    assert models["set"].path == tmp_path / "set" / "big-00001-of-00002.gguf"
    assert models["seeing"].beside == (tmp_path / "seeing" / "mmproj-F16.gguf",)
    assert {name: model.size_bytes for name, model in models.items()} == {
        "chat": 4, "embed.Q8": 4, "set": 8, "seeing": 8,
    }  # fmt: skip
    assert [found(tmp_path).largest_bytes(count) for count in (1, 2, 3, 9)] == [8, 16, 20, 24]


def test_a_preset_names_its_own_models_and_those_of_the_folder(tmp_path: Path) -> None:
    write(tmp_path, "models/chat.gguf", "elsewhere/e.gguf", "elsewhere/p.gguf")
    text = (
        f"[chat]\nalias = gpt-4o, x\n[embed]\nm = {tmp_path}/elsewhere/e.gguf\nmmproj = {tmp_path}/elsewhere/p.gguf\n"
    )
    path = preset(tmp_path, text + "[far]\nhf = user/repo\n[user/repo:Q4]\n[url]\nmodel-url = https://h/m.gguf\n")
    models = {
        model.name: model for model in found(tmp_path, MODELS_PRESET=path, MODELS_DIR=f"{tmp_path}/models").models
    }
    assert list(models) == ["chat", "embed", "far", "user/repo:Q4", "url"]
    assert (models["chat"].path, models["chat"].aliases) == (tmp_path / "models" / "chat.gguf", ("gpt-4o", "x"))
    assert (models["embed"].size_bytes, models["far"].path, models["url"].path) == (8, None, None)


def test_with_a_preset_the_folder_counts_only_if_it_is_set(tmp_path: Path) -> None:
    write(tmp_path, "data/models/stray.gguf", "chat.gguf")
    path = preset(tmp_path, f"[chat]\nmodel = {tmp_path}/chat.gguf\n")
    assert [model.name for model in found(tmp_path, MODELS_PRESET=path).models] == ["chat"]


def test_no_model_found(tmp_path: Path) -> None:
    assert (
        complaint(tmp_path)
        == f"MODELS_DIR: there is no model in {tmp_path}: it needs .gguf files, or folders with them"
    )
    assert complaint(tmp_path, MODELS_PRESET=preset(tmp_path, "[*]\nc = 5\n")).endswith("has no [section] of a model")
    both = complaint(tmp_path, MODELS_PRESET=preset(tmp_path, ""), MODELS_DIR=str(tmp_path))
    assert both.endswith(f"has no [section] of a model, and {tmp_path} no .gguf file")
    assert complaint(tmp_path / "none") == f"MODELS_DIR: {tmp_path / 'none'} cannot be read: No such file or directory"


def test_models_that_were_downloaded_before_may_be_all_there_are(tmp_path: Path) -> None:
    assert found(tmp_path, {"HF_HOME": "/somewhere"}).models == ()
    (tmp_path / "models--user--repo").mkdir()
    assert found(tmp_path).models == ()


def test_a_preset_that_names_no_file_that_can_be_loaded(tmp_path: Path) -> None:
    write(tmp_path, "other.gguf")
    write(tmp_path, "bad.gguf", content=b"<html>")
    text = f"[a]\nm = {tmp_path}/none.gguf\n[b]\nm = {tmp_path}/bad.gguf\n"
    message = complaint(tmp_path, MODELS_PRESET=preset(tmp_path, text))
    missing, bad = message.split("; MODELS_PRESET: ")
    assert missing.startswith(f"MODELS_PRESET: the model a: {tmp_path}/none.gguf does not exist (")
    assert bad.startswith(f"the model b: {tmp_path}/bad.gguf is ")
    assert complaint(tmp_path, MODELS_PRESET=preset(tmp_path, "[a]\nc = 5\n")) == (
        "MODELS_PRESET: [a] names no model: it needs model, hf or model-url"
    )
    text = f"[a]\nm = {tmp_path}/set-00001-of-00002.gguf\n"
    write(tmp_path, "set-00001-of-00002.gguf")
    assert "set-00002-of-00002.gguf does not exist" in complaint(tmp_path, MODELS_PRESET=preset(tmp_path, text))


def test_a_preset_that_cannot_be_read(tmp_path: Path) -> None:
    gone = complaint(tmp_path, MODELS_PRESET=f"{tmp_path}/none.ini")
    assert gone == f"MODELS_PRESET: {tmp_path}/none.ini cannot be read: No such file or directory"
    path = preset(tmp_path, "[a]\n[a]\n")
    assert complaint(tmp_path, MODELS_PRESET=path) == f"MODELS_PRESET: {path}: line 2: [a] is there twice"


def test_a_file_of_the_folder_that_cannot_be_loaded_keeps_no_other_from_serving(tmp_path: Path) -> None:
    write(tmp_path, "chat.gguf", "set/m-00001-of-00002.gguf")
    write(tmp_path, "bad.gguf", content=b"<html>")
    bad, incomplete = found(tmp_path).warnings
    assert bad.startswith(f"MODELS_DIR: the model bad: {tmp_path}/bad.gguf is ")
    assert incomplete.startswith("MODELS_DIR: the model set: ")


def test_a_name_belongs_to_one_model(tmp_path: Path) -> None:
    write(tmp_path, "chat.gguf", "chat/other.gguf", "embed.gguf")
    assert complaint(tmp_path) == "MODELS_DIR: two files are named chat"
    text = "[chat]\nalias = embed\n[embed]\nalias = x\n[third]\nalias = x, third\n"
    text = text.replace("\n[", f"\nm = {tmp_path}/embed.gguf\n[") + f"m = {tmp_path}/embed.gguf\n"
    assert complaint(tmp_path, MODELS_PRESET=preset(tmp_path, text)) == (
        "MODELS_PRESET: embed is a name of embed and of chat; MODELS_PRESET: x is a name of embed and of third"
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"MODELS_PRELOAD": "chat,chta", "MODELS_MAX": "2"}, "MODELS_PRELOAD: there is no model chta (there are "),
        ({"DEFAULT_MODEL": "gone"}, "DEFAULT_MODEL: there is no model gone (there are chat, embed)"),
        ({"MODEL_ALIASES": "gpt-4o=gone"}, "MODEL_ALIASES: there is no model gone (there are chat, embed)"),
        ({"MODEL_ALIASES": "chat=embed"}, "MODEL_ALIASES: chat is the name of a model itself"),
    ],
)
def test_settings_name_models_that_there_are(settings: dict[str, str], message: str, tmp_path: Path) -> None:
    write(tmp_path, "chat.gguf", "embed.gguf")
    assert complaint(tmp_path, **settings).startswith(message)


def test_settings_may_name_aliases_and_models_to_be_downloaded(tmp_path: Path) -> None:
    write(tmp_path, "chat.gguf", *(f"{number}.gguf" for number in range(9)))
    names = {"MODEL_ALIASES": "gpt-4o=chat,far=user/repo:Q4", "DEFAULT_MODEL": "gpt-4o", "MODELS_PRELOAD": "gpt-4o"}
    assert len(found(tmp_path, **names).models) == 10
    assert complaint(tmp_path, DEFAULT_MODEL="x").endswith("(there are 0, 1, 2, 3, 4, 5, 6, 7, …)")


def test_no_more_models_are_loaded_at_the_start_than_may_be(tmp_path: Path) -> None:
    write(tmp_path, "chat.gguf", "embed.gguf")
    path = preset(tmp_path, "[embed]\nload-on-startup = 1\n")
    settings = {"MODELS_PRESET": path, "MODELS_DIR": str(tmp_path), "MODELS_PRELOAD": "chat"}
    assert complaint(tmp_path, **settings) == (
        "MODELS_MAX=1, but more models are to be loaded at the start: chat, embed"
    )
    assert len(found(tmp_path, **settings, MODELS_MAX="2").models) == 2
