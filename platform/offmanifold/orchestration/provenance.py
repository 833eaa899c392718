"""What a result was made with."""

import platform
import subprocess
from functools import cache
from importlib.metadata import version
from pathlib import Path


@cache
def versions() -> dict[str, str]:
    """Libraries, Python and the machine, by name."""
    names = ("offmanifold", "ray", "torch", "torchvision", "timm", "numpy", "pillow", "jax", "jaxlib", "numpyro")
    libraries = {f"version.{name}": version(name) for name in names}
    return {**libraries, "version.python": platform.python_version(), "machine": platform.platform()}


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
