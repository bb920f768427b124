"""Which family an architecture belongs to: adding a model is a file beside this one and a line here."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from expertwire.engine.config.fields import Fields
from expertwire.engine.models.deepseek import DEEPSEEK_V2, DEEPSEEK_V3, DEEPSEEK_V32
from expertwire.engine.models.family import Family
from expertwire.engine.models.glm4_moe import GLM4_MOE
from expertwire.engine.models.glm_latent import GLM4_MOE_LITE, GLM_MOE_DSA
from expertwire.engine.models.gpt_oss import GPT_OSS
from expertwire.engine.models.kimi_k25 import KIMI_K25
from expertwire.engine.models.llama import LLAMA
from expertwire.engine.models.llama4 import LLAMA4
from expertwire.engine.models.minimax_m2 import MINIMAX_M2
from expertwire.engine.models.mistral import MINISTRAL3, MISTRAL
from expertwire.engine.models.mistral3 import MISTRAL3
from expertwire.engine.models.mistral4 import MISTRAL4
from expertwire.engine.models.mixtral import MIXTRAL
from expertwire.engine.models.olmoe import OLMOE
from expertwire.engine.models.phi3 import PHI3
from expertwire.engine.models.qwen3 import QWEN3, QWEN3_MOE

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "MixtralForCausalLM": MIXTRAL,
        "Qwen3MoeForCausalLM": QWEN3_MOE,
        "Qwen3ForCausalLM": QWEN3,
        "GptOssForCausalLM": GPT_OSS,
        "Llama4ForConditionalGeneration": LLAMA4,
        "Llama4ForCausalLM": LLAMA4,
        "MiniMaxM2ForCausalLM": MINIMAX_M2,
        "OlmoeForCausalLM": OLMOE,
        "Glm4MoeForCausalLM": GLM4_MOE,
        "DeepseekV2ForCausalLM": DEEPSEEK_V2,
        "DeepseekV3ForCausalLM": DEEPSEEK_V3,
        "DeepseekV32ForCausalLM": DEEPSEEK_V32,
        "KimiK25ForConditionalGeneration": KIMI_K25,
        "Glm4MoeLiteForCausalLM": GLM4_MOE_LITE,
        "GlmMoeDsaForCausalLM": GLM_MOE_DSA,
        "Mistral3ForConditionalGeneration": MISTRAL3,
        "Mistral4ForCausalLM": MISTRAL4,
        "LlamaForCausalLM": LLAMA,
        "MistralForCausalLM": MISTRAL,
        "Ministral3ForCausalLM": MINISTRAL3,
        "Phi3ForCausalLM": PHI3,
    }
)


def family_of(fields: Fields) -> tuple[str, Family]:
    """The architecture that a config.json names first, and its family.

    Raises:
        ValueError: it is not supported; lists those that are.
    """
    match fields.get("architectures"):
        case [str(architecture), *_] if architecture in FAMILIES:
            return architecture, FAMILIES[architecture]
        case found:
            raise ValueError(
                f"{fields.file}: architectures must begin with one of {', '.join(FAMILIES)}, got {found!r}"
            )
