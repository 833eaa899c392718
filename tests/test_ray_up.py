"""``ray up clusters/aws.yaml`` on a simulated EC2: Ray's own launcher, to its end; what it would do on the machines is only noted."""

import copy
import shlex

import boto3
import pytest
from cfnlint.api import lint_all
from cluster_files import CLUSTERS, RAY_UP, launched, node_types, workers
from ray.autoscaler._private import commands
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.util import prepare_config
from ray.autoscaler.tags import TAG_RAY_USER_NODE_TYPE
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig

CONFIG = RAY_UP["aws"]
REGION = {"region_name": CONFIG["provider"]["region"]}


class Machines:
    """Where commands end: what Ray would run by ssh and rsync, in its order, and the answers that it needs to go on."""

    def __init__(self):
        self.said = []

    def check_output(self, command, **_):
        self.said.append(command[-1] if command[0] == "ssh" else shlex.join(command))
        answers = {".State.Running": f"{any('docker run' in line for line in self.said)}", ".Config.Env": '["HOME=/home/ray"]'}
        answers |= {"printenv HOME": "/home/ray", ".Config.Image": "", ".Mounts": "[]", "/proc/meminfo": "MemAvailable: 15000000 kB"}
        return next((answer for asked, answer in answers.items() if asked in self.said[-1]), "").encode()

    def check_call(self, command, **_):
        self.check_output(command)

    call = check_call

    def at(self, *words):
        """Place of the only command that has these words."""
        (place,) = [place for place, line in enumerate(self.said) if all(word in line for word in words)]
        return place


@pytest.fixture(scope="module")
def ready(bucket, tmp_path_factory):
    """The file as Ray completes it: key pair, security group, subnets, what the machines have; with the roles of the template."""
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("home")  # the key of the machines is written there
        patch.setenv("HOME", str(home))
        patch.chdir(CLUSTERS.parent)
        (home / ".ray").mkdir()
        (home / ".ray" / "auth_token").write_text("token")
        boto3.client("cloudformation", **REGION).create_stack(
            StackName="offmanifold",
            TemplateBody=(CLUSTERS / "aws_roles.yaml").read_text(),
            Parameters=[{"ParameterKey": "Bucket", "ParameterValue": "results-of-the-stack"}],
            Capabilities=["CAPABILITY_NAMED_IAM"],
        )
        completed = AWSNodeProvider.bootstrap_config(prepare_config(copy.deepcopy(CONFIG)))
        yield AWSNodeProvider.fillout_available_node_types_resources(completed)


@pytest.fixture(scope="module")
def provider(ready):
    return AWSNodeProvider(ready["provider"], ready["cluster_name"])


def test_the_template_of_the_roles_is_one_that_cloudformation_takes():
    matches = lint_all((CLUSTERS / "aws_roles.yaml").read_text())
    assert [match for match in matches if not match.rule.id.startswith("I")] == []


def test_the_template_makes_the_bucket(ready):
    assert boto3.client("s3", **REGION).head_bucket(Bucket="results-of-the-stack")


def test_what_ec2_says_of_the_machines_leaves_their_order(ready):
    types = workers(node_types({name: part for name, part in ready.items() if name != "head_node"}))
    assert {"memory", "accelerator_type:L4"} <= set(types["gpu_spot_l4"].resources)
    assert launched(types, [{"CPU": 1, "GPU": 1}]) == {"gpu_spot_l4": 1}
    assert launched(types, [{"CPU": 1}]) == {"cpu_spot_m6i": 1}


def test_every_machine_is_started_as_it_was_asked_for(ready, provider):
    for name, node_type in workers(ready["available_node_types"]).items():
        provider.create_node(copy.deepcopy(node_type["node_config"]), {TAG_RAY_USER_NODE_TYPE: name}, 1)
    found = boto3.client("ec2", **REGION).describe_instances()["Reservations"]
    started = [({tag["Key"]: tag["Value"] for tag in machine["Tags"]}, machine) for group in found for machine in group["Instances"]]
    machines = {tags[TAG_RAY_USER_NODE_TYPE]: machine for tags, machine in started}
    assert set(workers(CONFIG["available_node_types"])) <= set(machines)
    for name, node_type in workers(CONFIG["available_node_types"]).items():
        assert machines[name]["InstanceType"] == node_type["node_config"]["InstanceType"]
        assert (machines[name].get("InstanceLifecycle") == "spot") == (node_type["labels"]["ray.io/market-type"] == "spot")
        assert machines[name]["IamInstanceProfile"]["Arn"].endswith(":instance-profile/offmanifold-worker")


def test_the_head_gets_the_package_the_token_and_the_settings_and_starts_ray(ready, provider):
    machines = Machines()
    commands.get_or_create_head_node(
        copy.deepcopy(ready), "clusters/aws.yaml", False, False, True, None, _provider=provider, _runner=machines
    )
    container = machines.at("docker run", "rayproject/ray:2.60.0-py311-cpu", *CONFIG["docker"]["run_options"])
    for source in ("platform/", "jobs/", "pyproject.toml", "constraints.txt", "README.md", ".ray/auth_token"):
        assert machines.at("rsync", f"/home/ray/{'' if source.startswith('.ray') else 'uploaded/'}{source}", "ubuntu@") < container
    last = machines.at("cd /home/ray/offmanifold && ray start --head", "RAY_enable_autoscaler_v2=1", '{"CPU":0,"GPU":0}')
    assert (
        container
        < machines.at("cp -r /home/ray/uploaded /home/ray/offmanifold")
        < machines.at("FILL?IN")
        < machines.at("pip install")
        < last
    )
    assert last == len(machines.said) - 1


@pytest.mark.parametrize(("name", "image", "installs"), [("gpu_spot_t4", "gpu", "'.[gpu]'"), ("cpu_on_demand", "cpu", "whl/cpu .")])
def test_a_worker_gets_what_its_kind_needs(ready, name, image, installs):
    """As Ray's autoscaler reads it, on the head."""
    config = AutoscalingConfig({name: part for name, part in copy.deepcopy(ready).items() if name != "head_node"}, skip_content_hash=True)
    docker = config.get_docker_config(name)
    assert docker["image"] == f"rayproject/ray:2.60.0-py311-{image}"
    assert docker["run_options"] == CONFIG["docker"]["run_options"]
    copied, *others = config.get_worker_setup_commands(name)  # Ray completes the file twice: what is common is done twice
    assert copied == CONFIG["setup_commands"][0]
    assert [command for command in others if "pip install" in command][-1].endswith(installs)
