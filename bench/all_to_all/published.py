"""Published times of dispatch and combine in µs: 7,168 values a row, 8 experts a token.

"vendor claim": the authors' own page or pull request. "published": measured by a third party, in ai-dynamo/aiconfigurator. We
have reproduced none of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

HIDDEN_SIZE, TOP_K = 7168, 8
_AICONFIGURATOR = (
    "https://github.com/ai-dynamo/aiconfigurator (aic-core/src/aiconfigurator_core/systems/data/SYSTEM/comm, 095f58a)"
)
_TRTLLM = (
    "https://nvidia.github.io/TensorRT-LLM/blogs/tech_blog/"
    "blog18_Optimizing_MoE_Communication_with_One_Sided_AlltoAll_Over_NVLink.html"
)
_DEEPEP = "https://github.com/deepseek-ai/DeepEP"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measurement. `perfect`: every token's experts are on as many ranks as possible; otherwise routing is uniform."""

    library: str
    hardware: str
    num_ranks: int
    num_tokens: int
    dispatch_us: float
    combine_us: float | None
    dispatch_format: str
    combine_format: str = "bf16"
    perfect: bool = False
    kind: str = "published"
    source: str = _AICONFIGURATOR


@dataclass(frozen=True, kw_only=True)
class Rate:
    """A bandwidth published without times, by the library's own definition."""

    library: str
    hardware: str
    num_ranks: int
    num_tokens: int | None
    dispatch_gb_s: float
    combine_gb_s: float | None
    dispatch_format: str
    definition: str
    source: str


# TensorRT-LLM one-sided, GB200 NVL72, bf16, perfect router: tokens, then dispatch and combine at EP 8, 16, 32 and 64.
_ONE_SIDED = (
    (1, (18.9, 31.0), (18.8, 30.8), (19.8, 31.4), (27.8, 32.6)),
    (32, (18.2, 32.7), (20.2, 34.2), (21.1, 34.6), (23.1, 36.1)),
    (128, (31.7, 38.1), (34.6, 39.9), (37.8, 41.1), (41.6, 44.5)),
    (512, (89.5, 91.7), (97.1, 98.2), (110.0, 103.0), (116.0, 107.0)),
    (2048, (312.0, 323.0), (343.0, 348.0), (374.0, 370.0), (399.0, 372.0)),
)
# The same kernels with nvfp4 dispatch in a CUDA graph: ranks, tokens, dispatch, combine. The routing is not stated; at 8,192
# tokens and EP 8 a combine of 1,267 us is 649 GB/s of 7 remote rows a token, which fits the perfect router.
_ONE_SIDED_NVFP4 = (
    (8, 1, 18.3, 25.3),
    (8, 128, 22.0, 37.4),
    (8, 2048, 107.0, 351.0),
    (8, 8192, 367.0, 1267.0),
    (32, 1, 20.9, 32.4),
    (32, 128, 25.6, 47.8),
    (32, 8192, 424.0, 1418.0),
)
_NORMAL = (  # DeepEP V1, 24 SMs: tokens, then H100 EP 8, H200 EP 8, B200 EP 8, GB200 EP 4
    (1, (26.2, 48.2), (26.7, 47.1), (33.5, 54.2), (34.3, 48.0)),
    (128, (48.6, 82.3), (48.3, 83.4), (54.9, 82.7), (43.3, 64.3)),
    (1024, (154.0, 296.0), (156.0, 300.0), (154.0, 264.0), (121.0, 196.0)),
    (4096, (498.0, 961.0), (502.0, 979.0), (440.0, 756.0), (360.0, 597.0)),
    (8192, (972.0, 1839.0), (974.0, 1835.0), (833.0, 1395.0), (671.0, 1120.0)),
)
_LOW_LATENCY = (
    (1, (13.2, 14.4), (11.9, 12.6), (22.1, 22.1), (16.6, 18.1)),
    (16, (15.6, 20.5), (14.2, 18.3), (23.3, 23.1), (18.0, 18.6)),
    (64, (24.6, 39.7), (23.0, 38.8), (26.6, 31.5), (21.6, 26.0)),
    (128, (36.7, 67.0), (35.1, 67.7), (33.0, 40.9), (26.9, 36.2)),
    (256, (62.6, 129.5), (60.5, 124.5), (44.5, 62.9), (37.5, 54.8)),
    (1024, (224.0, 489.0), (211.0, 481.0), (130.0, 189.0), (113.0, 168.0)),
)
_MACHINES = (("H100", 8), ("H200", 8), ("B200", 8), ("GB200", 4))


def one_sided() -> Iterator[Row]:
    """Yield TensorRT-LLM's table, to which our model of their kernel is fitted."""
    where: dict[str, Any] = {"library": "TensorRT-LLM one-sided", "hardware": "GB200", "perfect": True}
    where |= {"kind": "vendor claim", "source": _TRTLLM}
    for tokens, *times in _ONE_SIDED:
        for ranks, (out, back) in zip((8, 16, 32, 64), times, strict=True):
            shape: dict[str, Any] = {"num_ranks": ranks, "num_tokens": tokens, "dispatch_us": out, "combine_us": back}
            yield Row(**where, **shape, dispatch_format="bf16")


def one_sided_narrow() -> Iterator[Row]:
    """Yield times of the same kernels with narrower formats."""
    where: dict[str, Any] = {"library": "TensorRT-LLM one-sided", "hardware": "GB200", "perfect": True}
    for format, us in (("mxfp8", 172.0), ("nvfp4", 102.0)):
        shape: dict[str, Any] = {"num_ranks": 8, "num_tokens": 2048, "dispatch_us": us, "combine_us": None}
        yield Row(**where, **shape, dispatch_format=format, kind="vendor claim", source=_TRTLLM)
    for ranks, tokens, out, back in _ONE_SIDED_NVFP4:
        shape = {"num_ranks": ranks, "num_tokens": tokens, "dispatch_us": out, "combine_us": back}
        yield Row(**where, **shape, dispatch_format="nvfp4")


def others() -> Iterator[Row]:
    """Yield times of other libraries."""
    for library, table in (("DeepEP V1, 24 SMs", _NORMAL), ("DeepEP V1 low latency", _LOW_LATENCY)):
        for tokens, *times in table:
            for (hardware, ranks), (out, back) in zip(_MACHINES, times, strict=True):
                shape: dict[str, Any] = {
                    "num_ranks": ranks,
                    "num_tokens": tokens,
                    "dispatch_us": out,
                    "combine_us": back,
                }
                # The file has no column for it; the ratio of the two times says fp8.
                yield Row(library=library, hardware=hardware, **shape, dispatch_format="fp8")
    # The routing is not stated; it is taken to be that of the one-sided runs.
    where: dict[str, Any] = {
        "library": "TensorRT-LLM two-sided",
        "hardware": "GB200",
        "num_ranks": 64,
        "dispatch_format": "bf16",
    }
    yield Row(**where, num_tokens=128, dispatch_us=15.5 + 40.9, combine_us=43.0, perfect=True)
    yield Row(**where, num_tokens=2048, dispatch_us=28.0 + 443.0, combine_us=498.0, perfect=True)
    where = {"library": "DeepEP low latency, fp4", "hardware": "GB200", "num_ranks": 48, "dispatch_format": "nvfp4"}
    where |= {"source": f"{_DEEPEP}/pull/385", "kind": "vendor claim"}
    # Send and receive, each the best of the range given.
    yield Row(**where, num_tokens=128, dispatch_us=26.0 + 7.0, combine_us=32.0 + 9.0)
    yield Row(**where, num_tokens=768, dispatch_us=89.0 + 18.0, combine_us=131.0 + 20.0)
    # Neither the machine nor the format is stated.
    where = {"library": "pplx-garden", "hardware": "", "num_ranks": 8, "dispatch_format": "", "kind": "vendor claim"}
    where |= {"source": "https://github.com/perplexityai/pplx-garden/blob/main/docs/fabric-lib.md"}
    yield Row(**where, num_tokens=128, dispatch_us=49.7, combine_us=64.2)
    yield Row(**where, num_tokens=4096, dispatch_us=1052.4, combine_us=1396.7)


def rates() -> Iterator[Rate]:
    """Yield figures published as bandwidth only."""
    hybrid = f"{_DEEPEP}/blob/hybrid-ep/docs/README_Hybrid-EP.md"
    for kernel, times in (
        ("kernel", ((8, 764, 737), (16, 707, 666), (24, 666, 640), (32, 642, 605), (36, 632, 597))),
        ("torch API", ((8, 546, 569), (16, 523, 522), (32, 484, 465), (36, 479, 448))),
    ):
        for ranks, out, back in times:
            what: dict[str, Any] = {
                "library": f"Hybrid-EP {kernel}, 32 SMs",
                "hardware": "GB200",
                "num_ranks": ranks,
                "num_tokens": 4096,
            }
            what |= {"dispatch_gb_s": out, "combine_gb_s": back, "dispatch_format": "bf16"}
            yield Rate(**what, definition="algorithm bandwidth", source=hybrid)
    for sms, out, back in ((64, 726, 740), (24, 643, 675)):
        what = {"library": f"DeepEP V2, {sms} SMs", "hardware": "B200", "num_ranks": 8, "num_tokens": 8192}
        what |= {"dispatch_gb_s": out, "combine_gb_s": back, "dispatch_format": "fp8"}
        yield Rate(**what, definition="received bytes with local ones, without its copy or reduction", source=_DEEPEP)
    for ranks, out, back in ((8, 224, 185), (16, 77, 73), (32, 54, 50), (64, 49, 44)):
        what = {"library": "NCCL EP 0.1.0", "hardware": "H100", "num_ranks": ranks, "num_tokens": 128}
        what |= {"dispatch_gb_s": out, "combine_gb_s": back, "dispatch_format": "bf16"}
        yield Rate(**what, definition="theirs; NVLink within 8 ranks", source="https://arxiv.org/abs/2603.13606")
    what = {"library": "DeepEP V2, 32 SMs", "hardware": "GB200", "num_ranks": 4, "num_tokens": None}
    what |= {"dispatch_gb_s": 656, "combine_gb_s": None, "dispatch_format": "bf16"}
    yield Rate(**what, definition="received bytes with local ones, with its copy", source=f"{_DEEPEP}/pull/605")
    for hardware, ranks, gb_s in (("H100", 8, 315), ("H200", 8, 312), ("B200", 8, 561), ("GB200", 4, 488)):
        what = {"library": "NCCL all-to-all of 512 MB", "hardware": hardware, "num_ranks": ranks, "num_tokens": None}
        what |= {"dispatch_gb_s": gb_s, "combine_gb_s": gb_s, "dispatch_format": "bytes"}
        yield Rate(**what, definition="bus bandwidth", source=_AICONFIGURATOR)
