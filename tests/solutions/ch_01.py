"""Chapter 01's exercises, solved; and wrong answers that look right."""

import torch


def attend_to_window(q, k, v, window):
    scores = q @ k.T / q.shape[1] ** 0.5
    ones = torch.ones_like(scores)
    is_hidden = ones.triu(diagonal=1).bool() | ones.tril(diagonal=-window).bool()
    return scores.masked_fill(is_hidden, float("-inf")).softmax(dim=-1) @ v


def rotate(x, place, theta):
    half = len(x) // 2
    angles = place * theta ** (-2 * torch.arange(half) / len(x))
    a, b = x[:half], x[half:]
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()])


def choose_experts(scores, top_k):
    shares, chosen = scores.softmax(dim=-1).topk(top_k)
    return dict(zip(chosen.tolist(), (shares / shares.sum()).tolist()))


def one_too_many(q, k, v, window):
    return attend_to_window(q, k, v, window + 1)


def neighbours(x, place, theta):  # pairs of neighbouring channels
    turned = rotate(torch.cat([x[::2], x[1::2]]), place, theta).view(2, -1)
    return turned.T.flatten()


def without_renormalizing(scores, top_k):
    shares, chosen = scores.softmax(dim=-1).topk(top_k)
    return dict(zip(chosen.tolist(), shares.tolist()))


WRONG = {"attend_to_window": one_too_many, "rotate": neighbours, "choose_experts": without_renormalizing}
