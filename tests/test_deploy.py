"""What is shipped beside the product: image, compose, HAProxy, Kubernetes, systemd, Prometheus, Grafana and their docs.

Names are compared with the product's own: settings, routes, errors, metrics. A checker that is not installed (promtool,
kubernetes-validate, PyYAML, systemd-analyze) is skipped; .ci/run has them.
"""

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

import metrics
from config import ALIASES, SETTINGS, load_config
from errors import CATALOGUE
from parts import Parts
from routes import TABLE

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
DOCKERFILE = (ROOT / "Dockerfile").read_text()
COMPOSE = ROOT / "docker-compose.yml"
HAPROXY = (DEPLOY / "haproxy" / "haproxy.cfg").read_text()
KUBERNETES = DEPLOY / "kubernetes"
UNIT = (DEPLOY / "systemd" / "llama-gateway.service").read_text()
ENV_EXAMPLE = (DEPLOY / "systemd" / "env.example").read_text()
DEPLOYMENT = (ROOT / "docs" / "DEPLOYMENT.md").read_text()
DASHBOARD = DEPLOY / "grafana" / "dashboard.json"
DOCS = [ROOT / "docs" / "DEPLOYMENT.md", ROOT / "docs" / "SCALING.md"]
DEFAULTS = load_config({"DATA_DIR": "/data"})
REST_OF_STOP_S = 3  # after the drain: llama-server's grace, the health server's, the margins
SETTING_NAMES = {setting.name for setting in SETTINGS}
SECRET_FILES = {f"{setting.name}_FILE" for setting in SETTINGS if setting.secret}


def instructions(name: str) -> list[str]:
    """The arguments of an instruction, wherever the Dockerfile has it."""
    joined = re.sub(r"\\\n", " ", re.sub(r"(?m)^#.*\n", "", DOCKERFILE))
    return [" ".join(line.split()[1:]) for line in joined.splitlines() if line.startswith(name + " ")]


# The image


def test_the_bases_tag_is_pinned_in_one_place() -> None:
    (pinned,) = [line for line in instructions("ARG") if line.startswith("LLAMA_BUILD=")]
    tag = pinned.partition("=")[2]
    assert re.fullmatch("b[0-9]+", tag)
    assert instructions("FROM") == ["${BASE_IMAGE}"]
    for path in (COMPOSE, *DEPLOY.rglob("*.yaml")):
        assert tag not in path.read_text(), path


def test_nothing_but_scripts_and_version_goes_in() -> None:
    assert [line.split()[:-1] for line in instructions("COPY")] == [["VERSION"], ["scripts/*.py", "scripts/start.sh"]]
    assert not instructions("ADD")
    kept = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert kept == ["*", "!VERSION", "!scripts", "scripts/__pycache__"]
    assert not re.search(r"\bpip\b|curl|wget", " ".join(instructions("RUN")))


def test_pitfall_10_the_image_leaves_the_data_folder_to_the_platform() -> None:
    assert "DATA_DIR" not in " ".join(instructions("ENV") + instructions("ARG"))


def test_pitfall_12_no_old_names_and_both_ports() -> None:
    named = {pair.partition("=")[0] for line in instructions("ENV") for pair in line.split()}
    assert not named & ALIASES.keys()
    (exposed,) = instructions("EXPOSE")
    assert exposed.split() == [str(DEFAULTS.listen.port), str(DEFAULTS.listen.port_health)]


def test_what_the_image_sets_is_no_reason_for_a_warning() -> None:
    """The bases say LLAMA_ARG_HOST=0.0.0.0; a Dockerfile can empty that but not take it away."""
    environ = dict(pair.split("=", 1) for line in instructions("ENV") for pair in line.split())
    assert environ == {"LLAMA_ARG_HOST": ""}
    assert load_config(environ | {"DATA_DIR": "/data"}).warnings == ()


def test_the_image_runs_start_sh_as_a_numeric_user_that_is_not_root() -> None:
    assert instructions("USER")[-1] == "${RUN_AS}"
    (run_as,) = [line for line in instructions("ARG") if line.startswith("RUN_AS=")]
    assert re.fullmatch("RUN_AS=[1-9][0-9]*:[1-9][0-9]*", run_as)
    assert json.loads(instructions("ENTRYPOINT")[0])[0].endswith("/scripts/start.sh")


def health_check(environ: dict[str, str]) -> int:
    (text,) = instructions("HEALTHCHECK")
    argv = json.loads(text[text.index("[") :])
    argv[0] = sys.executable
    return subprocess.run(argv, env=environ, stderr=subprocess.DEVNULL, check=False, timeout=30).returncode


@contextmanager
def health_server(folder: Path, state: str) -> Iterator[dict[str, str]]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (folder / "state.json").write_text(json.dumps({"state": state, "since": "", "detail": "", "backend_pid": 1}))
    environ = {"HOST": "127.0.0.1", "PORT_HEALTH": str(port)}
    settings = {**environ, "STATE_FILE": str(folder / "state.json"), "DATA_DIR": str(folder)}
    process = subprocess.Popen([sys.executable, str(ROOT / "scripts" / "health_server.py")], env=settings)
    try:
        give_up_s = time.monotonic() + 20
        while True:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except OSError:
                assert time.monotonic() < give_up_s
                time.sleep(0.01)
        yield environ
    finally:
        process.terminate()
        process.wait(20)


@pytest.mark.parametrize(("state", "status"), [("ready", 0), ("loading", 1), ("draining", 1), ("dead", 1)], ids=str)
def test_pitfall_12_the_health_check_tells_a_dead_model_from_a_live_one(
    tmp_path: Path, state: str, status: int
) -> None:
    with health_server(tmp_path, state) as environ:
        assert health_check(environ) == status


def test_the_health_check_fails_where_nobody_answers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    assert health_check({"PORT_HEALTH": str(port)}) == 1


def test_a_load_of_any_length_counts_as_starting() -> None:
    """Within the start period a failed check is none until the first success."""
    assert "--start-period=24h" in instructions("HEALTHCHECK")[0]


def test_make_image_test_has_its_script() -> None:
    assert os.access(DEPLOY / "image-test.sh", os.X_OK)
    assert "deploy/image-test.sh" in (ROOT / "Makefile").read_text()


def test_compose_gives_no_more_than_is_needed() -> None:
    yaml = pytest.importorskip("yaml")
    services = yaml.safe_load(COMPOSE.read_text())["services"]
    assert {name: service["profiles"] for name, service in services.items()} == {"gpu": ["gpu"], "cpu": ["cpu"]}
    for service in services.values():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert {mount.partition(":")[0] for mount in service["tmpfs"]} == {"/tmp", "/dev/shm"}
        assert int(service["stop_grace_period"][:-1]) >= DEFAULTS.supervision.drain_timeout_s + REST_OF_STOP_S
        assert service["environment"].keys() <= SETTING_NAMES
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])


# HAProxy


def test_haproxy_has_the_same_workers_everywhere() -> None:
    sections = re.findall(r"(?ms)^backend (\w+)\n(.*?)(?=^\w|\Z)", HAPROXY)
    servers = {name: re.findall(r"(?m)^    server (\S+) (\S+)", text) for name, text in sections}
    assert set(servers) == {"least", "exact", "loading"}
    assert servers["least"] == servers["exact"] == servers["loading"]


def test_haproxy_waits_longer_than_a_worker_may_be_silent() -> None:
    minutes = int(re.findall(r"timeout server (\d+)m", HAPROXY)[0])
    assert minutes * 60 > DEFAULTS.queue.cold_start_wait_s + DEFAULTS.timeouts.request_s
    assert f"({DEFAULTS.queue.cold_start_wait_s:g}) and REQUEST_TIMEOUT ({DEFAULTS.timeouts.request_s:g})" in HAPROXY


def test_what_haproxy_answers_itself_has_the_gateways_form() -> None:
    by_code = {kind.code: kind for kind in CATALOGUE}
    bodies = re.findall(r"string '(.*?)'", HAPROXY)
    assert len(bodies) == 4
    for body in bodies:
        error = json.loads(body)["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert error["code"] in by_code
        assert error["type"] in {kind.type for kind in CATALOGUE}


def test_routes_that_haproxy_refuses_exist_and_no_inference_is_among_them() -> None:
    (exact, below) = re.findall(r"path -m str (.*?) } or { path_beg (.*?) }", HAPROXY)[0]
    kinds = {path: kind for _, path, kind in TABLE}
    paths = [path for path in kinds if path in exact.split() or path.startswith(tuple(below.split()))]
    assert set(exact.split()) <= kinds.keys()
    assert not any(kinds[path].slot for path in paths)
    operators = {path for path, kind in kinds.items() if kind.name.startswith("operator") and path not in paths}
    assert operators <= {"/models", "/reload", "/drain"} - set(exact.split())


# Kubernetes


def manifests() -> list[Any]:
    yaml = pytest.importorskip("yaml")
    names = yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text())["resources"]
    assert {*names, "kustomization.yaml"} == {path.name for path in KUBERNETES.iterdir()}
    return [each for name in names for each in yaml.safe_load_all((KUBERNETES / name).read_text())]


def of_kind(kind: str) -> Any:
    (found,) = [each for each in manifests() if each["kind"] == kind]
    return found


def test_kubernetes_takes_every_manifest() -> None:
    validate = pytest.importorskip("kubernetes_validate")
    ours = [each for each in manifests() if each["apiVersion"] != "keda.sh/v1alpha1"]
    assert len(ours) == 6
    for manifest in ours:
        validate.validate(manifest, "1.30", strict=True)
        validate.validate(manifest, validate.latest_version(), strict=True)


def container() -> Any:
    (only,) = of_kind("Deployment")["spec"]["template"]["spec"]["containers"]
    return only


def test_what_the_manifests_name_is_there() -> None:
    deployment = of_kind("Deployment")
    template = deployment["spec"]["template"]
    labels = template["metadata"]["labels"]
    ports = {port["name"]: port["containerPort"] for port in container()["ports"]}
    assert ports == {"http": DEFAULTS.listen.port, "health": DEFAULTS.listen.port_health}
    for each in manifests():
        if each["kind"] in ("Service", "PodDisruptionBudget"):
            selector = each["spec"]["selector"]
            assert selector.get("matchLabels", selector).items() <= labels.items()
        if each["kind"] == "Service":
            assert all(port["targetPort"] in ports for port in each["spec"]["ports"])
    volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
    assert {mount["name"] for mount in container()["volumeMounts"]} == volumes.keys()
    assert volumes["keys"]["secret"]["secretName"] == of_kind("Secret")["metadata"]["name"]
    assert container()["envFrom"] == [{"configMapRef": {"name": of_kind("ConfigMap")["metadata"]["name"]}}]
    assert of_kind("ScaledObject")["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]


def test_the_pods_settings_and_keys_are_good() -> None:
    settings = of_kind("ConfigMap")["data"]
    assert settings.keys() <= SETTING_NAMES
    config = load_config(settings)
    (keys_mount,) = [mount for mount in container()["volumeMounts"] if mount["name"] == "keys"]
    assert config.auth.keys_file == Path(keys_mount["mountPath"]) / "api_keys.txt"
    assert "subPath" not in keys_mount
    assert "api_keys.txt" in of_kind("Secret")["stringData"]
    grace_s = of_kind("Deployment")["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    (_, pause_s) = container()["lifecycle"]["preStop"]["exec"]["command"]
    assert grace_s >= int(pause_s) + config.supervision.drain_timeout_s + REST_OF_STOP_S


def test_a_pod_that_loads_is_neither_ready_nor_killed() -> None:
    """The kubelet takes any status below 400 for a success, so the health port's 204 must not decide who is ready."""
    probes = {name: container()[name]["httpGet"] for name in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert probes["startupProbe"] == probes["readinessProbe"] == {"path": "/health", "port": "http"}
    assert probes["livenessProbe"] == {"path": "/ready", "port": "health"}
    liveness = container()["livenessProbe"]
    assert liveness["periodSeconds"] * liveness["failureThreshold"] > 30  # the longest back-off


def test_a_pod_has_no_more_rights_than_it_needs() -> None:
    pod = of_kind("Deployment")["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    security = container()["securityContext"]
    assert security == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def test_the_autoscaler_asks_for_who_waits_and_who_works() -> None:
    spec = of_kind("ScaledObject")["spec"]
    assert spec["minReplicaCount"] >= 1
    slots = int(of_kind("ConfigMap")["data"]["PARALLEL"])
    queries = {trigger["metadata"]["query"]: float(trigger["metadata"]["threshold"]) for trigger in spec["triggers"]}
    assert all(trigger.keys() == {"type", "metricType", "metadata"} for trigger in spec["triggers"])
    assert queries['sum(gateway_requests_active{job="llama-gateway"})'] < slots
    assert 'sum(gateway_queue_depth{job="llama-gateway"})' in queries


def test_the_autoscalers_behaviour_is_one_that_kubernetes_knows() -> None:
    """KEDA's own kind has no schema at hand, but what it hands on has."""
    validate = pytest.importorskip("kubernetes_validate")
    spec = of_kind("ScaledObject")["spec"]
    assert spec.keys() == {
        "scaleTargetRef", "minReplicaCount", "maxReplicaCount", "pollingInterval", "advanced", "triggers"
    }  # fmt: skip
    behaviour = spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    target = {"apiVersion": "apps/v1", "kind": "Deployment", **spec["scaleTargetRef"]}
    scaler = {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": {"name": "keda-hpa-llama-gateway"},
        "spec": {"scaleTargetRef": target, "maxReplicas": spec["maxReplicaCount"], "behavior": behaviour},
    }
    validate.validate(scaler, "1.30", strict=True)
    assert all(isinstance(value, str) for trigger in spec["triggers"] for value in trigger["metadata"].values())


# systemd


def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    if not shutil.which("systemd-analyze"):
        pytest.skip("systemd-analyze is not installed")
    unit = tmp_path / "llama-gateway.service"
    unit.write_text(re.sub("ExecStart=.*", "ExecStart=/bin/true", UNIT))
    done = subprocess.run(
        ["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False, timeout=60
    )
    said = [line for line in done.stderr.splitlines() if "llama-gateway.service" in line]
    assert (done.returncode, said) == (0, [])


def test_the_unit_gives_time_to_drain_and_does_not_repeat_what_cannot_help() -> None:
    (stop_s,) = re.findall(r"(?m)^TimeoutStopSec=(\d+)$", UNIT)
    assert int(stop_s) >= DEFAULTS.supervision.drain_timeout_s + REST_OF_STOP_S
    assert "KillMode=mixed" in UNIT
    assert "RestartPreventExitStatus=2 3" in UNIT


def test_the_units_settings_are_good() -> None:
    settings = env_example()
    assert settings.keys() <= SETTING_NAMES
    load_config(settings | {"DATA_DIR": "/var/lib/llama-gateway"})


def env_example() -> dict[str, str]:
    """What is set, and what stands in comments; fails unless single quotes are around every value."""
    lines = [line.lstrip("#") for line in ENV_EXAMPLE.splitlines() if re.match("#?[A-Z_]+=", line)]
    found = [re.fullmatch("([A-Z_]+)='([^']*)'", line) for line in lines]
    return {match[1]: match[2] for match in found if match} if all(found) else {}


def test_a_shell_reads_the_units_settings_as_systemd_does(tmp_path: Path) -> None:
    settings = env_example()
    assert settings, "a value that is not in single quotes is read by systemd and a shell each in its own way"
    file = tmp_path / "env"
    file.write_text(re.sub("(?m)^#(?=[A-Z_]+=)", "", ENV_EXAMPLE))
    command = ["sh", "-c", 'set -a; . "$0"; exec env -0', str(file)]
    read = subprocess.run(command, capture_output=True, text=True, check=True, env={"PATH": os.environ["PATH"]}).stdout
    assert settings.items() <= dict(line.split("=", 1) for line in read.split("\0") if line).items()


def test_the_check_of_the_units_settings_reads_them_as_the_unit_does() -> None:
    (command,) = re.findall(r"(?m)^    sudo systemd-run (?:.*\\\n)*.*--check-config$", DEPLOYMENT)
    words = shlex.split(command)
    properties = [words[at + 1] for at, word in enumerate(words) if word == "-p"]
    assert set(properties) <= set(UNIT.splitlines())
    kept = re.findall(r"(?m)^(?:User|Group|Environment|EnvironmentFile|WorkingDirectory)=.*$", UNIT)
    assert set(kept) == set(properties)
    assert "set -a" not in DEPLOYMENT


def test_the_access_log_that_is_rotated_is_the_units() -> None:
    (path, stanza) = re.findall(r"(?ms)^    (/\S+) \{\n(.*?)^    \}$", DEPLOYMENT)[0]
    assert path == str(load_config(env_example() | {"DATA_DIR": "/var/lib/llama-gateway"}).log.access_file)
    assert "systemctl try-reload-or-restart llama-gateway" in stanza
    assert "ExecReload=/bin/kill -HUP $MAINPID" in UNIT


# Prometheus and Grafana


def promtool() -> str:
    """The one on the PATH, else the one that tests/e2e/get_prometheus.sh has fetched."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    found = shutil.which("promtool") or shutil.which(
        "promtool", path=str(cache / "llama-gguf-inference/prometheus/usr/bin")
    )
    if found is None:
        pytest.skip("promtool is not installed")
    return found


@pytest.mark.parametrize(
    "command",
    [("check", "rules", "alerts.yml"), ("check", "config", "prometheus.yml"), ("test", "rules", "alerts_test.yml")],
)
def test_promtool_takes_what_prometheus_is_given(command: tuple[str, ...]) -> None:
    done = subprocess.run(
        [promtool(), *command], cwd=DEPLOY / "prometheus", capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stdout + done.stderr


def expressions() -> list[str]:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel.get("targets", [])]


def test_prometheus_understands_every_panel(tmp_path: Path) -> None:
    ready = [text.replace("$__rate_interval", "1m").replace("$__range", "6h") for text in expressions()]
    rules = [{"record": f"panel:{number}", "expr": text} for number, text in enumerate(ready)]
    (tmp_path / "rules.json").write_text(json.dumps({"groups": [{"name": "panels", "rules": rules}]}))
    argv = [promtool(), "check", "rules", str(tmp_path / "rules.json")]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The names that a gateway registers, an operator's included, as Prometheus stores them."""
    parts = Parts(load_config({"DATA_DIR": str(tmp_path_factory.mktemp("data")), "USAGE_FILE": ""}))
    page = metrics.render(parts.operator_registry, "text").decode()
    kinds = dict(re.findall(r"(?m)^# TYPE (\S+) (\S+)$", page))
    assert parts.access_log is not None
    parts.access_log.close()
    parts.ledger.close()
    tails = ("_bucket", "_sum", "_count")
    return {name + tail for name, kind in kinds.items() for tail in (tails if kind == "histogram" else ("",))}


@pytest.mark.parametrize(
    "path",
    [DASHBOARD, *sorted((DEPLOY / "prometheus").glob("*.yml")), KUBERNETES / "scaledobject.yaml", *DOCS],
    ids=lambda path: path.name,
)
def test_every_metric_that_is_named_exists(path: Path, series: set[str]) -> None:
    named = set(re.findall(r"\bgateway_[a-z_]+", path.read_text()))
    whole = {name for name in named if not name.endswith("_")}
    histograms = {name.removesuffix("_count") for name in series if name.endswith("_count")}
    assert whole <= series | histograms, whole - series - histograms


def test_every_metric_is_on_the_dashboard_or_only_a_sum(series: set[str]) -> None:
    shown = set(re.findall(r"\bgateway_[a-z_]+", " ".join(expressions())))
    assert {name for name in series - shown if not name.endswith(("_sum", "_count"))} == set()


def test_the_dashboards_panels_are_distinct_and_do_not_overlap() -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        own = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert at["x"] + at["w"] <= 24
        assert not own & cells, panel["title"]
        cells |= own


def test_every_alert_has_a_case() -> None:
    alerts = re.findall(r"- alert: (\w+)", (DEPLOY / "prometheus" / "alerts.yml").read_text())
    cases = re.findall(r"alertname: (\w+)", (DEPLOY / "prometheus" / "alerts_test.yml").read_text())
    assert set(alerts) == set(cases)


# Docs

# Capital letters that are no settings of ours: other programs' names and build arguments.
FOREIGN = {
    "VERSION",
    "VARIANT",
    "LLAMA_BUILD",
    "BASE_IMAGE",
    "RUN_AS",
    "KEY",
    "ENDPOINT_ID",
    "POD_ID",
    "RUNPOD_API_KEY",
    "VAST_*",
}


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_every_setting_that_is_named_exists(path: Path) -> None:
    text = path.read_text()
    named = set(re.findall(r"`([A-Z][A-Z0-9_]{2,})(?:=[^`]*)?`", text)) | set(
        re.findall(r"(?m)(?:^|\s|-e )([A-Z][A-Z0-9_]{2,})=", text)
    )
    unknown = named - SETTING_NAMES - SECRET_FILES
    assert {name for name in unknown if not any(fnmatch(name, known) for known in FOREIGN)} == set()


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_every_file_that_is_named_exists(path: Path) -> None:
    text = path.read_text()
    named = set(re.findall(r"\b((?:deploy|scripts|docs|tests)/[\w./-]*\w)", text))
    assert {name for name in named if not (ROOT / name).exists()} == set()
    links = re.findall(r"\]\((?!https?:)([^)#]+)", text)
    assert [link for link in links if not (path.parent / link).exists()] == []


def test_the_sums_are_made_of_what_is_so() -> None:
    text = (ROOT / "docs" / "SCALING.md").read_text()
    queue = DEFAULTS.queue
    assert f"`MAX_QUEUE_SIZE` ({queue.max_size})" in text
    assert f"`MAX_CONNECTIONS` ({queue.max_connections:,})" in text
    assert f"`MAX_BUFFERED_BYTES` ({queue.max_buffered_bytes >> 20} MiB)" in text
    assert f"`maxconn` {int(re.findall('maxconn ([0-9]+)', HAPROXY)[0]):,}" in text
    assert f"{int(re.findall('tune.bufsize ([0-9]+)', HAPROXY)[0]) >> 10} KiB" in text
    stream = (ROOT / "tests" / "answers" / "chat.sse").read_bytes().split(b"\n\n")
    events = [len(event) + 2 for event in stream if b'"content":"' in event]
    assert f"{sum(events) / len(events):.0f} octets" in text


def test_a_workers_series_are_no_more_than_the_sums_say(tmp_path: Path) -> None:
    parts = Parts(load_config({"DATA_DIR": str(tmp_path), "USAGE_FILE": ""}))
    page = metrics.render(parts.operator_registry, "text").decode()
    assert parts.access_log is not None
    parts.access_log.close()
    parts.ledger.close()
    assert sum(not line.startswith("#") for line in page.splitlines()) + 20 <= 150
