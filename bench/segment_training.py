"""LoRA adapters for a prefill mask, trained on a CPU in minutes.

The recipe is that of the paper (MAS, arXiv 2412.18487): rank 32, alpha 64, dropout 0.05 on q_proj
and v_proj. Steps are few here, so the learning rate is five times its 2e-4, and no example is seen
twice, where it makes three epochs over a data set.

Training sees what the server will: token ids and turns from the server's ``ChatTemplate``, the mask
from the engine's ``Segments``. Only the answer and the token that ends it are learnt.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM

from headstart.bench.segment_task import Question
from headstart.engine.models.config import ModelConfig
from headstart.engine.models.files.gguf_weights import huggingface_folder
from headstart.engine.ranges.segments import Segments, turn_spans
from headstart.server.text.templates import ChatTemplate
from headstart.server.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from peft import PeftModel

RANK, ALPHA, DROPOUT = 32, 64, 0.05
TARGETS = ("q_proj", "v_proj")
LEARNING_RATE = 1e-3
WARM_UP = 10  # steps
CLIP = 1.0  # norm of all gradients together
BATCH = 16
IGNORED = -100  # the label that cross_entropy leaves out, by its own default


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt and its answer as token ids; the answer, with its end, starts at ``answer``."""

    token_ids: list[int]
    answer: int
    segments: Segments


@dataclass(frozen=True, slots=True)
class Batch:
    """Examples of B rows, filled up to T tokens at the end, where no token of theirs looks.

    ``token_ids`` and ``labels`` are int64 ``[B, T]``; a label is the token to predict *at* its
    place from those before it, IGNORED for prompt and filling. ``mask`` is what attention adds to
    its scores, float ``[B, 1, T, T]``: 0 where a row sees a key.
    """

    token_ids: Tensor
    labels: Tensor
    mask: Tensor

    @classmethod
    def of(cls, examples: Sequence[Example], dtype: torch.dtype) -> Batch:
        length = max(len(example.token_ids) for example in examples)
        token_ids = torch.zeros(len(examples), length, dtype=torch.int64)
        labels = torch.full_like(token_ids, IGNORED)
        mask = torch.zeros(len(examples), 1, length, length, dtype=dtype)
        for i, example in enumerate(examples):
            ids = torch.tensor(example.token_ids)
            token_ids[i, : len(ids)] = ids
            labels[i, example.answer : len(ids)] = ids[example.answer :]
            seen = torch.from_numpy(example.segments.mask(length))
            mask[i, 0].masked_fill_(~seen, torch.finfo(dtype).min)
        return cls(token_ids, labels, mask)


class Encoder:
    """Questions to examples, with the tokens and turns the server gives the same chat.

    ``mask`` is one of the engine's MASKS: turns makes each system and user turn a segment.
    """

    def __init__(self, folder: Path, mask: str) -> None:
        self.tokenizer = Tokenizer.from_folder(folder)
        self._template = ChatTemplate(self.tokenizer)
        self._mask = mask
        self.end = ModelConfig.from_folder(folder).eos_token_ids[0]

    def prompt(self, question: Question) -> Example:
        """Up to where the answer begins."""
        token_ids, turns = self._template.encode_turns(question.messages)
        spans = turn_spans(turns) if self._mask == "turns" else []
        return Example(token_ids, len(token_ids), Segments.of(spans, len(token_ids)))

    def example(self, question: Question) -> Example:
        """With the answer, and the token that ends it."""
        prompt = self.prompt(question)
        answer = self.tokenizer.encode(question.answer, add_special_tokens=False)
        return Example([*prompt.token_ids, *answer, self.end], prompt.answer, prompt.segments)


def load_model(folder: Path) -> Any:
    """The model to adapt, in bf16, its weights frozen."""
    # Attention as plain products: fused attention takes twice as long backwards at this length.
    model = AutoModelForCausalLM.from_pretrained(
        huggingface_folder(folder), dtype=torch.bfloat16, attn_implementation="eager"
    )
    return model.requires_grad_(False)


def add_adapter(model: Any, seed: int) -> PeftModel:
    """The model with a fresh adapter in float32; equal seeds give equal adapters."""
    torch.manual_seed(seed)
    # Here, because it takes seconds: it imports models of its own.
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=DROPOUT,
        target_modules=list(TARGETS),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def logits(model: PeftModel, batch: Batch, rows: Tensor) -> Tensor:
    """Float32 ``[rows, vocabulary]`` at the places where ``rows``, bool ``[B, T]``, is true."""
    causal_lm = model.get_base_model()
    positions = torch.arange(batch.token_ids.shape[1]).expand_as(batch.token_ids)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = causal_lm.model(
            input_ids=batch.token_ids,
            attention_mask=batch.mask,
            position_ids=positions,
            use_cache=False,
        ).last_hidden_state
        # The head is a quarter of the model: only where something is learnt or asked.
        return causal_lm.lm_head(hidden[rows]).float()  # type: ignore[no-any-return]


def answer_loss(model: PeftModel, batch: Batch) -> Tensor:
    """Mean cross-entropy of the labels that count, each predicted one place before its own."""
    following = functional.pad(batch.labels[:, 1:], (0, 1), value=IGNORED)
    rows = following != IGNORED
    return functional.cross_entropy(logits(model, batch, rows), following[rows])


def train(
    model: PeftModel, examples: Iterator[Example], steps: int, report: Callable[[int, float], None]
) -> list[float]:
    """The loss of every step; ``report(step, loss)`` after each.

    AdamW without weight decay; the learning rate warms up, and falls to nothing on a line in the
    last quarter. (Falling from the start it is low before a segment adapter has found its way:
    it learns later than a causal one, and then faster.)
    """
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARM_UP, 4 * (1 - step / steps), 1.0)
    )
    model.train()
    losses = []
    for step in range(1, steps + 1):
        batch = Batch.of(list(itertools.islice(examples, BATCH)), torch.bfloat16)
        loss = answer_loss(model, batch)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(weights, CLIP)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        report(step, losses[-1])
    return losses


def answers_right(model: PeftModel, examples: Iterable[Example]) -> list[bool]:
    """Whether the whole of each answer, with its end, is what greedy decoding gives.

    One pass: each token of the answer must be the likeliest after those before it.
    """
    model.eval()
    right = []
    waiting = iter(examples)
    while group := list(itertools.islice(waiting, BATCH)):
        batch = Batch.of(group, torch.bfloat16)
        following = functional.pad(batch.labels[:, 1:], (0, 1), value=IGNORED)
        rows = following != IGNORED
        with torch.inference_mode():
            best = logits(model, batch, rows).argmax(-1)
        wrong = torch.zeros_like(rows)
        wrong[rows] = best != following[rows]
        right += [not row for row in wrong.any(1).tolist()]
    return right


def save_adapter(model: PeftModel, folder: Path, mask: str) -> None:
    """In PEFT's format, its mask declared for the server in adapter_config.json."""
    model.save_pretrained(str(folder))
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "segment_mask": mask}, indent=1))
