"""Phi-4-mini-flash as on a GPU: Mamba's scan, gated memory, differential attention and layer norms interpreted, in captured steps
too, beside the same steps on the CPU.
"""

import numpy as np
from helpers import architectures, tiny_checkpoints
from helpers.fake_graphs import FakeCapture
from test_gpu_engine import check_outputs, serve

from expertwire.kernels import registry as kernels
from expertwire.kernels.gpu.device import describe
from expertwire.scheduler.request import Request
from expertwire.scheduler.sampling_params import SamplingParams


def request():
    prompt = np.array(tiny_checkpoints.prompt(3, seed=0), np.int32)
    return Request(key=0, prompt=prompt, params=SamplingParams(max_tokens=2, logprobs=2, temperature=0), seed=0)


def test_the_same_tokens_as_on_the_cpu():
    folder, capture = architectures.folder("phi4_flash"), FakeCapture()
    expected = serve(folder, kernels.cpu(), [request()])
    found = serve(folder, kernels.triton(describe("cpu")), [request()], capture=capture)
    assert capture.replays > 0
    check_outputs(found, expected)
