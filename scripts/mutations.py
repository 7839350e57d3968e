"""What `scripts/mutate.py --named` breaks, and which tests look after which room.

The named ones are features that once could be taken out and every test stayed green. Each is (file, text, what stands
there instead), so that it can be done again; when the code has changed so that the text is gone, `mutate.py` says so.
"""

from dataclasses import dataclass

P = "minprfaas/"


@dataclass(frozen=True)
class Named:
    """One feature taken out, in one or more places, and the test files that should notice."""

    name: str
    changes: tuple[tuple[str, str, str], ...]
    tests: tuple[str, ...]


def _named(name: str, file: str, old: str, new: str, *tests: str) -> Named:
    return Named(name, ((P + file, old, new),), tests)


WRITE = "        self._blocks.write(layer, start, end, rows)\n"
LOSE_ROW_150 = """        if self._pool.layout.specs[layer].kind.value == "token" and {} and start <= 150 < end:
            table = self._blocks._tables[self._pool.layout.group_of_layer[layer].index]
            self._pool.token_view(layer)[table[150 // 16], 150 % 16] = 0
"""

NAMED = (
    # kvcache and engine
    _named("rows that arrived before a stream broke off are not kept", "cluster/decode_role.py",
           "if full_end > request.cache.num_tokens:", "if False:", "test_kv_arrives.py"),
    _named("the state of a stream that broke off is kept as a snapshot", "cluster/decode_role.py",
           "has_state=False)", "has_state=True)", "test_kv_arrives.py"),
    _named("a snapshot is removed that another request holds", "kvcache/snapshots.py",
           "if previous is not None and self.ledger.refs[previous] == 0:", "if previous is not None:",
           "test_kvcache_manager.py"),
    _named("a preempted request is queued last", "engine/scheduler.py",
           "self.waiting.appendleft(request)", "self.waiting.append(request)",
           "test_engine.py::test_a_preempted_request_waits_ahead_of_those_that_never_ran"),
    _named("the running one is preempted before the prefilling one", "engine/scheduler.py",
           "self.prefilling.pop() if self.prefilling else self.running.pop()",
           "self.running.pop() if self.running else self.prefilling.pop()",
           "test_engine.py::test_who_is_still_being_prefilled_is_preempted_before_anybody_who_runs"),
    # the line and the link
    _named("a stall is caught up", "transport/wan/line.py",
           "free_at_s = max(words[_FREE_AT], self._stalled_until(now_s), queued_at_s, now_s - MAX_LAG_S)",
           "free_at_s = max(words[_FREE_AT], queued_at_s, now_s - MAX_LAG_S)", "test_transport_line.py"),
    _named("what leaves again is not sorted", "transport/wan/send_queue.py",
           "self._again = dict(sorted(self._again.items()))", "self._again = dict(self._again.items())",
           "test_transport_outbox.py"),
    _named("the secret is not looked at", "transport/wan/handshake.py",
           'key, peer_rank = identity.secret or b"", 1 - lane.rank', 'key, peer_rank = b"", 1 - lane.rank',
           "test_transport_handshake.py"),
    _named("frames are not sealed with the session's keys", "transport/wan/handshake.py",
           "if identity.secret is not None else (None, None)", "if False else (None, None)",
           "test_transport_handshake.py"),
    _named("the handshake's nonce is always the same", "transport/wan/handshake.py",
           "secrets.token_bytes(NONCE_BYTES)", "bytes(NONCE_BYTES)", "test_transport_handshake.py"),
    # who decides
    _named("a prefix that would go in is judged by the way out", "scheduling/router.py",
           "other, other_link = (pd, view.ingress) if away", "other, other_link = (pd, view.egress) if away",
           "test_router.py", "test_control.py"),
    _named("what is measured of the way in is taken for the way out", "scheduling/control.py",
           "line = self._ingress if event.ingress else self._egress", "line = self._egress", "test_control.py"),
    _named("the monitor's regime turns at once", "scheduling/congestion.py",
           " and at_s - self._since_s >= HOLD_S:", ":", "test_monitor.py"),
    _named("the monitor has no hysteresis", "scheduling/congestion.py",
           "elif self.utilization < LOW_UTILIZATION and queue_s <= LOW_QUEUE_S:", "else:",
           "test_monitor.py"),
    _named("a queue that is still there counts as none", "scheduling/congestion.py",
           " and queue_s <= LOW_QUEUE_S:", ":", "test_monitor.py"),
    Named("a peer's restart keeps its directory",
          ((P + "scheduling/control.py",
            "self._remove(node, now_s)  # of a node that was started again nothing that is known is true",
            "self._stop_work(node)"),
           (P + "scheduling/directory.py", "        self.drop_node(name)\n        self._nodes[name] = _NodeEntries()",
            "        self._nodes.setdefault(name, _NodeEntries())")),
          ("test_directory.py", "test_control.py")),
    _named("what a node held is forgotten, but not for prompts", "scheduling/directory.py",
           "        self.drop_node(name)\n        self._nodes[name] = _NodeEntries()",
           "        self._nodes[name] = _NodeEntries()", "test_directory.py"),
    _named("queued bytes are ignored when a fetch is weighed", "scheduling/router.py",
           "return (self.queued_bytes + count_bytes) * 8", "return count_bytes * 8", "test_router.py"),
    _named("queued bytes are ignored when the threshold is searched", "scheduling/threshold.py",
           "now.egress_gbps - now.queued_bytes * 8e-9 / DRAIN_S", "now.egress_gbps", "test_threshold.py"),
    _named("queued bytes of a sender are not heard", "scheduling/congestion.py",
           "queued_bytes = sum(one.queued_bytes for one in recent)", "queued_bytes = 0",
           "test_monitor.py", "test_control.py"),
    _named("load is ignored when a prefill node is chosen", "scheduling/router.py",
           "return node.load - max(own, saved_by_fetch(own)), -own", "return -max(own, saved_by_fetch(own)), -own",
           "test_router.py"),
    _named("load is ignored among nodes without the prefix", "scheduling/router.py",
           "return _Holder(min(nodes, key=_load), 0)", "return _Holder(nodes[0], 0)", "test_router.py"),
    _named("load is ignored when a decode node is chosen", "scheduling/router.py",
           " for holder in holders if holder.node.load <= limit)", " for holder in holders)", "test_router.py"),
    # what a person looks at
    _named("the timeline is written in place", "files.py",
           "self._partial = _beside(self.path)",
           "self._partial = self.path", "test_timeline.py"),
    _named("every span is drawn on one lane", "transport/wan/supervision.py",
           'f"{self._name} lane {lane.index} send"', 'f"{self._name} lane 0 send"',
           "test_timeline.py"),
    # a row is lost: the few tokens that a small model answers with may be right all the same
    _named("one row of a request's KVCache does not arrive", "cluster/kv_receive.py", WRITE,
           WRITE + LOSE_ROW_150.format("self.plan.end % 16"),
           "test_two_datacenters.py::test_short_and_long_requests_get_the_answers_of_one_process"),
    _named("one row of a shipped prefix does not arrive", "cluster/kv_receive.py", WRITE,
           WRITE + LOSE_ROW_150.format("self.plan.end % 16 == 0"),
           "test_prefix_shipping.py::"
           "test_a_prefix_that_only_the_prefill_node_has_is_fetched_and_only_the_rest_computed_here"),
    _named("a request that is preempted leaves a damaged row in the prefix cache", "engine/scheduler.py",
           "        self.close_cache(request)\n        request.preemptions += 1",
           "        group = self.kvcache.layout.token_groups[0]\n"
           "        self.kvcache.pool.bytes[request.cache.block_tables[group.index][0], :64] = 0\n"
           "        self.close_cache(request)\n        request.preemptions += 1",
           "test_engine.py::test_preempted_requests_get_the_same_tokens"),
)

# What nothing but a GPU runs, beside the branches that ask for one.
NOT_ON_A_CPU = {
    "minprfaas/engine/decode_graphs.py": ("captured",),
    "minprfaas/transport/fabric.py": ("_AfterWrites",),
    "minprfaas/transport/streams.py": ("wait_for_gpu",),
    "minprfaas/transport/wan/gpu_sums.py": ("landing", "land", "_sum"),
    "minprfaas/transport/wan/sending.py": ("_beside_prefill",),
}

# The test files of a room, the fastest first. Of the others, those that import what is broken follow.
ROOMS = {
    "kvcache": ("test_kvcache_ledger.py", "test_kvcache_layout.py", "test_kvcache_pool.py", "test_kvcache_paged.py",
                "test_kvcache_replay.py", "test_kvcache_manager.py", "test_kvcache_streams.py",
                "test_prefill_together.py", "test_engine.py"),
    "engine": ("test_sampling.py", "test_text.py", "test_prompts.py", "test_prefill_together.py", "test_generate.py",
               "test_engine.py", "test_engine_edges.py", "test_fast_runner.py"),
    "transport": ("test_transport_frames.py", "test_transport_inbox.py", "test_transport_outbox.py",
                  "test_transport_line.py", "test_transport_streams.py", "test_transport_messages.py",
                  "test_transport_handshake.py", "test_transport_seam.py", "test_transport_link.py",
                  "test_transport_lanes.py", "test_transport_monitor.py", "test_timeline.py",
                  "test_transport_shared_line.py", "test_transport_recovery.py"),
    "scheduling": ("test_router.py", "test_monitor.py", "test_directory.py", "test_throughput.py", "test_lengths.py",
                   "test_profiles.py", "test_control.py", "test_roles.py", "test_threshold.py", "test_planner.py",
                   "test_simulator_parts.py", "test_simulator.py"),
    "cluster": ("test_front_end.py", "test_topology.py", "test_cluster_messages.py", "test_cluster_roles.py",
                "test_kv_arrives.py", "test_two_datacenters.py", "test_prefix_shipping.py", "test_cluster_parts.py",
                "test_cluster_lines.py", "test_cluster_life.py"),
}

# The test files that look after one file, where those of its room say little of it.
GUARDS: dict[str, tuple[str, ...]] = {
    "cluster/emulation.py": ("test_case_study.py", "test_paced.py", "test_topology.py"),
    "cluster/journey.py": ("test_front_end.py", "test_cluster_parts.py", "test_two_datacenters.py"),
    "cluster/launch.py": ("test_topology.py", "test_launch.py"),
    "cluster/load.py": ("test_load.py",),
    "cluster/processes.py": ("test_launch.py", "test_two_datacenters.py", "test_two_datacenters_program.py"),
    "cluster/worker.py": ("test_upkeep.py", "test_kv_arrives.py", "test_cluster_life.py"),
    "cluster/prefill_role.py": ("test_cluster_roles.py", "test_kv_arrives.py", "test_two_datacenters.py",
                                "test_prefix_shipping.py", "test_cluster_life.py", "test_cluster_parts.py"),
    "cluster/prefix_shipping.py": ("test_prefix_shipping.py", "test_cluster_life.py"),
    "cluster/recovery.py": ("test_front_end.py", "test_cluster_life.py"),
    "cluster/relay.py": ("test_relay.py",),
    "cluster/neighbours.py": ("test_cluster_parts.py",),
    "cluster/upkeep.py": ("test_upkeep.py", "test_cluster_parts.py", "test_cluster_lines.py", "test_front_end.py",
                          "test_prefix_shipping.py", "test_two_datacenters.py"),
    "engine/decode_graphs.py": ("test_fast_runner.py",),
    "engine/decode_layers.py": ("test_fast_runner.py",),
    "engine/decode_state.py": ("test_fast_runner.py",),
    "engine/measure.py": ("test_profile_command.py",),
    "engine/paced.py": ("test_paced.py", "test_case_study.py"),
    "scheduling/profiles.py": ("test_profiles.py", "test_case_study.py", "test_paced.py"),
    "scheduling/books.py": ("test_control.py", "test_sites.py"),
    "scheduling/sites.py": ("test_sites.py",),
    "engine/pieces.py": ("test_fast_runner.py", "test_warm_up.py"),
    "engine/sampling.py": ("test_sampling.py", "test_engine.py"),
    "engine/text.py": ("test_text.py", "test_engine_edges.py"),
    "scheduling/paper_case.py": ("test_throughput.py", "test_planner.py", "test_profiles.py", "test_plan_command.py"),
    "transport/encoding.py": ("test_encoding.py", "test_wire.py"),
    "transport/fabric.py": ("test_transport_seam.py", "test_transport_fabric.py"),
    "transport/fabric_sending.py": ("test_transport_fabric_parts.py", "test_transport_seam.py",
                                    "test_transport_fabric.py"),
    "transport/loopback.py": ("test_transport_seam.py",),
    "transport/pair_group.py": ("test_transport_fabric_parts.py", "test_transport_seam.py", "test_transport_fabric.py"),
    "transport/streams.py": ("test_transport_streams.py", "test_transport_inbox.py", "test_transport_seam.py"),
    "transport/wan/binding.py": ("test_transport_binding.py", "test_transport_handshake.py"),
    "transport/wan/shared_words.py": ("test_transport_shared_line.py",),
    "transport/wan/line.py": ("test_transport_line.py", "test_transport_outbox.py", "test_transport_shared_line.py"),
    "transport/wan/monitor.py": ("test_transport_monitor.py", "test_transport_outbox.py"),
}
