"""One training step of the default base, against the same step with plain transformers.

    python benchmarks/train_step.py [--rounds 5] [--profile]

Both take AdamW steps on the same batches, in turn, in this process, with one thread. The share of
the machine's own matrix-product rate is the FLOPs of the step's matrix products, as counted by
torch, over its time and over the rate of a 1024 x 1024 float32 product measured in between.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode
from transformers import KimiLinearForCausalLM
from transformers.utils import logging

from kimi_recursive.kimi.switch import install_fast_kda
from kimi_recursive.training.base import LanguageModelling, base_optimizer, kimi_config
from kimi_recursive.training.settings import BaseSettings

ROOT = Path(__file__).parents[1]


class Tokenizer:
    """As much of a tokenizer as `kimi_config` reads."""

    bos_token_id, eos_token_id, pad_token_id = 0, 1, 2

    def __init__(self, size: int):
        self.size = size

    def __len__(self) -> int:
        return self.size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="steps of each, in turn (default 5)")
    parser.add_argument("--profile", action="store_true", help="say where our step spends its time")
    options = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    config = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    base = BaseSettings.from_mapping(config["base"])
    training = base.training
    torch.manual_seed(0)
    tokenizer = Tokenizer(config["tokenizer"]["vocab_size"])
    plain = KimiLinearForCausalLM(kimi_config(base.architecture, tokenizer))
    ours = copy.deepcopy(plain)
    install_fast_kda(ours)
    shape = (training.batch_size, training.context_length + 1)
    num_tokens = training.batch_size * training.context_length

    def stepper(model, optimizer):
        objective = LanguageModelling(model.train())

        def step(seed: int) -> float:
            generator = torch.Generator().manual_seed(seed)
            windows = torch.randint(len(tokenizer), shape, generator=generator)
            loss, _ = objective(windows[:, :-1], windows[:, 1:])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return float(loss.detach())

        return step

    plain_step = stepper(plain, torch.optim.AdamW(plain.parameters(), lr=training.lr))
    our_step = stepper(ours, base_optimizer(ours, training))
    losses = plain_step(0), our_step(0)  # warm-up; the first losses are of the same weights
    with FlopCounterMode(display=False) as counter:
        our_step(1)
    matrix = torch.randn(1024, 1024)
    times: dict[str, list[float]] = {"plain": [], "ours": [], "matmul": []}

    def clock(name: str, call) -> None:
        started = time.perf_counter()
        call()
        times[name].append(time.perf_counter() - started)

    for seed in range(2, 2 + options.rounds):
        clock("plain", lambda s=seed: plain_step(s))
        clock("ours", lambda s=seed: our_step(s))
        clock("matmul", lambda: matrix @ matrix)
    plain_s, ours_s, matmul_s = (statistics.median(times[k]) for k in ("plain", "ours", "matmul"))
    rate = 2 * 1024**3 / matmul_s
    reached = counter.get_total_flops() / ours_s
    ratio = statistics.median(p / o for p, o in zip(times["plain"], times["ours"], strict=True))
    print(f"{num_tokens} tokens a step, median of {options.rounds} rounds in turn, one thread")
    print(f"first loss            plain {losses[0]:.6f}, ours {losses[1]:.6f}")
    print(f"plain transformers    {plain_s:.3f} s a step, {num_tokens / plain_s:,.0f} tokens/s")
    print(f"kimi_recursive        {ours_s:.3f} s a step, {num_tokens / ours_s:,.0f} tokens/s")
    print(f"ratio                 {ratio:.1f} (required: >= 8)")
    print(f"matrix products       {reached / 1e9:.1f} GFLOP/s of this machine's {rate / 1e9:.1f}, "
          f"{100 * reached / rate:.0f} %")  # fmt: skip
    if options.profile:
        with torch.profiler.profile() as profile:
            our_step(99)
        table = profile.key_averages()
        print(table.table(sort_by="self_cpu_time_total", row_limit=20, max_name_column_width=40))


if __name__ == "__main__":
    main()
