"""Tokens per second of every way to generate, on the base and the phase A of `make all`.

    python benchmarks/generation.py [--results results] [--num-tokens 128] [--rounds 5]
    python benchmarks/generation.py --model SIDECAR --prompts FILE --only verified batch

All ways continue the same beginnings of held-out documents, greedily, in turn, in this process and
with one thread. Seconds are CPU seconds of the process. Decoding the refined model token by token
is measured as its definition says it (every step over the chunk so far, for each token) and at its
best: a cache for each inner step, one draft a round.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from torch import Tensor

from kimi_recursive import load_model_with_config
from kimi_recursive.data.tokens import load_tokens
from kimi_recursive.kimi.short_passes import ShortPasses
from kimi_recursive.model.cache import fork
from kimi_recursive.model.generation import plain_generation
from kimi_recursive.model.guesses import Guesses
from kimi_recursive.model.passes import FewRows
from kimi_recursive.model.verified import Lookahead
from kimi_recursive.processes.logs import quiet_libraries

SLOW = ("refined, learned", "refined, by definition")  # these are measured once


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("--run", default="recursive_a_s0", help="default recursive_a_s0")
    parser.add_argument("--model", type=Path, help="a sidecar elsewhere, in place of these two")
    parser.add_argument("--base", type=Path, help="where its base is now")
    parser.add_argument("--prompts", type=Path, help="a prompt a line; default: held-out documents")
    parser.add_argument("--only", nargs="+", help="ways whose name ends in one of these")
    parser.add_argument("--num-tokens", type=int, default=128, help="of a text (default 128)")
    parser.add_argument("--num-texts", type=int, default=4, help="default 4")
    parser.add_argument("--rounds", type=int, default=5, help="of each way, in turn (default 5)")
    options = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(1)
    sidecar = options.model or options.results / f"runs/{options.run}/sidecar"
    wrapper, tokenizer, config = load_model_with_config(sidecar, base_path=options.base)
    if options.prompts:
        lines = options.prompts.read_text().splitlines()[: options.num_texts]
        beginnings = [tokenizer(line).input_ids for line in lines]
    else:
        split = load_tokens(options.results / "tokens", "test")
        beginnings = [split.document(i)[:16].tolist() for i in range(options.num_texts)]
    shortest = min(map(len, beginnings))  # the last tokens of each, so that they make a batch
    ids = torch.tensor([tokens[-shortest:] for tokens in beginnings])
    ways = ways_to_generate(wrapper, options.num_tokens)
    if options.only:
        ends = ("base.generate", *options.only)
        ways = {name: way for name, way in ways.items() if name.endswith(ends)}
    outputs, seconds = {}, {name: [] for name in ways}
    for round_ in range(options.rounds + 1):  # the first warms up
        for name, (way, batched) in ways.items():
            if round_ > 1 and name in SLOW:
                continue
            started = time.process_time()
            outputs[name] = way(ids) if batched else torch.cat([way(row[None]) for row in ids])
            if round_:
                seconds[name].append(time.process_time() - started)
    num_tokens = ids.shape[0] * options.num_tokens
    speeds = {name: [num_tokens / s for s in spent] for name, spent in seconds.items()}
    base = statistics.median(speeds["base.generate"])
    print(f"chunks of {config.chunk_width}, {config.max_inner_steps} inner steps")
    print(f"{'':<44}{'tokens/s':>9}{'lowest':>8}{'highest':>8}{'of base.generate':>18}")
    for name, found in speeds.items():
        median = statistics.median(found)
        print(
            f"{name:<44}{median:>9.1f}{min(found):>8.1f}{max(found):>8.1f}{median / base:>17.2f}x"
        )
    for name, output in outputs.items():
        same = "base.generate" if "base" in name else "refined, verified"
        if same not in outputs:
            continue
        num = int((output != outputs[same]).any(1).sum())
        print(f"{name}: {num} of {len(ids)} texts differ from those of {same}")
    for commit in ("verified",) if options.only else ("verified", "learned"):
        stats = [
            wrapper.generate_chunks(
                row[None], max_new_tokens=options.num_tokens, eos_token_id=[], commit=commit,
                return_stats=True,
            )[1]
            for row in ids
        ]  # fmt: skip
        print(
            f"{commit}: {statistics.mean(s.mean_inner_steps for s in stats):.2f} inner steps and "
            f"{statistics.mean(s.mean_committed for s in stats):.2f} tokens a round, "
            f"{statistics.mean(s.acceptance_rate for s in stats):.3f} of drafts accepted"
        )


Way = Callable[[Tensor], Tensor]


def ways_to_generate(
    wrapper, num_tokens: int
) -> dict[str, tuple[Callable[[Tensor], Tensor], bool]]:
    """Each takes prompts [B, P]; whether it is given all at once."""
    options = {"max_new_tokens": num_tokens, "eos_token_id": []}

    def base(ids: Tensor) -> Tensor:
        with wrapper.disabled(), plain_generation(wrapper.base):
            mask = torch.ones_like(ids)
            return wrapper.generate_chunks(ids, attention_mask=mask, pad_token_id=0, **options)

    @torch.no_grad()
    def our_loop(ids: Tensor) -> Tensor:
        passes = wrapper.passes()
        cache = fork(wrapper.encode(ids[:, :-1], wrapper.new_cache()))
        for _ in range(num_tokens):
            logits = passes.run(cache, None, input_ids=ids[:, -1:])[1]
            ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], 1)
        return ids

    def verified(ids: Tensor) -> Tensor:
        return wrapper.generate_chunks(ids, commit="verified", **options)

    def learned(ids: Tensor) -> Tensor:
        return wrapper.generate_chunks(ids, commit="learned", **options)

    def without_guesses(ids: Tensor) -> Tensor:
        with patch.object(Guesses, "next", lambda _self, _drafted: []):
            return verified(ids)

    def one_a_round(ids: Tensor) -> Tensor:
        with patch.object(Lookahead, "go_on", lambda _self, _logits: False):
            return without_guesses(ids)

    def by_modules(way: Way) -> Way:
        def slower(ids: Tensor) -> Tensor:
            no = staticmethod(lambda _base: False)
            with patch.object(ShortPasses, "serves", no), patch.object(FewRows, "serves", no):
                return way(ids)

        return slower

    @torch.no_grad()
    def by_definition(ids: Tensor) -> Tensor:
        first, width = ids.shape[1] - 1, wrapper.config.chunk_width
        for n in range(num_tokens):
            logits = wrapper.step_logits(ids, first + n // width * width)[-1, :, -1]
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
        return ids

    return {
        "base.generate": (base, False),
        "base, our loop": (our_loop, False),
        "refined, verified": (verified, False),
        "refined, verified, transformers' modules": (by_modules(without_guesses), False),
        "refined, learned": (learned, False),
        "refined, verified, without guesses": (without_guesses, False),
        "refined, a token a round": (one_a_round, False),
        "refined, a token a round, modules": (by_modules(one_a_round), False),
        "refined, by definition": (by_definition, False),
        "base.generate, as one batch": (base, True),
        "refined, verified, as one batch": (verified, True),
    }


if __name__ == "__main__":
    main()
