"""What Ray's providers read of a cluster file, and KubeRay's published interface: all fields known, and of what type."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

Document = dict[str, Any]


class Closed(BaseModel):
    """Knows all its fields, and converts nothing: ``"1"`` is no number."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Aws(Closed):
    """What Ray's provider of AWS reads; without keys: roles give those."""

    type: Literal["aws"]
    region: str
    availability_zone: str
    cache_stopped_nodes: bool = True
    use_internal_ips: bool = False
    use_external_head_ip: bool = False
    security_group: Document | None = None
    key_pair: Document | None = None


class Gcp(Closed):
    """What Ray's provider of GCP reads, without keys."""

    type: Literal["gcp"]
    region: str
    availability_zone: str
    project_id: str | None
    cache_stopped_nodes: bool = False
    use_internal_ips: bool = False
    use_external_head_ip: bool = False


class HeadGroup(Closed):
    """KubeRay's HeadGroupSpec."""

    rayStartParams: dict[str, str]
    template: Document
    serviceType: Literal["ClusterIP", "NodePort", "LoadBalancer", "ExternalName"] | None = None
    headService: Document | None = None
    enableIngress: bool | None = None
    ingressOptions: Document | None = None
    resources: dict[str, str] | None = None
    labels: dict[str, str] | None = None


class WorkerGroup(Closed):
    """KubeRay's WorkerGroupSpec."""

    groupName: str
    rayStartParams: dict[str, str]
    template: Document
    minReplicas: int
    maxReplicas: int
    replicas: int = 0
    numOfHosts: int = 1
    idleTimeoutSeconds: int | None = None
    priority: int = 0
    resources: dict[str, str] | None = None
    labels: dict[str, str] | None = None
    suspend: bool | None = None
    scaleStrategy: Document | None = None


class AutoscalerOptions(Closed):
    """KubeRay's."""

    version: Literal["v1", "v2"] | None = None
    upscalingMode: Literal["Default", "Aggressive", "Conservative"] | None = None
    idleTimeoutSeconds: int | None = None
    image: str | None = None
    imagePullPolicy: Literal["Always", "IfNotPresent", "Never"] | None = None
    resources: Document | None = None
    securityContext: Document | None = None
    env: list[Document] | None = None
    envFrom: list[Document] | None = None
    volumeMounts: list[Document] | None = None


class AuthOptions(Closed):
    """KubeRay's."""

    mode: Literal["disabled", "token"]
    secretName: str | None = None
    enableK8sTokenAuth: bool | None = None


class RayClusterSpec(Closed):
    """KubeRay's."""

    headGroupSpec: HeadGroup
    workerGroupSpecs: list[WorkerGroup]
    rayVersion: str
    enableInTreeAutoscaling: bool | None = None
    autoscalerOptions: AutoscalerOptions | None = None
    authOptions: AuthOptions | None = None
    headServiceAnnotations: dict[str, str] | None = None
    gcsFaultToleranceOptions: Document | None = None
    historyServerOptions: Document | None = None
    networkPolicy: Document | None = None
    tlsOptions: Document | None = None
    upgradeStrategy: Document | None = None
    managedBy: Literal["ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue"] | None = None
    suspend: bool | None = None


class RayJobSpec(Closed):
    """KubeRay's."""

    entrypoint: str
    rayClusterSpec: RayClusterSpec | None = None
    clusterSelector: dict[str, str] | None = None
    submissionMode: Literal["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"] = "K8sJobMode"
    backoffLimit: int = 0
    shutdownAfterJobFinishes: bool = False
    ttlSecondsAfterFinished: int = 0
    activeDeadlineSeconds: int | None = None
    preRunningDeadlineSeconds: int | None = None
    runtimeEnvYAML: str | None = None
    jobId: str | None = None
    metadata: dict[str, str] | None = None
    entrypointNumCpus: float | None = None
    entrypointNumGpus: float | None = None
    entrypointResources: str | None = None
    submitterPodTemplate: Document | None = None
    submitterConfig: Document | None = None
    deletionStrategy: Document | None = None
    managedBy: Literal["ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue"] | None = None
    suspend: bool | None = None
