"""A cluster that grows from nothing, by Ray's own autoscaler (version 2), and shrinks again."""

import json

import pytest

pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="module")
def said(aside):
    return json.loads(aside["autoscaled"].said().splitlines()[-1])


def test_the_job_brings_machines_with_gpus_which_share_its_trials_and_go_when_it_has_ended(said):
    assert said["code"] == 0, said["job"]
    assert said["before"] == said["after"] == 1  # the head
    assert said["most"] == 2
    assert said["made_on"] == {"gpu-worker": 8}
    assert said["nodes"] == 2
    assert "no machine has 1 CPU, 0.5 GPU for a trial yet; the autoscaler can start gpu-worker" in said["job"]


def test_what_no_type_of_machine_has_is_refused_with_the_types(said):
    types = "the autoscaler can start cpu-worker (1 CPU), gpu-worker (1 CPU, 2 GPU)"
    assert said["refused_3"].startswith("a trial asks for 3 x (1.33333 CPU, 1 GPU), and the machines have not: there is ")
    assert said["refused_5"].startswith("a trial asks for 5 x (0.2 CPU, 1 GPU), and the machines have not: there is ")
    assert types in said["refused_3"]
    assert types in said["refused_5"]


def test_where_the_types_are_not_on_the_head_the_autoscaler_is_asked(said):
    assert said["can_start"] == [False, False, True]


def test_room_is_that_of_the_machines_that_are_there_and_of_those_that_may_come(said):
    assert said["room"] == 2  # two machines of the type, a CPU each
