"""The trainable parts of the loop against their formulas, and how they start."""

import pytest
import torch
import torch.nn.functional as F

from kimi_recursive.model.cells import INITIAL_COMMIT_BIAS, BoundaryHead, LatentToken, RefineCell

D, S, LENGTH = 16, 4, 6
# The stream at its usual size, and so small that the norm's epsilon decides.
SCALES = [1.0, 1e-3]


def stream(scale: float, seed: int = 0) -> torch.Tensor:
    """[2, 3, D]"""
    return torch.randn(2, 3, D, generator=torch.Generator().manual_seed(seed)) * scale


def normed(x: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def size(x: torch.Tensor) -> torch.Tensor:
    return x.square().mean(-1, keepdim=True).sqrt()


@torch.no_grad()
@pytest.mark.parametrize("scale", SCALES)
def test_a_refine_cell_is_its_formula(scale):
    torch.manual_seed(0)
    cell, h, state = RefineCell(D, S), stream(scale), torch.rand(2, 3, S)
    assert torch.equal(cell(h, None)[0], h), "a fresh cell does nothing"
    cell.out.weight.normal_()
    for before in (None, state):
        refined, after = cell(h, before)
        n, zero = normed(h), torch.zeros(2, 3, S)
        flat = (n.reshape(6, D), (zero if before is None else before).reshape(6, S))
        torch.testing.assert_close(after, cell.gru(*flat).reshape(2, 3, S))
        update = cell.out(F.silu(cell.inp(torch.cat([n, after], 2))))
        torch.testing.assert_close(refined, h + size(h) * update)


@torch.no_grad()
@pytest.mark.parametrize("scale", SCALES)
def test_the_latent_token_is_its_formula(scale):
    torch.manual_seed(0)
    latent, e, h = LatentToken(D), stream(scale), stream(scale, 1)
    assert torch.equal(latent(e, h), e), "a fresh one does nothing"
    assert 0.01 < latent.z.std() < 0.04
    latent.proj.weight.normal_()
    expected = e + size(e) * (normed(h) + latent.z) @ latent.proj.weight.T
    torch.testing.assert_close(latent(e, h), expected)


@torch.no_grad()
@pytest.mark.parametrize("scale", SCALES)
def test_the_boundary_head_reads_the_last_position(scale):
    torch.manual_seed(0)
    head, h = BoundaryHead(D, 8, LENGTH), stream(scale)
    assert float(head.commit.bias) == INITIAL_COMMIT_BIAS < 0
    p_commit, log_length = head(h)
    hidden = F.silu(head.hidden(normed(h[:, 2])))
    torch.testing.assert_close(p_commit, head.commit(hidden)[:, 0].sigmoid())
    torch.testing.assert_close(log_length, head.length(hidden).log_softmax(1))
    assert p_commit.shape == (2,) and log_length.shape == (2, LENGTH + 1)
    torch.testing.assert_close(head.scores(h)[0], head.commit(hidden)[:, 0])


def test_gradients_do_not_flow_through_the_size_of_the_stream():
    torch.manual_seed(0)
    cell, h = RefineCell(D, S), stream(1.0)
    torch.nn.init.normal_(cell.out.weight)
    fixed = size(h)
    a, b = h.clone().requires_grad_(), h.clone().requires_grad_()
    cell(a, None)[0].square().sum().backward()
    n = normed(b)
    state = cell.gru(n.reshape(6, D)).reshape(2, 3, S)
    update = cell.out(F.silu(cell.inp(torch.cat([n, state], 2))))
    (b + fixed * update).square().sum().backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)
