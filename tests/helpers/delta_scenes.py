"""Sequences of a gated delta net with blocks for their states, for the tests of its kernels."""

import torch

from expertwire.kernels.ops import attention
from expertwire.kernels.ops.gated_delta_rule import CHUNK, DeltaCache
from expertwire.kernels.ops.recurrent import StateMetadata

NAN = float("nan")


class Scene:
    """Random inputs of sequences, computed by any steps; caches are NaN wherever nothing was stored.

    Attributes:
        inputs: of each sequence, qkv_TD, a_TH and b_TH.
        cache: its state blocks, `every` positions each, and chunk blocks, one a sequence.
    """

    def __init__(self, lengths, dtype, *, keys=2, heads=4, key_size=32, value_size=32, every=128, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape):
            return torch.randn(*shape, generator=generator)

        self.sizes, self.every = (keys, heads, key_size, value_size), every
        width = 2 * keys * key_size + heads * value_size
        self.inputs = [[draw(length, size).to(dtype) for size in (width, heads, heads)] for length in lengths]
        self.A, self.dt_bias = -draw(heads).exp(), draw(heads) - 2
        self.done = [0] * len(lengths)
        counts = [[-(-length // every) for length in lengths], [1] * len(lengths)]
        self.states, self.chunks = (self._table(per_sequence, generator) for per_sequence in counts)
        num_states, num_chunks = (1 + sum(per_sequence) for per_sequence in counts)
        self.cache = DeltaCache(
            torch.full((num_states, heads, key_size, value_size), NAN),
            torch.full((num_chunks, CHUNK, keys, key_size), NAN),
            torch.full((num_chunks, CHUNK, heads, value_size), NAN),
            torch.full((num_chunks, CHUNK, heads), NAN),
        )

    @staticmethod
    def _table(counts, generator):
        """Rows of distinct block ids, padded with the null block 0."""
        ids = iter((1 + torch.randperm(sum(counts), generator=generator)).tolist())
        rows = [[next(ids) for _ in range(count)] for count in counts]
        return torch.tensor([row + [0] * (max(counts) - len(row)) for row in rows], dtype=torch.int32)

    def step(self, op, nums, *, unused=0):
        """Compute the next `nums[i]` tokens of each sequence i; return the output of each that has some.

        `unused` sequences without queries, with a row each, stand last; bounds are then loose.
        """
        order = [i for i in sorted(range(len(nums)), key=lambda i: nums[i] != 1) if nums[i]]
        lengths = [self.done[i] + nums[i] for i in order]
        tables = [torch.nn.functional.pad(table[order], (0, 0, 0, unused)) for table in (self.states, self.chunks)]
        # Entries of a chunk each repeat the block of `every` positions.
        repeated = tables[0].repeat_interleave(self.every // CHUNK, 1)
        seqs = attention.describe([*(nums[i] for i in order), *[0] * unused], [*lengths, *[0] * unused], repeated)
        states = StateMetadata(seqs=seqs, interval=CHUNK, chunk_blocks_S=tables[1][:, 0].contiguous())
        rows = [
            torch.cat([self.inputs[i][which][self.done[i] : self.done[i] + nums[i]] for i in order])
            for which in range(3)
        ]
        rows = [torch.cat((x, x.new_full((unused, x.shape[1]), NAN))) for x in rows]
        out = op(*rows, self.A, self.dt_bias, self.cache, states)
        for i in order:
            self.done[i] += nums[i]
        found = out[: len(out) - unused].split([nums[i] for i in order])
        return dict(zip(order, found, strict=True))

    def run(self, op, steps, **options):
        """Compute steps; return all outputs of each sequence."""
        found = [[qkv.new_empty(0, self.sizes[1] * self.sizes[3])] for qkv, _, _ in self.inputs]
        for nums in steps:
            for i, out in self.step(op, nums, **options).items():
                found[i].append(out)
        return [torch.cat(outputs) for outputs in found]

    def whole(self, op, **options):
        """Compute all tokens in one step."""
        return self.run(op, [[len(qkv) for qkv, _, _ in self.inputs]], **options)

    def snapshot(self, i):
        """Return the state that a sequence goes on from."""
        return self.cache.state_BHdv[self.states[i, (self.done[i] - 1) // self.every]]


def random_cuts(length, seed, largest=70):
    """Numbers of tokens that sum to `length`, single tokens among them."""
    generator = torch.Generator().manual_seed(seed)
    cuts = []
    while sum(cuts) < length:
        size = int(torch.randint(1, largest, (), generator=generator))
        cuts.append(min(length - sum(cuts), 1 if size % 3 == 0 else size))
    return cuts
