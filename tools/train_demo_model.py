"""Train the demo model and write it in the Hugging Face hub's format: `python tools/train_demo_model.py --help`.

A batch is a function of (model, seed, step), so that a run that was stopped goes on from its state file as if it had not been.

Shape letters: B batch, S sequence length, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from demo_batches import TOKEN_IDS, Batch, make_batch
from demo_network import CONFIGS, DemoConfig, DemoModel
from safetensors.torch import load_file, save
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from torch import Tensor, nn

from expertwire.deploy.demo_task import (
    END_OF_THINKING,
    EOS,
    PAD,
    THINK,
    UNKNOWN,
    WORDS,
)

SPECIAL = (PAD, EOS, UNKNOWN, *(word for word in WORDS if word.startswith("<reserved")))
CHAT_TEMPLATE = (
    "{%- set question = messages[-1]['content'] | trim -%}"
    "{{ question }}{% if add_generation_prompt and not question.endswith('?') %} ?{% endif %}"
)


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters of a training.

    One of `tokens` and `cpu_seconds` is the budget; only `tokens` gives the same weights twice. `model` is a key of `CONFIGS`,
    `init` the folder of a checkpoint to start from.
    """

    model: str = "demo"
    init: str | None = None

    tokens: int | None = None
    cpu_seconds: float | None = None
    seed: int = 0
    batch_tokens: int = 1024
    lr: float = 3e-3
    warmup: float = 0.02  # share of the budget
    decay_from: float = 0.4  # share of the budget after which the learning rate falls linearly to 0
    weight_decay: float = 0.01
    aux_coefficient: float = 0.01


def batch_loss(model: DemoModel, batch: Batch, aux_coefficient: float) -> Tensor:
    """Weighted cross-entropy of the completions plus the load-balancing loss.

    Where several tokens are right, the loss is that of their joint probability: which one the model prefers is left to it.
    """
    logits_BSV, aux = model(batch.ids_BS[:, :-1], first=batch.first - 1)
    targets_BS = batch.ids_BS[:, batch.first :]
    losses_BS = F.cross_entropy(logits_BSV.flatten(0, 1), targets_BS.flatten(), reduction="none").view(targets_BS.shape)
    if batch.others_BSV is not None:
        logprobs_BSV = logits_BSV.log_softmax(-1)
        joint_BS = logprobs_BSV.masked_fill(~batch.others_BSV, -torch.inf).logsumexp(-1)
        losses_BS = torch.where(batch.others_BSV.any(-1), -joint_BS, losses_BS)
    return (losses_BS.mean(0) * batch.weights_S).sum() / batch.weights_S.sum() + aux_coefficient * aux


def learning_rate(recipe: Recipe, progress: float) -> float:
    """Linear warm-up, a plateau, then linear decay towards 0; `progress` is the share of the budget that is spent."""
    rise, fall = progress / recipe.warmup, (1 - progress) / (1 - recipe.decay_from)
    return recipe.lr * max(0.0, min(1.0, rise, fall))


class Training:
    """A run: model, optimiser and counters, saved as a whole and taken up again.

    Raises:
        ValueError: not exactly one budget, or a state file of another recipe or model.
    """

    def __init__(self, config: DemoConfig, recipe: Recipe, state_path: Path | None = None) -> None:
        if (recipe.tokens is None) == (recipe.cpu_seconds is None):
            raise ValueError("give one of tokens and cpu_seconds (--tokens, --minutes)")
        self.recipe, self.state_path = recipe, state_path
        self.key = repr((config, recipe))
        self.model = DemoModel(config, recipe.seed)
        if recipe.init is not None:
            load_weights(self.model, Path(recipe.init))
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), betas=(0.9, 0.98), weight_decay=recipe.weight_decay, fused=True
        )
        self.step, self.tokens, self.cpu_seconds = 0, 0, 0.0
        if state_path is not None and state_path.exists():
            self._load(torch.load(state_path))

    @property
    def progress(self) -> float:
        """The share of the budget that is spent, at most 1."""
        if self.recipe.tokens is not None:
            return min(1.0, self.tokens / self.recipe.tokens)
        assert self.recipe.cpu_seconds is not None, "the recipe has one of the two budgets"
        return min(1.0, self.cpu_seconds / self.recipe.cpu_seconds)

    def run(self, log_every: int = 200) -> None:
        """Trains until the budget is spent, printing the mean loss and saving the state every `log_every` steps."""
        losses = []
        while self.progress < 1:
            losses.append(self.advance())
            if self.step % log_every == 0 or self.progress == 1:
                rate = self.tokens / self.cpu_seconds
                print(
                    f"step {self.step:6d}  {self.tokens / 1e6:6.2f}M tokens  {self.cpu_seconds:6.0f} CPU-s  "
                    f"{rate / 1e3:5.1f}K tokens/CPU-s  loss {sum(losses) / len(losses):.4f}",
                    flush=True,
                )
                losses = []
                self.save()

    def save(self) -> None:
        """Writes the state file, if the run has one."""
        if self.state_path is None:
            return
        counters = {"step": self.step, "tokens": self.tokens, "cpu_seconds": self.cpu_seconds, "key": self.key}
        temporary = self.state_path.with_suffix(".tmp")
        torch.save({"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), **counters}, temporary)
        temporary.replace(self.state_path)

    def advance(self) -> float:
        """Train for one step and return its loss."""
        started = time.process_time()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.recipe, self.progress)
        batch = make_batch(self.recipe.model, self.recipe.seed, self.recipe.batch_tokens, self.step)
        loss = batch_loss(self.model, batch, self.recipe.aux_coefficient)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        self.tokens += batch.ids_BS.numel()
        self.cpu_seconds += time.process_time() - started
        return loss.item()

    def _load(self, state: dict) -> None:
        if state["key"] != self.key:
            raise ValueError(f"{self.state_path} belongs to another run: {state['key']}, not {self.key}")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.tokens, self.cpu_seconds = state["step"], state["tokens"], state["cpu_seconds"]


def hub_tensors(model: DemoModel) -> dict[str, Tensor]:
    """Return the weights in bf16 by the hub's names: one tensor per expert and projection; the tied head is left out."""
    tensors: dict[str, Tensor] = {}
    for name, weight in model.state_dict().items():
        if name.endswith("experts.gate_up_proj"):
            for e, (gate, up) in enumerate(zip(*weight.chunk(2, dim=1), strict=True)):
                stem = name.replace("gate_up_proj", str(e))
                tensors |= {f"{stem}.gate_proj.weight": gate, f"{stem}.up_proj.weight": up}
        elif name.endswith("experts.down_proj"):
            tensors |= {f"{name.replace('down_proj', str(e))}.down_proj.weight": down for e, down in enumerate(weight)}
        else:
            tensors[name] = weight
    return {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in tensors.items()}


def load_weights(model: DemoModel, folder: Path) -> None:
    """Load the weights of a checkpoint that `save_checkpoint` wrote."""
    tensors = load_file(folder / "model.safetensors")
    state = model.state_dict()
    assert hub_tensors(model).keys() == tensors.keys(), f"{folder} is not a checkpoint of this configuration"
    for name in state:
        stem, _, kind = name.rpartition(".experts.")
        if not stem:
            state[name] = tensors[name].float()
            continue
        names = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
        state[name] = torch.stack(
            [
                torch.cat([tensors[f"{stem}.experts.{e}.{each}.weight"] for each in names])
                for e in range(model.c.num_experts)
            ]
        ).float()
    model.load_state_dict(state)


def hub_config(c: DemoConfig) -> dict:
    """`config.json` as the hub has it for Qwen3-MoE."""
    fixed = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "decoder_sparse_step": 1,
        "eos_token_id": TOKEN_IDS[EOS],
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "intermediate_size": 3 * c.hidden_size,
        "max_position_embeddings": 2048,
        "mlp_only_layers": [],
        "model_type": "qwen3_moe",
        "norm_topk_prob": True,
        "output_router_logits": False,
        "pad_token_id": TOKEN_IDS[PAD],
        "rope_scaling": None,
        "router_aux_loss_coef": Recipe.aux_coefficient,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
    }
    return dict(sorted((fixed | asdict(c)).items()))


def make_tokenizer() -> Tokenizer:
    """Return a tokenizer of one token a word; blanks and punctuation separate words, so `92?` is read as `92 ?`."""
    tokenizer = Tokenizer(models.WordLevel(TOKEN_IDS, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in SPECIAL])
    tokenizer.add_tokens([AddedToken(word, special=False, normalized=False) for word in (THINK, END_OF_THINKING)])
    return tokenizer


def save_checkpoint(model: DemoModel, folder: Path) -> None:
    """Writes weights, configuration and tokenizer in the hub's format."""
    folder.mkdir(parents=True, exist_ok=True)
    # `save_file` would leave a file that only its owner may read.
    (folder / "model.safetensors").write_bytes(save(hub_tensors(model), metadata={"format": "pt"}))
    make_tokenizer().save(str(folder / "tokenizer.json"))
    tokenizer_config = {
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": EOS,
        "model_max_length": 2048,
        "pad_token": PAD,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": UNKNOWN,
    }
    generation_config = {"eos_token_id": TOKEN_IDS[EOS], "pad_token_id": TOKEN_IDS[PAD]}
    for name, value in (
        ("config", hub_config(model.c)),
        ("generation_config", generation_config),
        ("tokenizer_config", tokenizer_config),
    ):
        (folder / f"{name}.json").write_text(json.dumps(value, indent=2) + "\n")


def compare_with_transformers(model: DemoModel, folder: Path, name: str) -> tuple[float, int, int]:
    """Compare the saved checkpoint in fp32 through transformers with this file's forward of the same (bf16) weights.

    Returns:
        The largest difference of logits, and how many of how many next tokens are equal.
    """
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours = DemoModel(model.c)
    ours.load_state_dict({name: weight.bfloat16().float() for name, weight in model.state_dict().items()})
    largest, equal, total = 0.0, 0, 0
    for step in range(20):
        ids_BS = make_batch(name, -1, 512, step).ids_BS
        with torch.no_grad():
            ours_BSV, theirs_BSV = ours(ids_BS)[0], theirs(ids_BS).logits
        largest = max(largest, (ours_BSV - theirs_BSV).abs().max().item())
        equal += int((ours_BSV.argmax(-1) == theirs_BSV.argmax(-1)).sum())
        total += ids_BS.numel()
    return largest, equal, total


def main(argv: list[str] | None = None) -> None:
    """Trains, saves and verifies a checkpoint."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--model", choices=CONFIGS, default="demo")
    parser.add_argument("--out", type=Path, default=Path("demo-model"), help="folder of the checkpoint")
    parser.add_argument("--tokens", type=float, help="budget in tokens: the same weights every time")
    parser.add_argument("--minutes", type=float, help="budget in CPU minutes: depends on the machine")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--init", type=Path, help="folder of a checkpoint of the same sizes to start from")
    parser.add_argument("--lr", type=float, default=Recipe.lr, help="highest learning rate")
    parser.add_argument("--warmup", type=float, default=Recipe.warmup, help="share of the budget in which it rises")
    parser.add_argument("--decay-from", type=float, default=Recipe.decay_from, help="share from which it falls")
    parser.add_argument("--state", type=Path, help="file to save the run's state in, and to go on from")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    recipe = Recipe(
        tokens=None if args.tokens is None else int(args.tokens),
        cpu_seconds=None if args.minutes is None else 60 * args.minutes,
        seed=args.seed,
        model=args.model,
        init=None if args.init is None else str(args.init),
        lr=args.lr,
        warmup=args.warmup,
        decay_from=args.decay_from,
    )
    training = Training(CONFIGS[args.model], recipe, args.state)
    training.run()
    save_checkpoint(training.model, args.out)
    largest, equal, total = compare_with_transformers(training.model, args.out, args.model)
    print(
        f"against transformers in fp32: largest difference of logits {largest:.2g}, {equal} of {total} next tokens equal"
    )


if __name__ == "__main__":
    main()
