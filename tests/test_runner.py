"""A step on the CPU: tensors, pending inputs, block operations, and what it counts."""

import math

import pytest
import torch
from dense_backend import DenseBackend

from kvchat.attention import AttentionBatch
from kvchat.attention.backends import BACKENDS, make_backend
from kvchat.attention.rope import build_rope
from kvchat.config import KVSpec, ModelConfig, SamplingParams
from kvchat.engine.request import Batch, Request, Row
from kvchat.engine.runner import Runner
from kvchat.engine.sampler import Sampler
from kvchat.kv.block_pool import BlockPool, CopyBlock
from kvchat.kv.cache import KVCache
from kvchat.model.decoder import Decoder
from kvchat.model.families import tensor_shapes

CONFIG = ModelConfig(
    family="llama",
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position=256,
    norm_eps=1e-5,
    rope_theta=10000.0,
)
BLOCK_SIZE, NUM_BLOCKS = 16, 40
GREEDY = SamplingParams(temperature=0.0)
PROMPT = [(7 * i * i + 3) % 97 for i in range(37)]


def random_decoder(dtype=torch.float32):
    """The weights are noise, scaled so that activations and logits are like a model's."""
    shapes = tensor_shapes(CONFIG)
    generator = torch.Generator().manual_seed(5)

    def draw(name):
        noise = torch.randn(shapes[name], generator=generator)
        if name.endswith("norm.weight"):
            return (1 + 0.1 * noise).to(dtype)
        # sqrt of the input width keeps activations near 1; the factor 2 keeps logits apart
        return (noise * 2 / math.sqrt(shapes[name][-1])).to(dtype)

    return Decoder(CONFIG, lambda *names: torch.cat([draw(name) for name in names]))


class Stack:
    """A random model over a small pool; `request` claims its slots."""

    def __init__(self, backend="cpu", dtype="float32"):
        self.decoder = random_decoder(getattr(torch, dtype))
        self.cache = KVCache(KVSpec(2, 2, 8, BLOCK_SIZE, dtype), NUM_BLOCKS)
        self.cache.blocks[1:] = math.nan
        self.backend = make_backend(backend, CONFIG, self.cache, build_rope(CONFIG, 256))
        self.pool = BlockPool(NUM_BLOCKS, BLOCK_SIZE)
        self.runner = Runner(self.decoder, self.cache, self.backend, Sampler())

    def request(self, request_id, token_ids=PROMPT, num_slots=64):
        request = Request(request_id, request_id, list(token_ids), len(token_ids), GREEDY)
        request.seq = self.pool.alloc([])
        self.pool.append(request.seq, num_slots)
        return request

    def launch(self, *rows, ops=()):
        batch = Batch(list(rows), list(ops), sum(row.num_tokens for row in rows))
        return self.runner.launch(batch).tokens()


def expected_greedy(token_ids, num_tokens):
    """The greedy reply by a full forward pass over one tensor of K and V for each token."""
    decoder, token_ids, reply = random_decoder(), [*token_ids], []
    for _ in range(num_tokens):
        backend = DenseBackend(CONFIG)
        backend.plan(AttentionBatch([len(token_ids)], [len(token_ids)], [[1]]))
        rows = torch.tensor([len(token_ids) - 1])
        reply.append(int(decoder(torch.tensor(token_ids), backend, rows).argmax()))
        token_ids.append(reply[-1])
    return reply


@pytest.mark.parametrize("backend", BACKENDS)
def test_chunks_and_decodes_in_one_step_give_the_full_forward_pass(backend):
    stack = Stack(backend)
    first, second = stack.request(1), stack.request(2, PROMPT[:20])

    assert stack.launch(Row(first, 0, 30, False)) == []
    # A chunk that ends a prompt, beside a whole prompt.
    reply = [[token] for token in stack.launch(Row(first, 30, 7, True), Row(second, 0, 20, True))]
    for step in range(4):
        for request, tokens in zip((first, second), reply, strict=True):
            request.token_ids.append(tokens[-1])
        rows = Row(second, 20 + step, 1, True), Row(first, 37 + step, 1, True)
        for tokens, token in zip(reply[::-1], stack.launch(*rows), strict=True):
            tokens.append(token)

    assert reply == [expected_greedy(PROMPT, 5), expected_greedy(PROMPT[:20], 5)]


def test_a_pending_input_is_the_id_sampled_in_the_step_before():
    stack = Stack()
    request, other = stack.request(1), stack.request(2, PROMPT[:9])

    late = stack.launch(Row(other, 0, 9, True), Row(request, 0, 37, True))
    # Nothing has been read: both inputs are still on the device.
    late += stack.launch(Row(request, 37, 1, True), Row(other, 9, 1, True))

    ahead = expected_greedy(PROMPT, 2), expected_greedy(PROMPT[:9], 2)
    assert late == [ahead[1][0], ahead[0][0], ahead[0][1], ahead[1][1]]
    assert (len(request.token_ids), len(other.token_ids)) == (37, 9)


def test_penalties_count_a_pending_token():
    stack = Stack()
    request = stack.request(1, PROMPT[:9])
    first = stack.launch(Row(request, 0, 9, True))[0]
    bias = ((first, 1e3),)

    request.sampling = SamplingParams(temperature=0.0, logit_bias=bias)
    assert stack.launch(Row(request, 9, 1, True)) == [first]
    request.sampling = SamplingParams(temperature=0.0, logit_bias=bias, presence_penalty=1e6)
    assert stack.launch(Row(request, 9, 1, True)) != [first]


def test_block_operations_run_before_the_step_writes():
    stack = Stack()
    parent = stack.request(1, PROMPT[:20], num_slots=20)
    token = stack.launch(Row(parent, 0, 20, True))[0]
    child = Request(2, 2, [*PROMPT[:20], token], 21, GREEDY)
    child.seq = stack.pool.fork(parent.seq, 20)
    ops = stack.pool.append(child.seq, 1)
    assert ops == [CopyBlock(parent.seq.table[1], child.seq.table[1])]
    tail = stack.cache.blocks[parent.seq.table[1]].clone()

    sampled = stack.launch(Row(child, 20, 1, True), ops=ops)

    assert sampled == expected_greedy(child.token_ids, 1)
    after = stack.cache.blocks[parent.seq.table[1]]
    assert after.view(torch.uint8).equal(tail.view(torch.uint8))


def test_a_step_without_rows_does_its_block_operations_and_keeps_pending_inputs():
    stack = Stack()
    request = stack.request(1)
    first = stack.launch(Row(request, 0, len(PROMPT), True))
    stack.cache.blocks[39] = 0.0

    assert stack.launch(ops=[CopyBlock(request.seq.table[0], 39)]) == []

    assert torch.equal(stack.cache.blocks[39], stack.cache.blocks[request.seq.table[0]])
    pending = stack.launch(Row(request, len(PROMPT), 1, True))
    request.token_ids += first
    assert pending == stack.launch(Row(request, len(PROMPT), 1, True))


def test_every_weight_is_read_once_a_step_whatever_the_batch():
    stack = Stack()
    requests = [stack.request(i, num_slots=40) for i in range(8)]

    stack.launch(*(Row(request, 0, 20 + i, False) for i, request in enumerate(requests)))
    stack.launch(*(Row(r, 20 + i, 1, False) for i, r in enumerate(requests)))

    assert {linear.num_reads for linear in stack.decoder.linears()} == {2}


def test_decodes_gather_nothing_on_the_cpu_backend():
    stack = Stack()
    request = stack.request(1)
    stack.launch(Row(request, 0, 36, False))
    gathered = stack.backend.bytes_gathered
    assert gathered == 36 * 2 * 2 * 2 * 8 * 4

    stack.launch(Row(request, 36, 1, True))

    assert stack.backend.bytes_gathered == gathered


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bad_value_in_one_sequence_stops_that_row_alone(backend):
    stack = Stack(backend)
    requests = [stack.request(i) for i in range(3)]
    stack.launch(*(Row(request, 0, 36, False) for request in requests))
    stack.cache.layer(0)[requests[1].seq.table[0], 1, 0, 3, 2] = math.nan

    sampled = stack.launch(*(Row(request, 36, 1, True) for request in requests))

    expected = expected_greedy(PROMPT, 1)[0]
    assert sampled == [expected, -1, expected]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_models_agree_between_the_backends(dtype):
    replies = []
    for backend in BACKENDS:
        stack = Stack(backend, dtype)
        request = stack.request(1)
        tokens = stack.launch(Row(request, 0, 37, True))
        for _ in range(8):
            request.token_ids.append(tokens[-1])
            tokens += stack.launch(Row(request, len(request.token_ids) - 1, 1, True))
        replies.append(tokens)

    assert replies[0] == replies[1]


def test_the_null_block_stays_zero():
    stack = Stack()
    stack.launch(Row(stack.request(1), 0, 37, True))

    assert not stack.cache.blocks[0].any()
