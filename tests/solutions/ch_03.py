"""Chapter 03's exercises, solved; and wrong answers that look right."""

import torch


def place_of(token, block_table, block_tokens):
    return block_table[token // block_tokens], token % block_tokens


def blocks_to_reserve(held_tokens, more_tokens, block_tokens, token_groups, state_blocks):
    needed, held = (-(-tokens // block_tokens) for tokens in (held_tokens + more_tokens, held_tokens))
    return token_groups * (needed - held) + (0 if held_tokens else state_blocks)


def merge_two(out_a, log_sum_a, out_b, log_sum_b):
    share_a, share_b = torch.tensor([log_sum_a, log_sum_b]).softmax(dim=0)
    return share_a * out_a + share_b * out_b


def without_the_table(token, block_table, block_tokens):
    return token // block_tokens, token % block_tokens


def rounds_only_the_new(held_tokens, more_tokens, block_tokens, token_groups, state_blocks):
    return token_groups * -(-more_tokens // block_tokens) + (0 if held_tokens else state_blocks)


def overflows(out_a, log_sum_a, out_b, log_sum_b):
    a, b = torch.tensor([log_sum_a, log_sum_b]).exp()
    return (a * out_a + b * out_b) / (a + b)


WRONG = {"place_of": without_the_table, "blocks_to_reserve": rounds_only_the_new, "merge_two": overflows}
