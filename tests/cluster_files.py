"""What is wrong with a cluster file: by Ray's own checks, and where Ray does not look, by the interfaces that providers publish.

Every function gives the faults as ``where: what``; none of them asks a cloud.
"""

import copy
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import botocore.session
import googleapiclient
import jsonschema
import kubernetes_validate
import ray.autoscaler
import yaml
from botocore.model import Shape
from cluster_models import Aws, Document, Gcp, RayClusterSpec, RayJobSpec
from pydantic import BaseModel, ValidationError
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig, NodeTypeConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil

CLUSTERS = Path(__file__).parents[1] / "clusters"
RAY_UP: dict[str, Document] = {path.stem: yaml.safe_load(path.read_text()) for path in (CLUSTERS / "aws.yaml", CLUSTERS / "gcp.yaml")}
KUBERNETES: dict[str, list[Document]] = {
    path.stem: list(yaml.safe_load_all(path.read_text())) for path in sorted((CLUSTERS / "kuberay").glob("*.yaml"))
}


def ray_up_faults(config: Document) -> list[str]:
    """Of a file for ``ray up``."""
    schema = json.loads(Path(ray.autoscaler.__file__).with_name("ray-schema.json").read_text())
    faults = list(_schema_faults(schema, config, "file"))
    try:
        node_types(config)
    except (ValueError, RuntimeError, AssertionError, jsonschema.ValidationError) as error:
        faults.append(f"Ray: {str(error) or 'min_workers above max_workers, or below 0'}")
    provider = config.get("provider", {})
    model, schema_of_a_machine = (Gcp, compute_schema()) if provider.get("type") == "gcp" else (Aws, ec2_schema())
    faults += _model_faults(model, provider, "provider")
    for name, node_type in config.get("available_node_types", {}).items():
        faults += _schema_faults(schema_of_a_machine, node_type.get("node_config", {}), f"{name}.node_config")
    return faults


def kubernetes_faults(documents: Sequence[Document]) -> list[str]:
    """Of a file for ``kubectl apply``: KubeRay's kinds, and those of Kubernetes."""
    return [fault for document in documents for fault in _document_faults(document)]


def node_types(config: Document) -> dict[str, NodeTypeConfig]:
    """Of a file for ``ray up``, as Ray's autoscaler understands them; its own checks raise."""
    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    return AutoscalingConfig(prepared, skip_content_hash=True).get_node_type_configs()


def group_types(spec: Document) -> dict[str, NodeTypeConfig]:
    """Of a RayCluster's ``spec``, as Ray's autoscaler understands them."""
    derived = _derive_autoscaling_config_from_ray_cr({"metadata": {"name": "cluster", "namespace": "default"}, "spec": spec})
    return AutoscalingConfig(derived, skip_content_hash=True).get_node_type_configs()


def workers(types: Mapping[str, NodeTypeConfig]) -> dict[str, NodeTypeConfig]:
    """Without the head."""
    return {name: node_type for name, node_type in types.items() if not name.startswith("head")}


def launched(types: Mapping[str, NodeTypeConfig], wanted: Sequence[Mapping[str, float]], refused: Sequence[str] = ()) -> Counter[str]:
    """Machines that Ray's autoscaler would start for these requests, of an empty cluster; some types were refused by the cloud just now."""
    requests = ResourceRequestUtil.group_by_count([ResourceRequestUtil.make(dict(resources)) for resources in wanted])
    unavailable = dict.fromkeys(refused, 0.0)
    request = SchedulingRequest(
        disable_launch_config_check=True,
        node_type_configs=dict(types),
        resource_requests=requests,
        cloud_resource_availabilities=unavailable,
        recoverable_resource_availabilities=unavailable,
    )
    return Counter({launch.instance_type: launch.count for launch in ResourceDemandScheduler().schedule(request).to_launch})


@cache
def ec2_schema() -> Document:
    """Of a machine's ``node_config`` on AWS: EC2's RunInstances, from botocore's service model; botocore itself checks no enumerations."""
    model = botocore.session.get_session().get_service_model("ec2")
    return _schema_of(model.operation_model("RunInstances").input_shape)


@cache
def compute_schema() -> Document:
    """Of one on GCP: Compute Engine's Instance, from the discovery document that Google's client brings."""
    document = Path(googleapiclient.__file__).with_name("discovery_cache") / "documents" / "compute.v1.json"
    schemas = json.loads(document.read_text())["schemas"]
    return {"$ref": "#/$defs/Instance", "$defs": {name: _closed(schema) for name, schema in schemas.items()}}


def _document_faults(document: Document) -> Iterator[str]:
    kind = document["kind"]
    if kind == "RayJob":
        yield from _model_faults(RayJobSpec, document["spec"], kind)
        spec = document["spec"].get("rayClusterSpec", {})
    elif kind == "RayCluster":
        yield from _model_faults(RayClusterSpec, document["spec"], kind)
        spec = document["spec"]
    else:
        yield from _kubernetes_faults(document)
        return
    if document["apiVersion"] != "ray.io/v1":
        yield f"{kind}.apiVersion: {document['apiVersion']} is not ray.io/v1"
    yield from _kubernetes_faults({"apiVersion": "v1", "kind": "ConfigMap", "metadata": document["metadata"]})
    options = spec.get("autoscalerOptions", {})
    container = {name: options[name] for name in ("env", "envFrom", "resources", "securityContext", "volumeMounts") if name in options}
    yield from _kubernetes_faults(_pod({"containers": [{"name": "autoscaler", **container}]}))
    for group in [spec.get("headGroupSpec", {}), *spec.get("workerGroupSpecs", [])]:
        if unknown := set(group.get("template", {})) - {"metadata", "spec"}:
            yield f"{group.get('groupName', 'head')}.template: {sorted(unknown)} unknown"
        yield from _kubernetes_faults(_pod(group.get("template", {}).get("spec", {})))
    try:
        group_types(spec)
    except Exception as error:  # Ray reads the file with few checks of its own: whatever it stumbles over
        yield f"Ray: {error!r}"


def _pod(spec: Document) -> Document:
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": spec}


def _kubernetes_faults(document: Document) -> Iterator[str]:
    """By Kubernetes' published schemas, unknown fields included."""
    try:
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)
    except kubernetes_validate.ValidationError as error:
        yield f"{document['kind']}.{'.'.join(map(str, error.path))}: {error.message}"


def _model_faults(model: type[BaseModel], value: Mapping[str, Any], where: str) -> list[str]:
    try:
        model.model_validate(value)
        return []
    except ValidationError as error:
        return [f"{where}.{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()]


def _schema_faults(schema: Document, value: Any, where: str) -> Iterator[str]:
    for error in jsonschema.Draft202012Validator(schema).iter_errors(value):
        yield f"{where}.{'.'.join(map(str, error.absolute_path))}: {error.message}"


def _schema_of(shape: Shape) -> Document:
    """JSON schema of what a request of AWS may hold."""
    if shape.type_name == "structure":
        members = {name: _schema_of(member) for name, member in shape.members.items()}
        return {"type": "object", "properties": members, "additionalProperties": False}
    if shape.type_name == "list":
        return {"type": "array", "items": _schema_of(shape.member)}
    if shape.type_name == "string" and shape.enum:
        return {"enum": shape.enum}
    return {"type": "string" if shape.type_name == "timestamp" else shape.type_name}


def _closed(schema: Document) -> Document:
    """A discovery document's schema, whose objects know all their fields."""
    if "$ref" in schema:
        return {"$ref": f"#/$defs/{schema['$ref']}"}
    closed = {name: schema[name] for name in ("type", "enum") if schema.get(name) not in (None, "any")}
    if "items" in schema:
        closed["items"] = _closed(schema["items"])
    if "properties" in schema:
        closed["properties"] = {name: _closed(part) for name, part in schema["properties"].items()}
        closed["additionalProperties"] = False
    elif "additionalProperties" in schema:
        closed["additionalProperties"] = _closed(schema["additionalProperties"])
    return closed
