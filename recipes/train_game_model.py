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
from game_model.maps import lake, room, training_maps
from game_model.network import Weights, losses, make_batch, new_weights
from game_model.samples import Sampler, Tree
from game_model.trial import Trial
from game_model.vocabulary import make_tokenizer, write_tokenizer
from torch import Tensor

from opcd_nemo.formats.huggingface import write_hf_folder
from opcd_nemo.formats.shape import ModelConfig
from opcd_nemo.formats.stored_model import open_model
from opcd_nemo.tasks.games.boards import STEPS

THREADS = 2
TREES = {"play": 28, "write": 20}  # of a step
SHORT_TREES = 12  # of each kind and step, where writing is taught
PARTS = 4  # of a step's trees, all padded to the same length
HIDDEN = 0.8  # share of the trees with random symbols
LEARNING_RATE = 2e-3
MATRIX_LEARNING_RATE = 0.02  # of Muon


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


def draw_tree(sampler: Sampler, rng: Random, progress: float, stage: str) -> Tree:
    """A tree for training that is `progress` of the way: later there are more whole games."""
    hidden = rng.random() < HIDDEN
    kind = rng.random()
    short, whole, game = 0.2, 0.05 + 0.1 * progress, 0.1 + 0.1 * progress
    if stage == "write":
        short, whole, game = 0.15, 0.25, 0.2
    if kind < short:
        return sampler.extraction(rng, hidden=hidden, short=True)
    if kind < short + whole:
        return sampler.extraction(rng, hidden=hidden)
    if kind < short + whole + game:
        return sampler.game(rng, hidden=hidden)
    return sampler.lesson(rng, 6, hidden=hidden)


def draw_step(sampler: Sampler, step: int, args: Any) -> list[list[Tree]]:
    """A step's trees, in parts of about as many tokens, each of trees of about one length."""
    rng = Random(f"{args.seed}/{step}")
    progress = step / args.steps
    trees = [draw_tree(sampler, rng, progress, args.stage) for _ in range(TREES[args.stage])]
    if args.stage == "write":
        trees += [sampler.outcome(rng) for _ in range(SHORT_TREES)]
        trees += [sampler.moves(rng, hidden=rng.random() < HIDDEN) for _ in range(SHORT_TREES)]
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

    def gradients(trees: Sequence[Tree]) -> tuple[Tensor, float, Sequence[Tensor]]:
        batch = make_batch(trees)
        found = losses(config, weights, batch)
        answered = batch.weights == 1.0
        is_move = torch.isin(batch.targets, moves)
        kinds = (answered & is_move, ~answered & is_move, ~answered & ~is_move)
        sums = [torch.stack([found.detach()[k].sum(), k.sum()]) for k in kinds]
        grads = torch.autograd.grad((found * batch.weights).sum(), parameters)
        return torch.stack(sums), float(batch.weights.sum()), grads

    with ThreadPoolExecutor(THREADS) as threads:
        for step in range(1, args.steps + 1):
            drawn = draw_step(sampler, step, args)
            parts = list(threads.map(gradients, drawn))
            num = sum(count for _, count, _ in parts)
            for parameter, *found in zip(parameters, *(part for _, _, part in parts), strict=True):
                parameter.grad = torch.stack(found).sum(0) / num
            norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            scale = args.peak * min(1.0, step / 50, 1.3 * (1.0 - step / args.steps) + 0.01)
            for optimizer, learning_rate in optimizers.items():
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate * scale
                optimizer.step()
            if step % 50 == 0:
                sums, counts = torch.stack([found for found, _, _ in parts]).sum(0).unbind(1)
                direction, way, role = (sums / counts).tolist()
                print(
                    f"step {step}: {time.monotonic() - start:.0f} s, losses: direction "
                    f"{direction:.3f}, marks {way:.3f} (ways) {role:.3f} (notes), norm {norm:.2f}",
                    flush=True,
                )
            if step % args.try_every == 0 or step == args.steps:
                report(Trial(config, weights, sampler, args.seed), 40)


def report(trial: Trial, num_games: int) -> None:
    """Print what the model can do on maps, letters and symbols that training never has."""
    for game, task, rounds in (("lake", lake(4, 4, 8, 80), 8), ("room", room(400, 0), 6)):
        boards = task.maps["test"][:num_games]
        for hidden in (False, True):
            rates = [
                trial.win_rate(boards, rounds, about=about, hidden=hidden) for about in (None, ())
            ]
            print(
                f"  {game}, hidden {hidden}, wins with and without notes {rates}, "
                f"{trial.items(boards, rounds, hidden=hidden)}",
                flush=True,
            )


def main() -> None:
    """Train and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--to", type=Path, required=True, help="a new folder")
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--stage", choices=("play", "write"), default="play")
    parser.add_argument("--start", type=Path, help="a folder to go on from")
    parser.add_argument("--peak", type=float, default=1.0, help="of the learning rates")
    parser.add_argument("--try-every", type=int, default=500)
    args = parser.parse_args()
    tokenizer = make_tokenizer()
    config = shape(tokenizer.get_vocab_size(), args.layers)
    sampler = Sampler(tokenizer, training_maps())
    weights = new_weights(config, tokenizer, args.seed)
    if args.start:
        checkpoint = open_model(str(args.start))
        for name, weight in weights.items():
            weight.data.copy_(checkpoint.tensor(name))
    train(config, weights, sampler, args)
    tensors = {name: weight.detach() for name, weight in weights.items()}
    write_hf_folder(args.to, config, tensors, torch.float32, write_others=write_tokenizer)


if __name__ == "__main__":
    main()
