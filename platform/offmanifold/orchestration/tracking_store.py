"""Where MLflow's store is, and whether it answers at all."""

import contextlib
import re
import sqlite3
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path

from offmanifold.orchestration.errors import JobError
from offmanifold.orchestration.storage import Storage


def default_uri(storage: Storage) -> str:
    """``mlflow.db`` in the storage folder; a bucket can hold no database."""
    if storage.is_bucket:
        raise JobError(
            f"--storage {storage.root} is a bucket, which can hold no MLflow store: name one with --tracking-uri (a server's address)"
        )
    return f"sqlite:///{storage.where('mlflow.db')}"


def without_password(uri: str) -> str:
    """The address as it may be shown: ``postgresql://...@host/mlflow``."""
    return re.sub(r"//[^/@]*@", "//...@", uri)


def check_store(uri: str) -> None:
    """``JobError`` or ``sqlite3.Error`` where no store answers there: MLflow would try for minutes."""
    if ":" not in uri and uri != "databricks":
        raise JobError(f"{uri} is no address of MLflow: name a server (http://HOST:5000) or a file (sqlite:////FOLDER/mlflow.db)")
    if uri.startswith(("http://", "https://")):
        if uri != without_password(uri):
            raise JobError(
                f"MLflow's address {without_password(uri)} must not hold a password: set MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD"
            )
        _reach(uri)
    elif path := database(uri):
        _open_sqlite(path)


def database(uri: str) -> Path | None:
    """The file of an sqlite store, if it is one and named by its path."""
    path = uri.removeprefix("sqlite:///").partition("?")[0]
    return Path(path) if uri.startswith("sqlite:///") and not path.startswith("file:") else None


def _open_sqlite(path: Path) -> None:
    """One that cannot be opened, MLflow would try to open for a minute and a half."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version").fetchone()


def _reach(uri: str) -> None:
    """One that does not answer, MLflow's own client would ask for minutes."""
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=10):
            return
    except urllib.error.HTTPError:
        return  # it answers; what it lets us do, the client will find out
    except (OSError, HTTPException) as error:
        raise JobError(f"no MLflow server answers at {uri} ({error}); start one, or name another with --tracking-uri") from error
