"""Logits and texts of models in one client, in a process that has never heard of headstart.

Takes the client's name, and JSON on standard input: models with their folders, whether their code
is trusted, and where their logits go; tokens, a prompt, and how many tokens to go on for. For each
model the answer has its text and the prompt's tokens, or the error's last line.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

REACH = 0.05
"""Of random adapters, so that what they add is seen."""


def loaded(folder: str, trusts: dict[str, bool]) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **trusts).eval()


def from_transformers(folder: str, tokens: torch.Tensor, trusts: dict[str, bool]) -> Any:
    model = loaded(folder, trusts)
    return model, model(tokens).logits


def from_lm_eval(folder: str, tokens: torch.Tensor, trusts: dict[str, bool]) -> Any:
    from lm_eval.models.huggingface import HFLM

    scorer = HFLM(pretrained=folder, dtype="float32", device="cpu", **trusts)
    return scorer.model, scorer._model_call(tokens)


def from_peft(folder: str, tokens: torch.Tensor, trusts: dict[str, bool]) -> Any:
    """Fresh adapters change nothing; random ones are the same once loaded, and once merged."""
    from peft import LoraConfig, PeftModel, get_peft_model

    model = get_peft_model(loaded(folder, trusts), LoraConfig(target_modules="all-linear")).eval()
    logits = model(tokens).logits
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=REACH)
    adapted = model(tokens).logits
    assert not torch.allclose(adapted, logits, atol=1e-3)
    model.save_pretrained(Path(folder) / "adapter")
    again = PeftModel.from_pretrained(loaded(folder, trusts), Path(folder) / "adapter").eval()
    assert torch.allclose(again(tokens).logits, adapted, atol=1e-5)
    merged = again.merge_and_unload()
    assert torch.allclose(merged(tokens).logits, adapted, atol=1e-3)
    return loaded(folder, trusts), logits


CLIENTS: dict[str, Callable[..., Any]] = {
    "transformers": from_transformers,
    "lm_eval": from_lm_eval,
    "peft": from_peft,
}


@torch.no_grad()
def main() -> None:
    client, asked = sys.argv[1], json.load(sys.stdin)
    torch.manual_seed(0)
    tokens = torch.tensor([asked["tokens"]])
    answers = []
    for model in asked["models"]:
        trusts = {"trust_remote_code": True} if model["trusts"] else {}
        try:
            tokenizer = AutoTokenizer.from_pretrained(model["folder"], **trusts)
            prompt = tokenizer(asked["prompt"], return_tensors="pt").input_ids
            made, logits = CLIENTS[client](model["folder"], tokens, trusts)
            torch.save(logits.float(), model["logits"])
            length = asked["num_tokens"]
            # By the config of the model, as whoever serves it does.
            text = made.generate(
                prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
                max_new_tokens=length, min_new_tokens=length, pad_token_id=0,
            )  # fmt: skip
            answers.append({"prompt": prompt[0].tolist(), "text": text[0].tolist()})
        except Exception as error:
            answers.append({"error": (str(error).strip() or type(error).__name__).splitlines()[-1]})
    assert not any(name.split(".")[0] == "headstart" for name in sys.modules)
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
