"""Chapter 02's exercises, solved; and wrong answers that look right."""

import torch


def delta_step(memory, k, v, decay, beta):
    memory = decay[:, None] * memory
    return memory + beta * torch.outer(k, v - k @ memory)


def lightning_by_attention(q, k, v, slope):
    places = torch.arange(len(q))
    decay = (-slope * (places[:, None] - places)).exp().tril()
    return (q @ k.T * decay) @ v


def layers_to_keep(budget_bytes, tokens, layers, full_bytes, linear_bytes):
    spare = budget_bytes - layers * linear_bytes
    return -1 if spare < 0 else min(layers, spare // (full_bytes * tokens - linear_bytes))


def sum_only(memory, k, v, decay, beta):  # adds without asking what is stored
    return decay[:, None] * memory + beta * torch.outer(k, v)


def with_softmax(q, k, v, slope):
    return (q @ k.T).masked_fill(torch.ones(len(q), len(q)).triu(1).bool(), float("-inf")).softmax(-1) @ v


def forgets_the_linear_layers(budget_bytes, tokens, layers, full_bytes, linear_bytes):
    return min(layers, budget_bytes // (full_bytes * tokens))


WRONG = {"delta_step": sum_only, "lightning_by_attention": with_softmax, "layers_to_keep": forgets_the_linear_layers}
