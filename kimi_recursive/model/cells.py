"""The trainable parts of the loop: `RefineCell`, `LatentToken`, `TokenFeedback`, the heads.

Shapes: B batch, W chunk width, D hidden size, S state size, V vocabulary. The updates of cell and
latent path are scaled by the root mean square of the stream. In each product exactly one factor
starts at zero: the loop starts as the identity, and gradients flow from the first step. Parameters
stay in float32; the stream keeps the dtype of the base.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

INITIAL_COMMIT_BIAS = -3.0  # at or above 0 the depth collapses (arXiv 2604.21999)
INITIAL_HALTING_BIAS = -1.0  # no step starts rare: of three, 0.27, 0.20 and 0.53


def rms(x: Tensor) -> Tensor:
    """Root mean square per position over the last axis, float32, without gradient: [..., 1]."""
    return x.detach().float().pow(2).mean(-1, keepdim=True).sqrt()


class RefineCell(nn.Module):
    """One layer's refinement: `h + rms(h) * out(silu(inp([n, s'])))`.

    `n = norm(h)`, and the state `s' = GRU(n, s)` persists over the inner steps of a chunk.

    Everything is per position, so the cell is as causal as the layer it follows. `out.weight` is
    zero at the start and `out` has no bias: a fresh cell returns `h` bit for bit.
    """

    def __init__(self, d_model: int, d_state: int):
        super().__init__()
        self.d_state = d_state
        self.norm = nn.RMSNorm(d_model, eps=1e-6)
        self.gru = nn.GRUCell(d_model, d_state)
        self.inp = nn.Linear(d_model + d_state, 4 * d_model)
        self.out = nn.Linear(4 * d_model, d_model, bias=False)
        nn.init.zeros_(self.out.weight)

    def forward(self, h_BWD: Tensor, s_BWS: Tensor | None) -> tuple[Tensor, Tensor]:
        """Args: h [B, W, D]; s [B, W, S] float32, or None for the zero state.

        Returns: the refined h in the dtype of h, and the next state.
        """
        n = self.norm(h_BWD.float())
        flat_state = None if s_BWS is None else s_BWS.flatten(0, -2)
        s = self.gru(n.flatten(0, -2), flat_state).view(*n.shape[:-1], self.d_state)
        update = self.out(F.silu(self.inp(torch.cat([n, s.to(n.dtype)], dim=-1))))
        return h_BWD + (rms(h_BWD) * update).to(h_BWD.dtype), s


class LatentToken(nn.Module):
    """The top-to-bottom path: `e + rms(e) * P(norm(h_top) + z)`, z learned, P zero at the start."""

    def __init__(self, d_model: int):
        super().__init__()
        self.norm = nn.RMSNorm(d_model, eps=1e-6)
        self.z = nn.Parameter(torch.empty(d_model).normal_(std=0.02))
        self.proj = nn.Linear(d_model, d_model, bias=False)
        nn.init.zeros_(self.proj.weight)

    def forward(self, e_BWD: Tensor, h_top_BWD: Tensor) -> Tensor:
        """Args: token embeddings [B, W, D]; top hidden state of the step before [B, W, D].

        Returns: embeddings for the next step, in the dtype of e.
        """
        update = self.proj(self.norm(h_top_BWD.float()) + self.z)
        return e_BWD + (rms(e_BWD) * update).to(e_BWD.dtype)


class TokenFeedback(nn.Module):
    """Lets each position read its own prediction: `g * (Ebar - e)` is added to its embedding e.

    Ebar is the expected embedding of the prediction of the step before, over its `top_k` most
    probable tokens; `g = tanh(w . norm(h_top) + b)` is one number per position. At g = 1 the
    position reads the predicted token instead of its own. w and b start at zero, and with them g.
    """

    def __init__(self, d_model: int, top_k: int):
        super().__init__()
        self.top_k = top_k
        self.norm = nn.RMSNorm(d_model, eps=1e-6)
        self.gate = nn.Linear(d_model, 1)
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)

    def forward(
        self,
        e_BWD: Tensor,
        h_top_BWD: Tensor,
        logits_BWV: Tensor,
        embed: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Args: token embeddings [B, W, D]; top hidden state [B, W, D] and logits [B, W, V] of the
        step before; the base's embedding of token ids, with its scale.

        Returns: what is added to the embeddings [B, W, D], in the dtype of e.
        """
        top = logits_BWV.topk(self.top_k, dim=-1)
        weights = top.values.float().softmax(-1).unsqueeze(-2)  # [B, W, 1, k]
        expected = (weights @ embed(top.indices).float()).squeeze(-2)
        g = torch.tanh(self.gate(self.norm(h_top_BWD.float())))
        return (g * (expected - e_BWD.float())).to(e_BWD.dtype)


class BoundaryHead(nn.Module):
    """Reads the right edge of a chunk: commit now, how many tokens? Never in the logits."""

    def __init__(self, d_model: int, gate_hidden: int, max_chunk_len: int):
        super().__init__()
        self.norm = nn.RMSNorm(d_model, eps=1e-6)
        self.hidden = nn.Linear(d_model, gate_hidden)
        self.commit = nn.Linear(gate_hidden, 1)
        self.length = nn.Linear(gate_hidden, max_chunk_len + 1)
        nn.init.constant_(self.commit.bias, INITIAL_COMMIT_BIAS)

    def forward(self, h_top_BWD: Tensor) -> tuple[Tensor, Tensor]:
        """Args: top hidden state [B, W, D].

        Returns: p_commit [B] and log-probabilities of the lengths 0..max_chunk_len
        [B, max_chunk_len + 1], both float32.
        """
        commit_logit, log_length = self.scores(h_top_BWD)
        return commit_logit.sigmoid(), log_length

    def scores(self, h_top_BWD: Tensor) -> tuple[Tensor, Tensor]:
        """As `forward`, with the logit of p_commit, which the halt loss needs."""
        x = F.silu(self.hidden(self.norm(h_top_BWD[:, -1].float())))
        return self.commit(x).squeeze(-1), self.length(x).log_softmax(-1)


class HaltingHead(nn.Module):
    """Decides at every position whether to stop at this inner step. Never in the logits.

    It has a memory over the inner steps: the top hidden state alone does not say which step it is.
    """

    def __init__(self, d_model: int, gate_hidden: int):
        super().__init__()
        self.gate_hidden = gate_hidden
        self.norm = nn.RMSNorm(d_model, eps=1e-6)
        self.memory = nn.GRUCell(d_model, gate_hidden)
        self.commit = nn.Linear(gate_hidden, 1)
        nn.init.constant_(self.commit.bias, INITIAL_HALTING_BIAS)

    def forward(self, h_top_BWD: Tensor, memory_BWG: Tensor | None) -> tuple[Tensor, Tensor]:
        """Args: top hidden state [B, W, D]; memory of the step before [B, W, G], or None at first.

        Returns: the logit [B, W] of the probability of stopping at this step when no earlier one
            did, and the next memory, both float32.
        """
        n = self.norm(h_top_BWD.float())
        before = None if memory_BWG is None else memory_BWG.flatten(0, -2)
        memory = self.memory(n.flatten(0, -2), before).view(*n.shape[:-1], self.gate_hidden)
        return self.commit(memory).squeeze(-1), memory
