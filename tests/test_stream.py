"""Streamed blocks compute what blocks in memory do, bit for bit, and at most two of them are there."""

import threading
import weakref

import pytest
import torch
from torch import nn

from flux import checkpoint, stream, weights
from flux.config import TINY, T5Config
from flux.errors import UserError
from flux.model import Flux
from flux.t5 import T5Encoder
from lora.adapter import Adapter, Dora, LowRank
from lora.inject import Loras

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("stream") / "flux.safetensors"
    checkpoint.save(path, Flux(TINY).bfloat16().state_dict())
    return path


def load(file, dtype=None) -> Flux:
    return weights.load(lambda: Flux(TINY), checkpoint.read(file), dtype)


def both(file, dtype) -> tuple[Flux, Flux]:
    return load(file, dtype), stream.streamed(load(file), dtype, CPU)


def inputs(dtype, batch=3, img=15, txt=7, residuals=None) -> list:
    torch.manual_seed(1)
    ids = torch.randint(9, (1, img, 3)).float()
    given = [torch.randn(batch, img, 64), ids, torch.randn(batch, txt, 28), torch.zeros(1, txt, 3), torch.randn(batch, 24),
             torch.rand(batch), torch.ones(batch)]
    given = [x if x is ids else x.to(dtype) for x in given]
    return [*given, residuals and [torch.randn(batch, img, 32).to(dtype) for _ in range(residuals)]]


def lora(term=lambda rows, columns: LowRank(torch.randn(2, columns), torch.randn(rows, 2), 0.1)) -> Adapter:
    torch.manual_seed(2)
    layers = {"img_in": (32, 64), "double_blocks.0.img_attn.qkv": (96, 32), "single_blocks.1.linear2": (32, 160)}
    return Adapter({name: (term(*shape),) for name, shape in layers.items()})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("residuals", [None, 1, 3])
@pytest.mark.parametrize("sizes", [(1, 16, 8), (3, 15, 7), (2, 1, 1)])
def test_the_same_bits(file, dtype, residuals, sizes):
    plain, late = both(file, dtype)
    given = inputs(dtype, *sizes, residuals)
    for _ in range(2):  # the second step begins where the first ended
        assert torch.equal(plain(*given), late(*given))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_loras_too_and_without_them_again(file, dtype):
    plain, late = both(file, dtype)
    given, dora = inputs(dtype), lora(lambda rows, columns: Dora(
        LowRank(torch.randn(2, columns), torch.randn(rows, 2), 0.1), torch.rand(rows)))
    before = plain(*given)
    for adapter in (lora(), dora):
        answers = []
        for model in (plain, late):
            loras = Loras(model)
            loras.attach("a", adapter, 0.7)
            answers.append(model(*given))
            loras.detach("a")
            assert torch.equal(model(*given), before)
        assert not torch.equal(answers[0], before)
        assert torch.equal(*answers)


def test_two_blocks_at_most_are_in_memory_and_the_file_stays_where_it_is(file, monkeypatch):
    model = load(file)
    model.single_blocks.extend(load(file).single_blocks)
    late, alive, most = stream.streamed(model, torch.float32, CPU), [], []
    names, mapped = set(model.state_dict()), {name: p.data_ptr() for name, p in late.named_parameters()}
    fetch = stream.Stream.fetch

    def counted(self, block, done):
        fetched = fetch(self, block, done)
        alive.append(weakref.ref(fetched.matrices[0][2]))
        most.append(sum(ref() is not None for ref in alive))
        return fetched
    monkeypatch.setattr(stream.Stream, "fetch", counted)
    for _ in range(2):
        late(*inputs(torch.float32))
    assert len(most) == 2 * 5 and max(most) <= 2 and not any(ref() is not None for ref in alive)
    assert set(late.state_dict()) == names
    assert {name: p.data_ptr() for name, p in late.named_parameters()} == mapped
    assert late.double_blocks[0].img_attn.qkv.weight.dtype == torch.bfloat16 and late.img_in.weight.dtype == torch.float32


def test_blocks_may_be_left_out_or_come_in_another_order(file):
    plain, late = both(file, torch.float32)
    for order in ((1, 0), (1,), (0, 0), (0, 1)):
        for model in (plain, late):
            model.whole = nn.ModuleList(model.single_blocks) if not hasattr(model, "whole") else model.whole
            model.single_blocks = nn.ModuleList(model.whole[i] for i in order)
        assert torch.equal(plain(*inputs(torch.float32)), late(*inputs(torch.float32)))


def test_text_encoders_are_streamed_too(tmp_path):
    torch.manual_seed(0)
    config = T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=3, num_heads=2)
    checkpoint.save(tmp_path / "t5.safetensors", T5Encoder(config).half().state_dict())
    plain = weights.load(lambda: T5Encoder(config), checkpoint.read(tmp_path / "t5.safetensors"), torch.float32)
    late = weights.load(lambda: T5Encoder(config), checkpoint.read(tmp_path / "t5.safetensors"))
    late = stream.streamed(late, torch.float32, CPU)
    ids = torch.randint(50, (3, 11))
    adapter = Adapter({"encoder.block.1.layer.0.SelfAttention.q": (LowRank(torch.randn(2, 16), torch.randn(16, 2)),)})
    before = plain(ids)
    assert torch.equal(before, late(ids))
    for model in (plain, late):
        Loras(model).attach("a", adapter)
    assert torch.equal(plain(ids), late(ids)) and not torch.equal(plain(ids), before)


def test_errors_of_the_thread_come_out_and_the_next_step_works(file):
    fail = threading.Event()

    def check():
        if fail.is_set():
            raise UserError("the file changed, expected it to stay; start again")
    late = stream.streamed(load(file), torch.float32, CPU, check)
    first = late(*inputs(torch.float32))
    fail.set()
    for _ in range(2):
        with pytest.raises(UserError, match="the file changed"):
            late(*inputs(torch.float32))
    fail.clear()
    assert torch.equal(late(*inputs(torch.float32)), first)
    late.single_blocks[0].linear1.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        late(*inputs(torch.float32))
    assert late.single_blocks[0].linear1.weight.dtype == torch.bfloat16  # what was there is back


def test_a_file_that_loses_bytes_while_it_is_used_is_one_line(tmp_path, file):
    path = tmp_path / "flux.safetensors"
    path.write_bytes(file.read_bytes())
    place = weights.Found("flux", path, "named", path.stat().st_size, "")
    late = stream.streamed(load(path), torch.float32, CPU, lambda: weights.unchanged(place))
    late(*inputs(torch.float32))
    with path.open("r+b") as opened:
        opened.truncate(path.stat().st_size - 1)
    with pytest.raises(UserError, match="bytes and had.*expected a file that stays") as caught:
        late(*inputs(torch.float32))
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: pinned memory and a second stream")
def test_on_a_gpu_the_same_bits_in_the_memory_of_two_blocks(file):
    place = torch.device("cuda")
    plain = weights.load(lambda: Flux(TINY), checkpoint.read(file), torch.bfloat16, place)
    late = stream.streamed(load(file), torch.bfloat16, place)
    given = [x if x is None else x.to(place) for x in inputs(torch.bfloat16)]
    for _ in range(3):
        assert torch.equal(plain(*given), late(*given))
