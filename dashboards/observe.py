"""Prometheus and Grafana beside a running Ray head: ``make observe``. Ctrl-C ends both.

What is on the PATH is used: prometheus, and grafana where it is; else containers (compose.yaml). They listen on the loopback alone, and
keep their data in the project's results/observe.
"""

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
SERVICES = "/tmp/ray/prom_metrics_service_discovery.json"
"""The file of Ray's that prometheus.yml names."""


class Failed(Exception):
    """Nothing can be shown; the message says why, and what to do."""


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    ray = Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray")
    parser.add_argument("--ray", type=Path, default=ray, help="the head's folder, its --temp-dir (default: $RAY_TMPDIR/ray, else /tmp/ray)")
    parser.add_argument(
        "--data", type=Path, default=HERE.parent / "results/observe", help="where both keep their data (default: results/observe)"
    )
    parser.add_argument("--prometheus-port", type=int, default=9090, help="(default: 9090)")
    parser.add_argument("--grafana-port", type=int, default=3000, help="(default: 3000)")
    return parser.parse_args()


def prepare(asked: argparse.Namespace) -> dict[str, str]:
    """Prometheus' configuration for this head, written; what Grafana's provisioning files and compose.yaml ask of the environment."""
    services = asked.ray.absolute() / Path(SERVICES).name
    if not services.is_file():
        raise Failed(f"no Ray head has written {services}: start one (ray start --head), or name its folder with --ray")
    for port in (asked.prometheus_port, asked.grafana_port):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                raise Failed(f"port {port} is taken; name others with --prometheus-port and --grafana-port") from None
    data = asked.data.absolute()
    for folder in ("prometheus", "grafana"):
        (data / folder).mkdir(parents=True, exist_ok=True)
    (data / "prometheus.yml").write_text((HERE / "prometheus.yml").read_text().replace(SERVICES, str(services)))
    return {
        "OFFMANIFOLD_RAY": str(services.parent),
        "OFFMANIFOLD_DATA_OBSERVED": str(data),
        "OFFMANIFOLD_DASHBOARDS": str(HERE / "grafana"),
        "OFFMANIFOLD_PROMETHEUS": f"http://127.0.0.1:{asked.prometheus_port}",
        "OFFMANIFOLD_PROMETHEUS_PORT": str(asked.prometheus_port),
        "OFFMANIFOLD_USER": f"{os.getuid()}:{os.getgid()}",
        "GF_SERVER_HTTP_ADDR": "127.0.0.1",
        "GF_SERVER_HTTP_PORT": str(asked.grafana_port),
        "GF_PATHS_DATA": str(data / "grafana"),
        "GF_PATHS_LOGS": str(data / "grafana"),
        "GF_PATHS_PROVISIONING": str(HERE / "grafana/provisioning"),
        "GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH": str(HERE / "grafana/experiment.json"),
        "GF_AUTH_ANONYMOUS_ENABLED": "true",  # to look, and nothing else; nobody else reaches the loopback
        "GF_AUTH_DISABLE_LOGIN_FORM": "true",
        "GF_AUTH_BASIC_ENABLED": "false",
        "GF_SECURITY_DISABLE_INITIAL_ADMIN_CREATION": "true",
        "GF_ANALYTICS_REPORTING_ENABLED": "false",
        "GF_ANALYTICS_CHECK_FOR_UPDATES": "false",
    }


def commands(data: Path, port: int) -> dict[str, list[str]]:
    """What to run, by its name."""
    if prometheus := shutil.which("prometheus"):
        listen = f"--web.listen-address=127.0.0.1:{port}"
        found = {"prometheus": [prometheus, f"--config.file={data}/prometheus.yml", f"--storage.tsdb.path={data}/prometheus", listen]}
        if grafana := shutil.which("grafana") or shutil.which("grafana-server"):
            server = ["server"] if Path(grafana).name == "grafana" else []
            package, beside = Path("/usr/share/grafana"), Path(grafana).resolve().parents[1]
            found["grafana"] = [grafana, *server, "--homepath", str(beside if (beside / "public").is_dir() else package)]
        return found
    if shutil.which("docker") and not subprocess.run(["docker", "compose", "ls"], capture_output=True).returncode:
        return {"docker": ["docker", "compose", "--file", str(HERE / "compose.yaml"), "up", "--abort-on-container-exit"]}
    raise Failed("neither prometheus is on the PATH nor does `docker compose ls` end well: install Prometheus and Grafana, or start Docker")


def observe(asked: argparse.Namespace) -> None:
    """Runs both until one ends, or Ctrl-C."""
    environment = prepare(asked)
    data = Path(environment["OFFMANIFOLD_DATA_OBSERVED"])
    running: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for name, command in commands(data, asked.prometheus_port).items():
            with (data / f"{name}.log").open("wb") as log:  # a session of its own: Ctrl-C is passed on below, once
                running[name] = subprocess.Popen(
                    command, env=os.environ | environment, cwd=data, stdout=log, stderr=log, start_new_session=True
                )
        print(f"Prometheus: {environment['OFFMANIFOLD_PROMETHEUS']}")
        if "prometheus" in running and "grafana" not in running:
            print("Grafana is not on the PATH: its dashboards are not shown")
        else:
            print(f"Grafana: http://127.0.0.1:{asked.grafana_port}")
        print(f"logs and data: {data}; Ctrl-C ends", flush=True)
        while all(process.poll() is None for process in running.values()):
            time.sleep(0.2)
        ended = next(name for name, process in running.items() if process.poll() is not None)
        raise Failed(f"{ended} ended with {running[ended].returncode}; see {data}/{ended}.log")
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()


def main() -> None:
    """Exit code 0 after Ctrl-C, 1 with the error's line."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        observe(parse())
    except KeyboardInterrupt:
        pass
    except Failed as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
