"""Several models behind one gateway (MODELS=router), over real sockets: who gets which model, and when."""

import asyncio
import json

import pytest

from support.backend import HELLO, LAST_CHUNK, STREAM_HEAD, answer, chunk, event, send, stall
from support.gateway import CHAT, KEY, OPERATOR_KEY, OTHER_KEY, Stack, get, post, request, scenario, until
from support.rawclient import RawClient
from support.router import Router, refusal

KEYS = f"""alice:{KEY.decode()}:1000000
bob:{OTHER_KEY.decode()}:1000000 models=c*
olga:{OPERATOR_KEY.decode()}:1000000 role=operator
"""
MODELS = ("chat", "code", "embed")
SETTINGS = {
    "MODELS": "router",
    "KEYS": KEYS,
    "MAX_CONCURRENT_REQUESTS": "auto",
    "ADMIN_ROUTES": "true",
    "MODELS_MAX": "3",
}
ONE = {**SETTINGS, "MODELS_MAX": "1"}
EMBEDDINGS = b"/v1/embeddings"


def body(model: str | None = "chat", **members: object) -> bytes:
    return json.dumps(members if model is None else {"model": model, **members}).encode()


async def router_of(stack: Stack, *names: str) -> Router:
    """Make the backend a router, and let the gateway learn that."""
    router = Router(stack.backend, *(names or MODELS))
    stack.set_state("ready")
    await until(lambda: stack.app.readiness.ready)
    return router


async def sent(stack: Stack, raw: bytes) -> RawClient:
    client = await stack.client()
    client.send(raw)
    return client


async def error_of(client: RawClient) -> tuple[int, str, str]:
    response = await client.response()
    error = json.loads(response.body)["error"]
    return response.status, error.get("code", error["type"]), error["message"]


# --- Which model ---


@scenario(STATE="loading", **SETTINGS)
async def test_a_request_gets_its_model_loaded(stack: Stack) -> None:
    router = await router_of(stack)
    client = await sent(stack, post(body=body("chat")))
    assert (await client.response()).body == HELLO
    assert router.orders == ["load chat"]
    assert stack.backend.calls[0].body == body("chat")


@scenario(STATE="loading", MAX_BATCH_SIZE="4", **SETTINGS)
async def test_a_batch_that_is_too_large_loads_no_model(stack: Stack) -> None:
    router = await router_of(stack)
    for stream in (False, True):
        raw = post(b"/v1/completions", body("chat", prompt=["a"] * 5, stream=stream))
        assert (await error_of(await sent(stack, raw)))[:2] == (400, "batch_too_large")
    assert (await error_of(await sent(stack, post(EMBEDDINGS, body("embed", input=["a"] * 5)))))[0] == 400
    assert not router.orders
    client = await sent(stack, post(EMBEDDINGS, body("embed", input=["a"] * 4)))
    assert (await client.response()).body == HELLO


@scenario(STATE="loading", **SETTINGS, MODEL_ALIASES="gpt-4o=chat", DEFAULT_MODEL="gpt-4o")
async def test_an_alias_and_the_default_are_replaced_by_the_models_name(stack: Stack) -> None:
    await router_of(stack)
    for sent_body in (body("gpt-4o"), body(None, n=1), body(None)):
        await stack.ask(post(body=sent_body))
    bodies = [call.body for call in stack.backend.calls]
    assert bodies == [b'{"model": "gpt-4o","model":"chat"}', b'{"n": 1,"model":"chat"}', b'{"model":"chat"}']


@scenario(STATE="loading", **SETTINGS)
async def test_an_alias_of_the_routers_own_is_passed_on(stack: Stack) -> None:
    router = Router(stack.backend, *MODELS)
    router.aliases["chat"] = ["assistant"]
    stack.set_state("ready")
    await stack.ask(post(body=body("assistant")))
    assert stack.backend.calls[0].body == body("assistant")
    assert router.orders == ["load chat"]


@scenario(STATE="loading", **SETTINGS)
async def test_an_unknown_model_is_refused_at_once_with_the_names_that_the_key_may_use(stack: Stack) -> None:
    await router_of(stack)
    status, code, message = await error_of(await sent(stack, post(body=body("gpt-5"), key=OTHER_KEY)))
    assert (status, code) == (404, "model_not_found")
    assert message == "There is no such model. This API key may use: chat, code."
    status, code, _ = await error_of(await sent(stack, post(b"/v1/messages", body("gpt-5"))))
    assert (status, code) == (404, "not_found_error")
    assert await error_of(await sent(stack, post(body=body(None)))) == (
        400,
        "model_required",
        "The request must name a model (model). This API key may use: chat, code, embed.",
    )
    assert not stack.backend.calls


@scenario(STATE="loading", **SETTINGS)
async def test_a_key_may_use_only_its_models(stack: Stack) -> None:
    await router_of(stack)
    status, code, message = await error_of(await sent(stack, post(EMBEDDINGS, body("embed"), key=OTHER_KEY)))
    assert (status, code) == (403, "model_not_allowed")
    assert message == "This API key may not use this model. This API key may use: chat, code."
    assert (await stack.ask(post(body=body("code"), key=OTHER_KEY))).status == 200


@scenario(STATE="loading", **SETTINGS, MODEL_ALIASES="whisper-1=chat", DEFAULT_MODEL="chat")
async def test_forms_name_their_model_too(stack: Stack) -> None:
    await router_of(stack)

    def form(*fields: bytes) -> bytes:
        parts = b"".join(
            b'--xyz\r\nContent-Disposition: form-data; name="%b"\r\n\r\n%b\r\n'
            % (field.partition(b"=")[0], field.partition(b"=")[2])
            for field in fields
        )
        return post(
            b"/v1/audio/transcriptions", parts + b"--xyz--\r\n", b"Content-Type: multipart/form-data; boundary=xyz"
        )

    await stack.ask(form(b"model=code", b"language=en"))
    await stack.ask(form(b"language=en"))
    bodies = [call.body for call in stack.backend.calls]
    assert b'name="model"\r\n\r\ncode\r\n' in bodies[0]
    assert bodies[0].count(b"model") == 1
    assert bodies[1].startswith(b'--xyz\r\nContent-Disposition: form-data; name="model"\r\n\r\nchat\r\n--xyz\r\n')
    status, code, message = await error_of(await sent(stack, form(b"model=whisper-1")))
    assert (status, code) == (404, "model_not_found")
    assert message == "A form must name the model itself, not an alias: chat."


@scenario(STATE="loading", **SETTINGS, MODEL_ALIASES="gpt-4o=chat")
async def test_a_query_names_the_model_of_a_route_without_a_body(stack: Stack) -> None:
    await router_of(stack)
    client = await sent(stack, get(b"/lora-adapters?model=chat", key=OPERATOR_KEY))
    assert (await client.response()).body == HELLO
    assert stack.backend.calls[0].target == b"/lora-adapters?model=chat"
    for model in (b"nope", b"gpt-4o"):
        target = b"/lora-adapters?model=" + model
        assert (await error_of(await sent(stack, get(target, key=OPERATOR_KEY))))[:2] == (404, "model_not_found")
    await stack.ask(get(b"/lora-adapters", key=OPERATOR_KEY))
    assert stack.backend.calls[1].target == b"/lora-adapters"


@scenario(STATE="loading", **SETTINGS)
async def test_a_body_is_no_query_in_which_a_model_could_be_loaded(stack: Stack) -> None:
    """llama-server would read it as a query as well, if it had the type that curl sends."""
    await router_of(stack)
    hidden = b'{"model":"chat","x":"&autoload=1&"}'
    await stack.ask(post(CHAT, hidden, b"Content-Type: application/x-www-form-urlencoded; charset=utf-8"))
    (call,) = stack.backend.calls
    assert (call.body, call.fields[b"content-type"]) == (hidden, b"application/json")


@scenario(STATE="loading", **SETTINGS)
async def test_a_form_that_could_be_divided_in_two_ways_is_refused(stack: Stack) -> None:
    await router_of(stack)
    for fields in (
        b'Content-Type: multipart/form-data; x="; boundary=y; boundary=a"',
        b"Content-Type: multipart/form-data; boundary=x; boundary=y",
        b"Content-Type: multipart/form-data; boundary=x\r\nContent-Type: text/plain",
        b"Content-Type: text/plain\r\nContent-Type: multipart/form-data; boundary=x",
    ):
        client = await sent(stack, post(b"/v1/audio/transcriptions", b"--x--\r\n", fields))
        assert (await error_of(client))[:2] == (415, "form_not_supported")
    assert not stack.backend.calls


@scenario(STATE="loading", **SETTINGS, METRICS_AUTH_ENABLED="true")
async def test_a_key_sees_the_names_of_its_models_only(stack: Stack) -> None:
    await router_of(stack)
    for name in MODELS:
        await stack.ask(post(EMBEDDINGS, body(name)))
    pages = {}
    for key in (KEY, OTHER_KEY):
        for path in (b"/metrics", b"/health", b"/v1/models", b"/props?model=nope", b"/usage?by=model"):
            pages[key, path] = (await (await sent(stack, get(path, key=key))).response()).body
    assert b'model="embed"' in pages[KEY, b"/metrics"]
    assert b"gateway_" in pages[OTHER_KEY, b"/metrics"]
    assert json.loads(pages[OTHER_KEY, b"/health"])["models"] == {"chat": "loaded", "code": "loaded"}
    assert {path for key, path in pages if key == OTHER_KEY and b'"embed"' in pages[key, path]} == set()


@scenario(STATE="loading", **SETTINGS)
async def test_no_request_makes_the_router_load_a_model_by_itself(stack: Stack) -> None:
    router = await router_of(stack)
    for raw in (
        post(b"/v1/chat/completions?autoload=true", b'{"model": "chat"}'),
        post(b"/v1/chat/completions?%61utoload", b'{"model": "chat"}'),
        get(b"/lora-adapters?model=chat&autoload=1", key=OPERATOR_KEY),
    ):
        status, code, message = await error_of(await sent(stack, raw))
        assert (status, code) == (403, "route_not_allowed")
        assert "autoload" in message
    assert (router.orders, stack.backend.calls) == ([], [])


@scenario(STATE="loading", **SETTINGS, MODEL_ALIASES="gpt-4o=chat")
async def test_a_key_sees_the_properties_of_its_models_only(stack: Stack) -> None:
    await router_of(stack)
    for key in (OTHER_KEY, OPERATOR_KEY):
        assert (await stack.ask(get(b"/props?model=gpt-4o", key=key))).json["total_slots"] == 2
        assert (await error_of(await sent(stack, get(b"/props?model=nope", key=key))))[:2] == (404, "model_not_found")
    assert (await error_of(await sent(stack, get(b"/props?model=embed", key=OTHER_KEY))))[1] == "model_not_allowed"
    assert (await stack.ask(get(b"/props", key=OTHER_KEY))).status == 200
    asked = {target for target in stack.backend.probes if target.startswith(b"/props?")}
    assert asked == {b"/props?model=chat&autoload=false", b"/props?autoload=false"}


# --- What a key sees ---


@scenario(STATE="loading", **SETTINGS, MODEL_ALIASES="gpt-4o=chat")
async def test_a_key_sees_its_models_and_nothing_of_the_machine(stack: Stack) -> None:
    router = await router_of(stack)
    await stack.ask(post(body=body("chat")))
    response = await stack.ask(get(b"/v1/models", key=OTHER_KEY))
    entry = {"object": "model", "created": 7, "owned_by": "llamacpp"}
    assert json.loads(response.body) == {
        "object": "list",
        "data": [
            {"id": "chat", **entry, "aliases": ["gpt-4o"], "status": {"value": "loaded"}, "context_length": 4096},
            {"id": "code", **entry, "aliases": [], "status": {"value": "unloaded"}},
        ],
    }
    stack.backend.script(send(answer(router.page())))
    assert b"/secret/" in (await stack.ask(get(b"/models", key=OPERATOR_KEY))).body


@scenario(STATE="loading", **SETTINGS)
async def test_before_the_first_list_there_is_none(stack: Stack) -> None:
    assert (await error_of(await sent(stack, get(b"/v1/models"))))[:2] == (503, "loading")
    await router_of(stack)
    assert (await stack.ask(get(b"/v1/models"))).status == 200
    stack.set_state("loading")
    await until(lambda: not stack.app.readiness.ready)
    assert (await stack.ask(get(b"/v1/models"))).status == 200


@scenario(STATE="loading", **SETTINGS)
async def test_health_shows_the_models_to_callers_with_a_key(stack: Stack) -> None:
    await router_of(stack)
    await stack.ask(post(body=body("chat")))
    report = json.loads((await stack.ask(get(b"/health"))).body)
    assert report["models"] == {"chat": "loaded", "code": "unloaded", "embed": "unloaded"}
    assert report["slots"] == 2
    assert b"models" not in (await stack.ask(get(b"/health", key=None))).body


@scenario(STATE="loading", **SETTINGS)
async def test_operators_load_and_unload(stack: Stack) -> None:
    router = await router_of(stack)
    status, code, _ = await error_of(await sent(stack, post(b"/models/load", body("code"))))
    assert (status, code) == (403, "route_not_allowed")
    await stack.ask(post(b"/models/load", body("new"), key=OPERATOR_KEY))
    assert stack.backend.calls[0].body == body("new")
    router.finish("code")
    await until(lambda: stack.app.models is not None and stack.app.models.states()["code"] == "loaded")
    assert not router.orders


# --- When ---


@scenario(STATE="loading", **ONE)
async def test_a_model_at_work_is_not_unloaded_and_the_swap_follows(stack: Stack) -> None:
    router = await router_of(stack)
    stack.backend.script(stall(stack.finish), send(answer()))
    running = await sent(stack, post(body=body("chat")))
    await stack.backend.call()
    waiting = await sent(stack, post(body=body("code")))
    await until(lambda: stack.app.numbers.queued == 1)
    stack.advance(31)
    assert stack.app.models is not None
    chat = stack.app.models.find("chat")
    await until(lambda: chat.is_ending)
    more = await sent(stack, post(body=body("chat")))  # too late: code has waited for MODEL_SWITCH_AFTER
    await until(lambda: stack.app.numbers.queued == 2)
    assert router.orders == ["load chat"]
    stack.finish.set()
    assert (await running.response()).body == HELLO
    assert (await waiting.response()).body == HELLO
    stack.advance(31)  # code has nothing to do any more
    assert (await more.response()).body == HELLO
    assert router.orders == ["load chat", "unload chat", "load code", "unload code", "load chat"]


@scenario(STATE="loading", **ONE)
async def test_a_client_that_leaves_withdraws_its_wish(stack: Stack) -> None:
    router = await router_of(stack)
    stack.backend.script(stall(stack.finish), send(answer()))
    running = await sent(stack, post(body=body("chat")))
    await stack.backend.call()
    leaving = await sent(stack, post(body=body("code")))
    await until(lambda: stack.app.numbers.queued == 1)
    leaving.close()
    await until(lambda: stack.app.numbers.queued == 0)
    stack.advance(31)
    stack.finish.set()
    await running.response()
    assert router.orders == ["load chat"]


@scenario(STATE="loading", **SETTINGS, SSE_HEARTBEAT="1")
async def test_heartbeats_go_on_through_a_load(stack: Stack) -> None:
    router = await router_of(stack)
    router.holds_loads = True
    client = await sent(stack, post(body=body("chat", stream=True)))
    await until(lambda: router.orders == ["load chat"])
    stack.advance(2)
    assert b": queued 1\n\n" in await client.take_through(b": queued 1\n\n")
    stack.backend.script(send(STREAM_HEAD + chunk(event("[DONE]")) + LAST_CHUNK))
    router.finish("chat")
    assert (await client.take_through(LAST_CHUNK)).endswith(chunk(event("[DONE]")) + LAST_CHUNK)


@scenario(STATE="loading", **SETTINGS)
async def test_a_load_that_fails_is_told_to_those_that_wait_for_it(stack: Stack) -> None:
    router = await router_of(stack)
    router.holds_loads = True
    lost = [await sent(stack, post(body=body("code"))) for _ in range(2)]
    other = await sent(stack, post(body=body("chat")))
    await until(lambda: len(router.orders) == 2)
    router.fail("code", 7)
    for client in lost:
        status, code, message = await error_of(client)
        assert (status, code) == (502, "model_load_failed")
        assert message == "The model code could not be loaded: its process ended with status 7."
    response = await stack.ask(post(body=body("code")))
    assert (response.status, response.field(b"retry-after")) == (502, b"2")
    router.finish("chat")
    assert (await other.response()).body == HELLO
    stack.advance(3)
    again = await sent(stack, post(body=body("code")))
    await until(lambda: router.orders[2:] == ["load code"])
    router.finish("code")
    assert (await again.response()).body == HELLO
    page = (await stack.ask(get(b"/metrics"))).body
    assert b'gateway_model_loads_total{model="code",result="failed"} 1\n' in page
    assert b'gateway_model_loads_total{model="code",result="ok"} 1\n' in page
    assert b'gateway_model_loaded{model="chat"} 1' in page
    assert b'gateway_requests_total{route="/v1/chat/completions",code="502",model="code"} 3\n' in page


@scenario(STATE="loading", **SETTINGS)
async def test_what_the_router_says_against_a_load_is_the_reason(stack: Stack) -> None:
    router = await router_of(stack)
    router.refuses = "failed to spawn server instance"
    status, code, message = await error_of(await sent(stack, post(body=body("chat"))))
    assert (status, code) == (502, "model_load_failed")
    assert message == "The model chat could not be loaded: failed to spawn server instance."


@scenario(STATE="loading", **SETTINGS)
async def test_while_others_hold_all_places_a_load_is_tried_again(stack: Stack) -> None:
    router = await router_of(stack)
    router.refuses = "model limit reached, try again later"
    client = await sent(stack, post(body=body("chat")))
    await until(lambda: router.orders == ["load chat"])
    router.refuses = None
    await until(lambda: (stack.advance(1), len(router.orders) > 1)[1])
    assert (await client.response()).body == HELLO


@scenario(STATE="loading", **SETTINGS, COLD_START_WAIT="20")
async def test_a_load_is_bounded(stack: Stack) -> None:
    router = await router_of(stack)
    router.holds_loads = True
    client = await sent(stack, post(body=body("chat")))
    await until(lambda: router.orders == ["load chat"])
    stack.advance(21)
    status, code, message = await error_of(client)
    assert (status, code) == (502, "model_load_failed")
    assert message == "The model chat was not loaded within COLD_START_WAIT."
    await until(lambda: router.orders == ["load chat", "unload chat"])


@scenario(STATE="loading", **ONE, QUEUE_TIMEOUT="5", COLD_START_WAIT="20")
async def test_a_wait_has_an_end(stack: Stack) -> None:
    router = await router_of(stack)
    stack.backend.script(stall(stack.finish), send(answer()))
    running = await sent(stack, post(body=body("chat")))
    await stack.backend.call()
    waiting = await sent(stack, post(body=body("code")))
    await until(lambda: stack.app.numbers.queued == 1)
    stack.advance(24)
    assert stack.app.numbers.queued == 1
    stack.advance(2)
    assert (await error_of(waiting))[:2] == (503, "loading")
    stack.finish.set()
    await running.response()
    assert router.orders == ["load chat"]


@scenario(STATE="loading", **SETTINGS, MODELS_IDLE_UNLOAD="60")
async def test_an_idle_model_is_unloaded(stack: Stack) -> None:
    router = await router_of(stack)
    await stack.ask(post(body=body("chat")))
    stack.advance(61)
    await until(lambda: router.orders == ["load chat", "unload chat"])


@scenario(STATE="loading", **ONE, MAX_CHEAP_REQUESTS="1")
async def test_requests_without_a_slot_wait_for_their_model_too(stack: Stack) -> None:
    router = await router_of(stack)
    router.holds_loads = True
    first = await sent(stack, post(b"/tokenize", body("embed", content="a")))
    await until(lambda: router.orders == ["load embed"])
    second = await sent(stack, post(b"/tokenize", body("embed", content="a")))
    await until(lambda: stack.app.numbers.queued == 2)
    stack.backend.script(stall(stack.finish), send(answer()))
    router.finish("embed")
    await stack.backend.call()
    stack.advance(31)
    swap = await sent(stack, post(body=body("chat")))
    await until(lambda: stack.app.numbers.queued == 1)
    assert len(router.orders) == 1
    stack.finish.set()
    assert (await first.response()).body == (await second.response()).body == HELLO
    await until(lambda: (stack.advance(1), router.orders[1:2] == ["unload embed"])[1])
    await until(lambda: router.orders[2:] == ["load chat"])
    router.finish("chat")
    assert (await swap.response()).body == HELLO


@scenario(STATE="loading", **ONE)
async def test_one_that_gives_up_waiting_for_a_model_without_a_slot_withdraws_its_wish(stack: Stack) -> None:
    await router_of(stack)
    stack.backend.script(stall(stack.finish), send(answer()))
    running = await sent(stack, post(body=body("chat")))
    await stack.backend.call()
    leaving = await sent(stack, post(b"/tokenize", body("embed", content="a")))
    await until(lambda: stack.app.numbers.queued == 1)
    leaving.close()
    await until(lambda: stack.app.numbers.queued == 0)
    stack.finish.set()
    await running.response()


@scenario(STATE="loading", **SETTINGS)
async def test_a_request_that_is_left_before_the_gateway_ends_has_its_access_line(stack: Stack) -> None:
    """It is recorded once its slot is released, which the end of the gateway does."""
    router = await router_of(stack)
    router.busy = 1
    stack.backend.script(stall())
    leaving = await sent(stack, post(body=body("chat")))
    await stack.backend.call()
    leaving.close()
    await until(lambda: stack.app.pending_releases)
    await stack.stop()
    assert [(line["model"], line["outcome"]) for line in stack.lines] == [("chat", "cancelled")]


# --- When a model dies ---


@scenario(STATE="loading", **SETTINGS)
async def test_a_stream_whose_model_dies_is_cut_visibly(stack: Stack) -> None:
    """The router ends it as if it were whole, with a text of its own."""
    await router_of(stack)
    begun, cut = chunk(event("one")), chunk(b"proxy error: Failed to read connection")
    stack.backend.script(send(STREAM_HEAD + begun + cut + LAST_CHUNK))  # nothing has been passed on
    assert (await error_of(await sent(stack, post(body=body("chat", stream=True)))))[:2] == (502, "backend_unavailable")
    for rest in (cut + LAST_CHUNK, begun + cut, cut):
        seen = asyncio.Event()
        stack.backend.script(send(STREAM_HEAD + begun), stall(seen), send(rest))
        client = await sent(stack, post(body=body("chat", stream=True)))
        await client.take_through(begun)
        seen.set()
        received = await client.take_all()
        assert b"proxy error" not in received
        assert not received.endswith(LAST_CHUNK)
    await stack.stop()
    assert {line["outcome"] for line in stack.lines} <= {"truncated", "refused"}


@pytest.mark.parametrize(
    ("refused", "times"),
    [
        (refusal("model is not loaded"), 1),
        (answer(b"proxy error: Could not establish connection", b"500 Internal Server Error"), 2),
        (answer(b"proxy error: Failed to read connection", b"500 Internal Server Error"), 1),
    ],
)
@scenario(STATE="loading", **SETTINGS)
async def test_a_request_that_comes_just_after_the_end_of_its_model_waits_for_it(
    stack: Stack, refused: bytes, times: int
) -> None:
    router = await router_of(stack)
    for _ in range(times):
        stack.backend.script(send(refused))
    client = await sent(stack, post(body=body("chat")))
    assert (await client.response()).body == HELLO
    assert len(stack.backend.calls) == times + 1
    assert router.orders[0] == "load chat"


@scenario(STATE="loading", **SETTINGS)
async def test_a_request_that_ends_its_model_twice_is_not_sent_a_third_time(stack: Stack) -> None:
    await router_of(stack)
    cut = b"proxy error: Failed to read connection"
    head, _, _ = answer(cut, b"500 Internal Server Error").partition(cut)
    for _ in range(2):
        stack.backend.script(send(head), send(cut))
    client = await sent(stack, post(body=body("chat")))
    assert (await client.response()).body == cut
    assert len(stack.backend.calls) == 2


@scenario(STATE="loading", **SETTINGS)
async def test_a_request_that_was_alone_at_work_when_its_model_died_is_held_back(stack: Stack) -> None:
    router = await router_of(stack)
    cut = b"proxy error: Failed to read connection"
    other = await sent(stack, post(body=body("embed")))
    assert (await other.response()).status == 200
    dies, goes_on = asyncio.Event(), asyncio.Event()
    stack.backend.script(stall(goes_on), send(answer()))
    beside = await sent(stack, post(body=body("embed", prompt="beside")))
    await stack.backend.call(1)
    stack.backend.script(stall(dies), send(answer(cut, b"500 Internal Server Error")))
    culprit = await sent(stack, post(body=body("chat", prompt="bad")))
    await stack.backend.call(2)
    router.exit_codes["chat"], router.states["chat"] = 139, "unloaded"
    dies.set()
    assert (await error_of(culprit))[:2] == (502, "request_held_back")
    assert len(stack.backend.calls) == 3
    again = await sent(stack, post(body=body("chat", prompt="bad")))
    assert (await error_of(again))[:2] == (502, "request_held_back")
    assert (await (await sent(stack, post(body=body("chat")))).response()).status == 200
    goes_on.set()
    assert (await beside.response()).status == 200
    assert (await (await sent(stack, post(body=body("embed", prompt="beside")))).response()).status == 200


@scenario(STATE="loading", **SETTINGS)
async def test_a_stream_that_was_alone_at_work_when_its_model_died_is_held_back(stack: Stack) -> None:
    """The gateway learns of the death after the stream was cut."""
    router = await router_of(stack)
    begun, cut = chunk(event("one")), chunk(b"proxy error: Failed to read connection")
    dies = asyncio.Event()
    stack.backend.script(send(STREAM_HEAD + begun), stall(dies), send(cut + LAST_CHUNK))
    culprit = await sent(stack, post(body=body("chat", prompt="bad", stream=True)))
    await culprit.take_through(begun)
    router.exit_codes["chat"], router.states["chat"] = 139, "unloaded"
    dies.set()
    await culprit.take_all()
    await until(lambda: stack.app.suspects.deaths == 1)
    stack.advance(3)  # until it is loaded again
    again = await sent(stack, post(body=body("chat", prompt="bad", stream=True)))
    assert (await error_of(again))[:2] == (502, "request_held_back")


@scenario(STATE="loading", **SETTINGS)
async def test_no_client_can_say_in_the_routers_words_that_a_model_has_ended(stack: Stack) -> None:
    """llama-server repeats what it does not understand, in an error of its own."""
    router = await router_of(stack)
    for text in ("proxy error: Could not establish connection", 'proxy error: "model is not loaded"'):
        refused = refusal(f"Invalid tool_choice: {text}")
        stack.backend.script(send(refused))
        response = await (await sent(stack, post(body=body("chat", tool_choice=text)))).response()
        assert refused.endswith(response.body)
    assert len(stack.backend.calls) == 2
    assert router.orders == ["load chat"]


@scenario(STATE="loading", **SETTINGS)
async def test_other_errors_of_a_model_pass_as_they_are(stack: Stack) -> None:
    await router_of(stack)
    stack.backend.script(send(refusal("the prompt is too long")))
    assert (await error_of(await sent(stack, post(body=body("chat")))))[2] == "the prompt is too long"
    stack.backend.script(send(answer(b"{}", b"404 Not Found")))
    assert (await stack.ask(post(body=body("chat")))).status == 404
    stack.backend.script(send(answer(b"", b"500 Internal Server Error")))
    assert (await stack.ask(post(body=body("chat")))).status == 500


@scenario(STATE="loading", **SETTINGS)
async def test_the_router_is_not_asked_for_its_models_after_each_error(stack: Stack) -> None:
    await router_of(stack)
    assert (await stack.ask(post(body=body("chat")))).status == 200
    before = stack.backend.probes.count(b"/models")
    for _ in range(20):
        stack.backend.script(send(refusal("the prompt is too long")))
        assert (await stack.ask(post(body=body("chat")))).status == 400
    assert stack.backend.probes.count(b"/models") < before + 10


@scenario(STATE="loading", **SETTINGS)
async def test_a_model_that_dies_is_loaded_again_for_those_that_wait(stack: Stack) -> None:
    router = await router_of(stack)
    for _ in range(2):
        stack.backend.script(stall(stack.finish), send(answer()))
    running = [await sent(stack, post(body=body("chat", prompt=prompt))) for prompt in ("a", "b")]
    await stack.backend.call(1)
    waiting = await sent(stack, post(body=body("chat")))
    await until(lambda: stack.app.numbers.queued == 1)
    router.fail("chat", 137)
    await until(lambda: (stack.advance(1), router.orders == ["load chat", "load chat"])[1])
    stack.finish.set()
    for client in (*running, waiting):
        assert (await client.response()).body == HELLO


@scenario(STATE="loading", **SETTINGS)
async def test_a_router_that_restarts_has_nothing_loaded(stack: Stack) -> None:
    router = await router_of(stack)
    await stack.ask(post(body=body("chat")))
    stack.set_state("loading")
    await until(lambda: not stack.app.readiness.ready)
    waiting = await sent(stack, post(body=body("chat")))
    router.states["chat"] = "unloaded"
    stack.set_state("ready")
    assert (await waiting.response()).body == HELLO
    assert router.orders == ["load chat", "load chat"]


@scenario(STATE="loading", **SETTINGS)
async def test_a_model_that_is_removed_is_not_there_any_more(stack: Stack) -> None:
    router = await router_of(stack)
    await stack.ask(post(body=body("chat")))
    del router.states["code"]
    router.finish("chat")
    await until(lambda: stack.app.models is not None and "code" not in stack.app.models.states())
    assert (await error_of(await sent(stack, post(body=body("code")))))[1] == "model_not_found"


# --- Limits ---


@scenario(STATE="loading", **{**SETTINGS, "KEYS": KEYS.replace("models=c*", "parallel=1")})
async def test_what_a_key_may_have_at_once_counts_over_all_models(stack: Stack) -> None:
    await router_of(stack)
    stack.backend.script(stall(stack.finish), send(answer()))
    running = await sent(stack, post(body=body("chat"), key=OTHER_KEY))
    await stack.backend.call()
    waiting = await sent(stack, post(body=body("code"), key=OTHER_KEY))
    await until(lambda: stack.app.numbers.queued == 1)
    assert (await stack.ask(post(body=body("code")))).body == HELLO
    assert stack.app.numbers.queued == 1
    stack.finish.set()
    assert (await running.response()).body == (await waiting.response()).body == HELLO


@scenario(STATE="loading", **SETTINGS, MAX_QUEUE_SIZE="2")
async def test_the_queue_is_full_if_all_models_queues_are_together(stack: Stack) -> None:
    router = await router_of(stack)
    router.holds_loads = True
    waiting = [await sent(stack, post(body=body(model))) for model in ("chat", "code")]
    await until(lambda: stack.app.numbers.queued == 2)
    status, code, message = await error_of(await sent(stack, post(EMBEDDINGS, body("embed"))))
    assert (status, code) == (503, "queue_full")
    assert "2 requests wait" in message
    # Another key's request takes the place of one of the key that has two.
    third = await sent(stack, post(EMBEDDINGS, body("embed"), key=OPERATOR_KEY))
    assert (await error_of(waiting[0]))[1] == "queue_full"
    for client in (*waiting, third):
        client.close()


@scenario(STATE="loading", **SETTINGS)
async def test_a_control_request_names_its_model_but_waits_for_nothing(stack: Stack) -> None:
    await router_of(stack)
    client = await sent(stack, post(b"/v1/chat/completions/control", body("chat")))
    assert (await client.response()).body == HELLO


@scenario(STATE="loading", **SETTINGS, ALLOW_PATHS="/own/*")
async def test_allowed_paths_are_for_a_model_too(stack: Stack) -> None:
    await router_of(stack)
    assert (await stack.ask(post(b"/own/x", body("chat")))).body == HELLO
    assert (await stack.ask(get(b"/own/x?model=code"))).body == HELLO
    assert (await error_of(await sent(stack, request(b"POST", b"/own/x", b"no JSON"))))[1] == "model_required"


@scenario(STATE="loading", **SETTINGS)
async def test_usage_is_reported_by_model(stack: Stack) -> None:
    await router_of(stack)
    usage = b'{"usage": {"prompt_tokens": 3, "completion_tokens": 4}}'
    for model in ("chat", "code", "chat", "nope"):
        stack.backend.script(send(answer(usage)))
        await stack.ask(post(CHAT, body(model)))
    rows = json.loads((await stack.ask(get(b"/usage?by=model"))).body)["rows"]
    assert [(row["model"], row["requests"], row["completion"]) for row in rows] == [
        ("chat", 2, 8),
        ("code", 1, 4),
        ("other", 1, 0),
    ]
    await stack.stop()
    assert [line["model"] for line in stack.lines[:4]] == ["chat", "code", "chat", "-"]


@scenario(KEYS=KEYS)
async def test_with_one_model_the_models_of_a_key_have_no_effect_and_the_log_says_so(stack: Stack) -> None:
    assert (await stack.ask(post(body=body("embed"), key=OTHER_KEY))).body == HELLO
    assert stack.backend.calls[0].body == body("embed")
    assert "keys: models= has no effect with MODELS=single: all keys may use the one model" in stack.logged()
