"""Answers of gpt-oss: channels told apart however the text is cut, and forced calls."""

from __future__ import annotations

import json

import llguidance
import pytest
import tokenizers

from headstart.server.text.answer import (
    Reasoning,
    Text,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
)
from headstart.server.text.tool_formats.harmony import MARKS, Harmony

LOOK = {
    "name": "look",
    "parameters": {"properties": {"city": {"type": "string"}}, "required": ["city"]},
}
CLOCK = {"name": "clock"}
ROME = '{"city": "Rome"}'
THOUGHT = "<|channel|>analysis<|message|>Look <up> it.<|end|><|start|>assistant"
CALL = f"<|channel|>commentary to=functions.look <|constrain|>json<|message|>{ROME}<|call|>"
FINAL = "<|channel|>final<|message|>It is hot.<|return|>"


def read(pieces, functions=(LOOK, CLOCK)):
    """Texts by kind, and calls, in order; parts joined."""
    reader = Harmony({}).reader(functions)
    found = []
    for part in [part for piece in pieces for part in reader.push(piece)] + reader.finish():
        match part:
            case Text(text) | Reasoning(text):
                kind = "says" if isinstance(part, Text) else "thinks"
                if found and found[-1][0] == kind:
                    found[-1][1] += text
                else:
                    found.append([kind, text])
            case ToolCallStart(_, _, name):
                found.append([name, "", "cut"])
            case ToolCallArguments(_, text):
                found[-1][1] += text
            case ToolCallEnd():
                del found[-1][2]
    return found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (THOUGHT + FINAL, [["thinks", "Look <up> it."], ["says", "It is hot."]]),
        (THOUGHT + CALL, [["thinks", "Look <up> it."], ["look", ROME]]),
        # What ends generation is no text.
        (CALL.removesuffix("<|call|>"), [["look", ROME]]),
        (CALL[:-12], [["look", ROME[:-4], "cut"]]),
        (
            f"{THOUGHT}<|channel|>commentary<|message|>I look.<|end|><|start|>assistant{CALL}",
            [["thinks", "Look <up> it."], ["says", "I look."], ["look", ROME]],
        ),
        (
            f" to=functions.look<|channel|>commentary json<|message|>{ROME}<|call|>",
            [["look", ROME]],
        ),
        (
            f"{CALL}<|start|>assistant to=functions.clock<|channel|>commentary<|message|>{{}}",
            [["look", ROME], ["clock", "{}"]],
        ),
        (CALL.replace("look", "other"), [["says", ROME]]),
        ("It is hot.", [["says", "It is hot."]]),
        ("to= be", [["says", "to= be"]]),
        ("<|channel|>final<|message|>a <| b", [["says", "a <| b"]]),
        ("<|channel|>anal", []),
        ("", []),
    ],
)
def test_channels(text, expected):
    assert read([text]) == expected
    assert read(text) == expected


def test_without_tools_a_call_is_text():
    assert read([CALL], functions=()) == [["says", ROME]]


def test_calls_are_written_as_the_model_writes_them():
    assert Harmony({}).written([("look", ROME)]) == CALL


@pytest.fixture(params=[False, True])
def vocabulary(request):
    """llguidance's byte-level tokenizer, with the marks as tokens or without, and what encodes."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE({char: i for i, char in enumerate(alphabet)}, [])
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    marks = MARKS if request.param else ()
    backend.add_special_tokens(
        [tokenizers.AddedToken(mark, special=True) for mark in ("<|eos|>", *marks)]
    )
    end = backend.token_to_id("<|eos|>")
    ids = {mark: backend.token_to_id(mark) for mark in marks}
    return backend, llguidance.LLTokenizer(backend.to_str(), eos_token=end), ids, end


@pytest.mark.parametrize("amid_text", [False, True])
def test_grammars(vocabulary, amid_text):
    backend, tokenizer, ids, end = vocabulary
    rules = Harmony(ids).grammar([LOOK, CLOCK], parallel=True, amid_text=amid_text)
    start = "calls | TEXT?" if amid_text else "calls"
    matcher = llguidance.LLMatcher(tokenizer, f"start: {start}\n{rules}", log_level=0)
    assert not matcher.is_error(), matcher.get_error()

    def takes(text):
        written = [*backend.encode(text).ids, end]
        return matcher.deep_copy().validate_tokens(written) == len(written)

    call, final = (text.rpartition("<|")[0] for text in (CALL, FINAL))
    for text in (call, THOUGHT + call, THOUGHT + call.replace("look", "clock").replace(ROME, "{}")):
        assert takes(text), text
        assert json.loads(read([text])[-1][1]) in ({}, {"city": "Rome"})
    for text in (final, THOUGHT + final):
        assert takes(text) == amid_text, text
    if ids:  # spelled in other tokens, the marks may be text
        for text in (call.replace("city", "town"), call.replace("look", "other"), THOUGHT):
            assert not takes(text), text
