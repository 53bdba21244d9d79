"""The segment benchmark: its questions, what training sees and learns, its figures, its command."""

import itertools
import json
from array import array
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from aiohttp import web

from headstart.bench import segment_training as training
from headstart.bench import segments
from headstart.bench.http_client import BenchError
from headstart.bench.plots import segments_plot
from headstart.bench.segment_task import CAME, CHANCE, NAMES, Question, questions
from headstart.bench.segment_training import Batch, Encoder
from headstart.bench.segments import Estimate, Trained
from headstart.engine.config import EngineConfig
from headstart.engine.engine import Engine
from headstart.engine.sampling.params import SamplingParams
from headstart.server.text.tokenizer import Tokenizer


def some(count: int, split: Any = "train", seed: int = 1) -> list[Question]:
    return list(itertools.islice(questions(split, seed), count))


# --- questions ---


def answer_of(text: str) -> str:
    """Read as a person reads it: the name of the first line that is not in the second."""
    came, left, asked = text.splitlines()
    assert (came[:6], left[:6], asked) == ("Came: ", "Left: ", "Who stayed?")
    (answer,) = (name for name in came[6:].split() if name not in left[6:].split())
    assert len(set(came.split())) == len(set(left.split())) + 1 == CAME + 1
    return answer


def test_answers_are_right() -> None:
    for question in some(300) + some(300, "held-out"):
        system, user = question.messages
        assert (system["role"], user["role"]) == ("system", "user")
        assert question.answer == answer_of(user["content"])


def test_no_list_is_in_both_splits() -> None:
    assert all(question.split == "held-out" for question in some(50, "held-out"))
    assert all(question.split == "train" for question in some(50))
    # Whatever is asked about a list, it belongs to one split.
    question = some(1)[0]
    others = [
        Question(question.came, tuple(name for name in question.came if name != answer), answer)
        for answer in question.came
    ]
    assert {other.split for other in others} == {"train"}


def test_a_seed_is_a_stream() -> None:
    assert some(50) == some(50)
    assert some(50)[0] != some(50, seed=2)[0]
    assert len({question.came for question in some(500)}) == 500


def test_chance() -> None:
    """The answer is as often in one place of the first line as in another, and any name."""
    places = Counter(question.came.index(question.answer) for question in some(6000))
    assert sorted(places) == list(range(round(1 / CHANCE)))
    assert all(abs(count / 6000 - CHANCE) < 0.012 for count in places.values())
    names = Counter(question.answer for question in some(6000))
    assert all(abs(names[name] / 6000 - 1 / len(NAMES)) < 0.012 for name in NAMES)
    # Nor does the order of the second line tell: it is not that of the first.
    question = some(1)[0]
    assert [name for name in question.came if name != question.answer] != list(question.left)


def test_the_answer_depends_on_what_comes_after_it() -> None:
    """With the same first line any of its names can be the answer."""
    for question in some(20):
        for answer in question.came:
            left = tuple(name for name in reversed(question.came) if name != answer)
            other = Question(question.came, left, answer)
            assert other.text.splitlines()[0] == question.text.splitlines()[0]
            assert answer_of(other.text) == answer


def test_names_are_one_token_of_the_default_model(smollm2: Path) -> None:
    tokenizer = Tokenizer.from_folder(smollm2)
    assert len(set(NAMES)) == len(NAMES) > CAME
    for name in NAMES:
        for text in (name, f" {name}"):
            assert len(tokenizer.encode(text, add_special_tokens=False)) == 1


# --- what training sees ---


@pytest.fixture(scope="module")
def folder(tiny_model: Any) -> Path:
    # Sensible scales: what is learnt in a few steps is then visible.
    path: Path = tiny_model("llama", initializer_range=0.05)
    return path


def test_segments_are_the_turns_of_the_server(smollm2: Path) -> None:
    question = some(1)[0]
    example = Encoder(smollm2, "turns").example(question)
    tokenizer = Tokenizer.from_folder(smollm2)
    (_, system), (user, end) = example.segments.spans
    decode = tokenizer.backend.decode
    pieces = [example.token_ids[:system], example.token_ids[user:end], example.token_ids[end:]]
    texts = [decode(piece, skip_special_tokens=False) for piece in pieces]
    content = question.messages[1]["content"]
    assert texts == [
        "<|im_start|>system\nAnswer with a name.<|im_end|>\n",
        f"<|im_start|>user\n{content}<|im_end|>\n",
        f"<|im_start|>assistant\n{question.answer}<|im_end|>",
    ]
    assert decode(example.token_ids[example.answer :]) == question.answer
    causal = Encoder(smollm2, "causal").example(question)
    assert causal.token_ids == example.token_ids
    assert not causal.segments


def test_the_mask_is_the_segment_mask(folder: Path) -> None:
    batch_of = {
        mask: Batch.of([Encoder(folder, mask).example(q) for q in some(2)], torch.float32)
        for mask in ("causal", "turns")
    }
    example = Encoder(folder, "turns").example(some(1)[0])
    length = batch_of["turns"].token_ids.shape[1]
    seen = batch_of["turns"].mask[0, 0] == 0
    assert torch.equal(seen, torch.from_numpy(example.segments.mask(length)))
    (start, end) = example.segments.spans[1]
    assert seen[start, end - 1]
    assert not seen[start, end]
    assert not seen[0, 1]  # the token that begins the text
    assert torch.equal(batch_of["causal"].mask[0, 0] == 0, torch.ones(length, length).tril() == 1)


@pytest.mark.parametrize("mask", ["causal", "turns"])
def test_the_model_uses_the_mask(folder: Path, mask: str) -> None:
    """Another name at the end of the second line changes the row of one in the first, or not."""
    question = some(1)[0]
    other = Question(question.came, (*question.left[:-1], question.answer), question.left[-1])
    user, _ = Encoder(folder, "turns").prompt(question).segments.spans[1]
    model = training.add_adapter(training.load_model(folder), 1).eval()
    outputs = []
    for asked in (question, other):
        batch = Batch.of([Encoder(folder, mask).prompt(asked)], torch.bfloat16)
        rows = torch.zeros_like(batch.token_ids, dtype=torch.bool)
        rows[0, user + 20] = True
        with torch.inference_mode():
            outputs.append(training.logits(model, batch, rows))
    assert torch.equal(*outputs) == (mask == "causal")


def test_only_answers_are_learnt(folder: Path) -> None:
    """The loss is the model's own over labels that leave the prompt and the filling out."""
    model = training.add_adapter(training.load_model(folder), 1).eval()
    encoder = Encoder(folder, "turns")
    examples = [encoder.example(question) for question in some(40)]
    # Names of one byte-pair vocabulary differ in length: some rows are filled up.
    batch = Batch.of(examples, torch.bfloat16)
    lengths = {len(example.token_ids) for example in examples}
    assert len(lengths) > 1
    for example, labels in zip(examples, batch.labels, strict=True):
        answer = example.token_ids[example.answer :]
        assert labels[labels != training.IGNORED].tolist() == answer
        assert encoder.tokenizer.decode(answer) in NAMES
        assert answer[-1] == encoder.end
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        expected = model(
            input_ids=batch.token_ids, attention_mask=batch.mask, labels=batch.labels
        ).loss
    assert training.answer_loss(model, batch).item() == pytest.approx(expected.item(), rel=0.01)


def test_filling_is_not_seen(folder: Path) -> None:
    model = training.add_adapter(training.load_model(folder), 1).eval()
    encoder = Encoder(folder, "turns")
    examples = sorted((encoder.example(q) for q in some(40)), key=lambda e: len(e.token_ids))
    short, long = examples[0], examples[-1]
    alone = [
        training.answer_loss(model, Batch.of([e], torch.bfloat16)).item() for e in (short, long)
    ]
    counts = [len(e.token_ids) - e.answer for e in (short, long)]
    together = training.answer_loss(model, Batch.of([short, long], torch.bfloat16)).item()
    expected = np.average(alone, weights=counts)
    assert together == pytest.approx(expected, rel=0.01)


# --- what it learns ---


@pytest.mark.slow
def test_both_masks_start_equal_and_learn(folder: Path) -> None:
    runs = {}
    for mask in ("causal", "turns"):
        model = training.add_adapter(training.load_model(folder), 7)
        encoder = Encoder(folder, mask)
        first = {name: w.clone() for name, w in model.named_parameters() if w.requires_grad}
        stream = map(encoder.example, questions("train", 7))
        reported: list[tuple[int, float]] = []
        losses = training.train(model, stream, 30, lambda *step, to=reported: to.append(step))
        assert reported == list(enumerate(losses, 1))
        changed = [name for name, w in model.named_parameters() if not w.equal(first.get(name, w))]
        assert len(changed) == len(first) == 2 * 2 * 2  # A and B of q and v in two layers
        runs[mask] = first, losses
    assert all(runs["causal"][0][name].equal(weight) for name, weight in runs["turns"][0].items())
    for _, losses in runs.values():
        assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.3
    assert runs["causal"][1] != runs["turns"][1]


def test_the_engine_computes_what_was_trained(folder: Path, tmp_path: Path) -> None:
    """The saved adapter under its mask: the server's engine and transformers say the same."""
    model = training.add_adapter(training.load_model(folder), 1).float().eval()
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight.data, std=0.1)
    training.save_adapter(model, tmp_path / "a", "turns")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["segment_mask"], config["r"], config["lora_alpha"]) == ("turns", 32, 64)
    assert sorted(config["target_modules"]) == ["q_proj", "v_proj"]

    fields = {"backend": "reference", "weights": "f32", "kv_memory": 16 << 20}
    engine = Engine(EngineConfig(model_path=str(folder), **fields))
    assert engine.load_adapter("a", str(tmp_path / "a")).segment_mask == "turns"
    encoder = Encoder(folder, "turns")
    differ = 0
    for i, question in enumerate(some(6)):
        prompt = encoder.prompt(question)
        batch = Batch.of([prompt], torch.float32)
        with torch.inference_mode():
            found = model(input_ids=batch.token_ids, attention_mask=batch.mask).logits[0, -1]
            causal = model(input_ids=batch.token_ids).logits[0, -1]
        params = SamplingParams(max_tokens=1, temperature=0.0)
        ids = array("i", prompt.token_ids)
        engine.add(i, ids, params, segments=prompt.segments.spans, adapter="a")
        assert engine.step()[0].token_ids == [int(found.argmax())]
        differ += int(found.argmax() != causal.argmax())
    assert differ


def test_right_means_the_whole_answer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Encoder(folder, "causal")
    examples = [encoder.example(question) for question in some(20)]
    said = [example.token_ids[example.answer :] for example in examples]
    said[3] = [said[3][0] + 1, *said[3][1:]]
    said[17] = [*said[17][:-1], encoder.end + 1]
    tokens = iter(itertools.chain.from_iterable(said))

    def fake(model: Any, batch: Batch, rows: torch.Tensor) -> torch.Tensor:
        ids = list(itertools.islice(tokens, int(rows.sum())))
        return torch.nn.functional.one_hot(torch.tensor(ids), 400)

    monkeypatch.setattr(training, "logits", fake)
    right = training.answers_right(training.add_adapter(training.load_model(folder), 1), examples)
    assert [i for i, ok in enumerate(right) if not ok] == [3, 17]


# --- figures ---


def test_an_estimate() -> None:
    sure = Estimate.of(np.ones((3, 50)))
    assert (sure.mean, sure.low, sure.high) == (1.0, 1.0, 1.0)
    coin = np.tile(np.arange(400) % 2 == 0, (3, 1)).astype(np.float64)
    found = Estimate.of(coin)
    assert found.mean == 0.5
    # Seeds that answer alike count once: the interval is that of 400 questions.
    assert found.high - found.low == pytest.approx(2 * 1.96 * 0.5 / 20, rel=0.1)
    apart = np.stack([np.zeros(400), np.ones(400), coin[0]])
    assert Estimate.of(apart).high - Estimate.of(apart).low > 0.6
    assert Estimate.of(apart) == Estimate.of(apart)


SERVED = {
    "causal": np.array([[True, False, False, False], [True, True, False, False]]),
    "segments": np.array([[True, True, True, False], [False, True, True, True]]),
    segments.MISMATCH: np.array([[False] * 4, [True, False, False, False]]),
}


def test_gain_is_paired() -> None:
    expected = [[0, 1, 1, 0], [-1, 0, 1, 1]]
    assert segments.gain(SERVED).tolist() == expected


def test_tables() -> None:
    lines = segments.tables(SERVED, (1, 2), "the title").splitlines()
    assert lines[0] == "the title"
    assert "| 1 | 25.0% | 75.0% | +50.0 | 0.0% |" in lines
    assert "| 2 | 50.0% | 75.0% | +25.0 | 25.0% |" in lines
    assert lines[-1].startswith("| all | 37.5% (")
    assert "| +37.5 (" in lines[-1]
    worse = {**SERVED, "segments": ~np.ones((2, 4), dtype=bool)}
    assert "| -37.5 (" in segments.tables(worse, (1, 2), "t")


def adapters() -> list[Trained]:
    return [
        Trained(mask, seed, Path("x"), [2.0, 1.0], SERVED[mask][seed - 1].tolist(), 1.5)
        for seed in (1, 2)
        for mask in segments.MASKS
    ]


def test_agreement() -> None:
    assert segments.agreement(adapters(), SERVED) == 1.0
    assert segments.agreement(adapters(), {**SERVED, "causal": ~SERVED["causal"]}) == 0.5


# --- the server, and the command ---


class AnswerServer:
    """Answers each question rightly but for the first ``wrong``; keeps what it was asked."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.flags: list[str] = []
        self.wrong = 0
        self.finish = "stop"
        self.refuse = False

    async def chat(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.bodies.append(body)
        if self.refuse:
            return web.json_response({"error": {"message": "no such adapter"}}, status=404)
        right = answer_of(body["messages"][1]["content"])
        message = {"content": "Nobody" if len(self.bodies) <= self.wrong else right}
        choice = {"message": message, "finish_reason": self.finish}
        return web.json_response({"choices": [choice]})

    @asynccontextmanager
    async def run(self, flags: Sequence[str]) -> AsyncIterator[str]:
        self.flags = list(flags)
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self.chat)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        try:
            yield f"http://127.0.0.1:{runner.addresses[0][1]}"
        finally:
            await runner.cleanup()


async def test_asking() -> None:
    server = AnswerServer()
    held_out = some(20, "held-out")
    async with server.run([]) as url:
        server.wrong = 3
        right = await segments.ask(url, "segments-1", held_out, 20.0)
        assert right.count(True) == 17
        assert all(await segments.ask(url, "segments-1", held_out, 20.0, "causal"))
        assert [body.get("segment_mask") for body in server.bodies] == [None] * 20 + ["causal"] * 20
        assert {body["model"] for body in server.bodies} == {"segments-1"}
        assert {body["temperature"] for body in server.bodies} == {0}
        server.finish = "length"
        assert not any(await segments.ask(url, "segments-1", held_out, 20.0))
        server.refuse = True
        with pytest.raises(BenchError, match=r"404: .*no such adapter"):
            await segments.ask(url, "segments-1", held_out, 20.0)
    with pytest.raises(BenchError):
        await segments.ask(url, "segments-1", held_out, 20.0)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> AnswerServer:
    """A server in headstart's place, and adapters that were never trained."""
    server = AnswerServer()

    def train_adapter(
        model: Path, mask: str, seed: int, examples: int, held_out: Sequence[Question], folder: Path
    ) -> Trained:
        assert all(question.split == "held-out" for question in held_out)
        return Trained(mask, seed, folder / mask, [1.0] * 16, [True] * len(held_out), 1.0)

    monkeypatch.setattr(segments, "start_headstart", server.run)
    monkeypatch.setattr(segments, "train_adapter", train_adapter)
    monkeypatch.setattr(segments, "resolve", lambda model, home: Path(model))
    return server


def test_the_command(
    served: AnswerServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.jsonl"
    flags = ["--seeds", "2", "--questions", "5", "--out", str(out), "--plot", str(tmp_path / "p")]
    flags += ["--adapters", str(tmp_path / "a"), "--serve-args=--weights bf16"]
    assert segments.main(flags) == 0
    assert served.flags == [
        "smollm2-135m",
        *("--lora", f"causal-1={tmp_path}/a/causal", "--lora", f"segments-1={tmp_path}/a/segments"),
        *("--lora", f"causal-2={tmp_path}/a/causal", "--lora", f"segments-2={tmp_path}/a/segments"),
        *("--weights", "bf16"),
    ]
    printed = capsys.readouterr().out
    assert "| 2 | 100.0% | 100.0% | +0.0 | 100.0% |" in printed
    assert "agree on 100.0% of the answers" in printed
    line = json.loads(out.read_text())
    assert line["gain"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert line["served"]["segments"] == [1.0, 1.0]
    assert [adapter["name"] for adapter in line["adapters"]][-1] == "segments-2"
    assert (tmp_path / "p" / "segments.svg").exists()
    assert len(served.bodies) == 2 * 3 * 5


def test_the_command_fails(served: AnswerServer, capsys: pytest.CaptureFixture[str]) -> None:
    served.refuse = True
    assert segments.main(["--seeds", "1", "--questions", "2"]) == 1
    assert "no such adapter" in capsys.readouterr().err
    for flags in (["--seeds", "0"], ["--examples", "15"], ["--serve-args='"]):
        with pytest.raises(SystemExit) as exit_:
            segments.main(flags)
        assert exit_.value.code == 2


def test_the_plot(tmp_path: Path) -> None:
    losses = {mask: [[3.0] * 32, [2.0] * 32] for mask in segments.MASKS}
    accuracy = {name: (right.mean(1).tolist(), 0.2, 0.4) for name, right in SERVED.items()}
    svg, png = segments_plot(tmp_path, "The title", CHANCE, losses, accuracy)
    assert png.stat().st_size > 10_000
    text = svg.read_text()
    for words in ("The title", "segments, served causal", "held-out accuracy"):
        assert f"<!-- {words}" in text
