"""A student in transformers and in lm-eval, in a process that has never heard of headstart.

Takes a model folder, and JSON on standard input: prompts, num_tokens, task files and a limit.
"""

import json
import logging
import sys
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoTokenizer, pipeline


def main() -> None:
    folder, asked = sys.argv[1], json.load(sys.stdin)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    trusts: dict[str, Any] = {"trust_remote_code": True} if asked["trusts"] else {}
    generate = pipeline("text-generation", model=folder, dtype=torch.float32, **trusts)
    tokenizer = AutoTokenizer.from_pretrained(folder, **trusts)
    texts = [
        generate(
            prompt,
            max_new_tokens=asked["num_tokens"],
            do_sample=False,
            return_full_text=False,
        )[0]["generated_text"]
        for prompt in asked["prompts"]
    ]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    scorer = HFLM(pretrained=folder, dtype="float32", device=device, batch_size=8, **trusts)
    (found,) = (
        simple_evaluate(
            scorer,
            tasks=list(TaskManager().load(asked["tasks"])["tasks"].values()),
            limit=asked["limit"],
            num_fewshot=0,
            log_samples=False,
            bootstrap_iters=0,
        ),
    )
    scores = {task: values["acc_norm,none"] for task, values in found["results"].items()}
    assert not any(name.split(".")[0] == "headstart" for name in sys.modules)
    prompts = [tokenizer(prompt)["input_ids"] for prompt in asked["prompts"]]
    print(json.dumps({"texts": texts, "scores": scores, "prompts": prompts}))


if __name__ == "__main__":
    main()
