"""Cluster files are valid, and what is wrong with one is found: a fault is planted, and must be named."""

import copy
import shutil
import subprocess

import pytest
import yaml
from cluster_files import CLUSTERS, KUBERNETES, RAY_UP, kubernetes_faults, ray_up_faults


@pytest.mark.parametrize("name", RAY_UP)
def test_a_file_for_ray_up_is_valid(name):
    assert ray_up_faults(RAY_UP[name]) == []


@pytest.mark.parametrize("name", KUBERNETES)
def test_a_file_for_kubernetes_is_valid(name):
    assert kubernetes_faults(KUBERNETES[name]) == []


def planted(document, path, value):
    """A copy with another value at ``a b 0 c``; None: without it."""
    changed = copy.deepcopy(document)
    *parents, last = [int(part) if part.isdigit() else part for part in path.split()]
    at = changed
    for part in parents:
        at = at[part]
    if value is None:
        del at[last]
    else:
        at[last] = value
    return changed


TYPE = "available_node_types gpu_spot_l4"


@pytest.mark.parametrize(
    ("name", "path", "value", "said"),
    [
        ("aws", "provider regoin", "us-west-2", "provider.regoin: Extra inputs"),
        ("aws", "provider region", None, "provider.region: Field required"),
        ("aws", "provider cache_stopped_nodes", "no", "provider.cache_stopped_nodes: Input should be a valid boolean"),
        ("aws", "max_worker", 3, "'max_worker' was unexpected"),
        ("aws", f"{TYPE} prio", 3, "'prio' was unexpected"),
        ("aws", f"{TYPE} resources CPU", 0.5, "0.5 is not of type 'integer'"),
        ("aws", f"{TYPE} min_workers", 5, "Ray: min_workers above max_workers"),
        ("aws", "head_node_type", "haed", "`head_node_type` must be one of"),
        ("aws", f"{TYPE} node_config InstanceMarketOptions MarketType", "sopt", "'sopt' is not one of ['spot'"),
        ("aws", f"{TYPE} node_config MarketType", "spot", "'MarketType' was unexpected"),
        ("aws", f"{TYPE} node_config InstanceType", "g6.2xlage", "'g6.2xlage' is not one of"),
        ("aws", f"{TYPE} node_config IamInstanceProfile", "offmanifold", "'offmanifold' is not of type 'object'"),
        ("aws", f"{TYPE} node_config BlockDeviceMappings 0 Ebs VolumeSize", "150", "'150' is not of type 'integer'"),
        ("gcp", "provider projectId", "mine", "provider.projectId: Extra inputs"),
        ("gcp", "provider project_id", None, "provider.project_id: Field required"),
        ("gcp", f"{TYPE} node_config machinetype", "g2-standard-8", "'machinetype' was unexpected"),
        ("gcp", f"{TYPE} node_config scheduling provisioningModel", "SPOTT", "'SPOTT' is not one of"),
        ("gcp", f"{TYPE} node_config scheduling", [{"preemptible": True}], "is not of type 'object'"),
        ("gcp", f"{TYPE} node_config guestAccelerators 0 acceleratorCount", "1", "'1' is not of type 'integer'"),
        ("gcp", f"{TYPE} node_config disks 0 initializeParams sourceImages", "x", "'sourceImages' was unexpected"),
    ],
)
def test_a_fault_in_a_file_for_ray_up_is_found(name, path, value, said):
    assert any(said in fault for fault in ray_up_faults(planted(RAY_UP[name], path, value)))


GROUP = "0 spec workerGroupSpecs 0"


@pytest.mark.parametrize(
    ("name", "path", "value", "said"),
    [
        ("cluster", "0 spec enableIntreeAutoscaling", True, "enableIntreeAutoscaling: Extra inputs"),
        ("cluster", "0 spec rayVersion", 2.6, "rayVersion: Input should be a valid string"),
        ("cluster", "0 spec autoscalerOptions upscalingMode", "Agressive", "upscalingMode: Input should be 'Default'"),
        ("cluster", "0 spec autoscalerOptions version", "v3", "version: Input should be 'v1' or 'v2'"),
        ("cluster", "0 spec autoscalerOptions env 0 value", 900, "Pod.spec.containers.0.env.0.value: 900 is not of type"),
        ("cluster", "0 spec authOptions mode", "tokens", "mode: Input should be 'disabled' or 'token'"),
        ("cluster", "0 spec headGroupSpec rayStartParams num-cpus", 0, "num-cpus: Input should be a valid string"),
        ("cluster", "0 spec headGroupSpec serviceType", "ClusterIp", "serviceType: Input should be 'ClusterIP'"),
        ("cluster", f"{GROUP} minReplicas", "one", "minReplicas: Input should be a valid integer"),
        ("cluster", f"{GROUP} minReplicas", 9, "Ray: AssertionError"),
        ("cluster", f"{GROUP} groupname", "x", "groupname: Extra inputs"),
        ("cluster", f"{GROUP} template specs", {}, "['specs'] unknown"),
        ("cluster", f"{GROUP} template spec containers 0 imagePullPolice", "Always", "'imagePullPolice' was unexpected"),
        ("cluster", f"{GROUP} template spec containers 0 resources limits cpu", True, "Pod.spec.containers.0.resources.limits.cpu"),
        ("cluster", f"{GROUP} template spec containers 0 resources limits cpu", "seven", "Ray: "),
        ("cluster", f"{GROUP} template spec tolerations 0 effects", "x", "'effects' was unexpected"),
        ("settings", "0 datas", {}, "'datas' was unexpected"),
        ("cluster", "0 metadata lables", {}, "'lables' was unexpected"),
        ("cluster", "0 apiVersion", "ray.io/v1alpha1", "is not ray.io/v1"),
        ("ensemble_robustness", "0 spec submissionMode", "k8sJobMode", "submissionMode: Input should be 'K8sJobMode'"),
        ("ensemble_robustness", "0 spec backofflimit", 2, "backofflimit: Extra inputs"),
        ("ensemble_robustness", "0 spec ttlSecondsAfterFinished", "600", "ttlSecondsAfterFinished: Input should be a valid integer"),
        ("ensemble_robustness", "0 spec rayClusterSpec headGroupSpec", None, "rayClusterSpec.headGroupSpec: Field required"),
    ],
)
def test_a_fault_in_a_file_for_kubernetes_is_found(name, path, value, said):
    assert any(said in fault for fault in kubernetes_faults(planted(KUBERNETES[name], path, value)))


def test_kubernetes_own_reader_expands_the_files_as_yaml_does(tmp_path):
    if not shutil.which("kubectl"):
        pytest.skip("no kubectl")
    for name, documents in KUBERNETES.items():
        (tmp_path / "file.yaml").write_bytes((CLUSTERS / "kuberay" / f"{name}.yaml").read_bytes())
        (tmp_path / "kustomization.yaml").write_text("resources: [file.yaml]")
        expanded = subprocess.run(["kubectl", "kustomize", str(tmp_path)], capture_output=True, check=True).stdout
        read = list(yaml.safe_load_all(expanded))
        assert len(read) == len(documents)
        assert all(document in documents for document in read)
