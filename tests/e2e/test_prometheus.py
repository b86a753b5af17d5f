"""The metrics page, read by Prometheus, its linter and its Python parsers."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import httpx
import prometheus_client.openmetrics.parser as openmetrics
import prometheus_client.parser as text_format
import pytest
from stack import HERE, OPERATOR_KEY, TEAM_KEY, Gateway, Process, bearer, eventually, fetch, running

from support.ports import free_port

OPENMETRICS = "application/openmetrics-text; version=1.0.0"
CHAT = {"model": "tiny", "max_tokens": 4, "messages": [{"role": "user", "content": "the cat"}]}


@pytest.fixture(scope="module")
def tools() -> Path:
    done = subprocess.run([HERE / "get_prometheus.sh"], stdout=subprocess.PIPE, text=True, check=True)
    return Path(done.stdout.strip())


@pytest.fixture
def used(gateway: Gateway) -> str:
    """The address of the gateway after a response, a stream and refusals."""
    for body in (CHAT, CHAT | {"stream": True}, {}):
        fetch(f"{gateway.url}/v1/chat/completions", TEAM_KEY, body)
    fetch(f"{gateway.url}/v1/models")
    fetch(f"{gateway.url}/nowhere", TEAM_KEY)
    return gateway.url


def page(url: str, accept: str, key: str | None = None) -> httpx.Response:
    answer = httpx.get(f"{url}/metrics", headers={"Accept": accept} | (bearer(key) if key else {}))
    assert answer.status_code == 200
    return answer


@pytest.mark.parametrize("key", [None, OPERATOR_KEY], ids=["public", "operator"])
def test_both_formats_parse_and_agree(used: str, key: str | None) -> None:
    text = list(text_format.text_string_to_metric_families(page(used, "text/plain", key).text))
    answer = page(used, OPENMETRICS, key)
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    om = list(openmetrics.text_string_to_metric_families(answer.text))
    assert {family.name for family in om} == {family.name for family in text}
    assert any(sample.name == "gateway_requests_total" and sample.value > 0 for f in text for sample in f.samples)


@pytest.mark.parametrize("key", [None, OPERATOR_KEY], ids=["public", "operator"])
def test_promtool_accepts_the_page(used: str, tools: Path, key: str | None) -> None:
    linted = subprocess.run(
        [tools / "promtool", "check", "metrics"],
        input=page(used, "*/*", key).text,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (linted.returncode, linted.stdout, linted.stderr) == (0, "", "")


class Prometheus(Process):
    name = "prometheus"

    def __init__(self, folder: Path, tools: Path, target: str) -> None:
        super().__init__(folder, free_port())
        self.tools, self.folder = tools, folder
        job = {
            "job_name": "gateway",
            "scrape_interval": "1s",
            "scrape_timeout": "1s",
            "authorization": {"credentials_file": str(folder / "key")},
            "static_configs": [{"targets": [target]}],
        }
        (folder / "key").write_text(TEAM_KEY)
        self.config = folder / "prometheus.yml"
        self.config.write_text(json.dumps({"scrape_configs": [job]}))

    def command(self) -> list[str]:
        return [
            str(self.tools / "prometheus"),
            f"--config.file={self.config}",
            f"--storage.tsdb.path={self.folder / 'tsdb'}",
            f"--web.listen-address=127.0.0.1:{self.port}",
            "--log.level=warn",
        ]

    def is_ready(self) -> bool:
        return fetch(f"{self.url}/-/ready")[0] == 200

    def query(self, expression: str) -> float | None:
        """Return the value of an expression with one series; None if it has none yet."""
        _, body = fetch(f"{self.url}/api/v1/query?query={quote(expression)}")
        result = json.loads(body)["data"]["result"]
        return float(result[0]["value"][1]) if result else None


@pytest.fixture
def prometheus(used: str, tools: Path, tmp_path: Path) -> Iterator[Prometheus]:
    yield from running(Prometheus(tmp_path, tools, used.removeprefix("http://")))


def test_a_real_prometheus_scrapes_the_page(used: str, prometheus: Prometheus) -> None:
    eventually(lambda: prometheus.query('up{job="gateway"}'), lambda value: value == 1, 20)
    counted = 'sum(gateway_requests_total{route="/v1/chat/completions",code="200"})'
    before = eventually(lambda: prometheus.query(counted), lambda value: value is not None, 20)
    assert before is not None
    for _ in range(3):
        assert fetch(f"{used}/v1/chat/completions", TEAM_KEY, CHAT)[0] == 200
    eventually(lambda: prometheus.query(counted), lambda value: value == before + 3, 20)
    quantile = "histogram_quantile(0.9, sum by (le) (gateway_request_duration_seconds_bucket))"
    eventually(lambda: prometheus.query(quantile), lambda value: value is not None, 20)
