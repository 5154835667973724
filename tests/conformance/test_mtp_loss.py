"""Multi-token prediction loss (report §2.2, §4.2), one rule a test. The modules themselves: test_mtp."""

import pytest
import torch
import torch.nn.functional as F

from litseek.losses import IGNORE, mtp_labels, mtp_loss
from litseek.optim import Steps

ROW = torch.arange(10, 19)[None]  # t_0 .. t_8: eight places, each with a label
LABELS = ROW[:, 1:]


def states(depths, batch=1, length=8, width=6, vocab=30, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hiddens = [torch.randn(batch, length, width, generator=generator, requires_grad=True) for _ in range(depths)]
    return hiddens, torch.randn(vocab, width, generator=generator, requires_grad=True)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_sec_2_2_depth_k_predicts_the_token_k_plus_1_ahead(depth):
    labels = mtp_labels(LABELS, depth)
    for place in range(8 - depth):
        assert labels[0, place] == ROW[0, place + depth + 1]
    assert labels[0, 8 - depth :].tolist() == [IGNORE] * depth


def test_sec_2_2_depth_beyond_the_sequence_has_no_label():
    assert mtp_labels(LABELS, 8).eq(IGNORE).all() and mtp_labels(LABELS, 20).eq(IGNORE).all()


@pytest.mark.parametrize("depth", [1, 2])
def test_sec_2_2_t_minus_k_terms_are_divided_by_t(depth):
    hiddens, weight = states(depth)
    _, losses = mtp_loss(hiddens, weight, LABELS, targets=8)
    terms = [
        F.cross_entropy(weight @ hiddens[depth - 1][0, i], ROW[0, i + depth + 1], reduction="sum")
        for i in range(8 - depth)
    ]
    assert len(terms) == 8 - depth
    assert float(losses[depth - 1]) == pytest.approx(float(sum(terms)) / 8, rel=1e-5)


def test_sec_2_2_depths_are_averaged():
    hiddens, weight = states(3)
    mean, losses = mtp_loss(hiddens, weight, LABELS, targets=8)
    assert float(mean.detach()) == pytest.approx(sum(map(float, losses)) / 3, rel=1e-6)
    mean.backward()
    assert all(hidden.grad is not None and hidden.grad.abs().sum() > 0 for hidden in hiddens)


def test_sec_2_2_head_is_shared_by_all_depths():
    hiddens, weight = states(2)
    both = torch.autograd.grad(mtp_loss(hiddens, weight, LABELS, 8)[0], weight)[0]
    apart = sum(
        torch.autograd.grad(F.cross_entropy((h @ weight.T)[0], mtp_labels(LABELS, k)[0], reduction="sum"), weight)[0]
        for k, h in enumerate(hiddens, 1)
    )
    torch.testing.assert_close(both, apart / 8 / 2, rtol=1e-4, atol=1e-6)


def test_sec_2_2_packed_documents_run_on_without_isolation():
    assert mtp_labels(LABELS, 1, None)[0, :7].tolist() == LABELS[0, 1:].tolist()


def test_sec_5_1_isolated_documents_are_not_predicted_across():
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2]])
    labels = LABELS.clone()
    labels[0, [2, 6]] = IGNORE  # the last token of a document has no next one
    one, two = mtp_labels(labels, 1, documents)[0], mtp_labels(labels, 2, documents)[0]
    assert one.tolist() == [12, IGNORE, IGNORE, 15, 16, IGNORE, IGNORE, IGNORE]
    assert two.tolist() == [IGNORE, IGNORE, IGNORE, 16, IGNORE, IGNORE, IGNORE, IGNORE]


def test_sec_5_1_a_prompts_last_place_may_predict_into_the_answer():
    labels = LABELS.clone()
    labels[0, :4] = IGNORE  # scored from place 4 on
    assert mtp_labels(labels, 1)[0].tolist() == [IGNORE] * 3 + LABELS[0, 4:].tolist() + [IGNORE]


def test_sec_4_2_lambda_is_03_for_10t_tokens_then_01():
    weight = Steps([0.3, 0.1], [10e12])
    assert [weight(int(t)) for t in (0, 10e12 - 1, 10e12, 14.8e12)] == [0.3, 0.3, 0.1, 0.1]


def test_no_depth_is_an_error_not_a_zero():
    with pytest.raises(ValueError, match="no depth"):
        mtp_loss([], torch.zeros(3, 2), LABELS, 8)
    with pytest.raises(ValueError, match="depth is 0"):
        mtp_labels(LABELS, 0)
