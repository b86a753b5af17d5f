"""Keys in the environment (API_KEYS), next to the keys file."""

from support.gateway import KEY, OTHER_KEY, Stack, get, request, scenario

OPERATOR_KEY = b"sk-handed-in-0123456789abcdef"
GIVEN = f"ops:{OPERATOR_KEY.decode()}:1000 role=operator; bob:sk-old-0123456789abcdef"
MODELS = b"/v1/models"


@scenario(API_KEYS=GIVEN, AUTH_KEYS_FILE=lambda folder: str(folder / "none"))
async def test_a_key_can_be_handed_in_where_there_is_no_file(stack: Stack) -> None:
    assert (await stack.ask(get(MODELS, key=OPERATOR_KEY))).status == 200
    assert (await stack.ask(get(MODELS))).status == 401
    reload = await stack.ask(request(b"POST", b"/reload", b"", key=OPERATOR_KEY))
    assert (reload.status, reload.json) == (200, {"keys": 2, "complaints": []})


@scenario(API_KEYS=GIVEN)
async def test_file_and_handed_in_keys_work_side_by_side_and_the_file_counts(stack: Stack) -> None:
    for key, status in ((KEY, 200), (OTHER_KEY, 200), (OPERATOR_KEY, 200), (b"sk-old-0123456789abcdef", 401)):
        assert (await stack.ask(get(MODELS, key=key))).status == status
    clash = "API_KEYS: the entry bob does not count: the keys file has that name or key"
    assert f"keys: {clash}" in stack.logged()
    stack.keys_file.write_text("# revoked\n")
    reload = await stack.ask(request(b"POST", b"/reload", b"", key=OPERATOR_KEY))
    assert reload.json == {"keys": 2, "complaints": []}
    assert [(await stack.ask(get(MODELS, key=key))).status for key in (KEY, OPERATOR_KEY)] == [401, 200]
