"""The exercises of chapter 11. Fill in the functions, then: python tutorials/11_the_router.py --check 1"""

from collections.abc import Mapping, Sequence

from exercises.checking import first_wrong

from minprfaas.scheduling.directory import CacheChanged, Directory
from minprfaas.scheduling.router import ClusterView, LinkView, NodeView, Router, RouteRequest, ShippingCosts


def route_by_cache(tokens: int, in_prfaas: int, in_pd: int, threshold: int, regime: str) -> str:
    """"prfaas" or "pdp" for a prompt of `tokens` tokens (paper 3.4.3). `in_prfaas` and `in_pd` are the cached prefixes
    of the two clusters, in tokens; `regime` is "scarce" or "abundant". Shipping a prefix takes no time here."""
    raise NotImplementedError


def best_node(queued: Mapping[str, int], held: Mapping[str, int]) -> str:
    """The node that will be done with a prompt first. `queued`: tokens waiting at each node; `held`: tokens of the
    prompt that a node has cached (0 where it is not named). Of two equal ones the one that holds more."""
    raise NotImplementedError


def longest_match(prompt_keys: Sequence[str], holdings: Mapping[str, set[str]], block_tokens: int) -> dict[str, int]:
    """Tokens of the longest cached prefix on each node that has any. `prompt_keys`: one for each full block, in order;
    a key stands for the whole prefix up to there. `holdings`: the keys after which each node can begin."""
    raise NotImplementedError


def check_1() -> str | None:
    """Against the package's router, on a link of no delay."""
    costs = ShippingCosts(token_bytes=1.0, state_bytes=0.0, prfaas_s_per_token=1.0, pdp_s_per_token=1.0)
    cases = []
    for regime in ("scarce", "abundant"):
        view = ClusterView([NodeView("a")], [NodeView("p")], [NodeView("d")], LinkView(1e5), LinkView(1e5), regime)
        for tokens, in_prfaas, in_pd in ((900, 0, 0), (1001, 0, 0), (1000, 0, 0), (5000, 4500, 0), (5000, 0, 4500),
                                         (5000, 2000, 3999), (5000, 4000, 100), (5000, 3999, 3999)):
            router = Router(1000, costs, ship_prefixes=True)
            decision = router.route(RouteRequest("one", tokens), {"a": in_prfaas, "p": in_pd}, view)
            cases.append(((tokens, in_prfaas, in_pd, 1000, regime), decision.route.value))
    return first_wrong(route_by_cache, cases)


def check_2() -> str | None:
    """Against the package's router, without a fabric to fetch over."""
    cases = []
    for queued, held in (({"p0": 0, "p1": 0}, {"p1": 700}), ({"p0": 0, "p1": 699}, {"p1": 700}),
                         ({"p0": 0, "p1": 700}, {"p1": 700}), ({"p0": 0, "p1": 701}, {"p1": 700}),
                         ({"p0": 500, "p1": 900, "p2": 400}, {"p1": 600}), ({"p0": 500, "p1": 400}, {"p0": 100}),
                         ({"p0": 10, "p1": 20, "p2": 30}, {})):
        nodes = [NodeView(name, load) for name, load in queued.items()]
        view = ClusterView([], nodes, [NodeView("d")], LinkView(1.0), LinkView(1.0))
        cases.append(((queued, held), Router(10_000).route(RouteRequest("one", 5000), held, view).node))
    return first_wrong(best_node, cases)


def check_3() -> str | None:
    """Against the package's directory."""
    cases = []
    for keys, holdings in ((["a", "b", "c"], {"n0": {"a", "b"}, "n1": {"a"}, "n2": set()}),
                           (["a", "b", "c"], {"n0": {"c"}, "n1": {"x"}}), ([], {"n0": {"a"}}),
                           (["a", "b", "c", "d"], {"n0": {"b", "d", "z"}, "n1": {"a", "b", "c"}})):
        directory = Directory()
        for name, held in holdings.items():
            directory.add_node(name)
            entries = [(key, 64 * (place + 1)) for place, key in enumerate(keys) if key in held]
            directory.apply(CacheChanged(name, 0, entries, inventory=True))
        expected = {name: tokens for name, tokens in sorted(directory.match(keys).items())}
        cases.append(((keys, holdings, 64), expected))
    return first_wrong(longest_match, cases)
