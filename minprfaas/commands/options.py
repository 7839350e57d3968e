"""What the commands that need torch can be told, without torch: `--help` waits for nothing. Chapter 13."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from minprfaas.errors import require_number

FULL_CONTEXTS = 8  # a server's pool has room for so many requests as long as the context
TEMPLATES = ("chatml", "llama3", "qwen3")  # of a chat: what `serving/chat.py` knows
DTYPES = ("float32", "bfloat16", "float16")
SHIPPED = Path(__file__).resolve().parent.parent / "assets" / "models"


def generate(parser: ArgumentParser) -> None:
    """The options of `generate`."""
    parser.add_argument("prompt", nargs="*", help="what to answer; or give --prompts")
    parser.add_argument("--model", metavar="DIR", help="Hugging Face directory (default: the embedded model)")
    parser.add_argument("--prompts", metavar="FILE.jsonl",
                        help='one {"id", "prompt", "max_tokens"} a line; {"after": id} continues that conversation')
    words = parser.add_argument_group("for prompts given as words (a line of --prompts has its own)")
    words.add_argument("--max-tokens", type=int, default=64, metavar="N", help="the most that an answer may have (64)")
    words.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0 is greedy (0)")
    words.add_argument("--top-k", type=int, default=0, metavar="K", help="draw from the K likeliest; 0 is all (0)")
    words.add_argument("--top-p", type=float, default=1.0, metavar="P", help="draw from the likeliest, P in sum (1)")
    words.add_argument("--seed", type=int, default=0, metavar="N", help="of the draws (0)")
    words.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end the answer here (repeatable)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (cpu)")
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="of weights and KVCache (float32)")
    parser.add_argument("--prefill-chunk", type=int, metavar="TOKENS", help="tokens of a chunk (1024; on a GPU 8192)")
    parser.add_argument("--pool-blocks", type=int, metavar="N", help="blocks of the pool (default: room for all)")
    parser.add_argument("--compile", action="store_true", help="compile the model's pieces first: minutes on two cores")
    parser.add_argument("--json", action="store_true", help="print one JSON line an answer")


def serve(parser: ArgumentParser) -> None:
    """The options of `serve`."""
    parser.add_argument("--model", metavar="DIR", help="Hugging Face directory (default: the embedded model)")
    add_http_arguments(parser)
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="where; 0 lets the system choose (8000)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (cpu)")
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="of weights and KVCache (float32)")
    parser.add_argument("--prefill-chunk", type=int, default=512, metavar="TOKENS", help="tokens of a prefill chunk: "
                        "as long as one takes, nobody else gets a token (512)")
    parser.add_argument("--block-tokens", type=int, metavar="N", help="tokens of a KVCache block (64; on cuda 256)")
    parser.add_argument("--pool-blocks", type=int, metavar="N", help="blocks of either pool, for prefill and decode "
                        f"(default: room for {FULL_CONTEXTS} contexts, at most 1 GiB)")
    parser.add_argument("--compile", action="store_true", help="compile the model's pieces first: minutes on two cores")


def add_http_arguments(parser: ArgumentParser) -> None:
    """The options of whatever serves HTTP."""
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; whoever reaches it may use the "
                        "model (127.0.0.1)")
    parser.add_argument("--max-requests", type=int, default=256, metavar="N", help="requests that are answered at "
                        "once; one more is told to come again (256)")
    parser.add_argument("--drain-s", type=float, default=30.0, metavar="S", help="seconds that requests get to end "
                        "once the server is told to (30)")
    parser.add_argument("--chat-template", choices=TEMPLATES, help="for a model whose own is missing or unknown")


def check_http_arguments(args: Namespace, port_option: str, port: int) -> None:
    """UserError names the first option that is out of range."""
    require_number(port_option, port, least=0, most=65_535, whole=True)
    require_number("--max-requests", args.max_requests, least=1, most=10_000, whole=True)
    require_number("--drain-s", args.drain_s, least=0)


def check_counts(args: Namespace, *names: str) -> None:
    """UserError names the first of these options that is given and no whole number above 0."""
    for name in names:
        if getattr(args, name) is not None:
            require_number(f"--{name.replace('_', '-')}", getattr(args, name), least=1, whole=True)


def inspect(parser: ArgumentParser) -> None:
    """The options of `inspect`."""
    names = sorted(path.stem for path in SHIPPED.glob("*.json"))
    parser.add_argument("directory", nargs="?", metavar="DIR",
                        help="Hugging Face directory (default: the embedded model)")
    parser.add_argument("--config", metavar="NAME", help=f"a published model instead: {', '.join(names)}")
    parser.add_argument("--block-tokens", type=int, default=64, metavar="N", help="tokens a block (64)")
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES, help="of the KVCache (bfloat16)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the tables")


def profile(parser: ArgumentParser) -> None:
    """The options of `profile`."""
    parser.add_argument("--model", metavar="DIR", help="Hugging Face directory (default: the embedded model)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (cpu)")
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="of weights and KVCache (float32)")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096], metavar="TOKENS",
                        help="of the prompts: the points of the curve (512 1024 2048 4096)")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="timed prefills of each length (3)")
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="requests of a decode step: BS_max (8)")
    parser.add_argument("--context", type=int, default=1024, metavar="TOKENS", help="their context (1024)")
    parser.add_argument("--prefill-chunk", type=int, metavar="TOKENS", help="tokens of a chunk (1024; on a GPU 8192)")
    parser.add_argument("--compile", action="store_true", help="compile the model's pieces first")
    parser.add_argument("--out", metavar="FILE.json", help="write the profile, for `plan --profile`")
    parser.add_argument("--json", action="store_true", help="print the profile instead of the table")
