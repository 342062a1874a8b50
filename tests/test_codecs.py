"""The codecs as defined: errors bounded by the scales, bytes as the layout says, NaN visible."""

import pytest
import torch
from torch.testing import assert_close

from kvchat.config import KVSpec
from kvchat.errors import UsageError
from kvchat.kv import codecs
from kvchat.kv.layout import K_GROUP, BlockLayout, Codec, v_group

HEAD_DIMS = (8, 24, 64, 80, 96, 128, 256)
COMPRESSED = (Codec.INT8, Codec.INT4)
NUM_HEADS = 2
ULPS = 4  # of float32, of the value or of the scale: what the arithmetic itself may add


def make_layout(head_dim: int, dtype: str = "bfloat16", block_size: int = 16) -> BlockLayout:
    return BlockLayout(KVSpec(1, NUM_HEADS, head_dim, block_size, dtype), Codec.INT4)


def make_values(layout: BlockLayout, codec: Codec, kind: str, num_blocks: int = 3):
    """k and v, float32 [num_blocks, heads, tokens, head_dim]."""
    generator = torch.Generator().manual_seed(5)
    dim = layout.spec.head_dim
    shape = (num_blocks, NUM_HEADS, layout.span_tokens(codec), dim)
    values = torch.randn((2, *shape), generator=generator)
    per_channel = torch.randn((2, 3, dim), generator=generator)
    if kind == "bias":
        values[0] += 30 * per_channel[0, 0]
    elif kind == "spread":  # channels of very different size, some next to nothing
        values *= per_channel[:, 1, None, None, None].abs() ** 6
    elif kind != "gauss":
        values *= float(kind)
    return values.unbind(0)


def round_trip(codec: Codec, k, v, layout: BlockLayout):
    payload, side = codecs.encode(codec, k, v, layout)
    return payload, side, *codecs.decode(codec, payload, side, layout)


def steps_of(codec: Codec, side, layout: BlockLayout):
    """The scale of every element of k (rotated, for INT8) and v."""
    if codec == Codec.INT8:
        views = codecs.int8_side(side, layout)
        return views.k_scales.float()[..., None], views.v_scales.float()[..., None]
    views = codecs.int4_side(side, layout)
    k_steps = views.k_supers.float()[..., None] * views.k_scales
    v_steps = views.v_scales.float().repeat_interleave(v_group(layout.spec.head_dim), -1)
    return k_steps.repeat_interleave(K_GROUP, -2), v_steps


@pytest.mark.parametrize("kind", ["gauss", "bias", "spread", "1e-8", "1e-6", "1e-4", "1e-2", "1e3"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("codec", COMPRESSED)
def test_no_element_is_further_off_than_half_its_scale(codec, head_dim, kind):
    layout = make_layout(head_dim)
    k, v = make_values(layout, codec, kind)

    _, side, k_decoded, v_decoded = round_trip(codec, k, v, layout)

    if codec == Codec.INT8:
        k, k_decoded = codecs.rotate(k), codecs.rotate(k_decoded)
    eps = ULPS * torch.finfo(torch.float32).eps
    for x, decoded, step in zip(
        (k, v), (k_decoded, v_decoded), steps_of(codec, side, layout), strict=True
    ):
        # rotating adds the rounding of a sum over the token
        largest = x.abs().amax(-1, keepdim=True) if codec == Codec.INT8 else x.abs()
        assert ((decoded - x).abs() <= step / 2 + eps * (largest + step)).all()


@pytest.mark.parametrize("kind", ["gauss", "bias", "spread", "1e-8", "1e-6", "1e-4", "1e-2", "1e3"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("codec", COMPRESSED)
def test_what_was_decoded_is_encoded_as_it_was(codec, head_dim, kind):
    layout = make_layout(head_dim)
    k, v = make_values(layout, codec, kind)

    payload, side, *decoded = round_trip(codec, k, v, layout)
    payload_again, side_again = codecs.encode(codec, *decoded, layout)

    assert torch.equal(payload, payload_again)
    assert torch.equal(side, side_again)


def test_every_int8_code_stands_for_its_multiple_of_the_scale():
    layout = make_layout(128)
    codes = torch.arange(-127, 128, dtype=torch.float32)
    v = torch.zeros(1, 1, layout.span_tokens(Codec.INT8), 128)
    v[0, 0, 0], v[0, 0, 1] = codes[:128], codes[127:]  # -127 .. 0 and 0 .. 127
    v[0, 0, 0] *= 0.25
    k = v.clone()

    payload, side, _, decoded = round_trip(Codec.INT8, k, v, layout)

    stored = codecs.int8_codes(payload, layout)[0, 1, 0]
    assert stored[0].tolist() == list(range(-127, 1))
    assert stored[1].tolist() == list(range(128))
    assert codecs.int8_side(side, layout).v_scales[0, 0, :2].tolist() == [0.25, 1.0]
    assert torch.equal(decoded, v)


def test_every_int4_code_stands_for_its_value():
    layout = make_layout(16)
    num_tokens = layout.span_tokens(Codec.INT4)
    codes = torch.arange(16, dtype=torch.float32)
    k = (codes.repeat(num_tokens // 16)[:, None] * 510 / 255 - 7).expand(num_tokens, 16)
    v = (codes - 7.5).expand(num_tokens, 16) * 0.5

    payload, side, *decoded = round_trip(Codec.INT4, k[None], v[None], layout)

    views = codecs.int4_side(side, layout)
    assert views.k_zeros.unique().tolist() == [-7.0]
    assert views.k_scales.unique().tolist() == [255]
    assert views.v_scales.unique().tolist() == [0.5]
    first_tokens = payload[0, 0].view(num_tokens, 8)[:3]
    assert first_tokens.tolist() == [[0x00] * 8, [0x11] * 8, [0x22] * 8]
    # channel j in the low bits of byte j, channel j + 8 in its high bits
    assert payload[1, 0].view(num_tokens, 8)[0].tolist() == [j | (j + 8) << 4 for j in range(8)]
    assert_close(decoded[0][0], k, rtol=1e-3, atol=1e-3)  # 2 / 255 in float16
    assert torch.equal(decoded[1][0], v)


@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("codec", COMPRESSED)
def test_bytes_are_those_of_the_layout_with_any_leading_dims(codec, dtype, block_size):
    layout = make_layout(96, dtype, block_size)
    k, v = (x.unflatten(0, (2, 3)) for x in make_values(layout, codec, "gauss", num_blocks=6))

    payload, side, k_decoded, _ = round_trip(codec, k, v, layout)

    assert payload.shape == (2, 3, 2, NUM_HEADS, layout.part_bytes)
    assert side.shape == (2, 3, NUM_HEADS, layout.side_bytes)
    assert not side[..., layout.side_used(codec) :].any()
    one_payload, one_side = codecs.encode(codec, k[1, 2], v[1, 2], layout)
    assert torch.equal(payload[1, 2], one_payload)
    assert torch.equal(side[1, 2], one_side)
    one_k, _ = codecs.decode(codec, one_payload, one_side, layout)
    assert torch.equal(k_decoded[1, 2], one_k)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_native_blocks_are_decoded_as_they_are(dtype):
    layout = make_layout(24, dtype)
    blocks = torch.randn(5, 2, NUM_HEADS, 16, 24).to(getattr(torch, dtype))
    payload = blocks.view(torch.uint8).flatten(-2)

    k, v = codecs.decode(Codec.NATIVE, payload, payload.new_empty(5, NUM_HEADS, 0), layout)

    assert torch.equal(k, blocks[:, 0].float())
    assert torch.equal(v, blocks[:, 1].float())


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("codec", COMPRESSED)
def test_zeros_are_kept(codec, head_dim):
    layout = make_layout(head_dim)
    k, v = (x.clone() for x in make_values(layout, codec, "gauss"))
    k[1], v[1] = 0.0, 0.0
    k[0, 0, 5], v[0, 0, 5] = 0.0, 0.0  # one token among others

    _, _, k_decoded, v_decoded = round_trip(codec, k, v, layout)

    assert not k_decoded[1].any()
    assert not v_decoded[1].any()
    assert not v_decoded[0, 0, 5].any()
    if codec == Codec.INT8:
        assert not k_decoded[0, 0, 5].any()


def test_constant_key_channels_are_kept_by_int4():
    layout = make_layout(64, "float16")
    k, v = (x.clone() for x in make_values(layout, Codec.INT4, "gauss"))
    constants = torch.linspace(-900, 900, 20).half().float()
    k[..., :20] = constants

    _, _, decoded, _ = round_trip(Codec.INT4, k, v, layout)

    assert torch.equal(decoded[..., :20], constants.expand_as(decoded[..., :20]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3e38, -2e9])
@pytest.mark.parametrize("codec", COMPRESSED)
def test_what_cannot_be_stored_becomes_nan_and_spoils_only_its_scale(codec, bad):
    layout = make_layout(128)
    k, v = (x.clone() for x in make_values(layout, codec, "gauss"))
    k[1, 1, 9, 3], v[1, 1, 9, 3] = bad, bad

    payload, side, k_decoded, v_decoded = round_trip(codec, k, v, layout)
    again = codecs.encode(codec, k_decoded, v_decoded, layout)

    k_lost, v_lost = torch.zeros_like(k).bool(), torch.zeros_like(v).bool()
    if codec == Codec.INT8:
        k_lost[1, 1, 9], v_lost[1, 1, 9] = True, True
    else:
        k_lost[1, 1, :K_GROUP], v_lost[1, 1, 9, : v_group(128)] = True, True
    assert torch.equal(k_decoded.isnan(), k_lost)
    assert torch.equal(v_decoded.isnan(), v_lost)
    assert torch.equal(again[0], payload)
    assert torch.equal(again[1], side)


@pytest.mark.parametrize(
    ("codec", "k_limit", "v_limit"), [(Codec.INT8, 8.3e6, 8.3e6), (Codec.INT4, 65504.0, 4.9e5)]
)
def test_values_up_to_the_limit_are_kept(codec, k_limit, v_limit):
    layout = make_layout(64)
    k, v = make_values(layout, codec, "gauss")
    k, v = k / k.abs().amax() * k_limit, v / v.abs().amax() * v_limit

    _, _, k_decoded, v_decoded = round_trip(codec, k, v, layout)

    assert_close(k_decoded, k, rtol=0, atol=k_limit / 7)
    assert_close(v_decoded, v, rtol=0, atol=v_limit / 7)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_the_rotation_is_orthonormal_and_block_diagonal(head_dim):
    matrix = codecs.rotate(torch.eye(head_dim))
    size = codecs.rotation_size(head_dim)

    assert_close(matrix @ matrix.T, torch.eye(head_dim), rtol=0, atol=1e-6)
    assert_close(matrix.abs().unique(), torch.tensor([0.0, size**-0.5])[head_dim == size :])
    blocks = torch.block_diag(*[torch.ones(size, size)] * (head_dim // size))
    assert torch.equal(matrix != 0, blocks != 0)
    assert_close(codecs.unrotate(matrix), torch.eye(head_dim), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("head_dim", "size"), [(8, 8), (24, 8), (80, 16), (96, 32), (128, 128)])
def test_the_rotation_takes_the_largest_power_of_two(head_dim, size):
    assert codecs.rotation_size(head_dim) == size


def test_rotated_queries_score_as_unrotated_ones_do():
    q, k = torch.randn(2, 50, 96, generator=torch.Generator().manual_seed(1)).unbind(0)

    assert_close(codecs.rotate(q) @ codecs.rotate(k).T, q @ k.T, rtol=0, atol=1e-4)


def test_the_rotation_does_not_depend_on_the_batch():
    x = torch.randn(999, 256, generator=torch.Generator().manual_seed(2))
    whole = codecs.rotate(x)

    for part in (slice(0, 1), slice(5, 12), slice(100, 612)):
        assert torch.equal(codecs.rotate(x[part]), whole[part])


def test_the_signs_are_fixed():
    signs = codecs.rotation_signs(256)
    shown = "".join("+" if sign > 0 else "-" for sign in signs[:32])

    assert signs.abs().unique().tolist() == [1.0]
    assert 100 < (signs > 0).sum() < 156
    assert shown == "-++-+-----+---+-+---+-++++---++-"
    assert torch.equal(codecs.rotation_signs(96), signs[:96])


@pytest.mark.parametrize("head_dim", [4, 12, 100])
def test_a_head_dim_that_codecs_cannot_store_is_refused_in_words(head_dim):
    with pytest.raises(UsageError, match=f"head_dim is {head_dim}.*multiple of 8; use --kv-cache"):
        make_layout(head_dim)


def test_int4_from_int8_is_nearly_as_good_as_from_native():
    layout = make_layout(128)
    k, v = make_values(layout, Codec.INT4, "gauss")
    halves = [x.unflatten(-2, (2, -1)).movedim(-3, 0) for x in (k, v)]

    decoded = codecs.decode(Codec.INT8, *codecs.encode(Codec.INT8, *halves, layout), layout)
    through = [x.movedim(0, -3).flatten(-3, -2) for x in decoded]
    direct = round_trip(Codec.INT4, k, v, layout)[2:]
    indirect = round_trip(Codec.INT4, *through, layout)[2:]

    norm = torch.linalg.vector_norm
    for x, once, twice in zip((k, v), direct, indirect, strict=True):
        assert norm(twice - x) < 1.02 * norm(once - x)
