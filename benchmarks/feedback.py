"""An inner step of the default base with token feedback, against the same step without it.

    python benchmarks/feedback.py [--rounds 40]

Random weights of the sizes of `config/config.yaml`; a batch of evaluation, whose second chunk is
refined: the forward pass alone, and with the backward pass through it. All steps are taken in turn,
in this process, with one thread. Seconds are CPU seconds. Most of the difference is `topk` over the
logits of every position.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import torch
import yaml
from train_step import Tokenizer
from transformers import KimiLinearForCausalLM
from transformers.utils import logging

from kimi_recursive import ChunkRefineWrapper, RecursiveConfig
from kimi_recursive.kimi.switch import install_fast_kda
from kimi_recursive.training.base import kimi_config
from kimi_recursive.training.settings import Architecture

ROOT = Path(__file__).parents[1]
LIMIT = 1.03


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=40, help="steps of each, in turn")
    options = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    tokenizer = Tokenizer(config["tokenizer"]["vocab_size"])
    architecture = Architecture.from_mapping(config["base"]["architecture"])
    base = KimiLinearForCausalLM(kimi_config(architecture, tokenizer)).eval()
    install_fast_kda(base)
    recursive = {**config["recursive"], "recursive_enabled": True}
    wrappers = {
        feedback: ChunkRefineWrapper(
            base, RecursiveConfig(**{**recursive, "use_token_feedback": feedback})
        )
        for feedback in (False, True)
    }
    width = recursive["chunk_width"]
    ids = torch.randint(len(tokenizer), (config["evaluation"]["batch_size"], 2 * width))
    with torch.no_grad():
        *_, chunk = wrappers[False].chunks(ids)
    base.requires_grad_(False)

    def forward(wrapper: ChunkRefineWrapper) -> None:
        with torch.no_grad():
            wrapper.refine(chunk)

    def with_backward(wrapper: ChunkRefineWrapper) -> None:
        wrapper.refine(chunk).logits.square().mean().backward()

    print(
        f"an inner step over {ids.shape[0]} x {width} tokens, {options.rounds} rounds, one thread"
    )
    for step in (forward, with_backward):
        spent: dict[bool, list[float]] = {False: [], True: []}
        for round_ in range(options.rounds + 2):  # the first two warm up
            for feedback in (False, True) if round_ % 2 else (True, False):
                started = time.process_time()
                step(wrappers[feedback])
                if round_ >= 2:
                    spent[feedback].append(time.process_time() - started)
        plain, fed = (1000 * statistics.median(spent[feedback]) for feedback in (False, True))
        ratio = statistics.median(b / a for a, b in zip(spent[False], spent[True], strict=True))
        name = step.__name__.replace("_", " ")
        print(f"{name:<14} {plain:.1f} ms without token feedback, {fed:.1f} ms with it, "
              f"ratio {ratio:.3f} (required: <= {LIMIT})")  # fmt: skip


if __name__ == "__main__":
    main()
