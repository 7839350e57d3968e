"""`python -m minprfaas serve`: an OpenAI-compatible endpoint for one model, in one process. Chapter 13.

It is the cluster's own front end, prefill role and decode role over the loopback: the same door that a whole cluster
has, and the same way for a request behind it.
"""

import argparse
import socket
from collections.abc import Callable

import torch

from minprfaas.cluster.launch import require_open_files
from minprfaas.cluster.mail import Mail
from minprfaas.cluster.processes import Process, control_settings, front_end, process, worker
from minprfaas.cluster.topology import Topology
from minprfaas.commands.options import FULL_CONTEXTS, check_counts, check_http_arguments
from minprfaas.commands.options import serve as add_arguments  # noqa: F401
from minprfaas.config import CacheConfig, block_tokens_for
from minprfaas.engine.engine import Engine
from minprfaas.engine.reference import pool_for
from minprfaas.engine.warm_up import compile_and_warm_up
from minprfaas.model.checkpoint import EMBEDDED, load
from minprfaas.model.tokenizer import Tokenizer
from minprfaas.model.transformer import Transformer
from minprfaas.observe.tables import human_bytes
from minprfaas.scheduling.control import ControlPlane
from minprfaas.serving.openai import Served
from minprfaas.serving.service import Service, listen, most_connections, serve
from minprfaas.transport.events import EventQueue

OWN_FILES = 32  # beside connections
END_S = 10.0  # that the roles get to give back what they hold
DEADLINE_S = 3600.0


def run(args: argparse.Namespace) -> int:
    """Serve until a signal."""
    check_http_arguments(args, "--port", args.port)
    check_counts(args, "prefill_chunk", "block_tokens", "pool_blocks")
    require_open_files(OWN_FILES + most_connections(args.max_requests))
    listener = listen(args.host, args.port)  # before the model is loaded: a port that is taken is said at once
    model, tokenizer = load(args.model, getattr(torch, args.dtype), args.device)
    if args.compile:
        compile_and_warm_up(model, tokenizer, args.block_tokens)
    served = Served.of(args.model or EMBEDDED, model.config, tokenizer, args.chat_template)
    made = one_process(args, model, tokenizer)
    print(f"two pools of {human_bytes(made.workers[0].engine.kvcache.pool.bytes.nbytes)}, for prefill and for decode")
    # Of nodes that neither come nor go there is nothing to tell.
    return serve_until_signal(args, listener, served, made, look=made.front.take_actions)


def serve_until_signal(args: argparse.Namespace, listener: socket.socket, served: Served, made: Process,
                       look: Callable[[], object]) -> int:
    """Answer HTTP clients from the process in which the front end lives, until SIGINT or SIGTERM; then dismiss all
    nodes. `look` is called after each step of the node. Returns 1 if a request was cut short, else 0."""
    service = Service(served, listener, args.max_requests, made.node.mail.events)
    host = f"[{args.host}]" if ":" in args.host else args.host
    print(f"serving {served.name} at http://{host}:{service.port}/v1, {args.max_requests} requests at once; Ctrl-C "
          "ends it", flush=True)
    cut = serve(service, made, args.drain_s, look)
    made.shut_down(END_S)
    were = "request was" if cut == 1 else "requests were"
    print("ended: " + (f"{cut} {were} cut short" if cut else "every request has its answer"), flush=True)
    return 1 if cut else 0


def one_process(args: argparse.Namespace, model: Transformer, tokenizer: Tokenizer) -> Process:
    """Front end, prefill role and decode role in this process, each role with a pool of its own."""
    context = [model.config.max_context_tokens] * FULL_CONTEXTS
    block_tokens = args.block_tokens or block_tokens_for(args.device)
    cache = CacheConfig(args.pool_blocks, block_tokens) if args.pool_blocks else \
        pool_for(model, context, block_tokens, limit_bytes=2**30)
    mail, (_, place) = Mail(EventQueue()), Topology(prfaas=1, pd=1).two_places()
    workers = [worker(name, role, Engine(model, tokenizer, cache, args.prefill_chunk), mail, DEADLINE_S)
               for name, role in place.roles.items()]
    engine = workers[0].engine
    plane = ControlPlane(control_settings(0, None, engine.layout))
    return process(mail, front_end(plane, mail, engine, DEADLINE_S), workers)
