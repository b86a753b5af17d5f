"""The files in deploy/, the image and their docs: HAProxy, Kubernetes, systemd, Prometheus, Grafana, Compose.

The settings, routes, errors and metrics that they name must exist in the product. Tests are skipped if their checker is
not installed (promtool, kubernetes-validate, PyYAML, systemd-analyze); .ci/run has them all.
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

import generate
import keyfile
from boot.router_models import find_models
from config.loader import load_config
from config.settings import ALIASES, SETTINGS
from core.errors import CATALOGUE
from metrics import Distribution, Family
from policy.routes import TABLE
from support.boot import PATIENCE_S
from support.ports import free_port, reserved_port

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
    """The arguments of every instruction with this name in the Dockerfile."""
    joined = re.sub(r"\\\n", " ", re.sub(r"(?m)^#.*\n", "", DOCKERFILE))
    return [" ".join(line.split()[1:]) for line in joined.splitlines() if line.startswith(name + " ")]


# The image


def test_the_tag_of_the_base_is_pinned_in_one_place() -> None:
    (pinned,) = [line for line in instructions("ARG") if line.startswith("LLAMA_BUILD=")]
    tag = pinned.partition("=")[2]
    assert re.fullmatch("b[0-9]+", tag)
    assert instructions("FROM") == ["${BASE_IMAGE}"]
    for path in (COMPOSE, *DEPLOY.rglob("*.yaml")):
        assert tag not in path.read_text(), path


def test_the_image_contains_only_scripts_and_version() -> None:
    assert [line.split()[:-1] for line in instructions("COPY")] == [["VERSION"], ["scripts"]]
    assert not instructions("ADD")
    kept = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert kept == ["*", "!VERSION", "!scripts", "**/__pycache__"]
    assert not re.search(r"\bpip\b|curl|wget", " ".join(instructions("RUN")))


def test_the_image_leaves_the_data_folder_to_the_platform() -> None:
    assert "DATA_DIR" not in " ".join(instructions("ENV") + instructions("ARG"))


def test_the_image_has_no_old_names_and_exposes_both_ports() -> None:
    named = {pair.partition("=")[0] for line in instructions("ENV") for pair in line.split()}
    assert not named & ALIASES.keys()
    (exposed,) = instructions("EXPOSE")
    assert exposed.split() == [str(DEFAULTS.listen.port), str(DEFAULTS.listen.port_health)]


def test_the_images_environment_causes_no_warning() -> None:
    """The base images set LLAMA_ARG_HOST=0.0.0.0; a Dockerfile can empty a variable but not unset it."""
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
    return subprocess.run(argv, env=environ, stderr=subprocess.DEVNULL, check=False, timeout=PATIENCE_S).returncode


@contextmanager
def health_server(folder: Path, state: str) -> Iterator[dict[str, str]]:
    port = free_port()
    (folder / "state.json").write_text(json.dumps({"state": state, "since": "", "detail": "", "backend_pid": 1}))
    environ = {"HOST": "127.0.0.1", "PORT_HEALTH": str(port)}
    settings = {**environ, "STATE_FILE": str(folder / "state.json"), "DATA_DIR": str(folder)}
    process = subprocess.Popen([sys.executable, str(ROOT / "scripts" / "health_server.py")], env=settings)
    try:
        give_up_s = time.monotonic() + PATIENCE_S
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
        process.wait(PATIENCE_S)


@pytest.mark.parametrize(("state", "status"), [("ready", 0), ("loading", 1), ("draining", 1), ("dead", 1)], ids=str)
def test_the_health_check_fails_unless_the_model_is_ready(tmp_path: Path, state: str, status: int) -> None:
    with health_server(tmp_path, state) as environ:
        assert health_check(environ) == status


def test_the_health_check_fails_if_nothing_answers() -> None:
    with reserved_port() as sock:
        assert health_check({"PORT_HEALTH": str(sock.getsockname()[1])}) == 1


def test_a_load_of_any_length_counts_as_starting() -> None:
    """In the start period a failed check does not count until the first success."""
    assert "--start-period=24h" in instructions("HEALTHCHECK")[0]


def test_make_image_test_has_its_script() -> None:
    assert os.access(DEPLOY / "image-test.sh", os.X_OK)
    assert "deploy/image-test.sh" in (ROOT / "Makefile").read_text()


def test_compose_grants_only_what_is_needed() -> None:
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
        assert re.fullmatch("on-failure:[1-9]", service["restart"]), "without a bound it fails for ever"


def test_two_models_in_compose_are_found_and_fit(tmp_path: Path) -> None:
    environment = {
        **load_yaml(COMPOSE)["services"]["gpu"]["environment"],
        **load_yaml(DEPLOY / "compose" / "models.yml")["services"]["gpu"]["environment"],
    }
    preset = (DEPLOY / "compose" / "models.ini").read_text().replace("/models/", f"{tmp_path}/")
    (tmp_path / "models.ini").write_text(preset)
    for name in ("chat", "embed"):
        (tmp_path / f"{name}.gguf").write_bytes(b"GGUF")
    config = load_config({**environment, "MODELS_DIR": "", "MODELS_PRESET": str(tmp_path / "models.ini")})
    assert config.warnings == ()
    found = find_models(config, {})
    assert [model.name for model in found.models] == list(config.router.preload) == ["chat", "embed"]
    assert found.warnings == ()


def test_the_examples_of_settings_and_keys_are_valid() -> None:
    text = (ROOT / ".env.example").read_text()
    assert set(re.findall(r"(?m)^#?([A-Z_]+)=", text)) <= SETTING_NAMES
    load_config(dict(line.split("=", 1) for line in text.splitlines() if re.match("[A-Z]", line)))
    lines = [line[1:] for line in (ROOT / "api_keys.txt.example").read_text().splitlines() if "sha256$0" in line]
    parsed = keyfile.parse("\n".join(lines).encode())
    assert len(parsed.entries) == len(lines) == 4
    assert parsed.complaints == ()
    whole = keyfile.parse((ROOT / "api_keys.txt.example").read_bytes())
    assert (whole.entries, whole.complaints) == ((), ())


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


def test_haproxys_own_answers_have_the_gateways_form() -> None:
    by_code = {kind.code: kind for kind in CATALOGUE}
    bodies = re.findall(r"string '(.*?)'", HAPROXY)
    assert len(bodies) == 5
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
    passed = operators - {"/models", "/props"}  # GET is for all keys, and operators change them at one worker
    assert not passed, (
        f"deploy/haproxy/haproxy.cfg passes {', '.join(sorted(passed))}, which concerns one worker: refuse it"
    )


# Kubernetes


def manifests() -> list[Any]:
    yaml = pytest.importorskip("yaml")
    text = (KUBERNETES / "kustomization.yaml").read_text()
    names = yaml.safe_load(text)["resources"] + re.findall(r"(?m)^  # - (\S+\.yaml)$", text)
    assert {*names, "kustomization.yaml"} == {path.name for path in KUBERNETES.iterdir()}
    return [each for name in names for each in yaml.safe_load_all((KUBERNETES / name).read_text())]


def load_yaml(path: Path) -> Any:
    return pytest.importorskip("yaml").safe_load(path.read_text())


def of_kind(kind: str) -> Any:
    (found,) = [each for each in manifests() if each["kind"] == kind]
    return found


def test_kubernetes_accepts_every_manifest() -> None:
    validate = pytest.importorskip("kubernetes_validate")
    ours = [each for each in manifests() if each["kind"] not in ("ScaledObject", "PodMonitor")]
    assert len(ours) == 8
    for manifest in ours:
        validate.validate(manifest, "1.30", strict=True)
        validate.validate(manifest, validate.latest_version(), strict=True)


def container() -> Any:
    (only,) = of_kind("Deployment")["spec"]["template"]["spec"]["containers"]
    return only


def test_the_names_in_the_manifests_match() -> None:
    deployment = of_kind("Deployment")
    template = deployment["spec"]["template"]
    labels = template["metadata"]["labels"]
    ports = {port["name"]: port["containerPort"] for port in container()["ports"]}
    assert ports == {"http": DEFAULTS.listen.port, "health": DEFAULTS.listen.port_health}
    for each in manifests():
        if each["kind"] in ("Service", "PodDisruptionBudget", "NetworkPolicy", "PodMonitor"):
            selector = each["spec"].get("podSelector") or each["spec"]["selector"]
            assert selector.get("matchLabels", selector).items() <= labels.items()
        if each["kind"] == "Service":
            assert all(port["targetPort"] in ports for port in each["spec"]["ports"])
    volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
    assert {mount["name"] for mount in container()["volumeMounts"]} == volumes.keys()
    assert volumes["keys"]["secret"]["secretName"] == of_kind("Secret")["metadata"]["name"]
    assert container()["envFrom"] == [{"configMapRef": {"name": of_kind("ConfigMap")["metadata"]["name"]}}]
    assert of_kind("ScaledObject")["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]


def test_the_network_policy_opens_the_gateways_port_alone() -> None:
    policy = of_kind("NetworkPolicy")["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert [rule["ports"] for rule in policy["ingress"]] == [[{"port": "http"}]]
    assert {port["port"] for rule in policy["egress"] for port in rule["ports"]} == {53, 443}


def test_the_pod_monitor_scrapes_the_job_that_alerts_and_dashboard_expect() -> None:
    """There is no schema of this kind; its fields are those of the Prometheus operator's API reference."""
    (endpoint,) = of_kind("PodMonitor")["spec"]["podMetricsEndpoints"]
    assert endpoint.keys() == {"port", "path", "interval", "authorization", "relabelings"}
    assert endpoint["path"] in {path for _, path, _ in TABLE}
    assert endpoint["port"] in {port["name"] for port in container()["ports"]}
    assert endpoint["relabelings"] == [{"targetLabel": "job", "replacement": "llama-gateway"}]


def test_the_ingress_waits_as_long_as_a_request_may_and_buffers_nothing() -> None:
    ingress = of_kind("Ingress")
    options = {name.rpartition("/")[2]: value for name, value in ingress["metadata"]["annotations"].items()}
    waits_s = DEFAULTS.queue.cold_start_wait_s + DEFAULTS.timeouts.request_s
    assert min(int(options["proxy-read-timeout"]), int(options["proxy-send-timeout"])) > waits_s
    assert options["proxy-body-size"] == f"{DEFAULTS.limits.body_bytes >> 20}m"
    assert options["proxy-buffering"] == options["proxy-request-buffering"] == options["proxy-next-upstream"] == "off"
    (path,) = ingress["spec"]["rules"][0]["http"]["paths"]
    services = {each["metadata"]["name"]: each["spec"]["ports"] for each in manifests() if each["kind"] == "Service"}
    assert path["backend"]["service"]["port"]["name"] in {
        port["name"] for port in services[path["backend"]["service"]["name"]]
    }


def test_the_image_is_that_of_this_version_and_is_pulled_once() -> None:
    assert container()["image"].endswith(f"/llama-gguf-inference:{(ROOT / 'VERSION').read_text().strip()}")
    assert container()["imagePullPolicy"] == "IfNotPresent"


def test_the_pods_settings_and_keys_are_valid() -> None:
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


def test_kubernetes_names_its_proxies_and_needs_a_key_for_metrics() -> None:
    check_facing_the_net(of_kind("ConfigMap")["data"])


def test_systemd_names_its_proxies_and_needs_a_key_for_metrics() -> None:
    check_facing_the_net(env_example())


def check_facing_the_net(settings: dict[str, str]) -> None:
    config = load_config(settings)
    assert config.listen.trusted_proxies
    assert config.auth.metrics_auth is True
    assert config.warnings == ()


def test_compose_needs_a_key_for_metrics() -> None:
    (service,) = {json.dumps(each["environment"]) for each in load_yaml(COMPOSE)["services"].values()}
    assert json.loads(service)["METRICS_AUTH_ENABLED"] == "true"


def test_prometheus_has_a_key() -> None:
    job = load_yaml(DEPLOY / "prometheus" / "prometheus.yml")["scrape_configs"][0]
    assert job["authorization"] == {"credentials_file": "/etc/prometheus/llama-gateway-key"}


def test_a_loading_pod_is_neither_ready_nor_killed() -> None:
    """To the kubelet any status below 400 is a success, so the health port's 204 must not decide readiness."""
    probes = {name: container()[name]["httpGet"] for name in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert probes["startupProbe"] == probes["readinessProbe"] == {"path": "/health", "port": "http"}
    assert probes["livenessProbe"] == {"path": "/ready", "port": "health"}
    liveness = container()["livenessProbe"]
    assert liveness["periodSeconds"] * liveness["failureThreshold"] > 30  # the longest back-off


def test_a_pod_has_only_the_rights_that_it_needs() -> None:
    pod = of_kind("Deployment")["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    security = container()["securityContext"]
    assert security == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def test_the_autoscaler_follows_waiting_and_active_requests() -> None:
    spec = of_kind("ScaledObject")["spec"]
    assert spec["minReplicaCount"] >= 1
    slots = int(of_kind("ConfigMap")["data"]["PARALLEL"])
    queries = {trigger["metadata"]["query"]: float(trigger["metadata"]["threshold"]) for trigger in spec["triggers"]}
    assert all(trigger.keys() == {"type", "metricType", "metadata"} for trigger in spec["triggers"])
    assert queries['sum(gateway_slots_active{job="llama-gateway"})'] < slots
    assert 'sum(gateway_queue_depth{job="llama-gateway"})' in queries


def test_the_autoscalers_behaviour_is_valid() -> None:
    """There is no schema of KEDA's kind, but there is one of the HorizontalPodAutoscaler that it creates."""
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


def test_the_units_socket_is_the_default_port_and_systemd_accepts_it(tmp_path: Path) -> None:
    text = (DEPLOY / "systemd" / "llama-gateway.socket").read_text()
    assert re.findall(r"(?m)^ListenStream=(.*)$", text) == [str(DEFAULTS.listen.port)]
    if not shutil.which("systemd-analyze"):
        pytest.skip("systemd-analyze is not installed")
    (tmp_path / "llama-gateway.socket").write_text(text)
    (tmp_path / "llama-gateway.service").write_text(re.sub("ExecStart=.*", "ExecStart=/bin/true", UNIT))
    verify = ["systemd-analyze", "verify", str(tmp_path / "llama-gateway.socket")]
    done = subprocess.run(verify, capture_output=True, text=True, check=False, timeout=PATIENCE_S)
    assert (done.returncode, [line for line in done.stderr.splitlines() if "llama-gateway" in line]) == (0, [])


def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    if not shutil.which("systemd-analyze"):
        pytest.skip("systemd-analyze is not installed")
    unit = tmp_path / "llama-gateway.service"
    unit.write_text(re.sub("ExecStart=.*", "ExecStart=/bin/true", UNIT))
    done = subprocess.run(
        ["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False, timeout=PATIENCE_S
    )
    complaints = [line for line in done.stderr.splitlines() if "llama-gateway.service" in line]
    assert (done.returncode, complaints) == (0, [])


def test_the_unit_allows_the_drain_and_does_not_restart_in_vain() -> None:
    (stop_s,) = re.findall(r"(?m)^TimeoutStopSec=(\d+)$", UNIT)
    assert int(stop_s) >= DEFAULTS.supervision.drain_timeout_s + REST_OF_STOP_S
    assert "KillMode=mixed" in UNIT
    assert "RestartPreventExitStatus=2 3" in UNIT


def test_the_units_settings_are_valid() -> None:
    settings = env_example()
    assert settings.keys() <= SETTING_NAMES
    load_config(settings | {"DATA_DIR": "/var/lib/llama-gateway"})


def env_example() -> dict[str, str]:
    """The settings of the example, those in comments included; empty unless every value is in single quotes."""
    lines = [line.lstrip("#") for line in ENV_EXAMPLE.splitlines() if re.match("#?[A-Z_]+=", line)]
    found = [re.fullmatch("([A-Z_]+)='([^']*)'", line) for line in lines]
    return {match[1]: match[2] for match in found if match} if all(found) else {}


def test_a_shell_reads_the_units_settings_as_systemd_does(tmp_path: Path) -> None:
    settings = env_example()
    assert settings, "systemd and a shell read a value differently unless it is in single quotes"
    file = tmp_path / "env"
    file.write_text(re.sub("(?m)^#(?=[A-Z_]+=)", "", ENV_EXAMPLE))
    command = ["sh", "-c", 'set -a; . "$0"; exec env -0', str(file)]
    read = subprocess.run(command, capture_output=True, text=True, check=True, env={"PATH": os.environ["PATH"]}).stdout
    assert settings.items() <= dict(line.split("=", 1) for line in read.split("\0") if line).items()


def test_the_documented_check_reads_the_settings_as_the_unit_does() -> None:
    (command,) = re.findall(r"(?m)^    sudo systemd-run (?:.*\\\n)*.*--check-config$", DEPLOYMENT)
    argv = shlex.split(command)
    properties = [argv[at + 1] for at, argument in enumerate(argv) if argument == "-p"]
    assert set(properties) <= set(UNIT.splitlines())
    names = "User|Group|Environment|EnvironmentFile|WorkingDirectory|ProtectHome|PrivateTmp"
    kept = re.findall(rf"(?m)^(?:{names})=.*$", UNIT)
    assert set(kept) == set(properties)
    assert "set -a" not in DEPLOYMENT


def test_the_documented_rotation_is_of_the_units_access_log() -> None:
    (path, stanza) = re.findall(r"(?ms)^    (/\S+) \{\n(.*?)^    \}$", DEPLOYMENT)[0]
    assert path == str(load_config(env_example() | {"DATA_DIR": "/var/lib/llama-gateway"}).log.access_file)
    assert "systemctl try-reload-or-restart llama-gateway" in stanza
    assert "ExecReload=/bin/kill -HUP $MAINPID" in UNIT


# Prometheus and Grafana


def promtool() -> str:
    """The promtool on the PATH, or the one that tests/e2e/get_prometheus.sh has downloaded."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    found = shutil.which("promtool") or shutil.which(
        "promtool", path=str(cache / "llama-gguf-inference/prometheus/usr/bin")
    )
    if found is None:
        pytest.skip("promtool is not installed")
    return found


@pytest.mark.parametrize(
    "command",
    [
        ("check", "rules", "alerts.yml"),
        ("check", "config", "--syntax-only", "prometheus.yml"),
        ("test", "rules", "alerts_test.yml"),
    ],
)
def test_promtool_accepts_the_files(command: tuple[str, ...]) -> None:
    done = subprocess.run(
        [promtool(), *command],
        cwd=DEPLOY / "prometheus",
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stdout + done.stderr


def expressions() -> list[str]:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel.get("targets", [])]


def test_prometheus_accepts_every_panel(tmp_path: Path) -> None:
    ready = [text.replace("$__rate_interval", "1m").replace("$__range", "6h") for text in expressions()]
    rules = [{"record": f"panel:{number}", "expr": text} for number, text in enumerate(ready)]
    (tmp_path / "rules.json").write_text(json.dumps({"groups": [{"name": "panels", "rules": rules}]}))
    argv = [promtool(), "check", "rules", str(tmp_path / "rules.json")]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def families() -> list[Family]:
    return generate.metric_families()


@pytest.fixture(scope="module")
def series(families: list[Family]) -> set[str]:
    """The names that a gateway registers, an operator's included, as Prometheus stores them."""
    tails = {"histogram": ("_bucket", "_sum", "_count")}
    return {family.name + tail for family in families for tail in tails.get(family.kind, ("",))}


def test_every_alert_has_its_runbook() -> None:
    alerts = (DEPLOY / "prometheus" / "alerts.yml").read_text()
    names = re.findall(r"- alert: (\w+)", alerts)
    assert re.findall(r"runbook_url: \S+/TROUBLESHOOTING\.html#(\w+)$", alerts, re.MULTILINE) == [
        name.lower() for name in names
    ]


def test_alertmanager_knows_the_alerts_and_has_the_receivers_that_it_names() -> None:
    text = (DEPLOY / "prometheus" / "alertmanager.yml").read_text()
    names = set(re.findall(r"- alert: (\w+)", (DEPLOY / "prometheus" / "alerts.yml").read_text()))
    matched = {name for names in re.findall(r'alertname!?=~?"([\w|]+)"', text) for name in names.split("|")}
    assert matched <= names
    assert set(re.findall(r"receiver: (\w+)", text)) == set(re.findall(r"- name: (\w+)", text))


@pytest.mark.parametrize(
    "path",
    [DASHBOARD, *sorted((DEPLOY / "prometheus").glob("*.yml")), KUBERNETES / "scaledobject.yaml", *DOCS],
    ids=lambda path: path.name,
)
def test_every_metric_that_is_named_exists(path: Path, series: set[str]) -> None:
    named = set(re.findall(r"\bgateway_[a-z_]+", path.read_text()))
    whole = {name for name in named if not name.endswith("_")}
    histograms = {name.removesuffix("_count") for name in series if name.endswith("_count")}
    unknown = ", ".join(sorted(whole - series - histograms))
    name = path.relative_to(ROOT)
    assert not unknown, (
        f"{name} names {unknown}: register it in scripts/accounting/request_metrics.py, or correct the name"
    )


def test_every_metric_is_on_the_dashboard_or_only_a_sum(series: set[str]) -> None:
    shown = set(re.findall(r"\bgateway_[a-z_]+", " ".join(expressions())))
    unseen = {name for name in series - shown if not name.endswith(("_sum", "_count"))}
    assert not unseen, f"no panel of deploy/grafana/dashboard.json shows {', '.join(sorted(unseen))}: add it to one"


def test_the_dashboards_panels_are_distinct_and_do_not_overlap() -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        covered = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert at["x"] + at["w"] <= 24
        assert not covered & cells, panel["title"]
        cells |= covered


def test_every_alert_has_a_case() -> None:
    alerts = re.findall(r"- alert: (\w+)", (DEPLOY / "prometheus" / "alerts.yml").read_text())
    cases = re.findall(r"alertname: (\w+)", (DEPLOY / "prometheus" / "alerts_test.yml").read_text())
    assert set(alerts) == set(cases)


# Docs

# Names in capitals that are not settings: other programs' variables and build arguments.
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
    "SHA256SUMS",
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


@pytest.mark.skipif(not shutil.which("git"), reason="git is not installed")
def test_a_clone_on_windows_has_the_line_ends_that_bash_and_the_image_need(tmp_path: Path) -> None:
    origin = tmp_path / "origin"
    origin.mkdir()
    files = {"start.sh": b"#!/bin/sh\nexit 0\n", "x.png": b"\x89PNG\r\n", "page.md": b"a\nb\n"}
    for name, content in files.items():
        (origin / name).write_bytes(content)
    shutil.copy(ROOT / ".gitattributes", origin)

    def git(*arguments: str) -> None:
        who = ("-c", "user.name=x", "-c", "user.email=x@x")
        subprocess.run(["git", *who, *arguments], cwd=origin, check=True, capture_output=True)

    git("init")
    git("add", ".")
    git("commit", "-m", "x")
    git("-c", "core.autocrlf=true", "clone", str(origin), str(tmp_path / "clone"))
    assert {name: (tmp_path / "clone" / name).read_bytes() for name in files} == files


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_every_file_that_is_named_exists(path: Path) -> None:
    text = path.read_text()
    named = set(re.findall(r"\b((?:deploy|scripts|docs|tests)/[\w./-]*\w)", text))
    assert {name for name in named if not (ROOT / name).exists()} == set()
    links = re.findall(r"\]\((?!https?:)([^)#]+)", text)
    assert [link for link in links if not (path.parent / link).exists()] == []


def test_the_figures_of_the_capacity_table_are_the_products() -> None:
    text = (ROOT / "docs" / "SCALING.md").read_text()
    queue = DEFAULTS.queue
    assert f"`MAX_QUEUE_SIZE` ({queue.max_size})" in text
    assert f"`MAX_CONNECTIONS` ({queue.max_connections:,})" in text
    assert f"`MAX_BUFFERED_BYTES` ({queue.max_buffered_bytes >> 20} MiB)" in text
    assert f"`maxconn` {int(re.findall('maxconn ([0-9]+)', HAPROXY)[0]):,}" in text
    assert f"{int(re.findall('tune.bufsize ([0-9]+)', HAPROXY)[0]) >> 10} KiB" in text
    stream = (ROOT / "tests" / "answers" / "chat.sse").read_bytes().split(b"\n\n")
    events = [len(event) + 2 for event in stream if b'"content":"' in event]
    assert f"{sum(events) / len(events):.0f} bytes" in text


def samples(family: Family) -> int:
    """How many samples a scrape stores. A histogram has its buckets, the one above them, the count and the sum."""
    return sum(len(value.counts) + 2 if isinstance(value, Distribution) else 1 for _, value in family.series)


def test_a_workers_series_are_no_more_than_the_capacity_table_says(families: list[Family]) -> None:
    assert sum(map(samples, families)) + 20 <= 160
