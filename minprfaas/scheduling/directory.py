"""Who holds which cached prefix, in all clusters: the paper's global KVCache manager. Chapter 11 (paper 3.2, 3.4.3).

Metadata only, fed by the nodes' own news. It may lag behind the truth: an entry that is gone costs a prefill, never a
wrong token, because a node looks into its own index before it uses a block.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

Key = Hashable  # a block's chained hash: it stands for the whole prefix that ends there


@dataclass(frozen=True, slots=True)
class CacheChanged:
    """What `node` can begin a prefill after: (key, tokens) pairs, with 0 tokens where it no longer can. A node numbers
    its entries 1, 2, 3, …; `sequence` is the first one's number. With `inventory` the entries are all that the node
    holds, and `sequence` is the number of the last entry that they take into account."""

    node: str
    sequence: int
    entries: Sequence[tuple[Key, int]]
    inventory: bool = False


@dataclass(slots=True)
class _NodeEntries:
    """What one node said of itself."""

    sequence: int | None = None  # of the last entry; None: nothing is believed until an inventory comes
    tokens: dict[Key, int] = field(default_factory=dict)


class Directory:
    """Answers, for a prompt's block keys, how much of it each node holds."""

    def __init__(self) -> None:
        self._nodes: dict[str, _NodeEntries] = {}
        self._holders: dict[Key, dict[str, int]] = {}  # key -> node -> tokens

    def add_node(self, name: str) -> None:
        """A node (re)connects. What it held before is forgotten, and nothing is believed before its inventory."""
        self.drop_node(name)
        self._nodes[name] = _NodeEntries()

    def __contains__(self, name: str) -> bool:
        return name in self._nodes

    def drop_node(self, name: str) -> None:
        """A node is gone, and its entries with it. Harmless for an unknown one."""
        node = self._nodes.pop(name, None)
        if node is not None:
            for key in node.tokens:
                self._forget_holder(key, name)

    def apply(self, change: CacheChanged) -> bool:
        """Take a node's news. False means that some were lost on the way: until an inventory comes, its entries are
        ignored. What was heard before is ignored too. The node must have been added."""
        node = self._nodes[change.node]
        if change.inventory:
            for key in node.tokens:
                self._forget_holder(key, change.node)
            node.tokens.clear()
            node.sequence, news = change.sequence, change.entries
        elif node.sequence is None or change.sequence > node.sequence + 1:
            node.sequence = None
            return False
        else:
            news = change.entries[node.sequence + 1 - change.sequence:]  # but for what is known already
            node.sequence += len(news)
        for key, tokens in news:
            if tokens:
                node.tokens[key] = tokens
                self._holders.setdefault(key, {})[change.node] = tokens
            else:
                self.forget(change.node, key)
        return True

    def forget(self, name: str, key: Key) -> None:
        """This node does not hold this prefix (any more). Harmless if that is known."""
        node = self._nodes.get(name)
        if node is not None and node.tokens.pop(key, None) is not None:
            self._forget_holder(key, name)

    def match(self, keys: Sequence[Key]) -> dict[str, int]:
        """Tokens of the longest cached prefix of a prompt with these block keys, on each node that has any. Scans from
        the end: a prefix is never cut in its middle, so the last key that a node holds says it all."""
        found: dict[str, int] = {}
        for holders in map(self._holders.get, reversed(keys)):
            if holders is not None and not holders.keys() <= found.keys():
                found = {**holders, **found}
                if len(found) == len(self._nodes):  # every node's longest is known: shorter prefixes say nothing new
                    break
        return found

    def _forget_holder(self, key: Key, name: str) -> None:
        holders = self._holders[key]
        del holders[name]
        if not holders:
            del self._holders[key]
