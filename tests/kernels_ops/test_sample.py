"""The native sample: any element that it reads is noticed when it changes, in every dtype; nothing else is read."""

import gc
import threading
import weakref

import pytest
import torch

from hf_paged_kernels import NativeError, NativeSample, can_sample

# As in the module under test, which cuts longer reads into pieces.
PIECE = 4096
DTYPES = [
    torch.bool,
    torch.int8,
    torch.uint8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float8_e4m3fn,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
]
# Elements and how far apart: fewer than are fetched ahead, one piece, several, and adjacent ones.
SHAPES = [(1, 1), (1, 7), (31, 3), (33, 1), (577, 5), (PIECE, 1), (PIECE + 1, 2), (3 * PIECE, 3)]

pytestmark = pytest.mark.usefixtures("native_library")


@pytest.fixture(params=[1, 3])
def threads(request):
    """The number of threads for one test."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1).view(torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_byte_of_any_element_read_is_noticed(dtype, threads):
    tensors = [torch.zeros(count * step, dtype=dtype) for count, step in SHAPES]
    sample = NativeSample(tensors, *zip(*SHAPES, strict=True))
    assert not sample.differs(tensors)
    width = tensors[0].element_size()
    for tensor, (count, step) in zip(tensors, SHAPES, strict=True):
        edges = {
            0,
            1,
            31,
            32,
            33,
            count // 2,
            PIECE - 1,
            PIECE,
            PIECE + 1,
            count - 33,
            count - 32,
            count - 2,
            count - 1,
        }
        for index in sorted(edges & set(range(count))):
            for byte in range(index * step * width, index * step * width + width):
                as_bytes(tensor)[byte] ^= 1
                assert sample.differs(tensors), f"{count} every {step}, element {index}, byte {byte}"
                as_bytes(tensor)[byte] ^= 1
                assert not sample.differs(tensors)


def test_every_element_read_is_noticed():
    tensor = torch.zeros(2 * PIECE + 5, 3)
    sample = NativeSample([tensor], [tensor.shape[0]], [3])
    for row in range(len(tensor)):
        tensor[row, 0] = 1
        assert sample.differs([tensor]), f"row {row}"
        tensor[row, 0] = 0


def test_elements_in_between_are_not_read():
    tensor = torch.zeros(600, 3)
    sample = NativeSample([tensor], [600], [3])
    tensor[:, 1:] = 1
    assert not sample.differs([tensor])


def test_not_a_number_and_signed_zeros_are_compared_by_their_bits():
    tensor = torch.tensor([torch.nan, 0.0, 1.0])
    sample = NativeSample([tensor], [3], [1])
    assert not sample.differs([tensor])
    tensor[1] = -0.0
    assert sample.differs([tensor])


def test_views_are_read_where_they_begin():
    whole = torch.zeros(50, 8)
    part = whole[10:20]
    sample = NativeSample([part], [80], [1])
    whole[:10], whole[20:] = 1, 1
    assert not sample.differs([part])
    whole[19, 7] = 1
    assert sample.differs([part])


def test_other_memory_differs_and_is_not_read():
    tensor = torch.zeros(1000)
    sample = NativeSample([tensor], [1000], [1])
    tensor.untyped_storage().resize_(0)
    assert sample.differs([tensor])
    moved = torch.zeros(1000)
    sample = NativeSample([moved], [1000], [1])
    moved.data = torch.zeros(1000)
    assert sample.differs([moved])
    shrunk = torch.zeros(100_000)
    sample = NativeSample([shrunk], [100_000], [1])
    shrunk.untyped_storage().resize_(400)
    assert sample.differs([shrunk])


def test_a_negated_view_in_the_same_memory_differs():
    tensor = torch.ones(10)
    sample = NativeSample([tensor], [10], [1])
    assert sample.differs([torch._neg_view(tensor)])


class Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(4, 4).t()[1:],
        torch.zeros(4, 4)[:, ::2],
        torch.zeros(4, dtype=torch.complex64),
        torch.zeros(4, dtype=torch.complex128),
        torch.zeros(4, dtype=torch.complex64).conj().imag,
        torch.zeros(0),
        torch.zeros(4, device="meta"),
        torch.zeros(4, 4).to_sparse(),
        torch.zeros(4).as_subclass(Subclass),
    ],
    ids=["transposed", "strided", "complex64", "complex128", "negated", "empty", "meta", "sparse", "subclass"],
)
def test_what_is_left_to_torch(tensor):
    assert not can_sample(tensor)
    with pytest.raises((NativeError, NotImplementedError)):
        NativeSample([tensor], [1], [1])


@pytest.mark.parametrize(("count", "step"), [(0, 1), (-1, 1), (11, 1), (1, 0), (2, -1), (2, 10), (2, 2**62)])
def test_reads_beyond_the_tensor_are_refused(count, step):
    with pytest.raises(NativeError):
        NativeSample([torch.zeros(10)], [count], [step])


def test_no_tensors_at_all():
    assert not NativeSample([], [], []).differs([])


def test_several_threads_ask_at_once():
    tensors = [torch.randn(3000, 7) for _ in range(20)]
    sample = NativeSample(tensors, [3000] * 20, [7] * 20)
    edited = [*tensors[:19], tensors[19].clone()]
    answers: list[tuple[bool, bool]] = []
    workers = [
        threading.Thread(
            target=lambda: answers.extend((sample.differs(tensors), sample.differs(edited)) for _ in range(50))
        )
        for _ in range(4)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert answers == [(False, True)] * 200


def test_a_look_keeps_what_it_reads(threads):
    tensors = [torch.randn(3000, 7) for _ in range(20)]
    sample = NativeSample(tensors, [3000] * 20, [7] * 20)
    look = sample.begin(tensors)
    storage = weakref.ref(tensors[0].untyped_storage())
    del tensors[:]
    assert storage() is not None
    assert not look()
    assert not look(), "asked again"
    gc.collect()
    assert storage() is None


def test_a_look_that_nobody_ends():
    tensors = [torch.randn(3000, 7) for _ in range(20)]
    sample = NativeSample(tensors, [3000] * 20, [7] * 20)
    for _ in range(50):
        sample.begin(tensors)
