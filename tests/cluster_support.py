"""Two datacenters inside one test: two engines, two threads, and a real Gloo link over loopback between them."""

import threading
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from minprfaas.cluster.launch import link_identity
from minprfaas.cluster.local_node import LocalNode
from minprfaas.cluster.prefill_node import PrefillNode
from minprfaas.config import CacheConfig, LinkConfig
from minprfaas.engine.engine import Engine
from minprfaas.transport.link import Link

DEADLINE_S = 60


@contextmanager
def two_datacenters(model, tokenizer, threshold, link=LinkConfig(lanes=2, chunk_bytes=4096), pool_a=200, pool_b=200,
                    block_tokens=16, prefill_chunk=48, offload_deadline_s=DEADLINE_S, overlap=True,
                    ship_prefixes=False):
    """Yields (local node, prefill node); both serve the same model. The prefill node runs in a thread of its own."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=DEADLINE_S))
    engines = [Engine(model, tokenizer, CacheConfig(blocks, block_tokens), prefill_chunk) for blocks in (pool_a, pool_b)]
    links = [Link("test", store, rank, link, link_identity(model, engine.layout)) for rank, engine in enumerate(engines)]
    remote = PrefillNode(engines[0], links[0], DEADLINE_S, overlap)
    failures = []

    def serve():
        try:
            links[0].connect(DEADLINE_S)
            remote.serve()
        except Exception as error:  # shown by the test, not lost in the thread
            failures.append(error)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        links[1].connect(DEADLINE_S)
        local = LocalNode(engines[1], links[1], threshold, offload_deadline_s, ship_prefixes=ship_prefixes)
        yield local, remote
        local.shutdown(DEADLINE_S)
        thread.join(DEADLINE_S)
        assert not thread.is_alive(), "the prefill node did not end"
    finally:
        for each in links:
            each.close()
    assert not failures, failures
    for engine in engines:
        engine.kvcache.check()


def serve(local, prompts, params):
    """Submit every prompt, run to the end; returns the journeys in order. `params` is one for all, or one for each."""
    each = params if isinstance(params, list) else [params] * len(prompts)
    number = len(local.journeys)
    journeys = [local.submit(local.engine.request(str(number + i), prompt, one))
                for i, (prompt, one) in enumerate(zip(prompts, each))]
    local.run()
    return journeys
