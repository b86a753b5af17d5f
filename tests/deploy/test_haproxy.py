"""deploy/haproxy/ for real: HAProxy, three workers that start.sh has started, clients over TLS, and what goes wrong."""

import errno
import json
import os
import re
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path

import pytest

if not (shutil.which("haproxy") and shutil.which("openssl")):
    pytest.skip("haproxy or openssl is not installed", allow_module_level=True)

from support.boot import Boot
from support.haproxy import EXACT_KEY, FREE_KEY, LOOSE_KEY, RATE, Load, Proxy, cluster, eventually

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


def test_load_goes_to_whoever_has_least(proxy: Proxy) -> None:
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
def test_a_reader_who_leaves_frees_the_slot(served: tuple[Proxy, list[Boot]], stream: bool) -> None:
    proxy, boots = served
    before = cancelled(boots)
    with closing(proxy.connect()) as connection:
        body = json.dumps({"messages": [{"role": "user", "content": "hi"}], "max_tokens": 100000, "stream": stream})
        fields = {"Authorization": f"Bearer {FREE_KEY}", "Content-Type": "application/json"}
        connection.request("POST", "/v1/chat/completions", body, fields)
        if stream:
            connection.getresponse().read(10)
        eventually(lambda: active(boots) == 1, "it is at work")
    eventually(lambda: active(boots) == 0 and cancelled(boots) == before + 1, "the slot is free")


def metric(boot: Boot, name: str) -> float:
    with closing(HTTPConnection(boot.env["HOST"], int(boot.env["PORT"]), timeout=30)) as connection:
        connection.request("GET", "/metrics")
        lines = connection.getresponse().read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.partition("{")[0].partition(" ")[0] == name)


def cancelled(boots: list[Boot]) -> float:
    return sum(metric(boot, "gateway_cancelled_total") for boot in boots)


def active(boots: list[Boot]) -> float:
    return sum(metric(boot, "gateway_requests_active") for boot in boots)


@pytest.mark.parametrize("path", ["/metrics", "/usage", "/drain", "/slots", "/slots/0", "/props"])
def test_what_concerns_one_worker_is_refused(proxy: Proxy, path: str) -> None:
    with closing(proxy.connect()) as connection:
        connection.request("GET", path, headers={"Authorization": f"Bearer {FREE_KEY}"})
        answer = connection.getresponse()
        assert (answer.status, b"route_not_allowed" in answer.read()) == (403, True)


def test_a_worker_that_an_operator_drains_gets_nothing_new(proxy: Proxy) -> None:
    assert proxy.order("set server least/w1 state drain").strip() == ""
    assert {answer.worker for answer in proxy.together(12)} == {"w2", "w3"}
    proxy.order("set server least/w1 state ready")
    assert {answer.worker for answer in proxy.together(12, tokens=100)} == {"w1", "w2", "w3"}


def test_requests_wait_where_every_worker_is_loading(tmp_path: Path) -> None:
    with cluster(tmp_path, 1, MOCK_LOAD_SECONDS="4") as (proxy, boots):
        eventually(lambda: not proxy.up("least") and proxy.up("loading") == {"w1"}, "HAProxy knows")
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
    """What it has begun it ends; what it has not is taken elsewhere, but for a connection that comes as it closes."""
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


def test_a_worker_that_is_killed_under_load_loses_what_it_had_in_hand(tmp_path: Path) -> None:
    with cluster(tmp_path) as (proxy, boots):
        with proxy.load(CLIENTS, EACH) as load:
            load.await_answers(load.total // 4)
            # As when the machine goes: nothing of it is left to answer for the rest.
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
        # Cut without its end, or an error: never an answer that only looks whole.
        assert all(answer.status == 502 or not answer.whole for answer in failed)
        assert not any(b"[DONE]" in answer.body for answer in failed)
        assert_the_others_took_over(load, proxy)


def refuses(boot: Boot) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((boot.env["HOST"], int(boot.env["PORT"]))) == errno.ECONNREFUSED


def assert_the_others_took_over(load: Load, proxy: Proxy) -> None:
    assert {answer.worker for answer in load.answers[-10:]} == {"w2", "w3"}
    assert proxy.up("least") == {"w2", "w3"}


def test_without_a_worker_the_error_is_one_that_clients_can_read(tmp_path: Path) -> None:
    with Proxy(tmp_path, []).running() as proxy:
        eventually(lambda: not proxy.up("least") and not proxy.up("loading"), "nobody is there")
        answer = proxy.request("none")
        assert (answer.status, b'"code":"backend_unavailable"' in answer.body) == (503, True)
