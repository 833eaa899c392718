"""The dashboards, on Debian's Prometheus: after a small job every query of every panel has something to show."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from local_cluster import free_port
from observing import BOARDS, DASHBOARDS, EXPRESSIONS, OF_REAL_GPUS, PANELS, PROMETHEUS, observe

from offmanifold.orchestration.meters import COUNTERS

NOT_THERE = "no Prometheus: name its binary by the variable PROMETHEUS (apt-get download prometheus && dpkg -x ...), or put it on the PATH"

needs_prometheus = pytest.mark.skipif(not PROMETHEUS, reason=NOT_THERE)


# as they are written


def test_there_is_a_dashboard_for_the_experiment_the_chains_the_data_and_the_cluster():
    assert set(BOARDS) == {"experiment", "chains", "data", "cluster"}
    assert len({board["uid"] for board in BOARDS.values()}) == len(BOARDS)
    assert all(board["description"] and board["title"].startswith("offmanifold") for board in BOARDS.values())


@pytest.mark.parametrize("name", BOARDS)
def test_a_dashboard_leaves_its_datasource_to_whoever_looks_and_uses_the_variables_that_it_has(name):
    board = BOARDS[name]
    variables = {variable["name"]: variable for variable in board["templating"]["list"]}
    assert (variables["datasource"]["type"], variables["datasource"]["query"]) == ("datasource", "prometheus")
    sources = [part["datasource"] for part in [*board["panels"], *variables.values()] if "datasource" in part]
    sources += [target["datasource"] for panel in board["panels"] for target in panel.get("targets", [])]
    assert all(source == {"type": "prometheus", "uid": "${datasource}"} for source in sources)
    used = set(re.findall(r"\$(\w+)", json.dumps([panel.get("targets") for panel in board["panels"]])))
    assert used - {"__rate_interval"} == set(variables) - {"datasource"} - ({"stage"} if name == "data" else set())
    panels, places = board["panels"], [panel["gridPos"] for panel in board["panels"]]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken = [(grid["x"] + x, grid["y"] + y) for grid in places for x in range(grid["w"]) for y in range(grid["h"])]
    assert len(set(taken)) == len(taken)  # no panel covers another
    assert max(x for x, _ in taken) < 24


@pytest.mark.parametrize(("name", "panel"), PANELS, ids=lambda value: value["title"] if isinstance(value, dict) else value)
def test_a_panel_says_what_it_shows_in_which_unit_and_sums_over_processes(name, panel):
    assert panel["description"].endswith(".")
    assert panel["fieldConfig"]["defaults"]["unit"]
    for target in panel["targets"]:
        assert target["legendFormat"]
        assert not re.search(r"WorkerId|JobId|\bpid\b", target["expr"])
        outside = target["expr"].split("ray_")[0]
        assert re.search(r"\b(sum|max|avg)\b", outside), f"{target['expr']} has a series a process"


def test_grafana_is_given_the_scrape_interval_that_prometheus_has():
    (source,) = yaml.safe_load((DASHBOARDS / "grafana/provisioning/datasources/prometheus.yaml").read_text())["datasources"]
    interval = yaml.safe_load((DASHBOARDS / "prometheus.yml").read_text())["global"]["scrape_interval"]
    assert source["jsonData"]["timeInterval"] == interval


def test_every_metric_is_in_a_panel_and_in_the_readme():
    shown, readme = " ".join(EXPRESSIONS), (DASHBOARDS / "README.md").read_text()
    for metric in [*(f"ray_offmanifold_{name}_total" for name in COUNTERS), "ray_offmanifold_trials", "ray_offmanifold_acceptance"]:
        assert metric in shown
        assert f"`{metric}`" in readme


# as they are used


@pytest.fixture(scope="module")
def said(aside) -> dict:
    """What tests/observing.py has left."""
    aside["observing"].said()
    return json.loads((aside["observing"].root / "said.json").read_text())


@needs_prometheus
@pytest.mark.timeout(1800)
def test_after_a_small_job_every_query_of_every_panel_returns_data(said):
    assert said["code"] == 0, said["out"] + said["err"]
    assert not said["err"]
    assert set(EXPRESSIONS.values()) >= OF_REAL_GPUS
    assert not said["unanswered"], "\n".join(said["unanswered"])
    assert not said["home"]


@needs_prometheus
@pytest.mark.timeout(1800)
def test_the_metrics_add_up_to_what_the_job_did(said):
    """Counters outlive the job. 100 images, 2 networks, 2 epochs."""
    assert {series["experiment"] for series in said["counted"]} == {"observed"}
    prefix, suffix = "ray_offmanifold_", "_total"
    found = {(series["stage"], series["__name__"].removeprefix(prefix).removesuffix(suffix)): series["value"] for series in said["counted"]}
    assert found.pop(("sample", "leapfrog_steps")) >= 12
    assert found == {
        ("shards", "sharded_images"): 100,
        ("sample", "draws"): 10,
        ("sample", "divergences"): 10,
        ("train", "training_images"): 2 * 2 * 100,
        ("attack", "attacked_images"): 4 * 10,
        ("attack", "attack_steps"): 4 * 10 * 10,
        ("attack", "retries"): 1,
    }
    assert {"experiment", "stage", "state"} <= set(said["labels"])
    assert not {"trial", "run", "name", "cell"} & set(said["labels"])


@needs_prometheus
def test_promtool_finds_no_fault_in_the_configuration():
    tool = shutil.which("promtool") or str(Path(PROMETHEUS).with_name("promtool"))
    done = subprocess.run([tool, "check", "config", str(DASHBOARDS / "prometheus.yml")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_without_a_head_observe_says_so_in_one_line(tmp_path):
    process = observe("--ray", str(tmp_path), "--data", str(tmp_path / "data"))
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 1
    assert errors.startswith(f"error: no Ray head has written {tmp_path}/prom_metrics_service_discovery.json: start one")
    assert len(errors.splitlines()) == 1
    assert not (tmp_path / "data").exists()


def test_where_nothing_is_installed_observe_says_what_to_install(tmp_path):
    (tmp_path / "prom_metrics_service_discovery.json").write_text("[]")
    ports = ["--prometheus-port", str(free_port()), "--grafana-port", str(free_port())]
    process = observe("--ray", str(tmp_path), "--data", str(tmp_path / "data"), *ports, PATH="")
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 1
    assert errors.startswith("error: neither prometheus is on the PATH nor does `docker compose ls` end well")
