"""Train the shipped model, `lynx-tiny`, from nothing: `python -m lynx_trt.models.train`.

A Mixture-of-Experts language model of Qwen3-MoE form, small enough to train on two CPU cores and real
enough to measure on: it is trained with a load-balancing loss on the sources of the Python standard
library, which every Python installation has, with a byte-level BPE tokenizer learnt from the same text.
The result is an ordinary Hugging Face folder (config.json, model.safetensors, tokenizer.json).
"""

from __future__ import annotations

import hashlib
import json
import math
import sysconfig
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import numpy as np
    import torch
    from transformers import PreTrainedTokenizerFast, Qwen3MoeForCausalLM

VALIDATION_PERCENT = 3
END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class Recipe:
    """Every number that decides what the trained model is. Lengths are in tokens."""

    vocabulary: int = 2048
    hidden: int = 160
    layers: int = 6
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 32
    experts: int = 32
    experts_per_token: int = 4
    expert_intermediate: int = 48
    balance_loss: float = 0.02
    length: int = 512
    batch: int = 8
    learning_rate: float = 3e-3
    warmup_steps: int = 100
    weight_decay: float = 0.1
    seed: int = 0


def corpus() -> tuple[list[str], list[str]]:
    """The standard library's sources as (training texts, validation texts).

    Tests and codec tables are left out: they are data more than code. A file goes to validation by the
    hash of its path, so the split is the same wherever the same Python is installed.
    """
    root = Path(sysconfig.get_path("stdlib"))
    skip = {"site-packages", "test", "tests", "idle_test", "lib2to3", "encodings", "__pycache__", "_vendor"}
    training: list[str] = []
    validation: list[str] = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if skip & set(relative.parts) or path.name.startswith("_sysconfigdata"):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        bucket = hashlib.sha256(relative.as_posix().encode()).digest()[0] * 100 // 256
        (validation if bucket < VALIDATION_PERCENT else training).append(text)
    return training, validation


def train_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: any text goes in, and comes back byte for byte."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    # Runs of blanks are one token each: indentation is a third of Python's bytes.
    words = Regex(r" ?[A-Za-z_]+|\d| ?[^\sA-Za-z_\d]+|\n[ \t]*|[^\S\n]+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # A prompt begins as every training text did; `pack` puts the token there itself.
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, tokenizer.token_to_id(END_OF_TEXT))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )


def new_model(recipe: Recipe) -> Qwen3MoeForCausalLM:
    """The untrained model (float32)."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(recipe.seed)
    config = Qwen3MoeConfig(
        vocab_size=recipe.vocabulary,
        hidden_size=recipe.hidden,
        intermediate_size=4 * recipe.hidden,
        moe_intermediate_size=recipe.expert_intermediate,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        head_dim=recipe.head_dim,
        num_experts=recipe.experts,
        num_experts_per_tok=recipe.experts_per_token,
        norm_topk_prob=True,
        router_aux_loss_coef=recipe.balance_loss,
        output_router_logits=True,
        tie_word_embeddings=True,
        max_position_embeddings=recipe.length,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return Qwen3MoeForCausalLM(config)


def pack(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> np.ndarray[Any, np.dtype[np.int32]]:
    """All texts as one row of token ids, an end-of-text token before each."""
    import numpy as np

    rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return np.concatenate([np.array([0, *row], dtype=np.int32) for row in rows])


def bits_per_byte(
    model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: list[str], length: int
) -> float:
    """Cross-entropy of `texts` in bits for each of their UTF-8 bytes, in windows of `length` tokens."""
    import torch

    ids = torch.from_numpy(pack(tokenizer, texts)).long()
    nats = 0.0
    model.eval()
    with torch.inference_mode():
        for start in range(0, len(ids) - 1, length):
            window = ids[start : start + length + 1][None]
            logits = model(input_ids=window[:, :-1], output_router_logits=False).logits
            nats += torch.nn.functional.cross_entropy(logits[0].float(), window[0, 1:], reduction="sum").item()
    model.train()
    return nats / math.log(2) / sum(len(text.encode()) for text in texts)


def optimizer_for(model: torch.nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW; norms and other vectors are not decayed."""
    import torch

    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95), fused=True)


def train(output: Path, recipe: Recipe, minutes: float) -> dict[str, Any]:
    """Train for `minutes` of wall clock, save to `output`, return what `training.json` holds.

    The learning rate follows the clock and not a number of steps, so that a slower machine still
    finishes its schedule; the batches of a seed are the same everywhere.
    """
    import torch
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    training, validation = corpus()
    tokenizer = train_tokenizer(training, recipe.vocabulary)
    ids = torch.from_numpy(pack(tokenizer, training)).long()
    model = new_model(recipe)
    model.set_experts_implementation("grouped_mm")  # a little faster than the default loop, with or without autocast
    optimizer = optimizer_for(model, recipe)
    generator = torch.Generator().manual_seed(recipe.seed)
    started = time.monotonic()
    step, loss_average = 0, float("nan")
    columns = [TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[loss]}"), TimeRemainingColumn()]
    with Progress(*columns) as progress:
        bar = progress.add_task("training lynx-tiny", total=minutes * 60, loss="")
        while (elapsed := time.monotonic() - started) < minutes * 60:
            done = elapsed / (minutes * 60)
            rate = min((step + 1) / recipe.warmup_steps, 1.0) * (0.02 + 0.98 * (1 + math.cos(math.pi * done)) / 2)
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * rate
            starts = torch.randint(len(ids) - recipe.length, (recipe.batch,), generator=generator)
            batch = torch.stack([ids[s : s + recipe.length] for s in starts.tolist()])
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            loss_average = loss.item() if step == 1 else 0.98 * loss_average + 0.02 * loss.item()
            progress.update(bar, completed=elapsed, loss=f"step {step}  loss {loss_average:.3f}")
    model.config.output_router_logits = False
    model.half()
    report = {
        "bits_per_byte": round(bits_per_byte(model.float(), tokenizer, validation, recipe.length), 4),
        "validation_bytes": sum(len(text.encode()) for text in validation),
        "training_bytes": sum(len(text.encode()) for text in training),
        "minutes": minutes,
        "steps": step,
        "tokens_seen": step * recipe.batch * recipe.length,
        "python": sysconfig.get_python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "recipe": asdict(recipe),
    }
    output.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(output)
    tokenizer.save_pretrained(output)
    (output / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    return report


def main(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write the trained model to.")],
    minutes: Annotated[float, typer.Option(help="Wall-clock minutes to train for.", min=0.05)] = 80.0,
    seed: Annotated[int, typer.Option(help="Seed of the initial weights and of the batches.")] = 0,
) -> None:
    """Train lynx-tiny from nothing on the Python standard library's sources."""
    if output.exists() and any(output.iterdir()):
        raise typer.BadParameter(f"{output} exists and is not empty; name a new folder", param_hint="--output")
    report = train(output, Recipe(seed=seed), minutes)
    typer.echo(json.dumps(report, indent=2))


if __name__ == "__main__":
    typer.run(main)
