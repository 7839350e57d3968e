"""Chapter 05's exercises, solved; and wrong answers that look right."""


def admitted(prompts, free_blocks, block_tokens, places):
    count = 0
    for tokens in prompts[:places]:
        free_blocks -= -(-tokens // block_tokens)
        if free_blocks < 0:
            break
        count += 1
    return count


def kept_by_top_p(probabilities, top_p):
    kept, total = set(), 0.0
    for token in sorted(range(len(probabilities)), key=lambda token: -probabilities[token]):
        if kept and total >= top_p:
            break
        kept.add(token)
        total += probabilities[token]
    return kept


def held_back(text, stops):
    return max((size for stop in stops for size in range(len(stop)) if size and text.endswith(stop[:size])), default=0)


def overtaking(prompts, free_blocks, block_tokens, places):
    count = 0
    for tokens in prompts:
        if -(-tokens // block_tokens) <= free_blocks and count < places:
            free_blocks -= -(-tokens // block_tokens)
            count += 1
    return count


def below_top_p(probabilities, top_p):
    return {token for token, share in enumerate(probabilities) if share >= 1 - top_p}


def first_letter_only(text, stops):
    return int(any(stop.startswith(text[-1]) for stop in stops))


WRONG = {"admitted": overtaking, "kept_by_top_p": below_top_p, "held_back": first_letter_only}
