"""What a result was made with: libraries, commit, and that every process has the same package."""

import hashlib
import platform
import subprocess
from functools import cache
from importlib.metadata import version
from pathlib import Path

import offmanifold
from offmanifold.orchestration.errors import JobError

PACKAGE = Path(__file__).resolve().parents[1]
"""The folder of the package that this process has imported."""


class OtherPackage(JobError):
    """A process has other code than the job's driver."""


@cache
def digest() -> str:
    """Of the package that this process has imported."""
    return digest_of(PACKAGE)


def digest_of(package: Path) -> str:
    """SHA-256 of a package's modules, by name and content."""
    whole = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        content = file.read_bytes()
        whole.update(f"{file.relative_to(package).as_posix()} {len(content)}\n".encode() + content)
    return whole.hexdigest()


def check_script(script: Path) -> None:
    """``OtherPackage`` where a script comes with a package of its own, and another one is imported."""
    beside = script.resolve().parent.parent / "platform" / PACKAGE.name
    if beside.is_dir() and digest_of(beside) != digest():
        raise OtherPackage(
            f"{script} belongs to the offmanifold in {beside}, but the one in {PACKAGE} is imported, and differs; submit with "
            "--runtime-env clusters/runtime_env.yaml, set PYTHONPATH=platform, or install that folder"
        )


def check_worker(of_driver: str) -> None:
    """``OtherPackage`` where this process has another package than the driver, whose digest is given."""
    if digest() != of_driver:
        raise OtherPackage(
            f"{platform.node()} has another offmanifold than the job's driver, in {PACKAGE}, or its files were changed since the job "
            "began; give all machines the same, or submit the folder with --runtime-env clusters/runtime_env.yaml"
        )


@cache
def versions() -> dict[str, str]:
    """Libraries, this package's digest, Python and the machine, by name."""
    names = ("ray", "torch", "torchvision", "timm", "numpy", "pillow", "jax", "jaxlib", "numpyro")
    libraries = {f"version.{name}": version(name) for name in names}
    ours = {"version.offmanifold": offmanifold.__version__, "version.package": digest()[:12]}
    return {**libraries, **ours, "version.python": platform.python_version(), "machine": platform.platform()}


def git_commit() -> str:
    """The commit of the package that runs, with ``+changes`` where files differ from it; ``unknown`` where it is not in a checkout."""
    package = Path(__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=package, capture_output=True, text=True, check=True, timeout=10)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", __file__)  # installed into another project's checkout, it has no commit
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
