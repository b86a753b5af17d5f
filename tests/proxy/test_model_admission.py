"""model_admission.py: which model a request names. tests/behaviour/test_models.py has its waits, over sockets."""

import pytest

from support.gateway import Stack, get, post, scenario, until
from support.router import Router

SETTINGS = {"MODELS": "router", "MODELS_MAX": "3", "STATE": "loading", "DEFAULT_MODEL": "embed"}


@pytest.mark.parametrize(
    ("raw", "model"),
    [
        (post(body=b'{"model": "chat"}'), "chat"),
        (post(body=b'{"model": "code", "model": "chat"}'), "chat"),
        (post(body=b'{"mod\\u0065l": "chat"}'), "chat"),
        (post(body=b'{"model": null}'), "embed"),
        (post(body=b'{"model": 1}'), "embed"),
        (post(body=b'{"model": ""}'), "embed"),
        (post(b"/v1/chat/completions?model=code", b'{"model": "chat"}'), "chat"),
        (post(b"/tokenize", b'{"content": "model"}'), "embed"),
    ],
)
@scenario(**SETTINGS)
async def test_the_last_model_in_the_body_counts_and_what_is_no_name_counts_as_none(
    stack: Stack, raw: bytes, model: str
) -> None:
    router = Router(stack.backend, "chat", "code", "embed")
    stack.set_state("ready")
    await until(lambda: stack.app.readiness.ready)
    assert (await stack.ask(raw)).status == 200
    assert router.orders == [f"load {model}"]
    sent = stack.backend.calls[0].body
    assert sent.endswith(b'"model":"embed"}') is (model == "embed")


@scenario(**SETTINGS)
async def test_a_body_that_is_no_object_has_no_model(stack: Stack) -> None:
    Router(stack.backend, "chat", "embed")
    stack.set_state("ready")
    await until(lambda: stack.app.readiness.ready)
    for body in (b"[]", b"no JSON"):
        response = await stack.ask(post(body=body))
        assert (response.status, response.code) == (400, "model_required")
    assert (await stack.ask(get(b"/v1/models"))).status == 200
    assert not stack.backend.calls
