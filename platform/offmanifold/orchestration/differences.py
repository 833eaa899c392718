"""Where two configs or recipes differ, in words."""

import json
from collections.abc import Mapping
from typing import Any


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings with dotted names, as MLflow compares them."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """``members is 4 there and 5 here; ...``: at most three, and how many more; nothing where they are equal as JSON has it."""
    was, now = flatten(there), flatten(json.loads(json.dumps(here, default=str)))
    found = [f"{name} is {was.get(name)} there and {now.get(name)} here" for name in {**was, **now} if was.get(name) != now.get(name)]
    return "; ".join(found[:3]) + (f", and {len(found) - 3} more" if len(found) > 3 else "")
