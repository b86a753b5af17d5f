"""token_limits.py: what a body asks for, and the key's limit in it. What counts was seen on llama-server b11434."""

import pytest

from core.errors import TOO_MANY_TOKENS_ASKED, GatewayError
from http1.json_members import MemberReader, Members
from policy.routes import Route, Routes
from policy.slot_demand import MEMBERS
from policy.token_limits import TokensAsked, limit_tokens, tokens_asked

CHAT, COMPLETIONS, NATIVE, RESPONSES, MESSAGES, EMBEDDINGS = (
    Routes().find(b"POST", path)
    for path in (
        b"/v1/chat/completions",
        b"/v1/completions",
        b"/completion",
        b"/v1/responses",
        b"/v1/messages",
        b"/v1/embeddings",
    )
)


def members_of(body: bytes) -> Members:
    reader = MemberReader(MEMBERS)
    reader.feed(body)
    while reader.step():
        pass
    return reader.end()


def asked(route: Route, body: str) -> TokensAsked:
    return tokens_asked(route, members_of(body.encode()))


def test_the_size_of_the_prompts_is_that_of_their_member() -> None:
    assert asked(NATIVE, '{"zz":"much that is no prompt","prompt":"four"}').prompt_bytes == 6
    assert asked(COMPLETIONS, '{"prompt":["a","b"]}').prompt_bytes == 9
    assert asked(NATIVE, "{}").prompt_bytes == 0
    assert asked(CHAT, '{"prompt":"four"}').prompt_bytes == 0


@pytest.mark.parametrize(
    ("route", "body", "max_tokens", "member", "is_named"),
    [
        (CHAT, "{}", None, "max_tokens", False),
        (CHAT, '{"max_tokens":5}', 5, "max_tokens", True),
        (CHAT, '{"max_tokens":5,"max_completion_tokens":7}', 7, "max_completion_tokens", True),
        (CHAT, '{"n_predict":3,"max_tokens":5,"max_completion_tokens":7}', 3, "n_predict", True),
        (CHAT, '{"n_predict":null,"max_tokens":5}', 5, "max_tokens", True),
        (CHAT, '{"n_predict":-1,"max_tokens":5}', None, "n_predict", False),
        (CHAT, '{"max_tokens":9,"max_tokens":4}', 4, "max_tokens", True),
        (CHAT, '{"max_t\\u006fkens":9}', 9, "max_tokens", True),
        (CHAT, '{"messages":[{"content":"\\"max_tokens\\":9"}],"x":{"max_tokens":9}}', None, "max_tokens", False),
        (CHAT, '{"max_tokens":3.9}', 3, "max_tokens", True),
        (CHAT, '{"max_tokens":1e300}', 1 << 40, "max_tokens", True),
        (CHAT, '{"x":1.' + "0" * 150 + ',"max_tokens":5}', 5, "max_tokens", True),
        (CHAT, '{"max_tokens":5.' + "0" * 2000 + "}", 1 << 40, "max_tokens", True),
        (CHAT, '{"max_tokens":0}', 1, "max_tokens", True),
        (CHAT, '{"max_tokens":true}', 1, "max_tokens", True),
        (CHAT, '{"max_tokens":"9"}', None, "", False),
        (CHAT, '{"max_output_tokens":9}', None, "max_tokens", False),
        (COMPLETIONS, "{}", None, "max_tokens", False),
        (NATIVE, "{}", None, "n_predict", False),
        (NATIVE, '{"max_tokens":5}', 5, "max_tokens", True),
        (RESPONSES, "{}", None, "max_output_tokens", False),
        (RESPONSES, '{"max_output_tokens":4,"max_tokens":6}', 4, "max_output_tokens", True),
        (RESPONSES, '{"max_output_tokens":4,"n_predict":6}', 6, "n_predict", True),
        (RESPONSES, '{"max_output_tokens":null,"max_tokens":4}', 4, "max_output_tokens", False),
        (RESPONSES, '{"max_tokens":-1}', None, "max_output_tokens", False),
        (MESSAGES, '{"n_predict":3}', None, "max_tokens", False),
        (MESSAGES, '{"n_predict":3,"max_tokens":8}', 8, "max_tokens", True),
        (EMBEDDINGS, '{"max_tokens":8}', None, "", False),
        (CHAT, "no json", None, "max_tokens", False),
    ],
)
def test_the_limit_that_counts(route: Route, body: str, max_tokens: int | None, member: str, is_named: bool) -> None:
    found = asked(route, body)
    assert (found.max_tokens, found.member, found.is_named) == (max_tokens, member, is_named)


@pytest.mark.parametrize(
    ("body", "choices", "prompts"),
    [
        ("{}", 1, 1),
        ('{"n":3,"prompt":"a"}', 3, 1),
        ('{"n":3,"n_cmpl":2}', 2, 1),
        ('{"n":3,"n_cmpl":null}', 3, 1),
        ('{"n":"x"}', 1, 1),
        ('{"n":-4}', 1, 1),
        ('{"prompt":["a","b"],"n":2}', 2, 2),
        ('{"prompt":[1,2,3]}', 1, 1),
        ('{"prompt":[]}', 1, 1),
    ],
)
def test_choices_and_prompts(body: str, choices: int, prompts: int) -> None:
    found = asked(COMPLETIONS, body)
    assert (found.choices, found.prompts, found.answers) == (choices, prompts, choices * prompts)


def test_a_request_may_not_ask_for_more_than_its_key_allows() -> None:
    assert limit_tokens(asked(CHAT, '{"max_tokens":9}'), 9).max_tokens == 9
    assert limit_tokens(asked(CHAT, "{}"), 9).max_tokens == 9
    with pytest.raises(GatewayError) as refused:
        limit_tokens(asked(CHAT, '{"max_completion_tokens":10}'), 9)
    assert refused.value.kind is TOO_MANY_TOKENS_ASKED
    assert refused.value.message == (
        "This request asks for 10 tokens (max_completion_tokens), but for this API key at most 9 are allowed."
    )
