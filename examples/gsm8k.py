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
parser.add_argument("problems", type=Path, help="JSON lines")
options = parser.parse_args()
BASE = Path("results/smollm2/base/model")
if not options.problems.is_file():
    parser.error(f"{options.problems}: no such file")
if not BASE.is_dir():
    parser.error(f"{BASE} is missing; docs/gsm8k.md says how to fetch it")

MAX_TOKENS, NUM_TEST, NUM_VALIDATION = 112, 128, 64
tokenizer = AutoTokenizer.from_pretrained(BASE)


def num_tokens(problem: dict[str, str]) -> int:
    texts = [problem["prompt"], problem["completion"]]
    return sum(len(ids) for ids in tokenizer(texts).input_ids) + 1


problems = []
for number, line in enumerate(options.problems.open(encoding="utf-8"), 1):
    try:
        problem = json.loads(line)
        short = num_tokens(problem) <= MAX_TOKENS
    except (ValueError, KeyError, TypeError) as error:
        parser.error(f"{options.problems}:{number}: not a problem ({error!r})")
    if short:
        problems.append(problem)
if len(problems) <= NUM_TEST + NUM_VALIDATION:
    parser.error(
        f"{options.problems}: {len(problems)} problems of at most {MAX_TOKENS} tokens; "
        f"more than {NUM_TEST + NUM_VALIDATION} are needed"
    )
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
