"""preset_file.py: what llama-server's own grammar accepts, and the line at which a file is wrong."""

import pytest

from boot.preset_file import parse_preset


def test_a_section_is_a_model_with_the_options_of_all() -> None:
    text = """\
version = 1
; a comment
# another one
[*]
c = 4096
alias=x

[ chat]   ; the first one
m = /models/chat model.gguf   # with a blank
LLAMA_ARG_ALIAS = gpt-4o, gpt-4
load-on-startup = true
[user/repo:Q4_K_M]
"""
    assert parse_preset(text) == {
        "chat": {"model": "/models/chat model.gguf", "alias": "gpt-4o, gpt-4", "load-on-startup": "true"},
        "user/repo:Q4_K_M": {"alias": "x"},
    }


def test_every_name_of_an_option_counts_and_the_last_one_wins() -> None:
    text = "[a]\r\nmodel = /1\r\nm=/2#3\rmm = /p\nmodel-draft = /d\nhf-repo = u/r\nmu = https://h/m\n\n"
    expected = {"model": "/2", "mmproj": "/p", "draft": "/d", "hf": "u/r", "url": "https://h/m"}
    assert parse_preset(text) == {"a": expected}
    assert parse_preset("") == parse_preset("[*]\nm = x") == {}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[a]\nm = x\n[b]\n[a]\n", r"line 4: \[a\] is there twice"),
        ("m = x\n", r"line 1: m stands before the first \[section\]"),
        ("[a]\n  m = x\n", "line 2 is neither"),
        ("[a]\nm\n", "line 2 is neither"),
        ("[a\n", "line 1 is neither"),
        ("[]\n", "line 1 is neither"),
        ("[a] b\n", "line 1 is neither"),
        ("[a]\n-m = x\n", "line 2 is neither"),
    ],
)
def test_what_llama_server_cannot_read_is_named_by_its_line(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=f"^{complaint}"):
        parse_preset(text)
