"""headstart: begin pretraining from the best sub-network of a pretrained language model."""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from headstart.model.layerwise import register_when_needed

if TYPE_CHECKING:
    from headstart.api import *  # noqa: F403

__version__ = "0.1.0"

register_when_needed()


def __getattr__(name: str) -> Any:
    """The names of `headstart.api`, imported when first asked for."""
    if name.startswith("_") or importlib.util.find_spec(f"{__name__}.{name}") is not None:
        raise AttributeError(name)  # Python then imports the module, and no more than that
    api = importlib.import_module("headstart.api")
    if name not in api.__all__:
        raise AttributeError(f"headstart has no {name}; it has {', '.join(api.__all__)}")
    return getattr(api, name)
