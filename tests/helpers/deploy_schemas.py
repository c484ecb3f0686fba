"""JSON schemas of the configurations that docker-compose-jaeger.yml mounts, for the parts of each format we use.

Written from the projects' documentation, as none of them ships a schema of its whole file. They are strict: a key that
is not here is an error, so that a misspelt or new key has to be looked up before it can be used.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]


def closed(required: Schema, optional: Schema | None = None) -> Schema:
    """An object with these keys and no others."""
    return {
        "type": "object",
        "properties": required | (optional or {}),
        "required": list(required),
        "additionalProperties": False,
    }


def many(of: Schema) -> Schema:
    return {"type": "array", "items": of, "minItems": 1}


TEXT: Schema = {"type": "string", "minLength": 1}
INTEGER: Schema = {"type": "integer", "minimum": 0}
FLAG: Schema = {"type": "boolean"}
DURATION: Schema = {"type": "string", "pattern": r"^\d+(ms|s|m|h|d)$"}
ADDRESS: Schema = {"type": "string", "pattern": r"^[\w.-]+:\d+$"}
URL: Schema = {"type": "string", "pattern": r"^http://[\w.-]+:\d+$"}

# www.jaegertracing.io/docs/latest/deployment/configuration, and the collector's configuration that it builds on.
_PIPELINE = closed(
    {
        "receivers": many({"enum": ["otlp"]}),
        "processors": many({"enum": ["batch"]}),
        "exporters": many({"enum": ["jaeger_storage_exporter", "prometheus"]}),
    }
)
JAEGER = closed(
    {
        "service": closed(
            {
                "extensions": many({"enum": ["jaeger_storage", "jaeger_query"]}),
                "pipelines": closed({"traces": _PIPELINE, "metrics": _PIPELINE}),
            }
        ),
        "extensions": closed(
            {
                "jaeger_storage": closed(
                    {
                        "backends": {
                            "type": "object",
                            "additionalProperties": closed({"memory": closed({"max_traces": INTEGER})}),
                        }
                    }
                ),
                "jaeger_query": closed({"storage": closed({"traces": TEXT})}),
            }
        ),
        "receivers": closed(
            {
                "otlp": closed(
                    {
                        "protocols": closed(
                            {"grpc": closed({"endpoint": ADDRESS}), "http": closed({"endpoint": ADDRESS})}
                        )
                    }
                )
            }
        ),
        "processors": closed({"batch": {"type": "null"}}),
        "exporters": closed(
            {
                "jaeger_storage_exporter": closed({"trace_storage": TEXT}),
                # .../opentelemetry-collector-contrib/blob/main/exporter/prometheusexporter/README.md
                "prometheus": closed(
                    {"endpoint": ADDRESS}, {"resource_to_telemetry_conversion": closed({"enabled": FLAG})}
                ),
            }
        ),
    }
)

# prometheus.io/docs/prometheus/latest/configuration/configuration
PROMETHEUS = closed(
    {
        "global": closed({"scrape_interval": DURATION}),
        "scrape_configs": many(
            closed(
                {"job_name": TEXT, "static_configs": many(closed({"targets": many(ADDRESS)}))},
                {"honor_labels": FLAG},
            )
        ),
    }
)

# grafana.com/docs/grafana/latest/administration/provisioning
DATASOURCES = closed(
    {
        "apiVersion": {"const": 1},
        "datasources": many(
            closed(
                {
                    "name": TEXT,
                    "uid": TEXT,
                    "type": {"enum": ["prometheus", "jaeger"]},
                    "access": {"const": "proxy"},
                    "url": URL,
                },
                {"isDefault": FLAG, "jsonData": closed({"timeInterval": DURATION})},
            )
        ),
    }
)
DASHBOARD_PROVIDERS = closed(
    {
        "apiVersion": {"const": 1},
        "providers": many(closed({"name": TEXT, "type": {"const": "file"}, "options": closed({"path": TEXT})})),
    }
)

# grafana.com/docs/grafana/latest/dashboards/build-dashboards/view-dashboard-json-model: the classic model
_SOURCE = closed({"type": {"const": "prometheus"}, "uid": TEXT})
_PANEL = closed(
    {
        "id": INTEGER,
        "type": {"enum": ["timeseries", "stat"]},
        "title": TEXT,
        "datasource": _SOURCE,
        "gridPos": closed({"x": {"enum": [0, 12]}, "y": INTEGER, "w": {"const": 12}, "h": INTEGER}),
        "fieldConfig": closed(
            {
                "defaults": closed(
                    {"unit": {"enum": ["none", "short", "s", "bytes"]}},
                    {"min": {"const": 0}, "decimals": INTEGER, "custom": closed({"axisLabel": TEXT})},
                ),
                "overrides": {
                    "type": "array",
                    "items": closed(
                        {
                            "matcher": closed({"id": {"const": "byFrameRefID"}, "options": TEXT}),
                            "properties": many(
                                closed({"id": {"enum": ["custom.axisPlacement", "custom.axisLabel"]}, "value": TEXT})
                            ),
                        }
                    ),
                },
            }
        ),
        "targets": many(
            closed({"refId": {"type": "string", "pattern": "^[A-Z]$"}, "expr": TEXT, "legendFormat": TEXT})
        ),
        "options": {"type": "object"},
    }
)
_VARIABLE = closed(
    {
        "name": TEXT,
        "label": TEXT,
        "type": {"const": "query"},
        "datasource": _SOURCE,
        "query": closed({"query": TEXT, "refId": TEXT}),
        "refresh": {"enum": [1, 2]},
        "includeAll": FLAG,
        "multi": FLAG,
        "current": {"type": "object"},
    }
)
DASHBOARD = closed(
    {
        "uid": {"type": "string", "minLength": 8, "maxLength": 40},
        "title": TEXT,
        "tags": {"type": "array", "items": TEXT},
        "schemaVersion": INTEGER,
        "version": INTEGER,
        "editable": FLAG,
        "refresh": DURATION,
        "time": closed({"from": TEXT, "to": TEXT}),
        "timezone": TEXT,
        "templating": closed({"list": many(_VARIABLE)}),
        "annotations": closed({"list": {"const": []}}),
        "panels": many(_PANEL),
    }
)
