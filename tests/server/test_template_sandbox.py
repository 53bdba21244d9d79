"""Chat templates within limits: as transformers renders them, and never for long."""

from __future__ import annotations

from pathlib import Path

import pytest
from jinja2.exceptions import SecurityError, UndefinedError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

from headstart.engine.errors import RequestError
from headstart.server.http.app import create_app
from headstart.server.settings import ServerSettings
from headstart.server.text.template_language import TemplateEnvironment
from headstart.server.text.template_sandbox import (
    LimitedTemplate,
    TemplateLimitError,
    TemplateLimits,
)
from headstart.server.text.templates import ChatTemplate
from headstart.server.text.tokenizer import Tokenizer

FOLDER = Path(__file__).parent / "chat_templates"
SHORT = TemplateLimits(seconds=0.2, chars=10_000)
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
CHAT = [
    {"role": "user", "content": " one é "},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
]
TOOL = {
    "type": "function",
    "function": {"name": "f", "description": "d", "parameters": {"type": "object"}},
}
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"

GROWING = (
    "{%% set n = namespace(s=%s) %%}{%% for i in range(99) %%}{%% set n.s = n.s %s n.s %%}"
    "{%% endfor %%}"
)


def render(source: str, limits: TemplateLimits = SHORT, **variables) -> str:
    template = LimitedTemplate(source, limits)
    with template.running():
        return template.render({"messages": CHAT, "tools": None} | variables)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.jinja")), ids=lambda path: path.stem)
@pytest.mark.parametrize("tools", [None, [TOOL]], ids=["plain", "tools"])
def test_templates_render_as_in_transformers(path, tools):
    source = path.read_text()
    for answer in (True, False):
        [expected], _ = render_jinja_template(
            conversations=[CHAT],
            tools=tools,
            chat_template=source,
            add_generation_prompt=answer,
            **SPECIAL,
        )
        named = SPECIAL | {"tools": tools, "documents": None, "add_generation_prompt": answer}
        assert render(source, TemplateLimits(), **named) == expected


def test_what_transformers_adds_to_jinja():
    source = (
        "{% generation %}{{ {'a': '<é>'} | tojson }}{% endgeneration %}"
        "{% for m in messages %}{% if loop.last %}{% break %}{% endif %}"
        "{{ loop.index }}{% endfor %}"
        "{% set ns = namespace(x=1) %}{% set ns.x = ns.x + 1 %}{{ ns.x }}{{ dict(a=1).a }}"
        "{{ 'a' ~ 1 ~ none }}{{ '%s-%3d' % ('x', 5) }}{{ '{}!'.format('y') }}"
    )
    [expected], _ = render_jinja_template(conversations=[CHAT], chat_template=source)
    assert render(source) == expected == '{"a": "<é>"}1221a1Nonex-  5y!'
    assert len(render("{{ strftime_now('%Y') }}")) == 4


def test_the_language_is_that_of_transformers():
    """Its names, and what it changed of jinja2's."""
    theirs, ours = _compile_jinja_template("").environment, TemplateEnvironment()
    plain = ImmutableSandboxedEnvironment()
    for kind in ("globals", "filters", "tests"):
        assert getattr(ours, kind).keys() == getattr(theirs, kind).keys()
        for name, value in getattr(theirs, kind).items():
            changed = getattr(plain, kind).get(name) is not value
            assert (getattr(plain, kind).get(name) is not getattr(ours, kind)[name]) is changed
    tags = [{t for e in env.extensions.values() for t in e.tags} for env in (theirs, ours)]
    assert tags[0] == tags[1] == {"generation", "break", "continue"}
    assert (ours.trim_blocks, ours.lstrip_blocks) == (theirs.trim_blocks, theirs.lstrip_blocks)


@pytest.mark.parametrize(
    "source",
    [
        "{{ namespace(__class__=1) }}",
        "{% set n = namespace() %}{% set n._x = 1 %}",
        "{{ dict.__init__ }}{{ dict.mro() }}",
    ],
)
def test_what_leads_to_pythons_inner_objects_is_refused(source):
    for environment in (_compile_jinja_template("").environment, TemplateEnvironment()):
        with pytest.raises((SecurityError, UndefinedError)):
            environment.from_string(source).render()


def test_what_is_set_inside_a_generation_tag_stays_there():
    source = "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}"
    source += "{{ dict.fromkeys('ab') }}{{ namespace({'self': 1}, y=2).y }}"
    [expected], _ = render_jinja_template(conversations=[CHAT], chat_template=source)
    assert render(source) == expected


@pytest.mark.parametrize(
    "source",
    [
        ENDLESS,
        "{% macro m(n) %}{{ m(n - 1) if n }}{{ m(n - 1) if n }}{% endmacro %}{{ m(60) }}",
        "{% for i in [1] recursive %}{{ loop([1, 1]) if loop.depth < 40 }}{{ loop([1, 1]) if "
        "loop.depth < 40 }}{% endfor %}",
        "{% for i in range(99999) %}{{ range(99999) | map('string') | list | length }}{% endfor %}",
        "{% set x %}" + ENDLESS + "{% endset %}",
    ],
)
def test_a_template_that_does_not_end_is_stopped(source):
    with pytest.raises(TemplateLimitError, match=r"took longer than 0\.2 s"):
        render(source)


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'x' * 10**9 }}",
        "{{ 10**9 * 'x' }}",
        "{{ [0] * 10**9 }}",
        "{% for i in range(9999) %}{{ 'x' * 999 }}{% endfor %}",
        "{% set x %}{% for i in range(9999) %}{{ 'x' * 999 }}{% endfor %}{% endset %}{{ x }}",
        "{% macro m() %}{% for i in range(9999) %}xx{% endfor %}{% endmacro %}{{ m() | length }}",
        GROWING % ("'x'", "+"),
        GROWING % ("'x'", "~"),
        GROWING % ("[1]", "+"),
        "{{ ('a' * 9999).replace('a', 'b' * 9999) | length }}",
        "{{ ('a' * 9999) | replace('a', 'b' * 9999) | length }}",
        "{{ range(99999) | join('x' * 9999) | length }}",
        "{{ ('x' * 9999).join(range(9999) | map('string')) | length }}",
        "{{ ('\n' * 9999) | indent(9999) | length }}",
        "{{ ('\t' * 9999).expandtabs(9999) | length }}",
    ],
)
def test_what_is_too_large_is_not_made(source):
    with pytest.raises(TemplateLimitError, match="makes more than 10000 characters"):
        render(source)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{% set x = 9 ** 9 %}{{ x ** x }}", "too large a number"),
        (GROWING % ("9", "*"), "too large a number"),
        ("{{ 'a'.center(10 ** 10) }}", "asks for 1e"),
        ("{{ 'a' | center(10 ** 10) }}", "asks for 1e"),
        ("{{ [1] | slice(10 ** 9) | list }}", "asks for 1e"),
        ("{{ messages | tojson(indent=10 ** 9) }}", "asks for 1e"),
        ("{{ (1).to_bytes(10 ** 10) }}", "asks for 1e"),
        ("{{ lipsum(n=10 ** 9) }}", "asks for 1e"),
        ("{{ '%9999999999d' % 1 }}", "too large a width"),
        ("{{ '%*d' % (10 ** 10, 1) }}", "too large a width"),
        ("{{ '%9999999999d' | format(1) }}", "too large a width"),
        ("{{ '{:>9999999999}'.format(1) }}", "too large a width"),
    ],
)
def test_huge_numbers_are_refused(source, words):
    with pytest.raises(TemplateLimitError, match=words):
        render(source)


def test_long_texts_pass():
    text = "a{b}%1 " * 1000
    source = (
        "{% for m in messages %}{{ '<' + m.content.replace('a', 'bb') | trim ~ '>' }}{% endfor %}"
    )
    expected = f"<{text.replace('a', 'bb').strip()}>"
    assert render(source, messages=[{"content": text}]) == expected


def test_large_numbers_of_a_chat_pass():
    source = (
        "{% macro m(n) %}{{ n }}{% endmacro %}{% set ns = namespace(n=messages[0].n) %}"
        "{{ m(ns.n) }} {{ messages[0].get('x', ns.n) }} {{ ns.n | tojson }} {{ dict(a=ns.n).a }}"
        " {{ messages[0].x | default(ns.n) }}"
    )
    expected = " ".join(["10000000000"] * 5)
    assert render(source, messages=[{"n": 10**10}]) == expected


def test_limits_end_the_search_for_turns_too(backend):
    source = "{% for m in messages %}{{ m.content }}{% endfor %}" + ENDLESS
    chat = ChatTemplate(Tokenizer(backend, chat_template=source), SHORT)
    with pytest.raises(TemplateLimitError, match="took longer"):
        chat.encode_turns(CHAT)
    assert issubclass(TemplateLimitError, RequestError)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize", "/apply-template"])
async def test_the_server_goes_on(engine, backend, path, connect_to):
    source = "{% if messages | length > 1 %}" + ENDLESS + "{% endif %}{{ messages[0].content }}"
    tokenizer = Tokenizer(backend, chat_template=source)
    limits = ServerSettings(template_timeout=0.3, max_template_chars=1000)
    client = connect_to(create_app(engine, tokenizer, model_names=["tiny"], settings=limits))
    user = {"role": "user", "content": "hi"}
    response = await client.post(path, json={"model": "tiny", "messages": [user, user]})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "messages"
    assert "took longer than 0.3 s" in response.json()["error"]["message"]
    long = user | {"content": "x" * 1001}
    response = await client.post(path, json={"model": "tiny", "messages": [long]})
    assert response.status_code == 400
    assert "more than 1000 characters" in response.json()["error"]["message"]
    assert (await client.post(path, json={"model": "tiny", "messages": [user]})).is_success
