import numpy as np
import pytest
import torch

from sse_rl.pipeline.weights import pack, unpack


def tensors() -> dict[str, torch.Tensor]:
    return {
        "a": torch.randn(3, 5),
        "b": torch.randn(7).to(torch.bfloat16),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "view": torch.randn(4, 6).T,
        "ids": torch.arange(5),
    }


def test_weights_survive_the_journey_bit_for_bit():
    before = tensors()
    index, buffer = pack(before, version=3)
    after = unpack(index, buffer)
    assert index.version == 3
    assert list(after) == list(before)
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name], tensor)


def test_what_is_published_is_a_snapshot():
    weights = {"w": torch.ones(4)}
    index, buffer = pack(weights, version=1)
    weights["w"].add_(1)
    assert torch.equal(unpack(index, buffer)["w"], torch.ones(4))


def test_one_flipped_bit_is_refused():
    index, buffer = pack(tensors(), version=9)
    torn = buffer.copy()
    torn[17] ^= 1
    with pytest.raises(ValueError, match="version 9 arrived damaged"):
        unpack(index, torn)


def test_a_short_buffer_is_refused():
    index, buffer = pack(tensors(), version=1)
    with pytest.raises(ValueError, match="bytes"):
        unpack(index, buffer[:-64])


def test_a_read_only_buffer_as_ray_gives_it_is_accepted():
    index, buffer = pack(tensors(), version=1)
    frozen = np.frombuffer(buffer.tobytes(), dtype=np.uint8)
    assert not frozen.flags.writeable
    unpack(index, frozen)["a"].add_(1)
