"""What the bare library answers, as tokens with their best logits: `python tokens.py FOLDER QUESTION…`, one JSON list.

The same file runs on this host and in a machine, where there is nothing but what the bundle installed. Greedy, so the
same tokens are promised by nothing but the same arithmetic.
"""

from __future__ import annotations

import json
import sys

import numpy as np
import onnxruntime_genai as og

MOST_TOKENS = 48
BEST = 8


def answers(folder: str, questions: list[str]) -> list[dict[str, object]]:
    """The answer to each question: its tokens, its text, and for each token the best that it was chosen from, as
    [token, logit] from the best one down: few enough for a serial line."""
    model = og.Model(folder)
    tokenizer = og.Tokenizer(model)
    ends = {int(token) for token in tokenizer.eos_token_ids}
    found: list[dict[str, object]] = []
    for question in questions:
        chat = json.dumps([{"role": "user", "content": question}])
        prompt = tokenizer.encode(tokenizer.apply_chat_template(chat, add_generation_prompt=True))
        params = og.GeneratorParams(model)
        params.set_search_options(do_sample=False, max_length=len(prompt) + MOST_TOKENS)
        generator = og.Generator(model, params)
        generator.append_tokens(np.array(prompt, dtype=np.int32))
        tokens: list[int] = []
        best: list[list[tuple[int, float]]] = []
        while not generator.is_done() and len(tokens) < MOST_TOKENS:
            row = np.asarray(generator.get_logits(), dtype=np.float32)[0, -1]
            best.append(
                [(int(token), round(float(row[token]), 5)) for token in row.argsort()[: -BEST - 1 : -1]]
            )
            generator.generate_next_token()
            tokens.append(int(generator.get_next_tokens()[0]))
        spoken = [token for token in tokens if token not in ends]
        text = str(tokenizer.decode(np.array(spoken, dtype=np.int32)))
        found.append({"tokens": tokens, "best": best, "text": text})
    return found


if __name__ == "__main__":
    print(json.dumps(answers(sys.argv[1], sys.argv[2:])))
