"""Short problems of GSM8K, as config/gsm8k.yaml takes them, in data/gsm8k.

    python examples/gsm8k.py PROBLEMS.jsonl

A line of PROBLEMS.jsonl is an object with `id`, `prompt` ("Question: ...\\nAnswer:"), `completion`.
Kept are problems of at most 112 tokens, the end of the completion included. The tokenizer is that
of config/smollm2.yaml.
"""

import argparse
import json
import random
from pathlib import Path

from transformers import AutoTokenizer

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("problems", type=argparse.FileType(encoding="utf-8"), help="JSON lines")
options = parser.parse_args()
BASE = Path("results/smollm2/base/model")
if not BASE.is_dir():
    parser.error(f"{BASE} is missing; docs/gsm8k.md says how to fetch it")

MAX_TOKENS, NUM_TEST, NUM_VALIDATION = 112, 128, 64
tokenizer = AutoTokenizer.from_pretrained(BASE)


def num_tokens(problem: dict[str, str]) -> int:
    texts = [problem["prompt"], problem["completion"]]
    return sum(len(ids) for ids in tokenizer(texts).input_ids) + 1


problems = [json.loads(line) for line in options.problems]
problems = [problem for problem in problems if num_tokens(problem) <= MAX_TOKENS]
random.Random(0).shuffle(problems)
parts = {
    "test": problems[:NUM_TEST],
    "validation": problems[NUM_TEST : NUM_TEST + NUM_VALIDATION],
    "train": problems[NUM_TEST + NUM_VALIDATION :],
}
folder = Path("data/gsm8k")
folder.mkdir(parents=True, exist_ok=True)
for name, part in parts.items():
    lines = [json.dumps(problem) + "\n" for problem in part]
    (folder / f"{name}.jsonl").write_text("".join(lines))
    print(f"{len(part)} problems: {folder / name}.jsonl")
