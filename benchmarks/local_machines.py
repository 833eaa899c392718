"""Machines on this one, for Ray's autoscaler: see ``local_cluster``."""

from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from ray._private.parameter import RayParams
from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider


class LocalMachines(FakeMultiNodeProvider):
    """Ray's own, but for a folder each: its nodes share the head's, and each clears that of the working folders of jobs when it starts."""

    def _create_node_with_resources_and_labels(self, *told: Any) -> None:
        folder = Path(self.provider_config["folder"]) / f"machine-{self._next_node_id}"
        with patch("ray._private.parameter.RayParams", partial(RayParams, temp_dir=str(folder))):
            super()._create_node_with_resources_and_labels(*told)  # type: ignore[no-untyped-call]
