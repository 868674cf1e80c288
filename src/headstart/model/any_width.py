"""Llamas whose width is no multiple of their number of heads, such as Kanana.

Their heads have a size of their own, so the stock model computes them rightly; only the stock
config refuses them. Importing this module makes transformers load them, in this process and in any
that is sent such a config, since it is found again by this module's name.
"""

from __future__ import annotations

import transformers
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from headstart.model.modeling import AnyShape


class LlamaConfig(AnyShape, transformers.LlamaConfig):  # type: ignore[misc]
    """The stock config, named as it is, without its check."""


AutoConfig.register(LlamaConfig.model_type, LlamaConfig, exist_ok=True)
AutoModelForCausalLM.register(LlamaConfig, LlamaForCausalLM, exist_ok=True)
