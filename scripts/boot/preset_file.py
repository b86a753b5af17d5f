"""llama-server's preset file, read as b11434 reads it: a section for each model, `[*]` for all, keys are arguments."""

import re
from collections.abc import Mapping

ALL = "*"
TRUE = ("on", "enabled", "true", "1")
# Every name of the options that are looked at, by the one that is used here. A key has no dashes in front.
_NAMES = {
    "model": ("m", "model", "LLAMA_ARG_MODEL"),
    "mmproj": ("mm", "mmproj", "LLAMA_ARG_MMPROJ"),
    "draft": ("md", "model-draft", "spec-draft-model", "LLAMA_ARG_SPEC_DRAFT_MODEL"),
    "hf": ("hf", "hfr", "hf-repo", "LLAMA_ARG_HF_REPO"),
    "url": ("mu", "model-url", "LLAMA_ARG_MODEL_URL"),
    "alias": ("a", "alias", "LLAMA_ARG_ALIAS"),
    "load-on-startup": ("load-on-startup",),
}
_OPTION = {name: option for option, names in _NAMES.items() for name in names}
# Headers and keys begin at the start of their line; a value ends where a comment begins, also within a word.
_COMMENT = r"[ \t]*(?:[;#].*)?"
_HEADER = re.compile(rf"\[[ \t]*([^\]]+)\]{_COMMENT}")
_KEY = re.compile(rf"([A-Za-z_][A-Za-z0-9_.-]*)[ \t]*=[ \t]*([^;#]*?){_COMMENT}")
_BLANK = re.compile(_COMMENT)


def parse_preset(text: str) -> dict[str, Mapping[str, str]]:
    """Return the options of each model, with those of `[*]`; only the options in _NAMES. Raises ValueError."""
    sections: dict[str, dict[str, str]] = {}
    current: dict[str, str] | None = None
    for number, line in enumerate(re.split("\r\n|\n|\r", text), 1):
        if header := _HEADER.fullmatch(line):
            if header[1] in sections:
                raise ValueError(f"line {number}: [{header[1]}] is there twice")
            current = sections[header[1]] = {}
        elif key := _KEY.fullmatch(line):
            if current is None and key[1] != "version":
                raise ValueError(f"line {number}: {key[1]} stands before the first [section]")
            if current is not None and key[1] in _OPTION:
                current[_OPTION[key[1]]] = key[2]
        elif not _BLANK.fullmatch(line):
            raise ValueError(f"line {number} is neither [section] nor key = value, which begin at the start of a line")
    for_all = sections.pop(ALL, {})
    return {name: {**for_all, **options} for name, options in sections.items()}
