import warnings

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


@pytest.mark.parametrize("place", [17, 5000, -1], ids=["first block", "second", "rest"])
def test_one_flipped_bit_is_refused(place: int):
    index, buffer = pack(tensors() | {"large": torch.randn(3000)}, version=9)
    torn = buffer.copy()
    torn[place] ^= 1
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
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(unpack(index, frozen)["a"], unpack(index, buffer)["a"])


def test_memory_of_an_earlier_snapshot_is_taken_if_it_has_the_size():
    _, first = pack(tensors(), version=1)
    later = tensors()
    index, second = pack(later, version=2, into=torch.from_numpy(first))
    assert second.ctypes.data == first.ctypes.data
    assert all(torch.equal(x, later[name]) for name, x in unpack(index, second).items())
    _, third = pack({"more": torch.ones(9999)}, version=3, into=torch.from_numpy(first))
    assert third.nbytes >= 4 * 9999
