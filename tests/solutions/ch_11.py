"""Chapter 11's exercises, solved; and wrong answers that look right."""


def route_by_cache(tokens, in_prfaas, in_pd, threshold, regime):
    cached = in_pd if regime == "scarce" else max(in_prfaas, in_pd)
    return "prfaas" if tokens - cached > threshold else "pdp"


def best_node(queued, held):
    return min(queued, key=lambda name: (queued[name] - held.get(name, 0), -held.get(name, 0)))


def longest_match(prompt_keys, holdings, block_tokens):
    found = {}
    for name, held in holdings.items():
        for place, key in enumerate(prompt_keys):
            if key in held:
                found[name] = (place + 1) * block_tokens
    return found


def _until_the_first_gap(prompt_keys, holdings, block_tokens):
    """A block whose key is missing need not end the prefix: nodes name only where they can begin."""
    found = {}
    for name, held in holdings.items():
        for key in prompt_keys:
            if key not in held:
                break
            found[name] = found.get(name, 0) + block_tokens
    return found


WRONG = {
    "route_by_cache": lambda tokens, away, pd, threshold, regime: "prfaas" if tokens - pd > threshold else "pdp",
    "best_node": lambda queued, held: max(queued, key=lambda name: held.get(name, 0)),  # affinity alone
    "longest_match": _until_the_first_gap,
}
