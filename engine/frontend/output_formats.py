"""Output formats of model families: the delimiters of reasoning and the tokens that end an answer.

`docs/chat.md` lists them with their sources, and the formats of tool calls, which the engine does not parse.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

_THINK = ("<think>", "</think>")


@dataclass(frozen=True, kw_only=True)
class OutputFormat:
    """The output format of a model family.

    Args:
        name: name of the format.
        marks: strings that identify the family: each is a token of its vocabulary or part of its chat template.
        end_of_turn: tokens that end an answer, in addition to the checkpoint's end-of-sequence ids.
        reasoning: delimiters before and after the reasoning; None if the family has none.
        reasoning_efforts: values of `reasoning_effort` in a chat that its templates know; empty if the template checks them.
    """

    name: str
    marks: tuple[str, ...]
    end_of_turn: tuple[str, ...]
    reasoning: tuple[str, str] | None = None
    reasoning_efforts: tuple[str, ...] = ()

    def opens_reasoning(self, prompt: str) -> bool:
        """Return whether the prompt ends with the start of reasoning, so that the output begins within it."""
        return self.reasoning is not None and prompt.rstrip().endswith(self.reasoning[0])


# In the order in which they are tried: a format whose marks include those of another comes first.
OUTPUT_FORMATS = (
    OutputFormat(
        name="harmony",
        marks=("<|channel|>", "<|message|>", "<|call|>"),
        end_of_turn=("<|return|>", "<|call|>"),
        reasoning=("<|channel|>analysis<|message|>", "<|end|>"),
        reasoning_efforts=("low", "medium", "high"),
    ),
    OutputFormat(name="deepseek_v3.2", marks=("｜DSML｜",), end_of_turn=("<｜end▁of▁sentence｜>",), reasoning=_THINK),
    OutputFormat(
        name="deepseek_v3",
        marks=("<｜tool▁sep｜>", "```json"),
        end_of_turn=("<｜end▁of▁sentence｜>",),
        reasoning=_THINK,
    ),
    OutputFormat(
        name="deepseek_v3.1", marks=("<｜tool▁sep｜>",), end_of_turn=("<｜end▁of▁sentence｜>",), reasoning=_THINK
    ),
    OutputFormat(
        name="kimi_k2", marks=("<|tool_calls_section_begin|>",), end_of_turn=("<|im_end|>",), reasoning=_THINK
    ),
    OutputFormat(name="minimax_m2", marks=("<minimax:tool_call>",), end_of_turn=("[e~[",), reasoning=_THINK),
    OutputFormat(
        name="glm_4.7",
        marks=("</arg_key><arg_value>", "<|observation|>"),
        end_of_turn=("<|user|>", "<|observation|>"),
        reasoning=_THINK,
    ),
    OutputFormat(
        name="glm_4.5",
        marks=("<arg_key>", "<|observation|>"),
        end_of_turn=("<|user|>", "<|observation|>"),
        reasoning=_THINK,
    ),
    OutputFormat(name="granite_4", marks=("<|start_of_role|>", "<tool_call>"), end_of_turn=("<|end_of_text|>",)),
    OutputFormat(
        name="qwen3_coder",
        marks=("<tool_call>", "<function=", "<|im_end|>"),
        end_of_turn=("<|im_end|>",),
        reasoning=_THINK,
    ),
    OutputFormat(name="qwen3", marks=("<tool_call>", "<|im_end|>"), end_of_turn=("<|im_end|>",), reasoning=_THINK),
    OutputFormat(
        name="mistral",
        marks=("[TOOL_CALLS]", "[ARGS]"),
        end_of_turn=("</s>",),
        reasoning=("[THINK]", "[/THINK]"),
        reasoning_efforts=("none", "high"),
    ),
    OutputFormat(name="mistral_v3", marks=("[TOOL_CALLS]",), end_of_turn=("</s>",)),
    OutputFormat(name="llama_4", marks=("<|python_start|>", "<|eot|>"), end_of_turn=("<|eot|>", "<|eom|>")),
    OutputFormat(name="llama_3", marks=("<|python_tag|>", "<|eot_id|>"), end_of_turn=("<|eot_id|>", "<|eom_id|>")),
    OutputFormat(name="phi_4_mini", marks=("<|tool_call|>", "<|end|>"), end_of_turn=("<|end|>",)),
)
# For models that match none of these.
THINKING = OutputFormat(name="thinking", marks=_THINK, end_of_turn=(), reasoning=_THINK)
PLAIN = OutputFormat(name="plain", marks=(), end_of_turn=())


def output_format_of(tokens: Collection[str], template: str) -> OutputFormat:
    """Return the output format of a model.

    It follows from the tokenizer, not from the architecture: Kimi K2 has DeepSeek-V3's, and releases of a family differ in their
    chat templates only.

    Args:
        tokens: tokens added to the vocabulary.
        template: sources of the chat templates.
    """
    candidates = (*OUTPUT_FORMATS, THINKING)
    found = (each for each in candidates if all(mark in tokens or mark in template for mark in each.marks))
    return next(found, PLAIN)
