"""A model with a latent and an index cache through the engine: many requests at once, prefixes that are found again."""

from helpers import architectures
from helpers import tiny_checkpoints as tiny
from helpers.rank_model import RankModel

from expertwire import LLM, SamplingParams

NAME, BLOCK, NUM_NEW = "deepseek_v32", 16, 12
LENGTHS = (5, 41, 100, 200)  # the indexer chooses 32 positions


def test_answers_are_those_of_one_request_alone():
    folder = architectures.folder(NAME)
    prompts = [tiny.prompt(length, seed=length) for length in LENGTHS]
    expected = [RankModel(folder).greedy(ids, NUM_NEW) for ids in prompts]
    sampling = SamplingParams(temperature=0, max_tokens=NUM_NEW, ignore_eos=True)
    options = {
        "block_size": BLOCK,
        "max_num_batched_tokens": 64,
        "max_model_len": 256,
        "kv_cache_memory_bytes": 1 << 20,
    }
    with LLM(str(folder), launcher="local", threads_per_rank=1, **options) as llm:
        assert set(llm.model_info.cache_blocks) == {"latent", "index"}
        for cached in (0, LENGTHS[-1] // BLOCK * BLOCK):
            outputs = llm.generate(prompts, sampling, use_tqdm=False)
            assert [list(output.outputs[0].token_ids) for output in outputs] == expected
            assert outputs[-1].num_cached_tokens == cached
