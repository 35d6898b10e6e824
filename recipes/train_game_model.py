"""Train the small model of `make demo-games` from nothing: `python recipes/train_game_model.py`."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import torch
from game_model.network import Weights, losses, make_batch, new_weights
from game_model.samples import Maps, Sampler, Tree
from game_model.settings import Hidden
from game_model.trial import Trial
from game_model.vocabulary import make_tokenizer, write_tokenizer
from torch import Tensor

from opcd_nemo.hf import write_hf_folder
from opcd_nemo.model_config import ModelConfig
from opcd_nemo.tasks.boards import STEPS
from opcd_nemo.tasks.frozen_lake import LETTERS as LAKE_LETTERS
from opcd_nemo.tasks.games import GameTask, frozen_lake

THREADS = 2
TREES = 28  # of a step
PARTS = 4  # of a step's trees, each padded to one length
LEARNING_RATE = 2e-3
MATRIX_LEARNING_RATE = 0.02  # of Muon


def lake(size: int, num_holes: int, rounds: int, num_held_back: int) -> GameTask:
    """The maps of a setting; letters and symbols play no part."""
    return frozen_lake(
        size=size,
        num_holes=num_holes,
        rounds=rounds,
        num_maps=None,
        map_seed=0,
        num_validation=num_held_back,
        num_test=num_held_back,
        repeat_maps=False,
        symbols=LAKE_LETTERS,
        controls={"up": ["w"], "down": ["s"], "left": ["a"], "right": ["d"]},
        hint=None,
        seed=0,
    )


def shape(vocab_size: int, num_layers: int) -> ModelConfig:
    """The model: 4 heads, an even number of layers and of token ids, for two ranks of any kind."""
    return ModelConfig(
        architecture="llama",
        num_layers=num_layers,
        hidden_size=128,
        ffn_hidden_size=320,
        num_attention_heads=4,
        num_query_groups=4,
        head_dim=32,
        vocab_size=vocab_size + vocab_size % 2,
        max_positions=1024,
        rope_theta=10000.0,
        rope_scaling=None,
        norm_eps=1e-5,
        tied_embeddings=True,
        qkv_bias=False,
        qk_norm=False,
        eos_token_ids=(0,),
    )


def draw_tree(sampler: Sampler, rng: Random, progress: float) -> Tree:
    """A tree for training that is `progress` of the way: boards first, then games and notes."""
    easy = rng.random() > min(0.9, 0.1 + 3.0 * progress)
    hidden: Hidden = "none" if easy else "ground"
    kind = rng.random()
    late = progress > 0.4
    if kind < (0.35 if late else 0.15):
        return sampler.extraction(rng, hidden=hidden)
    if kind < (0.6 if late else 0.3):
        return sampler.game(rng, hidden=hidden)
    return sampler.lesson(rng, 6, hidden=hidden)


def draw_step(sampler: Sampler, seed: int, step: int, num_steps: int) -> list[list[Tree]]:
    """A step's trees, in parts of about as many tokens, each of trees of about one length."""
    rng = Random(f"{seed}/{step}")
    trees = [draw_tree(sampler, rng, step / num_steps) for _ in range(TREES)]
    trees = sorted((tree for tree in trees if tree.answers), key=lambda tree: tree.num_tokens)
    share = sum(tree.num_tokens for tree in trees) / PARTS
    parts: list[list[Tree]] = [[] for _ in range(PARTS)]
    total = 0
    for tree in trees:
        parts[int(total / share)].append(tree)
        total += tree.num_tokens
    return [part for part in parts if part]


def train(config: ModelConfig, weights: Weights, sampler: Sampler, args: Any) -> None:
    """Minimise the cross-entropy of the answers; two threads share every step's trees."""
    parameters = list(weights.values())
    matrices = [weights[name] for name in weights if name.endswith("_proj.weight")]
    others = [weights[name] for name in weights if not name.endswith("_proj.weight")]
    optimizers = {
        torch.optim.Muon(matrices, weight_decay=0.0): MATRIX_LEARNING_RATE,
        torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0): LEARNING_RATE,
    }
    torch.set_num_threads(1)
    start = time.monotonic()

    moves = torch.tensor([sampler.encode(f"{direction} [")[0] for direction in STEPS])

    def gradients(trees: Sequence[Tree]) -> tuple[Tensor, int, Sequence[Tensor]]:
        batch = make_batch(trees)
        found = losses(config, weights, batch)
        named = found.detach()[torch.isin(batch.targets, moves)]
        return named, len(found), torch.autograd.grad(found.sum(), parameters)

    with ThreadPoolExecutor(THREADS) as threads:
        for step in range(1, args.steps + 1):
            drawn = draw_step(sampler, args.seed, step, args.steps)
            parts = list(threads.map(gradients, drawn))
            num = sum(count for _, count, _ in parts)
            for parameter, *found in zip(parameters, *(part for _, _, part in parts), strict=True):
                parameter.grad = torch.stack(found).sum(0) / num
            norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            scale = min(1.0, step / 50, 2.0 * (1.0 - step / args.steps) + 0.01)
            for optimizer, learning_rate in optimizers.items():
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate * scale
                optimizer.step()
            if step % 50 == 0:
                named = float(torch.cat([found for found, _, _ in parts]).mean())
                spent = time.monotonic() - start
                print(
                    f"step {step}: {spent:.0f} s, direction {named:.3f}, norm {norm:.2f}",
                    flush=True,
                )
            if step % args.try_every == 0 or step == args.steps:
                report(Trial(config, weights, sampler, args.seed), 40)


def report(trial: Trial, num_games: int) -> None:
    """Print what the model can do on maps, letters and symbols that training never has."""
    maps = lake(4, 4, 8, 80).maps["test"][:num_games]
    kinds: tuple[Hidden, ...] = ("none", "ground")
    for hidden in kinds:
        rates = {
            name: trial.win_rate(maps, 8, about=about, hidden=hidden)
            for name, about in (("all", None), ("none", ()))
        }
        print(
            f"  hidden: {hidden}, wins {rates}, {trial.items(maps, 8, hidden=hidden)}", flush=True
        )


def main() -> None:
    """Train and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--to", type=Path, required=True, help="a new folder")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--try-every", type=int, default=500)
    args = parser.parse_args()
    tokenizer = make_tokenizer()
    config = shape(tokenizer.get_vocab_size(), args.layers)
    lakes = [(4, 4, 8, 80, 0.6), (4, 3, 8, 20, 0.1), (4, 5, 8, 20, 0.1), (4, 2, 8, 5, 0.1)]
    maps = [
        Maps(boards=lake(*which).maps["train"], rounds=which[2], weight=weight)
        for *which, weight in lakes
    ]
    maps.append(Maps(boards=lake(3, 2, 5, 5).maps["train"], rounds=5, weight=0.1))
    sampler = Sampler(tokenizer, maps)
    weights = new_weights(config, tokenizer, args.seed)
    train(config, weights, sampler, args)
    tensors = {name: weight.detach() for name, weight in weights.items()}
    write_hf_folder(args.to, config, tensors, torch.float32, write_others=write_tokenizer)


if __name__ == "__main__":
    main()
