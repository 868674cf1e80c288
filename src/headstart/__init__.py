"""headstart: begin pretraining from the best sub-network of a pretrained language model."""

import importlib
import importlib.util
from types import ModuleType
from typing import TYPE_CHECKING, Any

import wrapt

if TYPE_CHECKING:
    from headstart.api import *  # noqa: F403

__version__ = "0.1.0"

_ROOMS = ("pretrain", "search")
for _room in _ROOMS:
    # Once imported, a room does not come back as an attribute: a function of `api` has its name.
    importlib.import_module(f"headstart.{_room}")
    del globals()[_room]


def __getattr__(name: str) -> Any:
    """The names of `headstart.api`, imported when first asked for."""
    is_module = name not in _ROOMS and importlib.util.find_spec(f"{__name__}.{name}") is not None
    if name.startswith("_") or is_module:  # Python then imports the module, and no more than that
        raise AttributeError(name)
    api = importlib.import_module("headstart.api")
    if name not in api.__all__:
        raise AttributeError(f"headstart has no {name}; it has {', '.join(api.__all__)}")
    return getattr(api, name)


@wrapt.when_imported("transformers.models.auto.configuration_auto")
def _load_layerwise_students(module: ModuleType) -> None:
    """Let transformers' auto classes load layer-wise students without `trust_remote_code`.

    They are made known when a config is first loaded, so that importing headstart imports neither
    torch nor transformers, and importing transformers no models.
    """

    def known_first(load: Any, auto_class: Any, args: Any, options: Any) -> Any:
        importlib.import_module("headstart.subnet.modeling")
        return load(*args, **options)

    wrapt.wrap_function_wrapper(module, "AutoConfig.from_pretrained", known_first)
