"""model_names.py: names, aliases and the default; and what a key may use."""

import pytest

from core.errors import MODEL_NOT_ALLOWED, MODEL_NOT_FOUND, MODEL_REQUIRED, GatewayError, Kind
from policy.model_names import ModelNames, may_use


def names(*models: str, default: str | None = None, **aliases: str) -> ModelNames:
    made = ModelNames(aliases, default)
    made.update({model: [f"{model}-latest"] for model in models})
    return made


def refusal(made: ModelNames, name: str | None, patterns: tuple[str, ...] | None = None) -> tuple[Kind, str]:
    with pytest.raises(GatewayError) as error:
        made.resolve(name, patterns)
    return error.value.kind, error.value.message


@pytest.mark.parametrize(
    ("name", "found"),
    [("chat", "chat"), ("gpt", "chat"), ("chat-latest", "chat"), ("code", "chat"), (None, "embed"), ("", "embed")],
)
def test_a_name_an_alias_and_none_are_found(name: str | None, found: str) -> None:
    """The operator's aliases precede all other names."""
    made = names("chat", "code", "embed", default="vectors", gpt="chat", code="chat", vectors="embed")
    assert made.resolve(name, None) == found


def test_the_only_model_is_the_default() -> None:
    assert names("chat").resolve(None, None) == "chat"
    assert refusal(names("chat", "code"), None)[0] is MODEL_REQUIRED
    assert refusal(names(), None) == (MODEL_REQUIRED, f"{MODEL_REQUIRED.message} This API key may use: no model.")


def test_an_unknown_name_is_refused_with_the_names_that_the_key_may_use() -> None:
    made = names("chat-a", "chat-b", "embed", gone="none")
    for name in ("gpt", "gone"):
        expected = "There is no such model. This API key may use: chat-a, chat-b."
        assert refusal(made, name, ("chat-*",)) == (MODEL_NOT_FOUND, expected)
    many = names(*[f"m{number:02}" for number in range(23)])
    assert refusal(many, "x")[1].endswith("m18, m19 and 3 more.")


def test_a_key_may_use_what_its_patterns_match() -> None:
    made = names("chat", "embed", gpt="embed")
    assert refusal(made, "gpt", ("chat",))[0] is MODEL_NOT_ALLOWED
    assert made.allowed(("e*", "x")) == ["embed"]
    assert made.allowed(None) == ["chat", "embed"]
    assert [may_use(patterns, "embed") for patterns in (None, ("Embed",), ("[ab]*", "?mbed"))] == [True, False, True]


def test_aliases_are_listed() -> None:
    made = names("chat", "code", gpt="chat")
    assert made.aliases_of("chat") == ["chat-latest", "gpt"]
    assert [made.is_own_alias(name) for name in ("gpt", "chat-latest", "chat")] == [True, False, False]
