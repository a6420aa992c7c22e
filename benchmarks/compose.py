"""Does token feedback let a frozen base compose facts that it was never asked to compose?

    python benchmarks/compose.py [--entities 4096] [--base FOLDER]

A tiny Kimi-Linear learns every fact x -> g(x), where g is a random permutation of the entities.
Then the gate of token feedback alone is trained, at one inner step, to answer g(g(x)) for half of
the entities. The table shows each inner step's accuracy at 1 to 4 hops, for the entities that were
trained and for those that were not. `--base` keeps the base, or takes it from there.
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from transformers import KimiLinearConfig, KimiLinearForCausalLM

from kimi_recursive import ChunkRefineWrapper, RecursiveConfig
from kimi_recursive.kimi.switch import install_fast_kda
from kimi_recursive.model.loading import load_base

WIDTH, BOS, RELATION, FIRST_ENTITY = 128, 1, 3, 16
BASE_STEPS, GATE_STEPS, WARMUP = 700, 200, 50
MOST_HOPS = 4


class Facts:
    """A random permutation of entities, and who of them is trained on two hops."""

    def __init__(self, num_entities: int):
        self.next = np.random.default_rng(5).permutation(num_entities)
        order = np.random.default_rng(6).permutation(num_entities)
        self.seen, self.unseen = np.split(order, 2)

    def prompt(self, entities: np.ndarray) -> Tensor:
        """Token ids [B, 3]: begin, the relation, the entity."""
        begin, relation = np.full_like(entities, BOS), np.full_like(entities, RELATION)
        return torch.tensor(np.stack([begin, relation, entities + FIRST_ENTITY], axis=1))

    def answer(self, entities: np.ndarray, hops: int) -> Tensor:
        """Token ids [B] of the entities that lie so many hops away."""
        for _ in range(hops):
            entities = self.next[entities]
        return torch.tensor(entities + FIRST_ENTITY)


def optimise(
    parameters: Iterable[nn.Parameter], lr: float, num_steps: int, loss_of: Callable[[], Tensor]
) -> None:
    """AdamW with warm-up and a cosine down to a twentieth."""
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)

    def rate(step: int) -> float:
        cosine = 0.5 * (1 + math.cos(math.pi * step / num_steps))
        return min((step + 1) / WARMUP, 0.95 * cosine + 0.05)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    bar = tqdm(range(num_steps), mininterval=5)
    for _ in bar:
        loss = loss_of()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=loss.item(), refresh=False)


def train_base(facts: Facts, folder: Path) -> None:
    torch.manual_seed(0)
    num_entities = len(facts.next)
    base = KimiLinearForCausalLM(
        KimiLinearConfig(
            vocab_size=num_entities + FIRST_ENTITY, hidden_size=WIDTH, intermediate_size=2 * WIDTH,
            moe_intermediate_size=WIDTH // 2, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=4, n_shared_experts=1, kv_lora_rank=WIDTH // 2, qk_rope_head_dim=8,
            qk_nope_head_dim=WIDTH // 4, v_head_dim=WIDTH // 4, num_experts_per_tok=2,
            num_local_experts=4, linear_head_dim=WIDTH // 4, linear_num_heads=4, pad_token_id=0,
            bos_token_id=BOS, eos_token_id=2, max_position_embeddings=64, tie_word_embeddings=True,
            layer_types=["linear_attention"] * 3 + ["full_attention"],
        )
    )  # fmt: skip
    install_fast_kda(base)
    generator = np.random.default_rng(0)

    def loss() -> Tensor:
        entities = generator.integers(0, num_entities, 256)
        logits = base(input_ids=facts.prompt(entities), logits_to_keep=1).logits[:, -1]
        return F.cross_entropy(logits, facts.answer(entities, 1))

    optimise(base.parameters(), 3e-3, BASE_STEPS, loss)
    base.save_pretrained(folder)


def train_gate(facts: Facts, base: KimiLinearForCausalLM) -> ChunkRefineWrapper:
    """The wrapper, with nothing but its gate trained."""
    base.requires_grad_(False)
    torch.manual_seed(0)
    wrapper = ChunkRefineWrapper(
        base,
        RecursiveConfig(
            recursive_enabled=True, chunk_width=8, max_inner_steps=1, use_latent_token=False,
            use_token_feedback=True, d_state=64, gate_hidden=16, max_chunk_len=8,
        ),
    )  # fmt: skip
    assert wrapper.feedback is not None
    generator = np.random.default_rng(7)

    def loss() -> Tensor:
        entities = generator.choice(facts.seen, 128)
        return F.cross_entropy(answers(wrapper, facts, entities, 1)[1], facts.answer(entities, 2))

    optimise(wrapper.feedback.parameters(), 3e-2, GATE_STEPS, loss)
    return wrapper


def answers(
    wrapper: ChunkRefineWrapper, facts: Facts, entities: np.ndarray, num_steps: int
) -> list[Tensor]:
    """Logits [B, V] behind the prompt, at each inner step."""
    with torch.no_grad():
        chunk = wrapper.start_chunk(facts.prompt(entities), wrapper.new_cache())
    return [state.logits[:, -1] for state in wrapper.steps(chunk, num_steps)]


@torch.no_grad()
def report(wrapper: ChunkRefineWrapper, facts: Facts) -> None:
    """Print the accuracy of each inner step at each number of hops."""
    print("entities  inner step  " + "  ".join(f"{h} hops" for h in range(1, MOST_HOPS + 1)))
    for name, entities in (("seen", facts.seen), ("unseen", facts.unseen)):
        for step, logits in enumerate(answers(wrapper, facts, entities, MOST_HOPS - 1)):
            said = logits.argmax(-1)
            right = [said == facts.answer(entities, h) for h in range(1, MOST_HOPS + 1)]
            cells = "  ".join(f"{100 * float(r.float().mean()):5.1f}%" for r in right)
            print(f"{name:<9} {step:>10}  {cells}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--entities", type=int, default=4096)
    parser.add_argument("--base", type=Path, help="Keep the base here, or take it from here.")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    facts = Facts(arguments.entities)
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.base or Path(scratch)
        if not (folder / "config.json").is_file():
            train_base(facts, folder)
        base = load_base(folder)
        assert isinstance(base, KimiLinearForCausalLM)
        report(train_gate(facts, base), facts)


if __name__ == "__main__":
    main()
