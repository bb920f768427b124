"""How the families of models write their answers: where reasoning, the answer proper and calls of tools begin and end.

Facts about published models, as data for whoever splits a stream of text; `docs/chat.md` tabulates them with their sources.
Nothing here parses.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

_THINK = ("<think>", "</think>")
_NAMED_JSON = '{"name": "{name}", "arguments": {arguments}}'


@dataclass(frozen=True, kw_only=True)
class ToolCalls:
    """How the calls of tools are written.

    Args:
        kind: of a call: "json" (an object with the name and the arguments), "json_list" (a list of these), "name_json" (the
            name, then the arguments as JSON), "tags" (the arguments one by one between tags), "python" (a list of calls in
            Python's syntax) or "harmony" (a message whose recipient is the tool, its content the arguments as JSON).
        start: where the calls of a turn begin; "" where nothing marks it.
        end: where they end; "" at the end of the turn.
        call: one call with `start` and `end` around it, with "{name}", "{arguments}" and, where calls are counted from 0,
            "{index}" in their places.
        argument: one argument of a call of kind "tags" or "python", with "{name}" and "{value}" in their places.
    """

    kind: Literal["json", "json_list", "name_json", "tags", "python", "harmony"]
    start: str
    end: str
    call: str
    argument: str = ""


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """What a family's answers look like.

    Args:
        name: of the dialect.
        marks: what tells it: each is a token of its own in the family's vocabulary, or written in its chat template.
        end_of_turn: tokens that end an answer, whatever the checkpoint's list of end-of-sequence ids says.
        reasoning: what stands before and after the reasoning; None where the family has none.
        answer: what stands before and after the answer proper, where there is such a thing.
        tool_calls: None where the family calls no tools.
        reasoning_efforts: values that a request's `reasoning_effort` may have; empty where the template alone decides.
    """

    name: str
    marks: tuple[str, ...]
    end_of_turn: tuple[str, ...]
    reasoning: tuple[str, str] | None = None
    answer: tuple[str, str] | None = None
    tool_calls: ToolCalls | None = None
    reasoning_efforts: tuple[str, ...] = ()

    def opens_reasoning(self, prompt: str) -> bool:
        """Whether the output after `prompt` begins within the reasoning, whose start the prompt already has."""
        return self.reasoning is not None and prompt.rstrip().endswith(self.reasoning[0])


# What has more marks in common with others stands before them.
DIALECTS = (
    Dialect(
        name="harmony",
        marks=("<|channel|>", "<|message|>", "<|call|>"),
        end_of_turn=("<|return|>", "<|call|>"),
        reasoning=("<|channel|>analysis<|message|>", "<|end|>"),
        answer=("<|channel|>final<|message|>", "<|return|>"),
        tool_calls=ToolCalls(
            kind="harmony",
            start="<|channel|>commentary to=",
            end="<|call|>",
            call="<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{arguments}<|call|>",
        ),
        reasoning_efforts=("low", "medium", "high"),
    ),
    Dialect(
        name="deepseek_v3.2",
        marks=("｜DSML｜",),
        end_of_turn=("<｜end▁of▁sentence｜>",),
        reasoning=_THINK,
        tool_calls=ToolCalls(
            kind="tags",
            start="<｜DSML｜function_calls>",
            end="</｜DSML｜function_calls>",
            call=(
                '<｜DSML｜function_calls>\n<｜DSML｜invoke name="{name}">\n{arguments}</｜DSML｜invoke>\n'
                "</｜DSML｜function_calls>"
            ),
            argument='<｜DSML｜parameter name="{name}" string="true">{value}</｜DSML｜parameter>\n',
        ),
    ),
    Dialect(
        name="deepseek_v3",
        marks=("<｜tool▁sep｜>", "```json"),
        end_of_turn=("<｜end▁of▁sentence｜>",),
        reasoning=_THINK,
        tool_calls=ToolCalls(
            kind="name_json",
            start="<｜tool▁calls▁begin｜>",
            end="<｜tool▁calls▁end｜>",
            call=(
                "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{arguments}\n```"
                "<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
            ),
        ),
    ),
    Dialect(
        name="deepseek_v3.1",
        marks=("<｜tool▁sep｜>",),
        end_of_turn=("<｜end▁of▁sentence｜>",),
        reasoning=_THINK,
        tool_calls=ToolCalls(
            kind="name_json",
            start="<｜tool▁calls▁begin｜>",
            end="<｜tool▁calls▁end｜>",
            call=(
                "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{arguments}<｜tool▁call▁end｜>"
                "<｜tool▁calls▁end｜>"
            ),
        ),
    ),
    Dialect(
        name="kimi_k2",
        marks=("<|tool_calls_section_begin|>",),
        end_of_turn=("<|im_end|>",),
        reasoning=_THINK,
        tool_calls=ToolCalls(
            kind="name_json",
            start="<|tool_calls_section_begin|>",
            end="<|tool_calls_section_end|>",
            call=(
                "<|tool_calls_section_begin|><|tool_call_begin|>functions.{name}:{index}<|tool_call_argument_begin|>"
                "{arguments}<|tool_call_end|><|tool_calls_section_end|>"
            ),
        ),
    ),
    Dialect(
        name="minimax_m2",
        marks=("<minimax:tool_call>",),
        end_of_turn=("[e~[",),
        reasoning=_THINK,
        tool_calls=ToolCalls(
            kind="tags",
            start="<minimax:tool_call>",
            end="</minimax:tool_call>",
            call='<minimax:tool_call>\n<invoke name="{name}">\n{arguments}</invoke>\n</minimax:tool_call>',
            argument='<parameter name="{name}">{value}</parameter>\n',
        ),
    ),
    Dialect(
        name="glm_4.7",
        marks=("</arg_key><arg_value>", "<|observation|>"),
        end_of_turn=("<|user|>", "<|observation|>"),
        reasoning=_THINK,
        tool_calls=ToolCalls(
            kind="tags",
            start="<tool_call>",
            end="</tool_call>",
            call="<tool_call>{name}{arguments}</tool_call>",
            argument="<arg_key>{name}</arg_key><arg_value>{value}</arg_value>",
        ),
    ),
    Dialect(
        name="glm_4.5",
        marks=("<arg_key>", "<|observation|>"),
        end_of_turn=("<|user|>", "<|observation|>"),
        reasoning=_THINK,
        tool_calls=ToolCalls(
            kind="tags",
            start="<tool_call>",
            end="</tool_call>",
            call="<tool_call>{name}\n{arguments}</tool_call>",
            argument="<arg_key>{name}</arg_key>\n<arg_value>{value}</arg_value>\n",
        ),
    ),
    Dialect(
        name="qwen3_coder",
        marks=("<tool_call>", "<function=", "<|im_end|>"),
        end_of_turn=("<|im_end|>",),
        reasoning=_THINK,
        tool_calls=ToolCalls(
            kind="tags",
            start="<tool_call>",
            end="</tool_call>",
            call="<tool_call>\n<function={name}>\n{arguments}</function>\n</tool_call>",
            argument="<parameter={name}>\n{value}\n</parameter>\n",
        ),
    ),
    Dialect(
        name="qwen3",
        marks=("<tool_call>", "<|im_end|>"),
        end_of_turn=("<|im_end|>",),
        reasoning=_THINK,
        tool_calls=ToolCalls(
            kind="json",
            start="<tool_call>",
            end="</tool_call>",
            call="<tool_call>\n" + _NAMED_JSON + "\n</tool_call>",
        ),
    ),
    Dialect(
        name="mistral",
        marks=("[TOOL_CALLS]", "[ARGS]"),
        end_of_turn=("</s>",),
        reasoning=("[THINK]", "[/THINK]"),
        tool_calls=ToolCalls(
            kind="name_json", start="[TOOL_CALLS]", end="", call="[TOOL_CALLS]{name}[ARGS]{arguments}"
        ),
        reasoning_efforts=("none", "high"),
    ),
    Dialect(
        name="mistral_v3",
        marks=("[TOOL_CALLS]",),
        end_of_turn=("</s>",),
        tool_calls=ToolCalls(kind="json_list", start="[TOOL_CALLS]", end="", call="[TOOL_CALLS][" + _NAMED_JSON + "]"),
    ),
    Dialect(
        name="llama_4",
        marks=("<|python_start|>", "<|eot|>"),
        end_of_turn=("<|eot|>", "<|eom|>"),
        tool_calls=ToolCalls(
            kind="python",
            start="<|python_start|>",
            end="<|python_end|>",
            call="<|python_start|>[{name}({arguments})]<|python_end|>",
            argument="{name}={value}",
        ),
    ),
    Dialect(
        name="llama_3",
        marks=("<|python_tag|>", "<|eot_id|>"),
        end_of_turn=("<|eot_id|>", "<|eom_id|>"),
        tool_calls=ToolCalls(kind="json", start="", end="", call='{"name": "{name}", "parameters": {arguments}}'),
    ),
    Dialect(
        name="phi_4_mini",
        marks=("<|tool_call|>", "<|end|>"),
        end_of_turn=("<|end|>",),
        tool_calls=ToolCalls(kind="json_list", start="functools[", end="]", call="functools[" + _NAMED_JSON + "]"),
    ),
)
# What is true of a model that none of these describes.
THINKING = Dialect(name="thinking", marks=_THINK, end_of_turn=(), reasoning=_THINK)
PLAIN = Dialect(name="plain", marks=(), end_of_turn=())


def dialect_of(tokens: Collection[str], template: str) -> Dialect:
    """The dialect of a model, told by its tokenizer: names of architectures say less, as Kimi K2 has DeepSeek-V3's and a
    family's releases differ in their templates only.

    Args:
        tokens: the tokens that were added to the vocabulary.
        template: sources of the chat templates.
    """
    candidates = (*DIALECTS, THINKING)
    found = (d for d in candidates if all(mark in tokens or mark in template for mark in d.marks))
    return next(found, PLAIN)
