"""Layer-wise students: what their `model_type` is, and how transformers comes to know them.

Their classes are in `modeling`, which travels inside checkpoints and takes seconds to import; this
module imports it only when it is needed.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Any

import wrapt

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

PREFIX = "headstart_"
"""Of a layer-wise student's `model_type`, before its family's."""


def is_layerwise(config: PreTrainedConfig) -> bool:
    """Whether a config is of one of headstart's own layer-wise models."""
    return bool(config.model_type.startswith(PREFIX))


def layerwise_config(family: str, entries: dict[str, Any]) -> PreTrainedConfig:
    """The config of a layer-wise model of a family, naming the classes that travel with it.

    `entries` are the config's, with `per_layer_config`.
    """
    from headstart.model.modeling import MODELS

    register()  # for whoever makes a model of it without having loaded a config
    model_type = PREFIX + family
    (model,) = (model for model in MODELS if model.config_class.model_type == model_type)
    config = model.config_class.from_dict({**entries, "model_type": model_type})
    config.architectures = [model.__name__]
    classes = {"AutoConfig": model.config_class, "AutoModelForCausalLM": model}
    config.auto_map = {auto: f"modeling.{chosen.__name__}" for auto, chosen in classes.items()}
    return config


@cache  # asked at every config that is loaded or made
def register() -> None:
    """Make the layer-wise classes known to transformers' auto classes."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from headstart.model.modeling import MODELS

    for model in MODELS:
        AutoConfig.register(model.config_class.model_type, model.config_class, exist_ok=True)
        AutoModelForCausalLM.register(model.config_class, model, exist_ok=True)


def register_when_needed() -> None:
    """Arrange that `register` runs when a config is first loaded.

    So importing headstart imports neither torch nor transformers, and importing transformers no
    models.
    """

    def hook(module: ModuleType) -> None:
        def registered_first(load: Any, auto_class: Any, args: Any, options: Any) -> Any:
            register()
            return load(*args, **options)

        wrapt.wrap_function_wrapper(module, "AutoConfig.from_pretrained", registered_first)

    wrapt.register_post_import_hook(hook, "transformers.models.auto.configuration_auto")
