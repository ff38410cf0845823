"""Kernels in 4 and 8 bits: bitsandbytes' codes, what is read back, and the shapes that a scan and a mesh rely on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rmjax.models import quantized

# bitsandbytes.functional's get_4bit_type("nf4"), version 0.50.2.
PUBLISHED = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]
SCALES = np.float32([1, 2, 0.5, 3, 0.1, -1, 0.3, 7])
DTYPES = (jnp.float32, jnp.bfloat16)
read = jax.jit(quantized.dequantize, static_argnames="dtype")


def normal(*shape, seed=0, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(0, 0.02, shape), dtype)


def on_bounds():
    """[128, 8]: each midpoint of two neighbours, the numbers next to it, and a 1, times eight scales."""
    bounds = (np.float32(PUBLISHED)[1:] + np.float32(PUBLISHED)[:-1]) / 2
    around = [bounds, np.nextafter(bounds, np.float32(2)), np.nextafter(bounds, np.float32(-2))]
    column = np.concatenate([*around, [1.0], np.zeros(18)]).astype(np.float32)
    return np.tile(column, 2)[:, None] * SCALES


def half_integers():
    """[128, 8]: what lies between two codes of int8, times eight scales."""
    return np.float32([-127, *np.arange(-63, 64) + 0.5])[:, None] * SCALES


def with_zeros():
    x = np.array(normal(128, 8))
    x[64:, 3] = x[:, 5] = 0
    return x


def with_a_huge_number():
    x = np.array(normal(128, 8))
    x[5, 1] = 1e30
    return x


KERNELS = {  # of few shapes, since each is compiled
    "normal": normal(128, 8),
    "bfloat16": normal(128, 8, seed=1, dtype=jnp.bfloat16),
    "blocks of 32": normal(96, 8, seed=2),
    "stacked": normal(3, 128, 8, seed=3),
    "zeros": with_zeros(),
    "huge": with_a_huge_number(),
    "on bounds": on_bounds(),
    "half integers": half_integers(),
}


def test_the_sixteen_values_are_the_published_ones():
    np.testing.assert_array_equal(quantized.NF4, np.float32(PUBLISHED))
    every = {"nf4": np.arange(256, dtype=np.uint8).reshape(4, 1, 64).swapaxes(1, 2), "nf4_absmax": np.ones((4, 2, 1))}
    codes = np.stack([np.arange(256) // 16, np.arange(256) % 16], axis=-1)
    np.testing.assert_array_equal(read(every, dtype=jnp.float32).ravel(), np.float32(PUBLISHED)[codes].ravel())


def test_a_block_worked_by_hand():
    # absmax 4; in its units 1, -1, 0, 0.5, -0.25, 0.05: codes 15, 0, 7, 12 (0.44, not 0.56), 4 (-0.28), 8 (0.08).
    kernel = np.zeros((64, 1), np.float32)
    kernel[:6, 0] = 4, -4, 0, 2, -1, 0.2
    parts = quantized.quantize(kernel, "nf4")
    assert parts["nf4"][:4, 0].tolist() == [0xF0, 0x7C, 0x48, 0x77]
    assert parts["nf4_absmax"].tolist() == [[4.0]]
    expected = 4 * np.float32([1, -1, 0, PUBLISHED[12], PUBLISHED[4], PUBLISHED[8], 0, 0])
    np.testing.assert_array_equal(read(parts, dtype=jnp.float32)[:8, 0], expected)

    parts = quantized.quantize(kernel[:6], "int8")  # 31.75 is a code of 32, 6.35 of 6
    assert parts["int8"][:, 0].tolist() == [127, -127, 0, 64, -32, 6]
    np.testing.assert_allclose(read(parts, dtype=jnp.float32)[5, 0], 4 * 6 / 127, rtol=1e-6)


def test_codes_that_bitsandbytes_wrote():
    # bitsandbytes 0.50.2, torch 2.13.0, CPU:
    #   w = torch.stack([(torch.arange(64.0) * 37 + 11) % 64 - 31, (torch.arange(64.0) * 23) % 64 - 20]) / 7
    #   packed, state = F.quantize_4bit(w, quant_type="nf4", blocksize=64)
    #   [bytes(row.tolist()).hex() for row in packed.reshape(2, -1)], state.absmax
    #   codes, absmax, _ = F.int8_vectorwise_quant(w)
    #   [bytes(row.view(torch.uint8).tolist()).hex() for row in codes], absmax
    i = np.arange(64, dtype=np.float32)
    kernel = np.stack([(i * 37 + 11) % 64 - 31, (i * 23) % 64 - 20], axis=1) / np.float32(7)
    absmax = np.float32([[4.5714287757873535, 6.142857074737549]])
    parts = quantized.quantize(kernel, "nf4")
    assert [np.asarray(column).tobytes().hex() for column in parts["nf4"].T] == [
        "1d4e71b2d5f81c3e6091c3e70a2d4f81b2e5f91c3e60a2d4f71b2e5f91c3e60a",
        "28d39e5be6cf7d38e4ae5bf6cf8d39e4ae5cf7d38d4ae5be6cf7d39e4ae5bf6c",
    ]
    np.testing.assert_array_equal(parts["nf4_absmax"], absmax)
    parts = quantized.quantize(kernel, "int8")
    assert [np.asarray(column).tobytes().hex() for column in parts["int8"].T] == [
        "b143d86b009528bd4fe4770ca134c85bf08518ad40d467fc9124b94be073089d"
        "30c457ec7f14a93cd063f88d20b547dc6f04992cc053e87b10a538cc5ff4891c",
        "c5094dd4185ce2266af135790044cb0f53da1e61e82c70f73b7f064ad11559e0"
        "2367ee3276fd41c80c50d71b5fe5296df4387c0347ce1256dd2064eb2f73fa3e",
    ]
    np.testing.assert_array_equal(parts["int8_absmax"], absmax)


@pytest.mark.parametrize("name", KERNELS)
def test_bitsandbytes(name):
    functional = pytest.importorskip("bitsandbytes.functional", reason="the reference; its CPU functions are compared")
    import torch

    kernels = jnp.asarray(KERNELS[name])
    for kernel in kernels.reshape(-1, *kernels.shape[-2:]):
        inputs, outputs = kernel.shape
        weight = torch.from_numpy(np.array(kernel.T.astype(jnp.float32)))
        weight = weight.bfloat16() if kernel.dtype == jnp.bfloat16 else weight
        parts = quantized.quantize(kernel, "nf4")
        packed, state = functional.quantize_4bit(weight, quant_type="nf4", blocksize=64 if inputs % 64 == 0 else 32)
        np.testing.assert_array_equal(parts["nf4"].T, packed.numpy().reshape(outputs, -1))
        np.testing.assert_array_equal(parts["nf4_absmax"].T, state.absmax.numpy().reshape(outputs, -1))
        for dtype, theirs in ((jnp.float32, torch.float32), (jnp.bfloat16, torch.bfloat16)):
            state.dtype = theirs
            back = functional.dequantize_4bit(packed, state).float().numpy()
            np.testing.assert_array_equal(read(parts, dtype=dtype).T.astype(jnp.float32), back)

        parts = quantized.quantize(kernel, "int8")
        codes, absmax, _ = functional.int8_vectorwise_quant(weight)
        used = absmax.numpy() > 0  # there, a channel of zeros is a division by zero
        np.testing.assert_array_equal(parts["int8_absmax"][0], absmax.numpy())
        np.testing.assert_array_equal(parts["int8"].T[used], codes.numpy()[used])
        back = functional.int8_vectorwise_dequant(codes, absmax).numpy()
        np.testing.assert_array_equal(read(parts, dtype=jnp.float32).T[used], back[used])


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("kind", quantized.BASES)
def test_what_is_read_back(name, kind):
    kernel = np.asarray(KERNELS[name], np.float32)
    parts = quantized.quantize(KERNELS[name], kind)
    assert quantized.kind_of(parts) == kind
    expected = quantized.abstract(kernel.shape, kind)
    assert {part: (x.shape, x.dtype) for part, x in parts.items()} == {
        part: (x.shape, x.dtype) for part, x in expected.items()
    }
    back = np.asarray(read(parts, dtype=jnp.float32))
    # Half of the widest gap: between the two lowest of the sixteen values, or one of 254 steps. And six roundings to
    # float32, there and back, of numbers up to absmax.
    gap = quantized.NF4[1] - quantized.NF4[0] if kind == "nf4" else 1 / 127
    absmax = np.asarray(parts[f"{kind}_absmax"])
    bound = absmax.repeat(kernel.shape[-2] // absmax.shape[-2], axis=-2) * (gap / 2 + 3 * np.finfo(np.float32).eps)
    assert (abs(back - kernel) <= bound).all()
    assert (back[kernel == 0] == 0).all()
    again = quantized.quantize(back, kind)
    np.testing.assert_array_equal(again[kind], parts[kind])
    np.testing.assert_allclose(again[f"{kind}_absmax"], absmax, rtol=2e-7)
    for dtype in DTYPES:  # computed in float32, and rounded once
        given = read(parts, dtype=dtype)
        assert given.dtype == dtype
        np.testing.assert_array_equal(given, back.astype(dtype))


@pytest.mark.parametrize("kind", quantized.BASES)
def test_a_layer_of_a_stack_is_the_stack_of_a_layer(kind):
    kernels = KERNELS["stacked"]
    whole = quantized.quantize(kernels, kind)
    back = read(whole, dtype=jnp.float32)
    x = normal(4, 128, seed=5)
    scanned = jax.jit(lambda p: jax.lax.scan(lambda c, p: (c, quantized.dequantize(p, jnp.float32)), 0, p)[1])(whole)
    np.testing.assert_array_equal(scanned, back)
    mapped = jax.jit(jax.vmap(lambda p: quantized.dequantize(p, jnp.float32)))(whole)
    np.testing.assert_array_equal(mapped, back)
    in_vmap = jax.vmap(lambda kernel: quantized.quantize(kernel, kind))(kernels)
    for layer in range(3):
        one = quantized.quantize(kernels[layer], kind)
        for name in one:
            np.testing.assert_array_equal(one[name], whole[name][layer])
            np.testing.assert_array_equal(one[name], in_vmap[name][layer])
    product = jax.jit(lambda x, p: jnp.sum(x @ quantized.dequantize(p, x.dtype)))
    one = {name: part[0] for name, part in whole.items()}
    np.testing.assert_allclose(jax.grad(product)(x, one)[0], back[0].sum(axis=-1), rtol=1e-4, atol=1e-6)


def test_shapes_of_the_parts():
    shapes = lambda shape, kind: {name: part.shape for name, part in quantized.abstract(shape, kind).items()}
    assert shapes((28, 3584, 512), "nf4") == {"nf4": (28, 1792, 512), "nf4_absmax": (28, 56, 512)}
    assert shapes((96, 8), "nf4") == {"nf4": (48, 8), "nf4_absmax": (3, 8)}
    assert shapes((6, 8), "nf4") == {"nf4": (3, 8), "nf4_absmax": (3, 8)}
    assert shapes((28, 3584, 512), "int8") == {"int8": (28, 3584, 512), "int8_absmax": (28, 1, 512)}


def test_numbers_that_are_not_finite_stay_visible():
    for kind in quantized.BASES:
        for wrong in (np.nan, np.inf):
            kernel = np.array(normal(64, 2))
            kernel[3, 1] = wrong
            back = np.asarray(read(quantized.quantize(kernel, kind), dtype=jnp.float32))
            assert np.isfinite(back[:, 0]).all() and not np.isfinite(back[3, 1])


def test_errors():
    with pytest.raises(ValueError, match=r"shape \(2, 7, 8\) has an odd input axis \(7\).*use int8"):
        quantized.quantize(jnp.zeros((2, 7, 8)), "nf4")
    with pytest.raises(ValueError, match=r"unknown kind of base weights 'nf5'; expected one of nf4, int8"):
        quantized.abstract((8, 8), "nf5")
    with pytest.raises(ValueError, match=r"found the parts \['kernel'\], expected nf4 and nf4_absmax or int8"):
        quantized.kind_of({"kernel": 0})
