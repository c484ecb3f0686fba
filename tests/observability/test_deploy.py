"""What docker-compose-jaeger.yml starts, checked without a container engine: schemas, files, addresses, names."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import jsonschema
import pytest
import yaml

from observability import schema
from observability.write import metrics
from tests import ROOT
from tests.helpers import deploy_schemas

COMPOSE = ROOT / "docker-compose-jaeger.yml"
DEPLOY = ROOT / "observability" / "deploy"
SCHEMAS = {
    "jaeger.yaml": deploy_schemas.JAEGER,
    "prometheus.yml": deploy_schemas.PROMETHEUS,
    "grafana/datasources.yaml": deploy_schemas.DATASOURCES,
    "grafana/dashboards.yaml": deploy_schemas.DASHBOARD_PROVIDERS,
    "grafana/training.json": deploy_schemas.DASHBOARD,
}


def load(name: str) -> Any:
    return yaml.safe_load((DEPLOY / name).read_text(encoding="utf-8"))  # JSON is YAML


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    services: dict[str, Any] = yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))["services"]
    return services


def mounts(service: dict[str, Any]) -> dict[str, str]:
    """Files of this repository that a service mounts, by their path in the container."""
    parts = [volume.split(":") for volume in service["volumes"]]
    assert all(part[2] == "ro" for part in parts if part[0].startswith("."))
    return {part[1]: part[0] for part in parts if part[0].startswith(".")}


def ports(service: dict[str, Any]) -> set[int]:
    """Ports of the container that are published under the same number."""
    pairs = [port.rsplit(":", 2)[1:] for port in service["ports"]]
    assert all(outside == inside for outside, inside in pairs)
    return {int(inside) for _, inside in pairs}


def test_the_compose_file_follows_the_compose_specification() -> None:
    """By the specification's own JSON schema, which check-jsonschema brings along."""
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(COMPOSE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_mounted_configuration_follows_its_schema(name: str) -> None:
    validator = jsonschema.Draft202012Validator
    validator.check_schema(SCHEMAS[name])
    assert [error.message for error in validator(SCHEMAS[name]).iter_errors(load(name))] == []


def test_every_mounted_file_exists_and_every_file_is_mounted_and_has_a_schema(services: dict[str, Any]) -> None:
    mounted = {(ROOT / file).resolve() for service in services.values() for file in mounts(service).values()}
    assert mounted == {path for path in DEPLOY.rglob("*") if path.is_file()}
    assert mounted == {DEPLOY / name for name in SCHEMAS}


def test_images_are_pinned_to_releases(services: dict[str, Any]) -> None:
    for service in services.values():
        assert re.fullmatch(r"[\w/-]+:v?\d+\.\d+\.\d+", service["image"]), service["image"]
    assert services["jaeger"]["image"].startswith("jaegertracing/jaeger:2.")


def test_jaeger_alone_starts_without_the_profile(services: dict[str, Any]) -> None:
    assert {name: service.get("profiles") for name, service in services.items()} == {
        "jaeger": None,
        "prometheus": ["metrics"],
        "grafana": ["metrics"],
    }


def test_jaeger_listens_where_its_ports_are_published(services: dict[str, Any]) -> None:
    config = load("jaeger.yaml")
    protocols = config["receivers"]["otlp"]["protocols"]
    assert (protocols["grpc"]["endpoint"], protocols["http"]["endpoint"]) == ("0.0.0.0:4317", "0.0.0.0:4318")
    assert ports(services["jaeger"]) == {4317, 4318, 16686}
    assert services["jaeger"]["command"][1] in mounts(services["jaeger"])


def test_jaegers_pipelines_use_what_is_declared_and_all_of_it() -> None:
    config = load("jaeger.yaml")
    service = config["service"]
    assert set(service["extensions"]) == set(config["extensions"])
    for kind in ("receivers", "processors", "exporters"):
        assert {name for pipeline in service["pipelines"].values() for name in pipeline[kind]} == set(config[kind])
    backends = set(config["extensions"]["jaeger_storage"]["backends"])
    assert config["exporters"]["jaeger_storage_exporter"]["trace_storage"] in backends
    assert config["extensions"]["jaeger_query"]["storage"]["traces"] in backends


def test_prometheus_fetches_from_jaeger_and_grafana_asks_both(services: dict[str, Any]) -> None:
    exporter_port = load("jaeger.yaml")["exporters"]["prometheus"]["endpoint"].split(":")[1]
    scrape = load("prometheus.yml")["scrape_configs"][0]
    assert scrape["static_configs"][0]["targets"] == [f"jaeger:{exporter_port}"]
    assert scrape["honor_labels"]  # or the run's id would be under exported_instance
    for source in load("grafana/datasources.yaml")["datasources"]:
        address = urlsplit(source["url"])
        assert address.port in ports(services[str(address.hostname)])


def test_the_dashboard_is_where_grafana_looks_for_it(services: dict[str, Any]) -> None:
    folder = load("grafana/dashboards.yaml")["providers"][0]["options"]["path"]
    home = services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert str(Path(home).parent) == folder
    assert mounts(services["grafana"])[home].endswith("training.json")
    sources = {source["uid"] for source in load("grafana/datasources.yaml")["datasources"]}
    dashboard = load("grafana/training.json")
    for part in [*dashboard["panels"], *dashboard["templating"]["list"]]:
        assert part["datasource"]["uid"] in sources


UNITS = {"s": "seconds", "By": "bytes"}
PER_UNITS = {"s": "second"}


def prometheus_names(metric: metrics.Metric) -> set[str]:
    """The series of a metric in Prometheus.

    The rules are those of the OpenTelemetry specification, Prometheus and OpenMetrics compatibility: dots become
    underscores, the unit is spelt out and appended, annotations in braces are left out, counters end in _total.
    """
    unit, _, per = metric.unit.partition("/")
    words = [metric.name.replace(".", "_")]
    words += [UNITS[unit]] if not unit.startswith("{") else []
    words += ["per", PER_UNITS[per]] if per else []
    words += ["total"] if metric.kind == "counter" else []
    name = "_".join(words)
    return {f"{name}_{part}" for part in ("bucket", "sum", "count")} if metric.kind == "histogram" else {name}


def test_metric_names_are_translated_as_documented() -> None:
    assert prometheus_names(metrics.GPU_MEMORY) == {"entrenar_gpu_memory_bytes"}
    assert prometheus_names(metrics.THROUGHPUT) == {"entrenar_step_throughput_per_second"}
    assert prometheus_names(metrics.ANOMALIES) == {"entrenar_anomalies_total"}
    assert "entrenar_step_duration_seconds_bucket" in prometheus_names(metrics.STEP_DURATION)


def test_the_dashboard_shows_metrics_that_are_exported_and_all_that_are_promised() -> None:
    text = json.dumps(load("grafana/training.json"))
    asked = set(re.findall(r"\bentrenar_\w+", text))
    exported = set().union(*map(prometheus_names, metrics.METRICS))
    labels = {name.replace(".", "_") for name, row in schema.ATTRIBUTES.items() if "resource" in row.on}
    assert asked <= exported | labels
    assert load("jaeger.yaml")["exporters"]["prometheus"]["resource_to_telemetry_conversion"]["enabled"]
    for metric in metrics.METRICS:
        assert prometheus_names(metric) & asked, f"{metric.name} is on no panel"


def test_panels_neither_overlap_nor_share_an_id() -> None:
    panels = load("grafana/training.json")["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken
        taken |= cells
