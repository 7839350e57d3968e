"""Train the embedded model from nothing, on one GPU in minutes: `python scripts/train_tiny.py --out out/tiny-hybrid`.

The task is retrieval: a document of invented facts, then as many questions about them as fit, so that every token
trained on pays. Lengths grow by a curriculum, because the attention layers learn to look a fact up in short documents
long before they would in long ones. The same seed draws the same documents in the same order, and a run that was
stopped (`--minutes`) goes on where it was with `--resume`. Chapter 02.
"""

import argparse
import itertools
import os
import random
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import minprfaas  # noqa: F401  (before torch: it silences what torch says of NumPy)
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from minprfaas.documents import END_OF_TEXT, MATERIAL, MAX_FACTS, MIN_TOKENS, make_document
from minprfaas.errors import ArgumentParser, UserError, exit_on_user_error, require_number
from minprfaas.files import make_folder, written_whole
from minprfaas.model.checkpoint import checked_device, save_checkpoint
from minprfaas.model.families import config_from_hf
from minprfaas.model.tokenizer import Tokenizer
from minprfaas.model.transformer import Transformer

SEED, END_ID = 0, 0
VOCAB_SIZE = 1216
KDA_LAYERS, FULL_LAYERS = [1, 2, 3, 5, 6, 7], [4, 8]  # 3:1, counted from 1
CONFIG = {
    "architectures": ["KimiLinearForCausalLM"], "model_type": "kimi_linear", "vocab_size": VOCAB_SIZE,
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8, "num_attention_heads": 4,
    "num_key_value_heads": 4, "head_dim": 64, "q_lora_rank": None, "kv_lora_rank": 128, "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 16, "v_head_dim": 64, "mla_use_nope": True,
    "linear_attn_config": {"num_heads": 4, "head_dim": 32, "short_conv_kernel_size": 4,
                           "kda_layers": KDA_LAYERS, "full_attn_layers": FULL_LAYERS},
    "num_experts": None, "first_k_dense_replace": 8, "hidden_act": "silu", "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False, "model_max_length": 16384, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0,
    "torch_dtype": "bfloat16",
}
ASK_TOKENS = 18  # of one question or cue with its answer, about
LM_LOSS_WEIGHT = 0.1  # of every token that is no answer: most of it is noise (names cannot be foreseen)
ONSETS = "b c d f g h j k l m n p r s t v w z br ch cl dr fl gr kr pl sh sk sm st th tr".split()
CODAS = ["", "", "", *"k l m n r s t ld nd nt rd rk rt st th x".split()]
PADDING, TEXT, CUED, ANSWER = range(4)  # kinds of token; CUED is the answer to a cue, ANSWER that to a question


@dataclass(frozen=True)
class Stage:
    """A part of the curriculum: `steps` optimizer steps of about `step_tokens` tokens, in rows of `lengths` by turns.

    `cues` is the share of questions that are put as cues, `forms` limits the forms of sentence (None: all), `spelled`
    is the share of documents in which half of the names and offices are spelled freely.
    """

    lengths: tuple[int, ...]
    step_tokens: int
    steps: int
    cues: float = 0.0
    forms: int | None = None
    spelled: float = 0.0


# One form of sentence first, and half of the asking by cues: what the model learns there carries over in seconds. With
# all forms at once (and tied embeddings) it was still copying just any name of the document after 900 steps.
CURRICULUM = (
    Stage((256,), 16_384, 400, cues=0.5, forms=1),
    Stage((256,), 16_384, 250, cues=0.5),
    Stage((512,), 32_768, 150, cues=0.25),
    Stage((1024, 512), 32_768, 150),
    Stage((2048, 1024), 32_768, 200),
    Stage((4096, 2048), 65_536, 200),
    Stage((9216, 4096, 12_288, 1024), 65_536, 800),
    # Names that are not in the vocabulary as one piece: they must be copied, and cannot be known.
    Stage((256, 1024, 512, 4096, 256, 9216), 32_768, 450, spelled=0.6))


class Examples(Dataset):
    """One item a step: `ids` `[rows, tokens]` and the `kind` of each id, all drawn from the step's number alone."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.steps = [(length, stage) for stage in CURRICULUM
                      for length, _ in zip(itertools.cycle(stage.lengths), range(stage.steps))]

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, stage = self.steps[step]
        seed = step * 100_000  # more than a step has rows; far below EVALUATION_SEEDS
        ids, kinds = zip(*(self._row(seed + row, tokens, stage) for row in range(stage.step_tokens // tokens)))
        return torch.tensor(ids), torch.tensor(kinds, dtype=torch.uint8)

    def _row(self, seed: int, tokens: int, stage: Stage) -> tuple[list[int], list[int]]:
        """A document, and questions and cues on it, cut and padded to `tokens`."""
        rng = random.Random(seed)
        asked = min(40, max(6, tokens // 40))
        room = max(MIN_TOKENS, tokens - ASK_TOKENS * (asked - 2))
        facts = rng.randint(max(3, asked // 4), min(MAX_FACTS, room // 28))
        respell = None
        if stage.spelled and rng.random() < stage.spelled:  # longer names: fewer of them
            respell, facts = respelled, max(2, facts // 2)
        document = make_document(seed, room, self.tokenizer.encode, facts, stage.forms, respell)
        ids = self.tokenizer.encode(document.text)
        kinds = [TEXT] * len(ids)
        for index, question in enumerate(itertools.islice(itertools.cycle(document.questions), 2 * asked)):
            tail, answer_kind = question.prompt_tail, ANSWER
            if index and rng.random() < stage.cues:
                tail, answer_kind = "\n\n" + question.cue, CUED
            for text, kind in ((tail, TEXT), (" " + question.answer + END_OF_TEXT, answer_kind)):
                piece = self.tokenizer.encode(text)
                ids, kinds = ids + piece, kinds + [kind] * len(piece)
            if len(ids) >= tokens:
                break
        padding = [END_ID] * (tokens - len(ids))
        return (ids + padding)[:tokens], (kinds + [PADDING] * len(padding))[:tokens]


def respelled(rng: random.Random, words: list[str]) -> list[str]:
    """`words`, about half of them replaced by one to three syllables that no list holds; all different."""
    while True:
        kept = [invented(rng) if rng.random() < 0.5 else word for word in words]
        if len({word.lower() for word in kept}) == len(words):
            return kept


def invented(rng: random.Random) -> str:
    """A word spelled freely, so that readers may bring their own names."""
    syllables = [rng.choice(ONSETS) + rng.choice("aeiouy") + rng.choice(CODAS) for _ in range(rng.randint(1, 3))]
    return "".join(syllables).capitalize()


def vocabulary() -> list[str]:
    """Every word that documents and prompts are made of, as a tokenizer meets it, names cut into their two pieces."""
    templates = [*MATERIAL["filler"], *MATERIAL["facts"], *MATERIAL["questions"]]
    words = {"Question", "Answer", " Chronicle", *(template.split()[0].strip(",") for template in templates)}
    for template in (*templates, *MATERIAL["offices"], *itertools.chain(*MATERIAL["words"].values())):
        words.update(" " + word for word in re.findall(r"[A-Za-z]+", re.sub(r"{\w+}", "", template)))
    for beginnings, endings in MATERIAL["names"].values():
        words.update([*(" " + beginning for beginning in beginnings), *endings])
    return sorted(words)


@exit_on_user_error
def main() -> int:
    args = parse_arguments()
    device = checked_device(args.device)
    out = Path(args.out)
    torch.manual_seed(SEED)
    tokenizer = write_tokenizer(out)
    model = Transformer(config_from_hf(CONFIG)).to(device)
    optimizers = new_optimizers(model, fused=device.type == "cuda")
    resume_file = out / "resume.pt"
    step = load_resume_file(resume_file, model, optimizers, device) if args.resume else 0
    examples = Examples(tokenizer)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters, {len(examples)} steps on {device}, "
          f"from step {step}")
    step = train(model, optimizers, examples, step, args, resume_file)
    save_resume_file(resume_file, model, optimizers, step)
    save_checkpoint(model, CONFIG, out, torch.bfloat16)
    done = "trained" if step == len(examples) else f"stopped at step {step} of {len(examples)} (go on with --resume)"
    print(f"{done}; {out} holds the checkpoint. Accuracy: python scripts/eval_tiny.py --model {out}")
    return 0


def train(model: Transformer, optimizers: list[torch.optim.Optimizer], examples: Examples, step: int,
          args: argparse.Namespace, resume_file: Path) -> int:
    """Run the steps from `step` on, until they or the minutes are used up; returns the step reached."""
    batches = DataLoader(examples, batch_size=None, sampler=range(step, len(examples)), num_workers=args.workers,
                         prefetch_factor=8 if args.workers else None, pin_memory=model.device.type == "cuda")
    started = saved = time.monotonic()
    model.train()
    with tqdm(total=len(examples), initial=step, unit="step", mininterval=1.0) as bar:
        for ids, kinds in batches:
            set_learning_rate(optimizers, args.lr, step / len(examples), step)
            loss, right = train_step(model, optimizers, ids.to(model.device, non_blocking=True),
                                     kinds.to(model.device, non_blocking=True))
            step += 1
            bar.update()
            if step % args.log_every == 0:
                bar.write(f"step {step:5d}  length {ids.shape[1]:5d}  answer loss {loss.item():.3f}  "
                          f"answers right {right.item():6.1%}  {time.monotonic() - started:5.0f} s", file=sys.stdout)
            now = time.monotonic()
            if now - saved > 60:
                save_resume_file(resume_file, model, optimizers, step)
                save_checkpoint(model, CONFIG, resume_file.parent, torch.bfloat16)
                saved = now
            if now - started > args.minutes * 60:
                break
    return step


def train_step(model: Transformer, optimizers: list[torch.optim.Optimizer], ids: torch.Tensor,
               kinds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One optimizer step; returns the mean loss of answer tokens and the share of questions with every token right."""
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.device.type == "cuda"):
        logits = model(ids[:, :-1])
    target, kind = ids[:, 1:], kinds[:, 1:]
    losses = F.cross_entropy(logits.float().flatten(0, 1), target.flatten(), reduction="none").view_as(target)
    answer, text = kind >= CUED, kind == TEXT
    answer_loss = (losses * answer).sum() / answer.sum()
    text_loss = (losses * text).sum() / text.sum()
    model.zero_grad()
    (answer_loss + LM_LOSS_WEIGHT * text_loss).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
    with torch.no_grad():  # an answer ends where the end-of-text token is due; it is wrong if any of its tokens is
        wrong = (answer & (logits.argmax(-1) != target)).long().cumsum(1)
        ends = answer & (target == END_ID)
        wrong_before = F.pad(torch.where(ends, wrong, 0).cummax(1).values, (1, -1))
        asked = ends & (kind == ANSWER)
        right = (asked & (wrong == wrong_before)).sum() / asked.sum()
    return answer_loss.detach(), right


def set_learning_rate(optimizers: list[torch.optim.Optimizer], peak: float, done: float, step: int) -> None:
    """a warm-up of 100 steps, then the peak, and over the last 40% of the run a straight line down to 2%."""
    rate = peak * min(1.0, (step + 1) / 100, max(0.02, (1 - done) / 0.4))
    for group in itertools.chain(*(optimizer.param_groups for optimizer in optimizers)):
        group["lr"] = rate


def new_optimizers(model: Transformer, fused: bool) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices (94% right at 4K tokens in 560 steps, AdamW in 720), AdamW for the rest."""
    matrices = [parameter for name, parameter in model.named_parameters() if parameter.ndim == 2 and ".layers." in name]
    chosen = {id(parameter) for parameter in matrices}
    others = [parameter for parameter in model.parameters() if id(parameter) not in chosen]
    return [torch.optim.Muon(matrices, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0, fused=fused)]


def write_tokenizer(directory: Path) -> Tokenizer:
    """A byte-level BPE trained on the words of the documents, names cut into their pieces: the same file every time."""
    make_folder(directory)
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=[END_OF_TEXT], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(vocabulary() * 2, trainer)  # twice: a pair seen once is not merged
    with written_whole(directory / "tokenizer.json") as partial:
        bpe.save(str(partial))
    return Tokenizer(directory, config_from_hf(CONFIG))


def save_resume_file(path: Path, model: Transformer, optimizers: list[torch.optim.Optimizer], step: int) -> None:
    """Weights, optimizers and step, whole or not at all."""
    with written_whole(path) as partial:
        torch.save({"model": model.state_dict(), "step": step,
                    "optimizers": [optimizer.state_dict() for optimizer in optimizers]}, partial)


def load_resume_file(path: Path, model: Transformer, optimizers: list[torch.optim.Optimizer],
                     device: torch.device) -> int:
    """Restore what `save_resume_file` wrote; returns the step. Raises UserError when the file is not there."""
    if not path.is_file():
        raise UserError(f"{path} is missing; --resume goes on from the file that an earlier run left in --out")
    saved = torch.load(path, map_location=device, weights_only=True)
    model.load_state_dict(saved["model"])
    for optimizer, state in zip(optimizers, saved["optimizers"]):
        optimizer.load_state_dict(state)
    return saved["step"]


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(description="Train the embedded model from nothing.",
                                     epilog="example: python scripts/train_tiny.py --minutes 10 --out out/mine")
    parser.add_argument("--out", default="out/tiny-hybrid", help="checkpoint directory (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=30.0, help="stop after so many (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on from OUT/resume.pt")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s here)")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=min(12, (os.cpu_count() or 2) - 1), help="document writers")
    parser.add_argument("--log-every", type=int, default=50, help="steps between two printed lines")
    args = parser.parse_args()
    require_number("--workers", args.workers, least=0)
    require_number("--log-every", args.log_every, least=1)
    return args


if __name__ == "__main__":
    sys.exit(main())
