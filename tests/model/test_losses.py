"""Draft-repair: corruption, the six losses by hand, and where gradients go."""

import math

import pytest
import torch
import torch.nn.functional as F
from models import adapted, make_base, make_wrapper, perturb, random_ids

from kimi_recursive import RecursiveConfig
from kimi_recursive.data.windows import IGNORED
from kimi_recursive.training.batches import Batch
from kimi_recursive.training.draft import Draw, corrupt, corruption_rate_at, edit
from kimi_recursive.training.objective import (
    DraftRepair,
    chunk_losses,
)


@pytest.mark.parametrize(
    ("schedule", "middle", "last"), [("linear", 0.2, 0.1), ("cosine", 0.2, 0.1), ("none", 0.3, 0.3)]
)
def test_corruption_schedules(schedule, middle, last):
    config = RecursiveConfig(corruption_schedule=schedule)
    at = [corruption_rate_at(config, p) for p in (0.0, 0.5, 1.0)]
    assert at == pytest.approx([0.3, middle, last])
    quarter = corruption_rate_at(config, 0.25)
    expected = {"linear": 0.25, "cosine": 0.1 + 0.1 * (1 + math.cos(math.pi / 4)), "none": 0.3}
    assert quarter == pytest.approx(expected[schedule])


def test_corruption_touches_editable_inputs_only_at_the_given_rate_and_from_the_given_source():
    tokens = random_ids(400, 33)
    predicted = torch.full((400, 32), 96)
    generator = torch.Generator().manual_seed(0)
    chunk = Batch.of_windows(tokens)
    draft = corrupt(chunk, predicted, Draw(0, 0.3, 0.0, generator), 0.5, 97)
    assert torch.equal(draft.targets, tokens[:, 1:])
    assert torch.equal(draft.inputs[:, 0], tokens[:, 0]), "the token before the draft is committed"
    slots_changed = draft.inputs[:, 1:] != tokens[:, 1:-1]
    assert not (slots_changed & ~draft.editable[:, :-1]).any()
    share = slots_changed.sum() / draft.editable[:, :-1].sum()
    assert 0.27 < share < 0.32
    own = (draft.inputs[:, 1:] == 96) & slots_changed
    assert 0.45 < own.sum() / slots_changed.sum() < 0.55
    lengths = draft.editable.sum(1)
    assert draft.editable[:, -1].all() and lengths.min() == 1 and lengths.max() == 32
    fresh = torch.Generator().manual_seed(0)
    again = corrupt(chunk, predicted, Draw(0, 0.3, 0.0, fresh), 0.5, 97)
    assert torch.equal(again.inputs, draft.inputs)
    untouched = corrupt(chunk, predicted, Draw(0, 0.0, 0.0, generator), 0.5, 97)
    assert torch.equal(untouched.inputs, tokens[:, :-1])


def test_edit_moves_predictions_one_position_to_the_right():
    inputs = torch.tensor([[10, 11, 12, 13]])
    predicted = torch.tensor([[21, 22, 23, 24]])
    editable = torch.tensor([[False, True, True, True]])
    assert edit(inputs, predicted, editable).tolist() == [[10, 11, 22, 23]]
    assert edit(inputs, predicted, ~editable).tolist() == [[10, 21, 12, 13]]


def setup(kind="kimi", **changes):
    """A perturbed wrapper, a chunk after a prefix of 5, and its draft."""
    wrapper = perturb(make_wrapper(make_base(kind).requires_grad_(False), **changes))
    tokens = random_ids(3, 5 + 9)
    prefix = wrapper.encode(tokens[:, :5], wrapper.new_cache())
    gold = tokens[:, 5:]
    predicted = random_ids(3, 8, seed=4)
    drawn = Draw(0, 0.4, 0.0, torch.Generator().manual_seed(1))
    draft = corrupt(Batch.of_windows(gold), predicted, drawn, 0.5, 97)
    return wrapper, wrapper.start_chunk(draft.inputs, prefix), draft


@torch.no_grad()
def test_losses_equal_a_computation_by_hand():
    wrapper, chunk, draft = setup(max_inner_steps=3)
    losses = chunk_losses(wrapper, chunk, draft)
    states = list(wrapper.steps(chunk))[1:]
    logp = [s.logits.log_softmax(-1) for s in states]
    ce = [-lp.gather(-1, draft.targets[..., None]).squeeze(-1) for lp in logp]
    torch.testing.assert_close(losses["final"], ce[2].mean())
    masked = [(c[draft.editable]).mean() for c in ce[:2]]
    torch.testing.assert_close(losses["masked"], torch.stack(masked).mean())
    kl = [(logp[t - 1].exp() * (logp[t - 1] - logp[t])).sum(-1)[~draft.editable].mean()
          for t in (1, 2)]  # fmt: skip
    torch.testing.assert_close(losses["stability"], torch.stack(kl).mean())
    p = [wrapper.boundary(s.h_top)[0] for s in states[:2]]
    done = [(ce[t].mean(1) - ce[t + 1].mean(1) <= 0.005).float() for t in (0, 1)]
    bce = [F.binary_cross_entropy(p[t], done[t]) for t in (0, 1)]
    torch.testing.assert_close(losses["halt"], torch.stack(bce).mean())
    steps = p[0] * 1 + (1 - p[0]) * p[1] * 2 + (1 - p[0]) * (1 - p[1]) * 3
    torch.testing.assert_close(losses["ponder"], steps.mean())
    log_length = wrapper.boundary(states[2].h_top)[1]
    runs = []
    for row in range(3):
        correct = (states[2].logits[row].argmax(-1) == draft.targets[row]).tolist()
        runs.append(correct.index(False) if False in correct else 8)
    expected = torch.stack([-log_length[row, run] for row, run in enumerate(runs)]).mean()
    torch.testing.assert_close(losses["len"], expected)


@torch.no_grad()
def test_the_length_target_counts_the_leading_run():
    wrapper, chunk, draft = setup()
    last = list(wrapper.steps(chunk))[-1].logits.argmax(-1)
    draft.targets[:] = last
    draft.targets[0, 5] = (draft.targets[0, 5] + 1) % 97  # run of 5 in row 0, 8 in the others
    wrapper.boundary.length.bias.fill_(-50.0)
    wrapper.boundary.length.bias[5] = 50.0
    assert chunk_losses(wrapper, chunk, draft)["len"] > 50  # rows 1 and 2 are far off
    draft.targets[:, 5] = (last[:, 5] + 1) % 97
    assert chunk_losses(wrapper, chunk, draft)["len"] < 1e-3


def test_drafts_are_edited_between_steps_only_when_generation_does_so():
    seen = []

    def record(wrapper, chunk, draft):
        refine, seen[:] = wrapper.refine, []
        wrapper.refine = lambda c, ids=None: seen.append(ids.clone()) or refine(c, ids)
        chunk_losses(wrapper, chunk, draft)

    record(*setup())
    assert all(torch.equal(ids, seen[0]) for ids in seen)
    wrapper, chunk, draft = setup(commit="learned")
    record(wrapper, chunk, draft)
    first = wrapper.__class__.refine(wrapper, chunk, draft.inputs)
    assert torch.equal(seen[1], edit(draft.inputs, first.logits.argmax(-1), draft.editable))
    assert not torch.equal(seen[1], seen[0])


def test_every_loss_has_a_gradient_where_it_should():
    wrapper, chunk, draft = setup()
    wrapper.base.requires_grad_(False)
    losses = chunk_losses(wrapper, chunk, draft)
    assert set(losses) == {"final", "masked", "halt", "len", "ponder", "stability"}
    cells, heads = wrapper.refine_cells[0].out.weight, wrapper.boundary.hidden.weight
    for name, loss in losses.items():
        assert torch.isfinite(loss) and loss > 0, name
        grads = torch.autograd.grad(loss, [cells, heads], retain_graph=True, allow_unused=True)
        of_the_head = name in ("halt", "len", "ponder")
        assert (grads[0] is None) == of_the_head, name
        assert (grads[1] is None) == (not of_the_head), name


@pytest.mark.parametrize("feedback", [False, True])
def test_backprop_steps_truncates(feedback):
    def cell_gradient(steps):
        path = {"use_latent_token": False, "use_token_feedback": feedback}
        wrapper, chunk, draft = setup(backprop_steps=steps, **path)
        wrapper.base.requires_grad_(False)
        chunk_losses(wrapper, chunk, draft)["final"].backward()
        return wrapper.refine_cells[0].gru.weight_hh.grad, wrapper

    full, _ = cell_gradient(None)
    assert torch.equal(cell_gradient(3)[0], full)
    truncated, _ = cell_gradient(1)
    assert truncated.abs().max() > 0 and not torch.allclose(truncated, full)


def test_one_step_has_no_earlier_step():
    wrapper, chunk, draft = setup(max_inner_steps=1)
    losses = chunk_losses(wrapper, chunk, draft)
    assert losses["masked"] == losses["halt"] == losses["stability"] == 0
    assert losses["ponder"] == 1


def test_the_objective_is_a_pure_function_of_seed_and_step_and_the_weighted_sum():
    base = make_base("kimi")
    base.requires_grad_(False)
    wrapper = perturb(make_wrapper(base))
    windows = random_ids(2, 33)
    objective = DraftRepair(wrapper, num_steps=10, own_share=0.5, seed=3)
    total, parts = objective(Batch.of_windows(windows), 4)
    assert torch.equal(objective(Batch.of_windows(windows), 4)[0], total)
    assert not torch.equal(objective(Batch.of_windows(windows), 5)[0], total)
    weights = {"final": 1, "masked": 0.5, "halt": 0.5, "len": 0.05, "ponder": 0.01,
               "stability": 0.01}  # fmt: skip
    expected = sum(w * parts[f"loss_{k}"] for k, w in weights.items())
    torch.testing.assert_close(total.detach(), expected)
    assert parts["tokens"] == 16
    assert parts["corruption_rate"] == pytest.approx(0.3 - 0.2 * 4 / 9)


@pytest.mark.parametrize(
    ("single_pass", "rate", "trains", "num_passes"),
    [(False, 0.0, False, 1), (False, 0.3, False, 2), (False, 0.0, True, 2),
     (True, 0.3, False, 1), (True, 0.3, True, 1)],
)  # fmt: skip
def test_step_0_is_read_again_only_where_that_says_something_new(
    single_pass, rate, trains, num_passes
):
    """What is not needed would cost FLOPs that the matched arm would be given, too."""
    rates = {"corruption_rate": rate, "corruption_rate_final": rate}
    steps = {"single_pass": True, "max_inner_steps": 1} if single_pass else {}
    wrapper = make_wrapper(make_base("llama"), **rates, **steps)
    wrapper.base.requires_grad_(trains)
    start_chunk, passes = wrapper.start_chunk, []
    wrapper.start_chunk = lambda *a, **k: passes.append(1) or start_chunk(*a, **k)
    DraftRepair(wrapper, 10, 0.5, seed=0)(Batch.of_windows(random_ids(1, 33)), 0)
    assert len(passes) == num_passes


def test_chunks_are_drawn_from_the_whole_grid():
    wrapper = make_wrapper(make_base("llama"))
    objective, encode, starts = DraftRepair(wrapper, 10, 0.5, seed=0), wrapper.encode, []
    assert {
        objective.draw(Batch.of_windows(random_ids(1, 33)), step).start for step in range(30)
    } == {0, 8, 16, 24}
    wrapper.encode = lambda ids, *a: starts.append(ids.shape[1]) or encode(ids, *a)
    for step in range(3):
        objective(Batch.of_windows(random_ids(1, 33)), step)
    assert (
        starts
        == [objective.draw(Batch.of_windows(random_ids(1, 33)), step).start for step in range(3)]
        and max(starts) > 0
    )


# ---- with a base that trains -------------------------------------------------------------------


def test_scheduled_sampling_takes_the_models_own_draft():
    tokens, predicted = random_ids(400, 33), torch.full((400, 32), 96)

    def draft(rate, sampling):
        generator = torch.Generator().manual_seed(0)
        drawn = Draw(0, rate, sampling, generator)
        return corrupt(Batch.of_windows(tokens), predicted, drawn, 0.0, 96)

    drafted = draft(0.0, 0.25)
    changed = drafted.inputs[:, 1:] != tokens[:, 1:-1]
    assert not (changed & ~drafted.editable[:, :-1]).any()
    assert (drafted.inputs[:, 1:][changed] == 96).all()
    assert 0.23 < changed.sum() / drafted.editable[:, :-1].sum() < 0.27
    both, alone = draft(0.3, 0.25), draft(0.3, 0.0)
    random_ones = alone.inputs != tokens[:, :-1]
    assert torch.equal(both.inputs[random_ones], alone.inputs[random_ones]), "what was corrupted is"
    assert (both.inputs[:, 1:] == 96).sum() > 0.2 * 0.5 * changed.numel() * 0.7


def test_the_share_of_own_tokens_grows_from_zero():
    wrapper = make_wrapper(make_base("llama"), corruption_rate=0.0, corruption_rate_final=0.0)
    objective = DraftRepair(wrapper, 5, 0.5, seed=0, scheduled_sampling=0.4)
    batch = Batch.of_windows(random_ids(1, 17))
    assert [objective.draw(batch, s).sampling for s in range(5)] == pytest.approx(
        [0, 0.1, 0.2, 0.3, 0.4]
    )
    assert objective.draw(batch, 0).clean and not objective.draw(batch, 1).clean


def gradients(wrapper, loss) -> dict[str, torch.Tensor]:
    named = {n: p for n, p in wrapper.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True, retain_graph=True)
    return dict(zip(named, found, strict=True))


def trainable(wrapper):
    wrapper.base.requires_grad_(False)
    for parameter in wrapper.adapter.lora_parameters().values():
        parameter.requires_grad_(True)
    for parameter in wrapper.adapter.layer_parameters().values():
        parameter.requires_grad_(True)
    return wrapper


def test_step_0_is_supervised_and_part_of_the_loop_where_the_base_trains():
    wrapper = trainable(adapted(make_base("llama"), std=0.05))
    wrapper.config.lambda_len = 0.0
    windows = random_ids(2, 17)
    objective = DraftRepair(wrapper, 4, 0.5, seed=0)
    seen = {}
    import kimi_recursive.training.objective as module

    real = module.chunk_losses
    try:
        module.chunk_losses = lambda w, c, d, *s: seen.update(chunk=c, draft=d) or real(w, c, d, *s)
        objective(Batch.of_windows(windows), 2)
    finally:
        module.chunk_losses = real
    chunk, draft = seen["chunk"], seen["draft"]
    assert chunk.logits.requires_grad
    with_step_0 = chunk_losses(wrapper, chunk, draft, trains_step_0=True)["masked"]
    without = chunk_losses(wrapper, chunk, draft)["masked"]
    ce = torch.nn.functional.cross_entropy(
        chunk.logits.transpose(1, 2), draft.targets, reduction="none"
    )
    step_0 = (ce * draft.editable).sum() / draft.editable.sum()
    torch.testing.assert_close(with_step_0, (step_0 + 2 * without) / 3)  # K = 3: steps 1 and 2
    final = chunk_losses(wrapper, chunk, draft)["final"]
    through = gradients(wrapper, final)
    wrapper.config.backprop_steps = 3
    cut = gradients(wrapper, chunk_losses(wrapper, chunk, draft)["final"])
    name = next(n for n in through if "lora_B" in n)
    assert cut[name].abs().max() > 0 and not torch.allclose(cut[name], through[name])


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_step_0_trains_on_clean_and_on_corrupted_drafts(rate):
    """With one inner step, `masked` is the loss of step 0 alone."""
    base = make_base("llama")
    wrapper = trainable(adapted(base, max_inner_steps=1))
    wrapper.config.corruption_rate = wrapper.config.corruption_rate_final = rate

    def loss():
        return DraftRepair(wrapper, 4, 0.5, seed=0)(Batch.of_windows(random_ids(2, 17)), 2)[0]

    with_it = loss()
    with torch.no_grad():
        torch.testing.assert_close(loss(), with_it.detach())  # the same with and without gradients
    name = next(n for n, p in wrapper.named_parameters() if p.requires_grad and "lora_B" in n)
    gradient = gradients(wrapper, with_it)[name]
    wrapper.config.lambda_masked = 0.0
    assert not torch.allclose(gradients(wrapper, loss())[name], gradient)


def test_the_pull_is_half_the_squared_distance():
    wrapper = trainable(adapted(make_base("kimi"), layers=[3], std=0.0))
    objective = DraftRepair(wrapper, 4, 0.5, seed=0, pull=0.3)
    windows = random_ids(2, 17)
    total, parts = objective(Batch.of_windows(windows), 1)
    assert parts["loss_pull"] == 0
    weight = wrapper.adapter.layer_parameters()["model.layers.3.self_attn.q_proj.weight"]
    before = wrapper.adapter.pretrained["model.layers.3.self_attn.q_proj.weight"]
    with torch.no_grad():
        weight.add_(0.1)
    assert objective.distance().item() == pytest.approx(0.5 * 0.01 * weight.numel(), rel=1e-4)
    [gradient] = torch.autograd.grad(objective.distance(), [weight])
    torch.testing.assert_close(gradient, weight.detach() - before)
    total, parts = objective(Batch.of_windows(windows), 1)
    names = {"final": 1, "masked": 0.5, "halt": 0.5, "len": 0.05, "ponder": 0.01,
             "stability": 0.01, "pull": 0.3}  # fmt: skip
    expected = sum(w * parts[f"loss_{k}"] for k, w in names.items())
    torch.testing.assert_close(total.detach(), expected)


@torch.no_grad()
def test_only_the_completion_of_a_pair_counts():
    """Losses of a batch padded on both sides equal those of its pairs alone."""
    wrapper = perturb(make_wrapper(make_base("kimi").requires_grad_(False), max_inner_steps=2))
    objective = DraftRepair(wrapper, 5, 0.5, seed=0)
    tokens, none = random_ids(2, 20), IGNORED
    short, long = tokens[0, :8], tokens[1, :14]  # prompts of 5 and 9 tokens
    inputs, targets = torch.zeros(2, 16, dtype=torch.long), torch.full((2, 16), none)
    mask = torch.ones(2, 16, dtype=torch.bool)
    for row, (pair, prompt) in enumerate(((short, 5), (long, 9))):
        at = 8 - (prompt - 1)
        inputs[row, at : at + len(pair) - 1] = pair[:-1]
        targets[row, 8 : 8 + len(pair) - prompt] = pair[prompt:]
        mask[row, :at] = False
    pairs = Batch(inputs, targets, mask, 8, torch.tensor([3, 5]))
    _, parts = objective(pairs, 0)
    sums = torch.zeros(3)
    for pair, prompt in ((short, 5), (long, 9)):
        chunk = next(wrapper.chunks(pair[None, :-1], chunk_start=prompt - 1))
        states = list(wrapper.steps(chunk))
        gold = pair[None, prompt:]
        for t in (1, 2):
            sums[t] += F.cross_entropy(states[t].logits[0], gold[0], reduction="sum")
    assert parts["tokens"] == 3 + 5
    torch.testing.assert_close(parts["loss_final"], sums[2] / 8)
    halves = [objective(pairs.rows(slice(i, i + 1)), 0, (i, 2))[1] for i in (0, 1)]
    assert halves[0]["tokens"] + halves[1]["tokens"] == 8, "of the whole batch"
    mean = (halves[0]["loss_final"] + halves[1]["loss_final"]) / 2
    torch.testing.assert_close(mean, parts["loss_final"])
    targets[:, 8:] = none
    nothing = Batch(inputs, targets, mask, 8, torch.tensor([0, 0]))
    assert torch.isfinite(objective(nothing, 0)[0])


def test_what_is_behind_a_completion_is_neither_corrupted_into_it_nor_run_into():
    inputs, targets = torch.arange(1, 5)[None], torch.tensor([[2, 3, IGNORED, IGNORED]])
    chunk = Batch(inputs, targets, num_targets=torch.tensor([2]))
    drawn = Draw(0, 0.0, 0.0, torch.Generator().manual_seed(0))
    draft = corrupt(chunk, inputs, drawn, 0.5, 9)
    assert draft.counted is not None and draft.counted.tolist() == [[True, True, False, False]]
    assert draft.num_counted == 2 and draft.inputs.tolist() == inputs.tolist()
    for number, slots in (
        (draft.num_editable, draft.editable),
        (draft.num_committed, ~draft.editable),
    ):
        assert number == max(1, draft.among(slots).sum()), "at least one each"
    assert draft.among(torch.ones_like(draft.counted)).tolist() == draft.counted.tolist()
