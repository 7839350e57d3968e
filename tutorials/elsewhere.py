"""Where other projects have our rooms, as read in their files in November 2026. Chapter 15."""

ELSEWHERE = {  # our room -> (project, what it is called there, where to read it)
    "kvcache/pool, ledger": [
        ("vLLM", "BlockPool", "vllm/v1/core/block_pool.py"),
        ("SGLang", "RadixCache: a tree, not chained keys", "python/sglang/srt/mem_cache/radix_cache.py")],
    "kvcache/manager": [
        ("vLLM", "KVCacheManager; groups: KVCacheCoordinator", "vllm/v1/core/kv_cache_coordinator.py")],
    "kvcache/snapshots": [
        ("SGLang", "MambaRadixCache", "python/sglang/srt/mem_cache/mamba_radix_cache.py")],
    "engine/scheduler": [
        ("vLLM", "Scheduler", "vllm/v1/core/sched/scheduler.py"),
        ("SGLang", "Scheduler", "python/sglang/srt/managers/scheduler.py")],
    "engine/runner": [
        ("vLLM", "GPUModelRunner", "vllm/v1/worker/gpu_model_runner.py")],
    "transport/base": [
        ("vLLM", "KVConnectorBase_V1", "vllm/distributed/kv_transfer/kv_connector/v1/base.py"),
        ("SGLang", "BaseKVSender, BaseKVReceiver", "python/sglang/srt/disaggregation/base/conn.py"),
        ("NIXL", "nixlAgent", "src/api/cpp/nixl.h"),
        ("Mooncake", "TransferEngine", "mooncake-transfer-engine/include/transfer_engine.h")],
    "transport/fabric": [
        ("NIXL", "a backend: nixlBackendEngine, such as UCX", "src/plugins/ucx/ucx_backend.cpp")],
    "transport/encoding": [
        ("LMCache", "CacheGenSerializer", "lmcache/v1/storage_backend/naive_serde/cachegen_encoder.py")],
    "cluster/prefill_role": [
        ("SGLang", "the prefill server's queues", "python/sglang/srt/disaggregation/prefill.py")],
    "cluster/decode_role": [
        ("SGLang", "DecodePreallocQueue: it reserves first, too", "python/sglang/srt/disaggregation/decode.py")],
    "scheduling/directory": [
        ("Dynamo", "KvIndexer", "lib/kv-router/src/indexer.rs"),
        ("Mooncake", "Conductor's PrefixCacheTable",
         "mooncake-conductor/include/conductor/prefixindex/prefix_indexer.h")],
    "scheduling/router": [
        ("Dynamo", "the KV router's scheduler", "lib/llm/src/kv_router/scheduler.rs")],
    "scheduling/threshold": [
        ("Dynamo", "DisaggregatedRouter: max_local_prefill_length", "lib/llm/src/disagg_router.rs")],
    "scheduling/planner, roles": [
        ("Dynamo", "Planner: scales prefill and decode", "components/src/dynamo/planner")],
    "prefix shipping": [
        ("LMCache", "LMCacheEngine: store and retrieve", "lmcache/v1/cache_engine.py"),
        ("Mooncake", "Mooncake Store's MasterService", "mooncake-store/include/master_service.h")],
}
NOWHERE_FOUND = ("transport/wan's line and weather", "scheduling/congestion", "simulator under the live control plane")


def rooms_elsewhere() -> str:
    """The list as a chapter prints it."""
    lines = []
    for room, theirs in ELSEWHERE.items():
        lines.append(f"   {room}")
        for project, name, where in theirs:
            lines += [f"     {project:9} {name}", f"     {'':9} {where}"]
    return "\n".join([*lines, "", "   Found in none of them, in a short search:", f"   {'; '.join(NOWHERE_FOUND)}."])
