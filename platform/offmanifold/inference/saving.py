"""Saves and loads any posterior: a frozen dataclass of modules, tensors, plain values and other posteriors.

Tensors are safetensors, all else is JSON: nothing that is read can run code. A new method has nothing to write for it.
"""

import copy
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

import offmanifold
from offmanifold import files, models
from offmanifold.data import DataError
from offmanifold.faults import ModelError
from offmanifold.inference import METHODS, hmc
from offmanifold.inference.ensemble import Ensemble
from offmanifold.inference.posterior import Posterior, Undivided
from offmanifold.inference.weight_samples import WeightSamples
from offmanifold.models import weights

ABOUT, TENSORS = "posterior.json", "posterior.safetensors"
FORMAT = 1
KINDS: dict[str, Any] = {
    kind.__name__: kind for kind in (Ensemble, Undivided, WeightSamples, *(method.posterior for method in METHODS.values()))
}
"""Posteriors that can be saved."""
Modules = nn.Module | Sequence[nn.Module] | None


def save(posterior: Posterior, folder: str) -> None:
    """Write the posterior into a folder, or below ``s3://bucket/prefix``: ``posterior.safetensors``, and ``posterior.json`` with its hash.

    ``ModelError`` for a posterior that is not of this package; ``OSError`` where the folder is not writable.
    """
    about, tensors = pack(posterior)
    content = save_tensors(tensors)
    entry = {"format": FORMAT, "offmanifold": offmanifold.__version__, "sha256": _hash(content, about), "posterior": about}
    files.write(f"{folder.rstrip('/')}/{TENSORS}", content)
    files.write(f"{folder.rstrip('/')}/{ABOUT}", json.dumps(entry, indent=1).encode())


def load(folder: str, module: Modules = None, device: torch.device = torch.device("cpu")) -> Posterior:
    """The posterior that ``save`` wrote, or that a run of ``sample_hmc`` left.

    Networks of ``models.MODELS`` are built again from the file. For others, ``module`` is an untrained module of the same architecture, or
    one for each member of an ensemble; copies of it are given the weights. ``DataError`` where there is none, or where the files are not
    what was written; ``ModelError`` where a module is needed or is of another architecture.
    """
    if module is not None and not isinstance(module, nn.Module | Sequence):
        raise TypeError(f"module must be a torch module or a list of them, not {module!r}")
    folder = folder.rstrip("/")
    try:
        entry = json.loads(files.read(f"{folder}/{ABOUT}"))
        if "chains" in entry:
            return hmc.load(folder, device=device)
        content = files.read(f"{folder}/{TENSORS}")
        if entry["format"] > FORMAT:
            raise DataError(f"{folder} was written by a later version of this package ({entry['offmanifold']}): update it")
        if _hash(content, entry["posterior"]) != entry["sha256"]:
            raise DataError(f"{folder}/{TENSORS} or {ABOUT} is not what was written: the hash differs; save the posterior again")
        return unpack(entry["posterior"], load_tensors(content), module, device)
    except ModelError:
        raise
    except OSError as error:
        raise DataError(f"{folder} holds no posterior that can be read ({error}); name the folder that om.save wrote") from error
    except (KeyError, TypeError, ValueError, SafetensorError) as error:
        raise DataError(f"{folder}/{ABOUT} is not what om.save writes ({error!r}); save the posterior again") from error


def to_arrays(posterior: Posterior) -> dict[str, NDArray[Any]]:
    """The posterior as arrays alone, e.g. for a task's result."""
    about, tensors = pack(posterior)
    return {ABOUT: np.frombuffer(json.dumps(about).encode(), np.uint8)} | {name: value.numpy() for name, value in tensors.items()}


def from_arrays(arrays: Mapping[str, NDArray[Any]], device: torch.device = torch.device("cpu")) -> Posterior:
    """The posterior that ``to_arrays`` gave."""
    tensors = {name: torch.from_numpy(value) for name, value in arrays.items() if name != ABOUT}
    return unpack(json.loads(arrays[ABOUT].tobytes()), tensors, None, device)


def pack(posterior: Posterior) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The posterior as JSON, and its tensors (contiguous, on the CPU)."""
    tensors: dict[str, Tensor] = {}

    def keep(path: str, values: Mapping[str, Tensor]) -> None:
        tensors.update(
            {f"{path}{name}": value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in values.items()}
        )

    def describe(value: Any, path: str) -> Any:
        if isinstance(value, nn.Module):
            origin = models.origin(value)
            keep(f"{path}.", value.state_dict())
            of = {"module": type(value).__name__, "origin": None if origin is None else origin.as_json()}
            return {**of, "rates": dropout_rates(value)}
        if isinstance(value, Tensor):
            keep(path, {"": value})
            return {"tensor": True}
        if isinstance(value, Mapping) and value and all(isinstance(item, Tensor) for item in value.values()):
            keep(f"{path}.", value)
            return {"tensors": list(value)}
        if type(value).__name__ in KINDS:
            return about(value, path)
        if isinstance(value, list | tuple):
            return {"items": [describe(item, f"{path}.{index}") for index, item in enumerate(value)]}
        if value is None or isinstance(value, str | int | float | bool):
            return {"value": value}
        raise ModelError(f"a posterior with a {type(value).__name__} ({path}) cannot be saved: it holds modules, tensors and plain values")

    def about(of: Any, path: str) -> dict[str, Any]:
        if type(of).__name__ not in KINDS:
            raise ModelError(f"{type(of).__name__} cannot be saved: it is no posterior of this package ({', '.join(KINDS)})")
        return {
            "kind": type(of).__name__,
            "fields": {name: describe(getattr(of, name), f"{path}.{name}".lstrip(".")) for name in _fields(type(of))},
        }

    return about(posterior, ""), tensors


def dropout_rates(module: nn.Module) -> dict[str, float]:
    """Name of each dropout layer -> its rate: what a state dictionary does not hold."""
    return {name: float(layer.p) for name, layer in module.named_modules() if isinstance(layer, _DropoutNd)}


def unpack(about: Mapping[str, Any], tensors: Mapping[str, Tensor], module: Modules, device: torch.device) -> Posterior:
    """The posterior that ``pack`` gave."""
    given = _given(module)

    def below(path: str) -> dict[str, Tensor]:
        return {name.removeprefix(path): value for name, value in tensors.items() if name.startswith(path)}

    def made(value: Mapping[str, Any], path: str) -> Any:
        if "kind" in value:
            kind = KINDS[value["kind"]]
            return kind(**{name: made(item, f"{path}.{name}".lstrip(".")) for name, item in value["fields"].items()})
        if "module" in value:
            return _restored(value, below(f"{path}."), next(given, None), device)
        if "tensor" in value:
            return tensors[path].to(device)
        if "tensors" in value:
            own = below(f"{path}.")
            return {name: weights.fast(own[name]).to(device) for name in value["tensors"]}
        if "items" in value:
            return tuple(made(item, f"{path}.{index}") for index, item in enumerate(value["items"]))
        return value["value"]

    posterior: Posterior = made(about, "")
    if isinstance(module, Sequence) and next(given, None) is not None:
        raise ModelError(f"{len(module)} modules were given, more than the saved posterior has")
    return posterior


def _hash(content: bytes, about: Mapping[str, Any]) -> str:
    """SHA-256 of the tensors' file and of what the posterior is."""
    return hashlib.sha256(content + json.dumps(about, sort_keys=True).encode()).hexdigest()


def _fields(kind: Any) -> list[str]:
    """Fields that say what a posterior is; derived ones are made again."""
    return [field.name for field in dataclasses.fields(kind) if field.init and not field.metadata.get("derived")]


def _given(module: Modules) -> Iterator[nn.Module]:
    """The modules that the caller gave, one for each that is needed; a single one serves for all."""
    if isinstance(module, nn.Module):
        while True:
            yield module
    yield from module or ()


def _restored(value: Mapping[str, Any], state: Mapping[str, Tensor], given: nn.Module | None, device: torch.device) -> nn.Module:
    if given is not None:
        module = copy.deepcopy(given)
    elif value["origin"] is not None:
        module = models.rebuild(models.Origin.from_json(value["origin"]))
    else:
        raise ModelError(
            f"the posterior is of a {value['module']}, which is none of this package's networks: give load an untrained one as module=..., "
            "or a list of them, one for each member of an ensemble"
        )
    if wrong := weights.differences(module, state):
        raise ModelError(f"{type(module).__name__} is of another architecture than the saved {value['module']} ({wrong})")
    if kinds := {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}:
        module = module.to(next(iter(kinds))) if len(kinds) == 1 else module
    module.load_state_dict(dict(state))
    if (rates := dropout_rates(module)) != value["rates"]:
        raise ModelError(f"the dropout rates of {type(module).__name__} are {rates}, those of the saved posterior {value['rates']}")
    return module.eval().requires_grad_(False).to(device)
