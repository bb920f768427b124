"""Chats as prompts: templates in the manner of every family against transformers, switches, and what is refused."""

from __future__ import annotations

import dataclasses
import datetime
import json
import subprocess
import sys

import pytest
from helpers import chat_templates, tokenizer_files
from helpers.chat_templates import CALLS, QUESTION, TOOLS, TURNS
from helpers.fake_controller import INFO
from jinja2 import meta

from expertwire.engine.frontend import chat_templates as ours
from expertwire.engine.frontend.chat import Chat
from expertwire.engine.frontend.prompts import encode_prompt
from expertwire.engine.frontend.tokenizer import Tokenizer
from expertwire.scheduler.sampling_params import SamplingParams

CASES = {
    "question": {"messages": QUESTION},
    "turns": {"messages": TURNS},
    "without generation prompt": {"messages": TURNS[:3], "add_generation_prompt": False},
    "tools": {"messages": TURNS, "tools": TOOLS},
    "calls": {"messages": CALLS, "tools": TOOLS},
    "continued": {"messages": TURNS[:3], "add_generation_prompt": False, "continue_final_message": True},
}
# What a family's template cannot write.
NOT_WRITTEN = {"olmoe": {"tools", "calls"}, "deepseek_r1": {"tools", "calls"}}
SWITCHES = {
    "qwen3": [{"enable_thinking": True}, {"enable_thinking": False}],
    "glm_45": [{"enable_thinking": True}, {"enable_thinking": False}],
    "deepseek_v31": [{"thinking": True}, {"thinking": False}],
    "gpt_oss": [{"reasoning_effort": effort} for effort in ("low", "medium", "high")],
    "mistral": [{"reasoning_effort": effort} for effort in ("none", "high")],
}


VARIABLES = {
    "qwen3": {"enable_thinking"},
    "glm_45": {"enable_thinking"},
    "glm_47": {"enable_thinking"},
    "deepseek_v31": {"thinking"},
    "gpt_oss": {"model_identity", "reasoning_effort"},
    "mistral": {"reasoning_effort"},
    "minimax_m2": {"model_identity"},
    "llama_3": {"custom_tools", "date_string"},
}


@pytest.fixture(scope="module", params=sorted(chat_templates.FAMILIES))
def family(request):
    return request.param


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory):
    return chat_templates.write(tmp_path_factory.mktemp(family), chat_templates.FAMILIES[family])


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer.open(folder)


@pytest.fixture(scope="module")
def theirs(folder):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(folder)


def open_template(folder, template, **config):
    return Tokenizer.open(tokenizer_files.write(folder, "word_level", chat_template=template, **config))


def test_every_family_renders_as_in_transformers(family, tokenizer, theirs):
    for name, case in CASES.items():
        if name in NOT_WRITTEN.get(family, ()):
            continue
        messages, options = case["messages"], {"add_generation_prompt": True, **case}
        del options["messages"]
        expected = theirs.apply_chat_template(messages, tokenize=False, **options)
        assert tokenizer.render_chat(Chat(**case)) == expected, name
        ids = theirs.apply_chat_template(messages, return_dict=False, **options)
        assert tokenizer.encode_chat(Chat(**case)) == ids, name
        assert "Be brief." in expected or name == "question"
    for switch in SWITCHES.get(family, ()):
        [(name, value)] = switch.items()
        field = "reasoning_effort" if name == "reasoning_effort" else "thinking"
        expected = theirs.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=True, **switch)
        assert tokenizer.render_chat(Chat(messages=TURNS, **{field: value})) == expected
        assert tokenizer.render_chat(Chat(messages=TURNS, chat_template_kwargs=switch)) == expected


def test_the_variables_of_every_family(family, tokenizer):
    assert set(tokenizer.chat_variables) == VARIABLES.get(family, set())
    # With what Jinja itself finds, which takes names that are set in some branches for read.
    source = chat_templates.FAMILIES[family].template
    assert set(tokenizer.chat_variables) <= meta.find_undeclared_variables(ours.make_environment().parse(source))


@pytest.mark.parametrize(
    ("template", "reads"),
    [
        ("{% if not a is defined %}{% set a = 1 %}{% endif %}{{ a }}", "a"),
        ("{% set a = a | default(b) %}{{ a }}", "a b"),
        ("{% if a %}{% set x = 1 %}{% elif b %}{% set x = 2 %}{% else %}{% set x = 3 %}{% endif %}{{ x }}", "a b"),
        ("{% if a %}{% set x = 1 %}{% elif b %}{% set x = 2 %}{% endif %}{{ x }}", "a b x"),
        ("{% if a %}{% set x = 1 %}{{ x }}{% endif %}", "a"),
        ("{% for i in a if i %}{{ loop.index }}{{ i }}{% set x = i %}{% else %}{{ b }}{% endfor %}{{ x }}", "a b x"),
        ("{% for a in a %}{{ a }}{% endfor %}{{ i }}{{ loop }}", "a i loop"),
        ("{% macro f(p, q=a) %}{{ p }}{{ q }}{{ b }}{{ caller() }}{% endmacro %}{{ f(c) }}{{ p }}", "a b c p"),
        ("{% macro f() %}{% endmacro %}{% call(x) f(a) %}{{ x }}{{ b }}{% endcall %}{{ x }}", "a b x"),
        ("{% set ns = namespace(v=a) %}{% set ns.v = b %}{{ ns.v }}{{ dict() }}{{ strftime_now(c) }}", "a b c"),
        ("{% set x %}{{ a }}{% set y = 1 %}{% endset %}{{ x }}{{ y }}", "a y"),
        ("{% with x = a %}{{ x }}{% endwith %}{{ x }}", "a x"),
        ("{% generation %}{% set x = a %}{{ x }}{% endgeneration %}{{ x }}", "a x"),
        ("{% filter upper %}{{ a }}{% endfilter %}{% set x, y = a %}{{ x ~ y }}{{ a.b[c](d=e) }}", "a c e"),
    ],
)
def test_the_variables_of_a_template(tmp_path, template, reads):
    assert open_template(tmp_path, template).chat_variables == tuple(reads.split())


def test_switches_change_the_prompt(tmp_path):
    for family, switches in SWITCHES.items():
        tokenizer = Tokenizer.open(chat_templates.write(tmp_path / family, chat_templates.FAMILIES[family]))
        texts = [tokenizer.render_chat(Chat(messages=TURNS, chat_template_kwargs=switch)) for switch in switches]
        assert len(set(texts)) == len(texts)


def test_the_environment_is_that_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    template = (
        "{%- for m in messages %}\n  {% if loop.index > 2 %}{% break %}{% endif %}\n"
        "  {% generation %}{{ m.content | tojson(indent=2) }}{{ m.name is defined }}{% endgeneration %}\n"
        "{% set ns = namespace(found=1) %}{% set ns.found = 2 %}{{ ns.found }}{{ strftime_now('%Y') | length }}\n"
        "{% endfor %}{{ eos_token }}{{ undefined_name }}{{ {'b': 1, 'a': 'é<'} | tojson(sort_keys=True) }}"
        "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}{{ dict(a=x).a }}"
        "{{ documents is defined }}{{ documents }}{{ tools is none }}{{ documents[0].title if documents }}"
    )
    folder = tokenizer_files.write(tmp_path, "word_level", chat_template=template)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    chat = [*QUESTION, {"role": "user", "content": "a", "name": None}, {"role": "user", "content": "third"}]
    for variables in ({}, {"eos_token": "!"}, {"documents": [{"title": "<t>", "text": "x"}]}):
        rendered = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, **variables)
        assert Tokenizer.open(folder).render_chat(Chat(messages=chat, chat_template_kwargs=variables)) == rendered
    assert "True" in rendered and "<t>" in rendered


@pytest.mark.parametrize("content", ["Once upon", " Once upon \n", "", [{"type": "text", "text": "Once "}]])
@pytest.mark.parametrize("written", ["m.content", "m.content | trim", "(m.content | trim) + ' after'"])
def test_a_continued_message_ends_as_in_transformers(tmp_path, content, written):
    transformers = pytest.importorskip("transformers")
    written = written if isinstance(content, str) else "m.content[0].text"
    template = "{% for m in messages %}<s>{{ " + written + " }}</s>\n{% endfor %}"
    folder = tokenizer_files.write(tmp_path, "word_level", chat_template=template)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": content}, {"role": "assistant", "content": content}]
    options = {"add_generation_prompt": False, "continue_final_message": True}
    expected = theirs.apply_chat_template(chat, tokenize=False, **options)
    assert Tokenizer.open(folder).render_chat(Chat(messages=chat, **options)) == expected
    assert not expected.rstrip().endswith("</s>") and expected.count("<s>") == 2


def test_the_last_message_cannot_always_be_continued(tmp_path):
    options = {"add_generation_prompt": False, "continue_final_message": True}
    tokenizer = open_template(tmp_path, "{{ messages[0].content[:3] }}")
    with pytest.raises(ValueError, match="continue_final_message: the chat template leaves out"):
        tokenizer.render_chat(Chat(messages=QUESTION, **options))
    for content in (None, 5):
        message = {"role": "assistant", "content": content}
        with pytest.raises(ValueError, match="continue_final_message: the last message has no text"):
            tokenizer.render_chat(Chat(messages=[message], **options))


class TestSources:
    def test_named_templates_in_the_config(self, tmp_path):
        named = [
            {"name": "default", "template": "plain {{ messages | length }}{{ tools }}"},
            {"name": "tool_use", "template": "tools {{ tools }}"},
        ]
        tokenizer = open_template(tmp_path, named)
        assert tokenizer.render_chat(Chat(messages=QUESTION)) == "plain 1None"
        for tools in ([{}], []):  # transformers takes an empty list for tools, too
            assert tokenizer.render_chat(Chat(messages=QUESTION, tools=tools)) == f"tools {tools}"
        chosen = Chat(messages=QUESTION, tools=[{}], chat_template="default")
        assert tokenizer.render_chat(chosen) == "plain 1[{}]"
        own = Chat(messages=QUESTION, chat_template="{{ deep.er }}", chat_template_kwargs={"deep": {"er": 7}})
        assert tokenizer.render_chat(own) == "7"
        with pytest.raises(ValueError, match="default, tool_use"):
            tokenizer.render_chat(Chat(messages=QUESTION, chat_template="missing"))
        with pytest.raises(ValueError, match="chat_template is not valid Jinja"):
            tokenizer.render_chat(Chat(messages=QUESTION, chat_template="{% if %}"))

    def test_files_beside_the_config_come_first(self, tmp_path):
        folder = tokenizer_files.write(tmp_path, "word_level", chat_template=None)
        chat = Chat(messages=QUESTION)
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": "from json"}))
        assert Tokenizer.open(folder).render_chat(chat) == "from json"
        tokenizer_files.write(tmp_path, "word_level", chat_template="from config")
        assert Tokenizer.open(folder).render_chat(chat) == "from config"
        (folder / "chat_template.jinja").write_text("from jinja é")
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "short.jinja").write_text("short")
        tokenizer = Tokenizer.open(folder)
        assert tokenizer.render_chat(chat) == "from jinja é"
        assert tokenizer.render_chat(Chat(messages=QUESTION, chat_template="short")) == "short"

    @pytest.mark.parametrize("template", [5, ["a"], [{"name": "a"}], [{"name": "a", "template": 5}]])
    def test_malformed_entries(self, tmp_path, template):
        with pytest.raises(ValueError, match=r"tokenizer_config\.json: .*chat_template must"):
            open_template(tmp_path, template)

    @pytest.mark.parametrize("text", ["{", "[]", "{}", '"a"'])
    def test_malformed_files(self, tmp_path, text):
        folder = tokenizer_files.write(tmp_path, "word_level", chat_template=None)
        (folder / "chat_template.json").write_text(text)
        with pytest.raises(ValueError, match=r"chat_template\.json must be a JSON object with a chat_template"):
            Tokenizer.open(folder)

    def test_no_template(self, tmp_path):
        tokenizer = open_template(tmp_path, None)
        assert tokenizer.encode("lazy dog.") != []
        with pytest.raises(ValueError, match="no chat template"):
            tokenizer.render_chat(Chat(messages=QUESTION))

    def test_a_template_that_does_not_parse(self, tmp_path):
        with pytest.raises(ValueError, match="'default' is not valid Jinja"):
            open_template(tmp_path, "{% if %}")


class TestRefusals:
    @pytest.mark.parametrize(
        ("fields", "error"),
        [
            ({"messages": []}, "messages must be a non-empty list"),
            ({"messages": "hello"}, "messages must be a non-empty list"),
            ({"messages": [{"content": "no role"}]}, "'role'"),
            ({"messages": [None]}, "'role'"),
            ({"tools": {"name": "f"}}, "tools must be a list of JSON schemas"),
            ({"tools": "f"}, "tools must be a list of JSON schemas"),
            ({"tools": [print]}, "tools must be a list of JSON schemas"),
            ({"reasoning_effort": 3}, "reasoning_effort must be a string or None, got 3"),
            ({"thinking": "yes"}, "thinking must be True, False or None, got 'yes'"),
            ({"chat_template_kwargs": [1]}, "chat_template_kwargs must be a dictionary"),
            ({"chat_template_kwargs": {1: 2}}, "chat_template_kwargs must be a dictionary"),
            ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs must not have 'tools'"),
            ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs must not have 'messages'"),
            ({"chat_template_kwargs": {"add_generation_prompt": True}}, "must not have 'add_generation_prompt'"),
            ({"reasoning_effort": "low", "chat_template_kwargs": {"reasoning_effort": "low"}}, "set twice"),
            ({"thinking": True, "chat_template_kwargs": {"thinking": True}}, "thinking is set twice"),
            ({"thinking": True, "chat_template_kwargs": {"enable_thinking": True}}, "'enable_thinking'"),
            ({"add_generation_prompt": 1}, "add_generation_prompt must be True or False, got 1"),
            ({"continue_final_message": "content"}, "continue_final_message must be True or False"),
            ({"continue_final_message": True}, "continue_final_message needs add_generation_prompt=False"),
            ({"chat_template": b"x"}, "chat_template must be a string or None"),
        ],
    )
    def test_malformed_chats(self, fields, error):
        with pytest.raises(ValueError, match=error):
            Chat(**{"messages": QUESTION, **fields})

    def test_what_the_template_does_not_read(self, tmp_path):
        tokenizer = open_template(
            tmp_path, "{% if not thinking is defined %}{% set thinking = 1 %}{% endif %}{{ thinking }}"
        )
        assert tokenizer.chat_variables == ("thinking",)
        assert tokenizer.render_chat(Chat(messages=QUESTION, thinking=False)) == "False"
        for fields, error in (
            (
                {"chat_template_kwargs": {"thinkin": 1}},
                "chat_template_kwargs: .* does not read thinkin; it reads thinking",
            ),
            ({"reasoning_effort": "low"}, "reasoning_effort: .* does not read reasoning_effort; it reads thinking"),
            ({"tools": [{}]}, "tools: the chat template does not read tools; it reads thinking"),
            (
                {"thinking": True, "chat_template": "{{ 1 }}"},
                "thinking: .*enable_thinking or thinking; it reads only the messages",
            ),
        ):
            with pytest.raises(ValueError, match=error):
                tokenizer.render_chat(Chat(messages=QUESTION, **fields))

    def test_an_effort_turns_thinking_on_or_off_where_the_template_does_not_read_it(self, tmp_path):
        for family, template in chat_templates.FAMILIES.items():
            folder = tmp_path / family
            folder.mkdir()
            tokenizer = Tokenizer.open(chat_templates.write(folder, template))
            effort = "high" if family in ("gpt_oss", "mistral") else "minimal"
            chat = Chat(messages=QUESTION, reasoning_effort=effort)
            if tokenizer.output_format.reasoning is None:
                with pytest.raises(ValueError, match=r"reasoning_effort: .* does not read reasoning_effort"):
                    tokenizer.render_chat(chat)
                continue
            if "reasoning_effort" in tokenizer.chat_variables:
                assert "high" in tokenizer.render_chat(chat)
                continue
            switch = next((name for name in ("enable_thinking", "thinking") if name in tokenizer.chat_variables), None)
            for effort in ("none", "minimal", "low", "medium", "high"):
                chat = Chat(messages=QUESTION, reasoning_effort=effort)
                if switch is None:
                    assert tokenizer.render_chat(chat) == tokenizer.render_chat(Chat(messages=QUESTION))
                    continue
                on, off = (tokenizer.render_chat(Chat(messages=QUESTION, thinking=value)) for value in (True, False))
                assert on != off
                assert tokenizer.render_chat(chat) == (off if effort == "none" else on)
                # A switch that is set wins.
                for value, text in ((True, on), (False, off)):
                    for options in ({"thinking": value}, {"chat_template_kwargs": {switch: value}}):
                        assert tokenizer.render_chat(dataclasses.replace(chat, **options)) == text
            with pytest.raises(ValueError, match="one of none, minimal, low, medium, high, got 'max'"):
                tokenizer.render_chat(Chat(messages=QUESTION, reasoning_effort="max"))
            own = Chat(messages=QUESTION, reasoning_effort="max", chat_template="{{ reasoning_effort }}")
            assert tokenizer.render_chat(own) == "max"

    @pytest.mark.parametrize(("family", "allowed"), [("gpt_oss", "low, medium, high"), ("mistral", "none, high")])
    def test_an_effort_that_the_model_does_not_know(self, tmp_path, family, allowed):
        tokenizer = Tokenizer.open(chat_templates.write(tmp_path, chat_templates.FAMILIES[family]))
        with pytest.raises(ValueError, match=f"reasoning_effort must be one of {allowed}, got 'very'"):
            tokenizer.render_chat(Chat(messages=QUESTION, reasoning_effort="very"))

    def test_messages_that_the_template_refuses(self, tmp_path):
        tokenizer = Tokenizer.open(tokenizer_files.write(tmp_path, "word_level"))
        with pytest.raises(ValueError, match="system comes first"):
            tokenizer.render_chat(Chat(messages=[*QUESTION, {"role": "system", "content": "late"}]))
        deep: list = []
        for _ in range(100_000):
            deep = [deep]
        for content in (object(), deep):
            with pytest.raises(ValueError, match="JSON values"):
                tokenizer.render_chat(Chat(messages=[{"role": "user", "content": content}]))

    def test_a_model_without_a_tokenizer(self):
        with pytest.raises(ValueError, match="a chat needs a tokenizer, and the model has none"):
            encode_prompt(Chat(messages=QUESTION), SamplingParams(), INFO, None)

    @pytest.mark.parametrize(
        "template",
        ["{{ messages.append(1) }}", "{{ ''.__class__.__mro__ }}", "{{ messages + 1 }}", "{{ 1 // 0 }}", "{{ a.b.c }}"],
    )
    def test_a_template_that_misbehaves_is_the_users_error(self, tmp_path, template):
        with pytest.raises(ValueError, match="cannot render these messages"):
            open_template(tmp_path, template).render_chat(Chat(messages=QUESTION))


COMPILE = """
import resource, sys
from expertwire.engine.frontend.chat_templates import ChatTemplates

resource.setrlimit(resource.RLIMIT_CPU, (20, 20))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for template in sys.argv[1:]:
    ChatTemplates({"default": template}, {})
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before >> 10, "MiB")
"""


def test_nothing_of_a_template_runs_while_it_is_compiled():
    large = "'a' * 1000000000"
    templates = [
        "{{ %s }}", "{{ (%s) ~ 'b' }}", "{{ (%s) is string }}", "{{ (%s)[0] }}", "{%% if %s %%}{%% endif %%}",
        "{%% set a = %s %%}", "{%% macro f(a=%s) %%}{%% endmacro %%}", "{%% include %s %%}",
    ]  # fmt: skip
    templates = [template % large for template in templates]
    templates += ["{{ 'a' | center(1000000000) }}", "{{ 9 ** 9 ** 9 }}", "{{ '%1000000000d' % 1 }}"]
    done = subprocess.run([sys.executable, "-c", COMPILE, *templates], capture_output=True, text=True)
    assert done.returncode == 0, (done.returncode, done.stderr)
    assert int(done.stdout.split()[0]) < 100


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% autoescape 'a' * 1000000000 %}{% endautoescape %}", "line 1: autoescape must be true or false"),
        ("{{ " + "1" * 5000 + " }}", "is not valid Jinja: .*4300 digits"),
        ("é" * (ours.MAX_BYTES // 2 + 1), f"at most {ours.MAX_BYTES} bytes, got {ours.MAX_BYTES + 2}"),
    ],
)
def test_templates_that_cost_too_much_are_refused(tmp_path, template, message):
    with pytest.raises(ValueError, match=message):
        open_template(tmp_path, template)
    chat = Chat(messages=QUESTION, chat_template="{{ 1 }}" + template)
    with pytest.raises(ValueError, match=f"chat_template.*{message}".replace(f", got {ours.MAX_BYTES + 2}", "")):
        open_template(tmp_path, "{{ 1 }}").render_chat(chat)


@pytest.mark.parametrize("name", ["chat_template.jinja", "chat_template.json"])
def test_a_large_template_is_refused_unread(tmp_path, name):
    folder = tokenizer_files.write(tmp_path, "word_level", chat_template=None)
    with (folder / name).open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ValueError, match=f"{name} must have at most {ours.MAX_BYTES} bytes, got {1 << 40}"):
        Tokenizer.open(folder)


def test_the_clock_of_templates(tmp_path, monkeypatch):
    class Clock(datetime.datetime):
        @classmethod
        def now(cls):
            return cls(2030, 2, 3)

    monkeypatch.setattr(ours, "datetime", Clock)
    tokenizer = open_template(tmp_path, "{{ strftime_now('%d %b %Y') }}")
    assert tokenizer.render_chat(Chat(messages=QUESTION)) == "03 Feb 2030"
