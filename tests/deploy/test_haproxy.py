"""deploy/haproxy/ with a real HAProxy, three workers that start.sh has started, clients over TLS, and failures."""

import errno
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import textwrap
import time
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path

import pytest

if not (shutil.which("haproxy") and shutil.which("openssl")):
    pytest.skip("haproxy or openssl is not installed", allow_module_level=True)

from support.boot import PATIENCE_S, Boot
from support.haproxy import EXACT_KEY, FREE_KEY, LOOSE_KEY, RATE, Load, Proxy, cluster, eventually
from support.ports import free_ports

ROOT = Path(__file__).parent.parent.parent
CLIENTS, EACH = 24, 10


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Proxy, list[Boot]]]:
    with cluster(tmp_path_factory.mktemp("served")) as both:
        yield both


@pytest.fixture
def proxy(served: tuple[Proxy, list[Boot]]) -> Proxy:
    return served[0]


def test_the_configuration_has_no_warning(tmp_path: Path) -> None:
    checked = Proxy(tmp_path, []).check()
    assert checked.returncode == 0
    assert "WARNING" not in checked.stderr


def test_the_configuration_takes_a_template_for_the_workers(tmp_path: Path) -> None:
    """As docs/SCALING.md has it for Kubernetes."""
    (template,) = re.findall(r"    (server-template .*)", (ROOT / "docs" / "SCALING.md").read_text())
    proxy = Proxy(tmp_path, [])
    text = proxy.config.read_text()
    checks = text[text.index("    option httpchk") : text.index("    server w1")]
    text = re.sub(r"    server w[23] .*\n", "", text)
    text = re.sub(r"    server w1 .* track .*", f"{checks}    {template}", text)
    text = re.sub(r"    server w1 .*", f"    {template}", text)
    proxy.config.write_text(f"{text}\nresolvers cluster\n    parse-resolv-conf\n")
    checked = proxy.check()
    assert checked.returncode == 0, checked.stderr
    assert text.count(template) == 3


def test_load_goes_to_the_worker_with_the_least(proxy: Proxy) -> None:
    answers = proxy.together(12, tokens=100)
    assert all(answer.done for answer in answers)
    assert {answer.worker for answer in answers} == {"w1", "w2", "w3"}


def test_limits_of_a_listed_key_are_exact(proxy: Proxy) -> None:
    answers = proxy.together(2 * RATE, EXACT_KEY)
    assert len({answer.worker for answer in answers}) == 1
    assert sorted(answer.status for answer in answers) == [200] * RATE + [429] * RATE


def test_limits_of_another_key_hold_for_each_worker(proxy: Proxy) -> None:
    statuses = [proxy.request(f"loose-{number}", LOOSE_KEY, 1).status for number in range(4 * RATE)]
    assert sorted(statuses) == [200] * 3 * RATE + [429] * RATE


@pytest.mark.parametrize("field", ["Authorization", "x-api-key", "api-key"])
def test_a_listed_key_is_recognised_in_every_field(proxy: Proxy, field: str) -> None:
    answer = proxy.request(f"field-{field}", EXACT_KEY, field=field)
    assert answer.status in (200, 429)
    assert proxy.line(answer.id).backend == "exact"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_client_that_leaves_frees_the_slot(served: tuple[Proxy, list[Boot]], stream: bool) -> None:
    proxy, boots = served
    before = cancelled(boots)
    with closing(proxy.connect()) as connection:
        body = json.dumps({"messages": [{"role": "user", "content": "hi"}], "max_tokens": 100000, "stream": stream})
        fields = {"Authorization": f"Bearer {FREE_KEY}", "Content-Type": "application/json"}
        connection.request("POST", "/v1/chat/completions", body, fields)
        if stream:
            connection.getresponse().read(10)
        eventually(lambda: active(boots) == 1, "the request is being served")
    eventually(lambda: active(boots) == 0 and cancelled(boots) == before + 1, "the slot is free")


def metric(boot: Boot, name: str) -> float:
    with closing(HTTPConnection(boot.env["HOST"], int(boot.env["PORT"]), timeout=PATIENCE_S)) as connection:
        connection.request("GET", "/metrics")
        lines = connection.getresponse().read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.partition("{")[0].partition(" ")[0] == name)


def cancelled(boots: list[Boot]) -> float:
    return sum(metric(boot, "gateway_cancelled_total") for boot in boots)


def active(boots: list[Boot]) -> float:
    return sum(metric(boot, "gateway_requests_active") for boot in boots)


@pytest.mark.parametrize(
    "path", ["/metrics", "/usage", "/ui", "/ui/events", "/drain", "/slots", "/slots/0", "POST /props"]
)
def test_routes_that_concern_one_worker_are_refused(proxy: Proxy, path: str) -> None:
    method, _, target = path.rpartition(" ")
    with closing(proxy.connect()) as connection:
        connection.request(method or "GET", target, headers={"Authorization": f"Bearer {FREE_KEY}"})
        answer = connection.getresponse()
        assert (answer.status, b"route_not_allowed" in answer.read()) == (403, True)


def test_a_browser_gets_its_page_from_any_worker(proxy: Proxy) -> None:
    with closing(proxy.connect()) as connection:
        connection.request("GET", "/", headers={"Accept": "text/html"})
        answer = connection.getresponse()
        assert (answer.status, b"<h1>Chat</h1>" in answer.read()) == (200, True)
        connection.request("GET", "/props", headers={"Authorization": f"Bearer {FREE_KEY}"})
        answer = connection.getresponse()
        assert (answer.status, b"total_slots" in answer.read()) == (200, True)


def test_a_worker_knows_the_client_whatever_it_sends(served: tuple[Proxy, list[Boot]]) -> None:
    proxy, boots = served
    spoofed = {"X-Forwarded-For": "192.0.2.9, 127.0.0.1", "Forwarded": "for=192.0.2.8", "X-Request-Id": "whose"}
    with closing(proxy.connect("127.0.0.5")) as connection:
        connection.request("GET", "/v1/models", headers={"Authorization": f"Bearer {FREE_KEY}"} | spoofed)
        assert connection.getresponse().status == 200
    eventually(lambda: " id=whose peer=127.0.0.5 " in access_lines(boots), "the worker has logged the client")


def access_lines(boots: list[Boot]) -> str:
    return "".join(Path(boot.env["DATA_DIR"], "logs", "api_access.log").read_text() for boot in boots)


def test_a_worker_that_an_operator_drains_gets_nothing_new(proxy: Proxy) -> None:
    assert proxy.order("set server least/w1 state drain").strip() == ""
    assert {answer.worker for answer in proxy.together(12)} == {"w2", "w3"}
    proxy.order("set server least/w1 state ready")
    assert {answer.worker for answer in proxy.together(12, tokens=100)} == {"w1", "w2", "w3"}


def test_requests_wait_while_all_workers_are_loading(tmp_path: Path) -> None:
    with cluster(tmp_path, 1, MOCK_LOAD_SECONDS="20") as (proxy, boots):
        eventually(lambda: not proxy.up("least") and proxy.up("loading") == {"w1"}, "HAProxy has seen it loading")
        assert boots[0].state["state"] == "loading"
        answer = proxy.request("early")
        assert answer.done
        assert proxy.line("early").backend == "loading"


def test_a_worker_that_is_drained_then_stopped_under_load_loses_nothing(tmp_path: Path) -> None:
    with cluster(tmp_path) as (proxy, boots):
        with proxy.load(CLIENTS, EACH) as load:
            load.await_answers(load.total // 4)
            proxy.order("set server least/w1 state drain")
            eventually(lambda: proxy.sessions("least", "w1") == 0, "w1 has nothing to do")
            boots[0].signal(signal.SIGTERM)
        assert [answer for answer in load.answers if not answer.done] == []
        assert len(load.answers) == load.total
        assert boots[0].end() == 0


def test_a_worker_that_is_stopped_unannounced_under_load_cuts_no_answer(tmp_path: Path) -> None:
    """It finishes what it has begun. Other requests go elsewhere, except on a connection that arrives as it closes."""
    with cluster(tmp_path) as (proxy, boots):
        with proxy.load(CLIENTS, EACH) as load:
            load.await_answers(load.total // 4)
            boots[0].signal(signal.SIGTERM)
        assert len(load.answers) == load.total
        assert all(answer.whole for answer in load.answers)
        refused = [answer for answer in load.answers if answer.status != 200]
        assert {answer.status for answer in refused} <= {502, 503}
        assert {proxy.line(answer.id).worker for answer in refused} <= {"w1"}
        assert boots[0].end() == 0


def test_a_worker_that_is_killed_under_load_loses_only_what_it_was_serving(tmp_path: Path) -> None:
    with cluster(tmp_path) as (proxy, boots):
        with proxy.load(CLIENTS, EACH) as load:
            load.await_answers(load.total // 4)
            # As if the machine had failed: nothing of the worker is left.
            for pid in (boots[0].pid_of("gateway.py"), boots[0].process.pid):
                os.kill(pid, signal.SIGKILL)
            eventually(lambda: refuses(boots[0]), "its port is closed")
            killed_s = time.monotonic()
        assert len(load.answers) == load.total
        failed = [answer for answer in load.answers if not answer.done]
        lines = proxy.logged(load.total)
        assert {lines[answer.id].worker for answer in failed} == {"w1"}
        assert [answer for answer in failed if answer.started_s > killed_s] == []
        assert {lines[answer.id].ending[0] for answer in failed} == {"S"}, [(a, lines[a.id]) for a in failed]
        # Each one is cut without its end, or an error: none only looks whole.
        assert all(answer.status == 502 or not answer.whole for answer in failed)
        assert not any(b"[DONE]" in answer.body for answer in failed)
        assert_the_others_took_over(load, proxy)


def refuses(boot: Boot) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((boot.env["HOST"], int(boot.env["PORT"]))) == errno.ECONNREFUSED


def assert_the_others_took_over(load: Load, proxy: Proxy) -> None:
    assert {answer.worker for answer in load.answers[-10:]} == {"w2", "w3"}
    assert proxy.up("least") == {"w2", "w3"}


def test_without_a_worker_clients_get_an_error_that_they_can_parse(tmp_path: Path) -> None:
    with Proxy(tmp_path, []).running() as proxy:
        eventually(lambda: not proxy.up("least") and not proxy.up("loading"), "no worker is up")
        answer = proxy.request("none")
        assert (answer.status, b'"code":"backend_unavailable"' in answer.body) == (503, True)


def with_a_group_for_embeddings(proxy: Proxy) -> Proxy:
    """Add the lines of docs/SCALING.md, "Several models". There is no worker, so HAProxy answers itself."""
    page = (ROOT / "docs" / "SCALING.md").read_text()
    section = page.partition("\n## Several models\n")[2].partition("\n## ")[0]
    rules = re.findall(r"(?m)^    (http-request .*)", section)
    rules += re.findall(r"(?m)^\|.*`(use_backend .*?)` \|$", section)
    assert len(rules) == 4
    (group,) = re.findall(r"(?ms)^    (backend embed\n.*?)\n\n", section)
    keys = proxy.folder / "embed_keys.lst"
    keys.write_text(hashlib.sha256(LOOSE_KEY.encode()).hexdigest() + "\n")
    first = "    use_backend loading if"
    text = proxy.config.read_text()
    text = text.replace(first, "".join(f"    {rule}\n" for rule in rules) + "    # ")
    text = text.replace("/etc/haproxy/embed_keys.lst", str(keys))
    group = re.sub(r"10\.0\.0\.1\d:8000", f"127.0.0.1:{free_ports(1)[0]}", textwrap.dedent(f"    {group}"))
    proxy.config.write_text(f"{text}\n{group}\n")
    return proxy


@pytest.mark.parametrize(
    ("path", "key", "body", "group"),
    [
        ("/v1/embeddings", FREE_KEY, {"input": "x"}, "embed"),
        ("/v1/chat/completions", LOOSE_KEY, {"messages": []}, "embed"),
        ("/v1/chat/completions", FREE_KEY, {"messages": [{"model": "embed"}], "model": "chat"}, "least"),
        ("/v1/rerank", FREE_KEY, {"documents": ["x" * 60000], "model": "embed"}, "embed"),
        ("/v1/rerank", FREE_KEY, {"documents": ["x" * 70000], "model": "embed"}, "least"),
    ],
)
def test_a_group_of_workers_has_its_own_model(
    path: str, key: str, body: dict[str, object], group: str, tmp_path: Path
) -> None:
    proxy = with_a_group_for_embeddings(Proxy(tmp_path, []))
    checked = proxy.check()
    assert (checked.returncode, "WARNING" in checked.stderr) == (0, False), checked.stderr
    with proxy.running(), closing(proxy.connect()) as client:
        fields = {"Authorization": f"Bearer {key}", "Content-Type": "application/json", "X-Request-Id": "one"}
        client.request("POST", path, json.dumps(body), fields)
        assert client.getresponse().status == 503
        assert proxy.line("one").backend == group
