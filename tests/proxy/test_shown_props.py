"""shown_props.py: what each key may read of llama-server's properties, and what is asked for it."""

import asyncio
import json
from dataclasses import replace
from typing import Any

import pytest

from auth import Caller
from backend.fetch import FetchedFile
from backend.readiness import DEAD, READY
from backend.readiness import LOADING as IS_LOADING
from core.errors import BACKEND_MALFORMED, DRAINING, LOADING, MODEL_NOT_ALLOWED, MODEL_NOT_FOUND, GatewayError
from http1.grammar import parse_response_head
from policy.model_names import ModelNames
from proxy.lifecycle import Lifecycle
from proxy.shown_props import ShownProps, model_of, shown, shown_target
from support.gateway import get
from support.memory_gateway import ALICE, OLGA, ScriptedReadiness, prepare
from support.memory_transport import Link, run

# As of b11434, with what a later version might add.
PROPS = {
    "default_generation_settings": {"params": {"seed": 1, "lora": []}, "n_ctx": 512, "model": "/models/secret/a.gguf"},
    "total_slots": 4,
    "model_alias": "a",
    "model_path": "/models/secret/a.gguf",
    "modalities": {"vision": False, "audio": False},
    "chat_template": "{% for /x in y %}",
    "bos_token": "<s>",
    "build_info": "b11434",
    "is_sleeping": False,
    "ui_settings": {},
    "cors_proxy_enabled": False,
    "slot_save_path": "/models/secret/slots",
    "lora_paths": ["/models/secret/lora.gguf"],
}
ROUTER = {"role": "router", "max_instances": 4, "models_autoload": True, "model_path": "none", "build_info": "b11434"}


class Props:
    """Properties, and the backend that has them."""

    def __init__(self) -> None:
        self.asked: list[tuple[bytes, bytes]] = []
        self.status, self.page = b"200 OK", json.dumps(PROPS).encode()
        self.lifecycle = Lifecycle()
        self.readiness = ScriptedReadiness()
        self.names: ModelNames | None = None

    async def _fetch(self, target: bytes, lines: bytes, most_bytes: int) -> FetchedFile:
        self.asked.append((target, lines))
        return FetchedFile(parse_response_head(b"HTTP/1.1 " + self.status + b"\r\n\r\n"), (self.page,))

    def find(self, caller: Caller, target: bytes = b"/props") -> tuple[int, bytes]:
        """Return status and body. Raises what is raised."""
        client = Link().client()
        props = ShownProps(self._fetch, self.readiness, self.lifecycle, 600.0, self.names)  # type: ignore[arg-type]

        async def handler() -> Any:
            try:
                return await props.find(client, prepare(get(target), ui=True), caller)
            except Exception as error:
                return error

        async def play() -> Any:
            end: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
            client.run_handler(handler(), end.set_result)
            return await end

        found = run(play())
        if isinstance(found, Exception):
            raise found
        return found  # type: ignore[no-any-return]


def test_an_operator_gets_what_the_backend_says() -> None:
    props = Props()
    assert props.find(OLGA, b"/props?model=a&autoload=true") == (200, props.page)
    props.status = b"501 Not Implemented"
    assert props.find(OLGA)[0] == 501
    assert props.asked == [(b"/props?model=a&autoload=true", b""), (b"/props", b"")]


def test_other_keys_get_no_path() -> None:
    status, body = Props().find(ALICE)
    assert status == 200
    found = json.loads(body)
    assert found["model_path"] == "a.gguf"
    assert found["default_generation_settings"] == {"params": {"seed": 1, "lora": []}, "n_ctx": 512}
    assert PROPS.keys() - found.keys() == {"slot_save_path", "lora_paths"}
    assert found["chat_template"] == PROPS["chat_template"]
    assert b"secret" not in body


def test_other_keys_load_no_model() -> None:
    props = Props()
    props.find(ALICE, b"/props?autoload=true&model=a%2Fb&x=y&model=c%26d")
    assert props.asked == [(b"/props?model=c%26d&autoload=false", b"")]


@pytest.mark.parametrize(
    ("target", "asked"),
    [
        (b"/props", b"/props?autoload=false"),
        (b"/props?", b"/props?autoload=false"),
        (b"/props?model=", b"/props?autoload=false"),
        (b"/props?autoload=1&model=org/m%3AQ4", b"/props?model=org%2Fm%3AQ4&autoload=false"),
    ],
)
def test_what_is_asked_for_keys_that_change_nothing(target: bytes, asked: bytes) -> None:
    assert shown_target(model_of(target)) == asked


@pytest.mark.parametrize("caller", [ALICE, OLGA])
def test_of_several_models_each_key_may_ask_for_those_that_it_may_use(caller: Caller) -> None:
    props = Props()
    props.names = ModelNames({"gpt": "chat a"}, None)
    props.names.update({"chat a": [], "embed": []})
    limited = replace(caller, models=("chat*",))
    for target, asked in (
        (b"/props?model=gpt&autoload=true", b"/props?model=chat+a&autoload=false"),
        (b"/props?autoload=1", b"/props?autoload=false"),
    ):
        assert props.find(limited, target)[0] == 200
        assert props.asked[-1][0] == asked
    for name, kind in ((b"embed", MODEL_NOT_ALLOWED), (b"none", MODEL_NOT_FOUND)):
        with pytest.raises(GatewayError) as refused:
            props.find(limited, b"/props?model=" + name)
        assert refused.value.kind is kind


def test_a_router_has_other_properties() -> None:
    assert json.loads(shown(json.dumps(ROUTER).encode())) == ROUTER


@pytest.mark.parametrize(
    ("path", "name"), [("a.gguf", "a.gguf"), ("C:\\models\\a.gguf", "a.gguf"), ("/a/b/", ""), ("", "")]
)
def test_a_path_becomes_its_last_part(path: str, name: str) -> None:
    assert json.loads(shown(json.dumps({"model_path": path, "model_alias": path}).encode())) == {
        "model_path": name,
        "model_alias": name,
    }


def test_what_is_no_name_is_left_out() -> None:
    assert json.loads(shown(b'{"model_path": ["/x"], "model_alias": null, "default_generation_settings": "/x"}')) == {}


@pytest.mark.parametrize("page", [b"", b"[]", b"{", b"[" * 100_000, b'"x"', b"\xff"])
def test_what_is_no_object_is_an_error(page: bytes) -> None:
    with pytest.raises(GatewayError) as failed:
        shown(page)
    assert failed.value.kind is BACKEND_MALFORMED


def test_an_error_of_the_backend_is_passed_on() -> None:
    props = Props()
    props.status, props.page = b"400 Bad Request", b'{"error": {"message": "model not found", "type": "x"}}'
    with pytest.raises(GatewayError) as failed:
        props.find(ALICE)
    assert (failed.value.kind.status, failed.value.kind.message) == (400, "model not found")


@pytest.mark.parametrize("caller", [ALICE, OLGA])
@pytest.mark.parametrize("state", [IS_LOADING, DEAD])
def test_without_a_model_nothing_is_asked(state: str, caller: Caller) -> None:
    props = Props()
    props.readiness.state = state
    with pytest.raises(GatewayError) as failed:
        props.find(caller)
    assert failed.value.kind is LOADING
    assert not props.asked


def test_a_model_that_is_ready_by_now_is_asked() -> None:
    props = Props()
    props.readiness.state, props.readiness.news = IS_LOADING, READY
    assert props.find(ALICE)[0] == 200


def test_a_drain_refuses() -> None:
    props = Props()
    props.lifecycle.drain()
    with pytest.raises(GatewayError) as failed:
        props.find(OLGA)
    assert failed.value.kind is DRAINING
