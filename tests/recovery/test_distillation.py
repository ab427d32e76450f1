"""The distillation loss against float64 autograd on all logits."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hqqplus.errors import UserError
from hqqplus.recovery import distillation
from hqqplus.recovery.distillation import (
    Distillation,
    FullTargets,
    Head,
    LossWeights,
    TopTargets,
    distillation_loss,
    log1mexp,
    supervised,
)

N, D, V = 11, 8, 23
KL = LossWeights(kl=1.0, ce=0.0, hidden=0.0)
MIXED = LossWeights(kl=0.7, ce=0.4, hidden=0.3)


def problem(
    dtype: torch.dtype = torch.float64, seed: int = 0, **head: Any
) -> tuple[Tensor, Head, Tensor, FullTargets]:
    """Hidden states of a student, its head, labels, and a parent (with a head of its own) that is not too near."""
    made = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=made, dtype=torch.float64).to(dtype)

    own = Head(normal(V, D), normal(V), **head)
    parent = FullTargets(normal(N, D), Head(normal(V, D), None, **head))
    return normal(N, D).requires_grad_(), own, torch.randint(V, (N,), generator=made), parent


def plain_logits(hidden: Tensor, head: Head) -> Tensor:
    logits = hidden @ head.weight.T
    if head.bias is not None:
        logits = logits + head.bias
    logits = logits * head.scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def top_of(parent: FullTargets, k: int) -> TopTargets:
    log_p = plain_logits(parent.hidden, parent.head).log_softmax(-1)
    top = log_p.topk(k, -1)
    return TopTargets(top.indices.int(), top.values)


def reference(
    hidden: Tensor, head: Head, labels: Tensor, targets: Any, weights: LossWeights, num_items: int
) -> Tensor:
    """The same, on all logits at once, by autograd."""
    log_q = plain_logits(hidden, head).log_softmax(-1)
    ce = -log_q.gather(-1, labels[:, None]).sum()
    relative = torch.zeros(())
    if isinstance(targets, TopTargets):
        p, ids = targets.log_probs.exp(), targets.ids.long()
        q = log_q.exp().gather(-1, ids)
        kl = (p * (p.log() - q.log())).sum()
        if ids.shape[1] < log_q.shape[1]:
            p_rest, q_rest = 1 - p.sum(-1), 1 - q.sum(-1)
            kl = kl + (p_rest * (p_rest.log() - q_rest.log())).sum()
    else:
        log_p = plain_logits(targets.hidden, targets.head).log_softmax(-1)
        kl = (log_p.exp() * (log_p - log_q)).sum()
        relative = ((hidden - targets.hidden) ** 2).mean(-1) / (targets.hidden**2).mean(-1)
    return (weights.kl * kl + weights.ce * ce + weights.hidden * relative.sum()) / num_items


@pytest.mark.parametrize("head", [{}, {"scale": 0.4}, {"softcap": 3.0}, {"scale": 1.7, "softcap": 2.0}])
@pytest.mark.parametrize("k", [None, 1, 5, V - 1, V])
@pytest.mark.parametrize("chunk", [1, 4, None])
def test_loss_and_gradients_are_those_of_autograd_on_all_logits(
    head: dict[str, float], k: int | None, chunk: int | None
) -> None:
    hidden, own, labels, parent = problem(**head)
    assert own.bias is not None
    leaves = [hidden, own.weight.requires_grad_(), own.bias.requires_grad_()]
    targets: Any = parent if k is None else top_of(parent, k)
    weights = MIXED if k is None else LossWeights(kl=0.7, ce=0.4, hidden=0.0)
    found = distillation_loss(hidden, own, labels, targets, weights, 7, chunk)
    expected = reference(hidden, own, labels, targets, weights, 7)
    torch.testing.assert_close(found.loss, expected, rtol=1e-11, atol=1e-12)
    for ours, theirs in zip(
        torch.autograd.grad(found.loss * 3, leaves), torch.autograd.grad(expected * 3, leaves), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
    parts = weights.kl * found.kl + weights.ce * found.ce + weights.hidden * found.hidden
    torch.testing.assert_close(parts / 7, expected.detach(), rtol=1e-11, atol=1e-12)
    assert not parts.requires_grad
    assert found.positions == N
    assert int(found.correct) == int((plain_logits(hidden, own).argmax(-1) == labels).sum())


@given(st.integers(0, 10_000), st.integers(1, V - 1), st.floats(0.01, 20))
def test_kl_with_a_rest_is_positive_grows_with_k_and_ends_at_the_full_kl(seed: int, k: int, sharpness: float) -> None:
    hidden, own, labels, parent = problem(seed=seed, scale=sharpness)
    hidden = hidden.detach()
    kls = [
        float(distillation_loss(hidden, own, labels, top_of(parent, size), KL).kl)
        for size in sorted({1, k, k + 1, V - 1, V})
    ]
    full = float(distillation_loss(hidden, own, labels, parent, KL).kl)
    # Outcomes lumped together can only hide a difference; one lumped with none hides nothing.
    assert kls[0] >= -1e-9
    assert all(below <= above + 1e-9 * max(1, above) for below, above in itertools.pairwise(kls))
    assert kls[-1] == pytest.approx(full, rel=1e-8, abs=1e-9)
    assert kls[-2] == pytest.approx(full, rel=1e-6, abs=1e-7)


def test_kl_to_itself_is_zero_and_so_is_its_gradient() -> None:
    _, _, labels, parent = problem(torch.float32)
    hidden = parent.hidden.clone().requires_grad_()
    for targets in (parent, top_of(parent, 4)):
        found = distillation_loss(hidden, parent.head, labels, targets, KL)
        assert abs(float(found.kl)) < 1e-5
        (grad,) = torch.autograd.grad(found.loss, hidden)
        assert grad.abs().max() < 1e-6


def test_a_kl_over_the_top_k_alone_is_biased_and_ours_is_not() -> None:
    """Minimised from the parent's own distribution, the one drives the rest to nothing, the other stays."""
    _, _, labels, parent = problem()
    targets, one = top_of(parent, 3), torch.eye(V, dtype=torch.float64)
    parent_p = plain_logits(parent.hidden, parent.head).softmax(-1)
    rest = 1 - parent_p.gather(-1, targets.ids.long()).sum(-1)
    assert rest.min() > 0.001
    found = {}
    for name in ("ours", "plain"):
        # Its "hidden states" are the logits themselves.
        logits = plain_logits(parent.hidden, parent.head).detach().clone().requires_grad_()
        optimizer = torch.optim.SGD([logits], lr=20.0)
        for _ in range(300):
            optimizer.zero_grad()
            if name == "ours":
                loss = distillation_loss(logits, Head(one), labels, targets, KL).loss
            else:
                q = logits.log_softmax(-1).gather(-1, targets.ids.long())
                loss = (targets.log_probs.exp() * (targets.log_probs - q)).sum() / N
            loss.backward()
            optimizer.step()
        found[name] = 1 - logits.detach().softmax(-1).gather(-1, targets.ids.long()).sum(-1)
    torch.testing.assert_close(found["ours"], rest, rtol=1e-6, atol=1e-9)
    assert (found["plain"] < rest).all()
    assert found["plain"].sum() < 0.1 * rest.sum()


def test_probabilities_that_rounding_made_too_large_are_no_negative_kl() -> None:
    hidden, own, labels, parent = problem()
    exact = top_of(parent, V - 1)
    for log_probs in (exact.log_probs + 1e-3, exact.log_probs.half()):
        for targets in (TopTargets(exact.ids, log_probs), TopTargets(exact.ids[:, :1] * 0, log_probs[:, :1] * 0)):
            found = distillation_loss(hidden, own, labels, targets, KL)
            assert torch.isfinite(found.loss)
            assert float(found.kl) >= 0
            assert torch.isfinite(torch.autograd.grad(found.loss, hidden)[0]).all()
    sure = TopTargets(labels[:, None], torch.zeros(N, 1))
    found = distillation_loss(hidden, own, labels, sure, KL)
    assert float(found.kl) == pytest.approx(float(found.ce)), "a parent that is sure of the label is the label"


def test_extreme_logits_stay_finite() -> None:
    """Logits of hundreds: where probabilities are 0 in float32 their logarithms are not."""
    hidden, own, labels, parent = problem(torch.float32, scale=200.0)
    for targets in (parent, top_of(parent, 2), top_of(FullTargets(hidden.detach(), own), 2)):
        found = distillation_loss(hidden, own, labels, targets, LossWeights(1, 1, 0))
        assert torch.isfinite(found.loss)
        assert torch.isfinite(torch.autograd.grad(found.loss, hidden)[0]).all()


def test_half_precision_models_lose_nothing_but_their_own_rounding() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        hidden, own, labels, parent = problem(dtype)
        found = distillation_loss(hidden, own, labels, parent, MIXED)
        assert found.loss.dtype == torch.float32
        exact = hidden.detach().double().requires_grad_()
        heads = [Head(h.weight.double(), None if h.bias is None else h.bias.double()) for h in (own, parent.head)]
        expected = reference(exact, heads[0], labels, FullTargets(parent.hidden.double(), heads[1]), MIXED, N)
        assert float(found.loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
        (grad,), (theirs,) = torch.autograd.grad(found.loss, hidden), torch.autograd.grad(expected, exact)
        assert grad.dtype == dtype
        torch.testing.assert_close(grad.double(), theirs, rtol=0.05, atol=0.02 * float(theirs.abs().max()))


@pytest.mark.gpu
def test_on_a_gpu_it_is_what_it_is_on_a_cpu() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        hidden, own, labels, parent = problem(dtype)
        there = hidden.detach().cuda().requires_grad_()
        heads = [Head(h.weight.cuda(), None if h.bias is None else h.bias.cuda()) for h in (own, parent.head)]
        k = top_of(FullTargets(parent.hidden.float(), Head(parent.head.weight.float())), 5)
        for targets, moved, weights in (
            (parent, FullTargets(parent.hidden.cuda(), heads[1]), MIXED),
            (k, TopTargets(k.ids.cuda(), k.log_probs.cuda()), KL),
        ):
            ours = distillation_loss(there, heads[0], labels.cuda(), moved, weights, chunk_tokens=4)
            theirs = distillation_loss(hidden, own, labels, targets, weights)
            assert float(ours.loss.detach()) == pytest.approx(float(theirs.loss.detach()), rel=1e-4)
            (grad,), (expected,) = torch.autograd.grad(ours.loss, there), torch.autograd.grad(theirs.loss, hidden)
            largest = float(expected.abs().max())
            torch.testing.assert_close(grad.cpu().float(), expected.float(), rtol=0.05, atol=0.02 * largest)


def test_it_is_the_same_under_autocast_and_needs_no_gradient() -> None:
    hidden, own, labels, parent = problem(torch.float32)
    plain = distillation_loss(hidden, own, labels, parent, MIXED).loss
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(distillation_loss(hidden, own, labels, parent, MIXED).loss, plain)
    with torch.no_grad():
        without = distillation_loss(hidden, own, labels, parent, MIXED).loss
    assert not without.requires_grad
    torch.testing.assert_close(without, plain.detach())


def test_batches_cut_into_smaller_ones_add_up() -> None:
    hidden, own, labels, parent = problem()
    whole = distillation_loss(hidden, own, labels, parent, MIXED, N).loss
    parts = [
        distillation_loss(
            hidden[part], own, labels[part], FullTargets(parent.hidden[part], parent.head), MIXED, torch.tensor(N)
        ).loss
        for part in (slice(0, 3), slice(3, 3), slice(3, N))
    ]
    torch.testing.assert_close(sum(parts), whole)
    (grad,), (theirs,) = torch.autograd.grad(sum(parts), hidden), torch.autograd.grad(whole, hidden)  # type: ignore[arg-type]
    torch.testing.assert_close(grad, theirs)


def test_no_position_at_all_is_a_zero_that_can_be_differentiated() -> None:
    hidden, own, labels, parent = problem()
    targets = FullTargets(parent.hidden[:0], parent.head)
    found = distillation_loss(hidden[:0], own, labels[:0], targets, MIXED, 0)
    (grad,) = torch.autograd.grad(found.loss, hidden)
    assert float(found.loss.detach()) == 0
    assert not grad.any()


def test_nothing_of_the_size_of_the_vocabulary_is_kept_and_chunks_stay_small() -> None:
    """100 positions of 4096 tokens, 2 at a time: no tensor has more than 2 rows of logits."""
    largest: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            # The head itself, transposed, is [8, 4096].
            if isinstance(result, Tensor) and result.shape[-1:] == (4096,) and result.shape[0] != 8:
                largest.append(result.numel())
            return result

    hidden, weight = torch.randn(100, 8, requires_grad=True), torch.randn(4096, 8)
    parent = FullTargets(torch.randn(100, 8), Head(torch.randn(4096, 8)))
    with Watch():
        found = distillation_loss(hidden, Head(weight), torch.arange(100), parent, MIXED, chunk_tokens=2)
    assert max(largest) == 2 * 4096
    saved = found.loss.grad_fn.next_functions[0][0].saved_tensors  # type: ignore[union-attr]
    assert sum(tensor.numel() for tensor in saved if tensor is not None) == hidden.numel()
    assert 2**24 * 4 == distillation._CHUNK_ELEMENTS * 4 == 64 * 2**20


@given(st.floats(-50, -1e-9))
def test_log1mexp_is_exact_at_both_ends(x: float) -> None:
    import math

    expected = math.log(-math.expm1(x)) if x > -1 else math.log1p(-math.exp(x))
    assert float(log1mexp(torch.tensor(x, dtype=torch.float64))) == pytest.approx(expected, rel=1e-12, abs=1e-300)
    assert float(log1mexp(torch.tensor(x, dtype=torch.float32))) == pytest.approx(expected, rel=1e-5, abs=1e-30)


def test_which_positions_count() -> None:
    labels = torch.tensor([[5, -100, 7, 8], [-100, -100, -100, 9]])
    assert supervised(labels).tolist() == [[False, True, True], [False, False, True]]


def test_what_does_not_fit_together_is_refused() -> None:
    hidden, own, labels, parent = problem()
    with pytest.raises(ValueError, match="targets of 10 positions for 11"):
        distillation_loss(hidden, own, labels, FullTargets(parent.hidden[1:], parent.head), MIXED)
    with pytest.raises(ValueError, match="the parent has 22 tokens, the student 23"):
        distillation_loss(hidden, own, labels, FullTargets(parent.hidden, Head(own.weight[1:])), KL)
    with pytest.raises(ValueError, match="no hidden states"):
        distillation_loss(hidden, own, labels, top_of(parent, 3), MIXED)
    with pytest.raises(ValueError, match="no targets"):
        distillation_loss(hidden, own, labels, None, KL)
    with pytest.raises(ValueError, match="labels of shape"):
        distillation_loss(hidden, own, labels[1:], parent, KL)
    plain = distillation_loss(hidden, own, labels, None, LossWeights(0, 1, 0)).loss
    torch.testing.assert_close(plain, torch.nn.functional.cross_entropy(plain_logits(hidden, own), labels))
    with pytest.raises(UserError, match="weight of ce is -1"):
        LossWeights(ce=-1)
    with pytest.raises(UserError, match="all 0"):
        LossWeights(0, 0, 0)

    class Cache:
        has_hidden = False

    with pytest.raises(UserError, match="hidden states are not cached"):
        Distillation(MIXED, Cache())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "settings", "scale", "softcap"),
    [
        ("llama", {}, 1.0, None),
        ("gemma2", {"final_logit_softcapping": 5.0, "head_dim": 8}, 1.0, 5.0),
        ("cohere", {"logit_scale": 0.25}, 0.25, None),
        ("granite", {"logits_scaling": 8.0}, 0.125, None),
    ],
)
def test_the_head_of_a_model_makes_the_models_logits(
    kind: str, settings: dict[str, Any], scale: float, softcap: float | None
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = {
        "vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **settings)).eval()
    head = Head.of(model)
    assert (head.scale, head.softcap) == (scale, softcap)
    ids = torch.randint(40, (1, 9))
    with torch.no_grad():
        hidden = model.base_model(input_ids=ids).last_hidden_state[0]
        torch.testing.assert_close(head.logits(hidden), model(input_ids=ids).logits[0], rtol=1e-5, atol=1e-6)
