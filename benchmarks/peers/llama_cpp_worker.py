"""Continues prompts by llama.cpp's most likely tokens: GGUF file, and JSON on standard input."""

import json
import sys

import xllamacpp


def main() -> None:
    asked = json.load(sys.stdin)
    settings = xllamacpp.CommonParams()
    settings.model.path = sys.argv[1]
    settings.n_ctx = 512
    # Half precisions, its default in attention, would choose other tokens now and then.
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(settings)
    texts = []
    for tokens in asked["prompts"]:
        request = {"prompt": tokens, "n_predict": asked["num_tokens"], "temperature": 0.0}
        texts.append(server.handle_completions(request)["choices"][0]["text"])
    print(json.dumps(texts))


if __name__ == "__main__":
    main()
