"""Who holds which cached prefix, in all clusters: the paper's global KVCache manager. Chapter 11 (paper 3.2, 3.4.3).

Metadata only, fed by the nodes' own events. It may lag behind the truth: an entry that is gone costs a prefill, never a
wrong token, because a node looks into its own index before it uses a block.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from minprfaas.errors import UserError

HOT_MATCHES = 8  # so many matches that end at one key make its prefix hot
Key = Hashable  # a block's chained hash: it stands for the whole prefix that ends there


class CacheEvent(NamedTuple):
    """Node `node` can now ("stored") or can no longer ("evicted") begin a request after the `tokens` tokens of `key`.
    A node numbers its events 1, 2, 3, …"""

    node: str
    sequence: int
    kind: str
    key: Key
    tokens: int


@dataclass(frozen=True, slots=True)
class PrefixMatch:
    """Cached prefix lengths of one prompt, in tokens, wherever there is any: per node, and the best per cluster."""

    nodes: dict[str, int] = field(default_factory=dict)
    clusters: dict[str, int] = field(default_factory=dict)


class PrefixMove(NamedTuple):
    """Copy the prefix that ends at `key` from an overloaded node to an idle one of the same cluster."""

    key: Key
    tokens: int
    source: str
    target: str


@dataclass(slots=True)
class _Node:
    cluster: str
    sequence: int = 0
    gap: bool = True  # nothing is known until the first snapshot
    keys: dict[Key, int] = field(default_factory=dict)


class Directory:
    """Answers, for a prompt's block keys, how much of it each node and each cluster holds."""

    def __init__(self):
        self._nodes: dict[str, _Node] = {}
        self._holders: dict[Key, dict[str, int]] = {}  # key -> node -> tokens
        self._hits: dict[Key, int] = {}  # matches that ended at a key, since the last rebalancing

    def add_node(self, name: str, cluster: str) -> None:
        """A node (re)connects. What it held before is forgotten; it needs a `resync` (an empty one if it is new)."""
        self.drop_node(name)
        self._nodes[name] = _Node(cluster)

    def drop_node(self, name: str) -> None:
        """A node is gone, and its entries with it. Harmless for an unknown one."""
        node = self._nodes.pop(name, None)
        for key in node.keys if node else ():
            self._forget_holder(key, name)

    def publish(self, event: CacheEvent) -> bool:
        """Take one event. False means a gap: the node must send a snapshot (`resync`), and until then its events are
        ignored. A repeated event is ignored. Raises UserError for a node that was not added."""
        node = self._known(event.node)
        if event.sequence <= node.sequence:
            return not node.gap
        if node.gap or event.sequence != node.sequence + 1:
            node.gap = True
            return False
        node.sequence = event.sequence
        if event.kind == "stored":
            self._store(node, event.node, event.key, event.tokens)
        elif node.keys.pop(event.key, None) is not None:
            self._forget_holder(event.key, event.node)
        return True

    def needs_resync(self, name: str) -> bool:
        """Whether events of this node were lost, or none has been heard yet."""
        return self._known(name).gap

    def resync(self, name: str, sequence: int, entries: Iterable[tuple[Key, int]]) -> None:
        """A node's whole truth, (key, tokens) pairs, as of its event number `sequence`."""
        node = self._known(name)
        for key in node.keys:
            self._forget_holder(key, name)
        node.keys.clear()
        node.sequence, node.gap = sequence, False
        for key, tokens in entries:
            self._store(node, name, key, tokens)

    def report_stale(self, name: str, key: Key) -> None:
        """A node was sent a request for this prefix and did not have it: drop the entry."""
        if name in self._nodes and self._nodes[name].keys.pop(key, None) is not None:
            self._forget_holder(key, name)

    def match(self, keys: Sequence[Key]) -> PrefixMatch:
        """The longest cached prefix of a prompt with these block keys. Scans from the end: a prefix is never cut in
        its middle, so the last key that a node holds says it all."""
        found = PrefixMatch()
        for key in reversed(keys):
            holders = self._holders.get(key)
            if holders is None:
                continue
            if not found.nodes:
                self._hits[key] = self._hits.get(key, 0) + 1
            for name, tokens in holders.items():
                if name not in found.nodes:
                    found.nodes[name] = tokens
                    cluster = self._nodes[name].cluster
                    found.clusters[cluster] = max(found.clusters.get(cluster, 0), tokens)
            if len(found.nodes) == len(self._nodes):
                break
        return found

    def rebalance(self, load: Mapping[str, float]) -> PrefixMove | None:
        """A hot prefix to copy, or None: of those at which most matches ended since the last move, the first whose only
        holder in its cluster has over twice the load of that cluster's idlest node. `load`: of nodes that take work."""
        for key, hits in sorted(self._hits.items(), key=lambda item: -item[1]):
            holders = self._holders[key]
            for source, tokens in holders.items() if hits >= HOT_MATCHES else ():
                peers = [name for name in load if self._nodes[name].cluster == self._nodes[source].cluster]
                idlest = min(peers, key=load.__getitem__, default=source)
                alone = all(peer == source or peer not in holders for peer in peers)
                if alone and load.get(source, 0) > 2 * load.get(idlest, 0):
                    self._hits.clear()
                    return PrefixMove(key, tokens, source, idlest)
        return None

    def _known(self, name: str) -> _Node:
        if name not in self._nodes:
            raise UserError(f"node {name!r} is not in the directory; it has {len(self._nodes)} nodes")
        return self._nodes[name]

    def _store(self, node: _Node, name: str, key: Key, tokens: int) -> None:
        node.keys[key] = tokens
        self._holders.setdefault(key, {})[name] = tokens

    def _forget_holder(self, key: Key, name: str) -> None:
        holders = self._holders[key]
        del holders[name]
        if not holders:
            del self._holders[key]
            self._hits.pop(key, None)
