"""Weights from strangers: broken files are named for what they are, sound ones load whole, in any published naming."""

import ast
import errno
import io
import json
import math
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import textwrap
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import golden
from flux import checkpoint, naming, weights
from flux.autoencoder import AutoEncoder
from flux.checkpoint import CheckpointError, read, save
from flux.clip import ClipText
from flux.config import DEMO, DEV, KREA, SCHNELL, AutoEncoderConfig, ClipTextConfig, FluxConfig, SiglipConfig, T5Config
from flux.errors import UserError
from flux.model import Flux
from flux.siglip import Redux, SiglipVision
from flux.t5 import T5Encoder

ROOT = Path(__file__).parents[1]
MANIFESTS = Path(__file__).parent / "manifests"
SMALL = FluxConfig(vec_in_dim=8, context_in_dim=8, hidden_size=16, num_heads=2, depth=1, depth_single_blocks=1,
                   axes_dim=(2, 2, 4))
CLIP = ClipTextConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
T5 = T5Config(vocab_size=64, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=2)
AE = AutoEncoderConfig(ch=8, ch_mult=(1, 2), num_res_blocks=1, norm_groups=4)
SIGLIP = SiglipConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32,
                      patch_size=16)


def manifest(name, dtype=torch.bfloat16):
    shapes = json.loads((MANIFESTS / f"{name}.json").read_text())
    return {key: torch.empty(shape, dtype=dtype, device="meta") for key, shape in shapes.items()}


def shapes(tensors):
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def assert_equal(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype and torch.equal(actual[name], tensor), name


def weights_of(module, config, dtype=torch.float32):
    torch.manual_seed(0)
    return {name: tensor.to(dtype) for name, tensor in module(config).state_dict().items()}


def at(part, path):
    return {part: weights.Found(part, Path(path), "named", 0, "")}


def raw(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8) if isinstance(header, dict) else b""
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


# P1: no code runs from a file


def code_from_files(source: str) -> list[str]:
    """The calls and imports in a Python source through which a file could run code."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""] + [alias.name for alias in node.names]
        found += [name for name in names if name.split(".")[0] in {"pickle", "cPickle", "dill", "cloudpickle", "joblib",
                                                                   "shelve", "marshal"}]
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if called in {"eval", "exec", "compile", "builtins.eval", "builtins.exec", "os.system", "torch.hub.load"}:
            found.append(called)
        if called in {"torch.load", "load"} and (called == "torch.load" or "map_location" in keywords):
            found += [called] if keywords.get("weights_only") != "True" else []
        if keywords.get("allow_pickle") == "True" or keywords.get("trust_remote_code") == "True":
            found.append(called)
    return found


def test_no_code_runs_from_a_file():
    sources = [path for folder in ("flux", "lora", "kernels", "vlm_client") for path in (ROOT / folder).rglob("*.py")]
    sources += ROOT.glob("*.py")
    assert len(sources) > 10
    assert {str(path): found for path in sources if (found := code_from_files(path.read_text()))} == {}


@pytest.mark.parametrize("source", ["import pickle", "from pickle import load", "eval('1')", "exec(text)",
                                    "torch.load(p)", "torch.load(p, weights_only=False)",
                                    "np.load(p, allow_pickle=True)"])
def test_the_source_check_sees(source):
    assert code_from_files(source)
    assert not code_from_files("model.eval(); torch.load(p, weights_only=True); re.compile(x)")


# P2: broken files


def base_files():
    """Bytes of a file with every dtype, and of a small but whole transformer."""
    torch.manual_seed(0)
    mixed = {name: torch.randn(3, 4).to(dtype) for name, dtype in checkpoint.DTYPES.items()}
    mixed |= {"scalar": torch.ones(()), "empty": torch.ones(0, 4)}
    files = []
    for tensors in (mixed, weights_of(Flux, SMALL, torch.bfloat16)):
        text, offset = {"__metadata__": {"a": "b"}}, 0
        data = [tensor.reshape(-1).view(torch.uint8).numpy().tobytes() for tensor in tensors.values()]
        for (name, tensor), part in zip(tensors.items(), data, strict=True):
            text[name] = entry(checkpoint.DTYPE_NAMES[tensor.dtype], tensor.shape, (offset, offset + len(part)))
            offset += len(part)
        files.append(raw(text, b"".join(data)))
    return files


NASTY = [0, 1, -1, 2**31, 2**48, 2**63, 2**64, 10**100, 1.5, 1e308, True, None, "", "F32", [], {}, [0], [0, 0], [[1]],
         [2**62, 4], "\0", "\ud800", "a" * 5000]


def mutate(data: bytes, rng: random.Random) -> bytes:
    data = bytearray(data)
    length = int.from_bytes(data[:8], "little")
    kind = rng.randrange(9)
    if kind in (0, 1):  # bit flips, anywhere or in the header
        for _ in range(rng.randint(1, 8)):
            data[rng.randrange(len(data) if kind == 0 else 8 + length)] ^= 1 << rng.randrange(8)
    elif kind == 2:
        del data[rng.randrange(len(data)):]
    elif kind == 3:
        data += rng.randbytes(rng.randint(1, 64))
    elif kind == 4:  # another header length
        data[:8] = rng.choice([rng.randrange(2**64), rng.randrange(len(data) + 9), length + rng.randint(-9, 9)]) \
            .to_bytes(8, "little")
    elif kind == 5:  # a slice of the header dropped or doubled, the length corrected
        start = rng.randrange(length)
        piece = data[8 + start:8 + length][:rng.randint(1, 30)]
        text = data[8:8 + start] + piece * rng.choice([0, 2]) + data[8 + start + len(piece):8 + length]
        return raw(bytes(text), bytes(data[8 + length:]))
    elif kind in (6, 7):  # a value in the header
        header = json.loads(data[8:8 + length])
        for _ in range(rng.randint(1, 2)):
            name = rng.choice(list(header))
            field = rng.choice(["dtype", "shape", "data_offsets", "all", "name"])
            if field == "name":
                header[rng.choice(["x" * 300, "a\nb", "../x", "", "\ud800", "__metadata__"])] = header.pop(name)
            elif field == "all" or not isinstance(header[name], dict):
                header[name] = rng.choice(NASTY)
            elif kind == 6:
                header[name][field] = rng.choice(NASTY)
            elif isinstance(header[name].get(field), list) and header[name][field]:
                header[name][field][rng.randrange(len(header[name][field]))] = rng.choice(NASTY)
        return raw(header, bytes(data[8 + length:]))
    else:  # a region copied over another
        size = rng.randint(1, 200)
        a, b = rng.randrange(len(data)), rng.randrange(len(data))
        data[a:a + size] = data[b:b + size]
    return bytes(data)


def test_mutated_files_give_only_our_error(tmp_path, hard):
    mixed, whole = base_files()
    path, outcomes, slowest = tmp_path / "x.safetensors", {"loads": 0, "refused": 0, "builds": 0}, 0.0
    for seed in range(500_000 if hard else 5_000):
        rng = random.Random(seed)
        build = seed % 25 == 0
        path.write_bytes(mutate(whole if build else mixed, rng))
        start = time.process_time()
        try:
            if build:
                weights.load_flux(at("flux", path), SMALL, torch.float32)
                outcomes["builds"] += 1
            else:
                tensors = read(path)
                for tensor in tensors.values():
                    tensor.flatten().view(torch.uint8).sum()
                assert sum(tensor.nbytes for tensor in tensors.values()) < path.stat().st_size
                checkpoint.check_finite(tensors, path)
                outcomes["loads"] += 1
        except CheckpointError as error:
            assert str(path) in str(error) and "\n" not in str(error) and str(error).isprintable(), seed
            outcomes["refused"] += 1
        slowest = max(slowest, time.process_time() - start)
        path.unlink()
    assert slowest < 1
    assert min(outcomes.values()) > seed / 200, outcomes


def torch_zip():
    file = io.BytesIO()
    torch.save({"a": torch.ones(2)}, file)
    return file.getvalue()


def torch_legacy():
    file = io.BytesIO()
    torch.save({"a": torch.ones(2)}, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def plain_zip():
    file = io.BytesIO()
    zipfile.ZipFile(file, "w").writestr("notes.txt", "hello")
    return file.getvalue()


def sound(names, shape=(1,)):
    size = 4 * math.prod(shape)
    header = {name: entry("F32", shape, (i * size, (i + 1) * size)) for i, name in enumerate(names)}
    return raw(header, bytes(size * len(names)))


WHOLE = raw({"a": entry()}, bytes(8))
PAGE = b"<!DOCTYPE html><html><head><title>Sign in</title></head></html>" + b" " * 4000
BROKEN = {  # name: (bytes, what the message must say)
    "empty": (b"", "empty"),
    "five bytes": (b"\x01\x02\x03\x04\x05", "no safetensors file (5 bytes"),
    "zeros": (bytes(4096), "unfinished download"),
    "noise": (random.Random(0).randbytes(4096), "no safetensors file"),
    "html page": (PAGE, "HTML"),
    "xml error": (b"\n<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "HTML or XML"),
    "json error": (b'{"error": "Repository not found"}', "JSON"),
    "text": (b"Access to model black-forest-labs/FLUX.1-dev is restricted.", "Access to model"),
    "git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 238\n",
                        "git-LFS pointer"),
    "torch zip": (torch_zip(), "torch .pt or .pth"),
    "torch legacy": (torch_legacy(), "pickle"),
    "pickle": (pickle.dumps({"a": [1, 2]}), "pickle"),
    "zip": (plain_zip(), "zip archive"),
    "gguf": (b"GGUF\x03\x00\x00\x00" + bytes(100), "GGUF"),
    "gzip": (b"\x1f\x8b\x08\x00" + bytes(100), "packed archive"),
    "png": (b"\x89PNG\r\n\x1a\n" + bytes(100), "picture"),
    "numpy": (b"\x93NUMPY\x01\x00v\x00{'descr'" + bytes(100), "NumPy"),
    "truncated header": (raw({"a": entry(), "b": entry("F32", (2,), (8, 16))})[:60], "truncated"),
    "truncated data": (WHOLE[:-3], "truncated, with 5 of 8 bytes"),
    "trailing bytes": (WHOLE + b"xy", "2 bytes follow"),
    "huge header": (raw(b"{" + bytes(100), length=2**62), "claims 4611686018427387904 bytes"),
    "duplicate key": (raw(b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2), bytes(8)),
                      "a stands in it twice"),
    "duplicate field": (raw(b'{"a":{"dtype":"F32","dtype":"F16","shape":[2],"data_offsets":[0,8]}}', bytes(8)),
                        "dtype stands in it twice"),
    "no json": (raw(b"{'a': 1}"), "no JSON"),
    "bad utf-8": (raw(b'{"\xff\xfe": 1}'), "no JSON"),
    "nested": (raw(b'{"a":' * 100_000 + b"1" + b"}" * 100_000), "no JSON (nested too deep)"),
    "long number": (raw(b'{"a":' + b"9" * 10_000 + b"}"), "no JSON"),
    "unknown dtype": (raw({"a": entry("Q4_K")}, bytes(8)), "unknown dtype Q4_K"),
    "negative shape": (raw({"a": entry(shape=(-2,))}, bytes(8)), "impossible shape"),
    "endless shape": (raw({"a": entry(shape=(1,) * 1000)}, bytes(8)), "impossible shape"),
    "huge empty shape": (raw({"a": entry(shape=(0, 2**47, 2**47), offsets=(0, 0))}), "needs 0 bytes"),
    "overlap": (raw({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)), "b overlaps a"),
    "gap": (raw({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20)), "leaves a gap after a"),
    "wrong size": (raw({"a": entry(shape=(3,))}, bytes(8)), "needs 12 bytes and has 8"),
    "offsets reversed": (raw({"a": entry(offsets=(8, 0))}, bytes(8)), "needs 8 bytes and has -8"),
    "metadata": (raw({"__metadata__": {"a": 1}}), "__metadata__"),
}
FOREIGN = {  # tensor names: what the message must say when a transformer was wanted
    ("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight",): "LoRA",
    ("transformer.transformer_blocks.0.attn.to_q.lora_A.weight",): "LoRA",
    ("double_stream_modulation_img.lin.weight", "double_blocks.0.img_attn.qkv.weight"): "FLUX.2",
    ("distilled_guidance_layer.layers.0.in_layer.weight", "double_blocks.0.img_attn.qkv.weight"): "Chroma",
    ("model.diffusion_model.input_blocks.0.0.weight", "conditioner.embedders.0.transformer.x"): "SDXL",
    ("model.diffusion_model.joint_blocks.0.context_block.attn.qkv.weight",): "SD3",
    ("blocks.0.self_attn.q.weight", "patch_embedding.weight"): "Wan",
    ("transformer_blocks.0.img_mod.1.weight", "transformer_blocks.0.attn.add_q_proj.weight"): "Qwen-Image",
    ("double_blocks.0.img_attn.qkv.weight.quant_state.bitsandbytes__nf4",): "bitsandbytes",
    ("controlnet_blocks.0.weight", "transformer_blocks.0.attn.add_q_proj.weight"): "ControlNet",
    ("decoder.conv_in.weight", "encoder.conv_in.weight"): "FLUX.1 autoencoder",
    ("encoder.block.0.layer.0.SelfAttention.q.weight", "shared.weight"): "T5 text encoder",
    ("text_model.embeddings.token_embedding.weight",): "CLIP text encoder",
    ("vision_model.embeddings.patch_embedding.bias",): "SigLIP",
    ("redux_up.weight",): "Redux",
    ("model.layers.0.self_attn.q_proj.weight",): "language model",
    ("a", "b"): "unknown model (its first tensor is a)",
    (): "without tensors",
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named_for_what_it_is(name, tmp_path):
    data, words = BROKEN[name]
    path = tmp_path / "flux1-dev.safetensors"
    path.write_bytes(data)
    with pytest.raises(CheckpointError) as error:
        read(path)
    assert str(error.value).startswith(str(path)) and words in str(error.value) and "expected" in str(error.value)


@pytest.mark.parametrize("names", FOREIGN, ids=lambda names: names[0] if names else "none")
def test_another_model_is_named(names, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(sound(names))
    with pytest.raises(CheckpointError, match=FOREIGN[names].replace("(", r"\(").replace(")", r"\)")) as error:
        weights.load_flux(at("flux", path), SMALL)
    assert "expected a FLUX.1 transformer" in str(error.value)


@pytest.mark.parametrize(("names", "part", "words"), [
    (("quant_conv.weight", "decoder.conv_in.weight"), "ae", "Stable Diffusion autoencoder"),
    (("double_blocks.0.img_attn.qkv.weight",), "t5", "FLUX.1 transformer"),
    (("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
      "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"), "t5", "UMT5"),
    (("vision_model.embeddings.class_embedding", "vision_model.post_layernorm.weight"), "siglip", "CLIP vision"),
])
def test_another_part_is_named(names, part, words, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(sound(names))
    with pytest.raises(CheckpointError, match=words):
        weights.state_of(at(part, path), part)


def test_paths_that_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    for name, words in (("absent", "not there"), ("pipe", "a device or a pipe"), ("dangling", "a link to nothing"),
                        ("loop", "cannot be read"), ("n" * 300, "cannot be read"), ("a\0b", "NUL"),
                        (".", "no safetensors file")):
        with pytest.raises(CheckpointError, match=words) as error:
            read(f"{tmp_path}/{name}")
        assert str(error.value).isprintable()


def test_large_hostile_headers_come_to_an_end(tmp_path):
    limit, tensors = checkpoint.HEADER_LIMIT, checkpoint.TENSOR_LIMIT
    one = b'"%d":{"dtype":"F32","shape":[],"data_offsets":[0,0]},'
    texts = [b'{"a":[' + b"[]," * (limit // 3 - 9) + b"[]]}", b"{" + b'"a":1,' * (limit // 6 - 9) + b'"b":1}',
             b"{" + b"".join(one % i for i in range(limit // 70)) + b'"x":1}', b'{"a":' * (limit // 6),
             b'{"' + b"x" * (limit - 20) + b'":1}', b'{"a":[' + b"9," * (limit // 2 - 9) + b"9]}",
             b"{" + b",".join(b'"%d":1' % i for i in range(limit // 11)) + b"}",
             json.dumps({f"double_blocks.{i}.x": entry("U8", (0,), (0, 0)) for i in range(tensors)}).encode()]
    for text in texts:  # no measurement but a stop: time that grew as the square of the size would be an hour
        (tmp_path / "x").write_bytes(raw(text))
        before = signal.signal(signal.SIGALRM, _stop)
        signal.alarm(60)
        try:
            with pytest.raises(CheckpointError):
                weights.load_flux(at("flux", tmp_path / "x"), SMALL)
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)


def _stop(number, frame):
    raise TimeoutError("a header took more than a minute")


def test_nan_and_inf_are_found_when_asked(tmp_path):
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2):
        tensors = {"a": torch.ones(4, 3).to(dtype), "ids": torch.arange(3), "b": torch.tensor([1, torch.nan]).to(dtype)}
        save(tmp_path / "x", tensors)
        with pytest.raises(CheckpointError, match="NaN or Inf in b"):
            checkpoint.check_finite(read(tmp_path / "x"), tmp_path / "x")
        del tensors["b"]
        checkpoint.check_finite(tensors, tmp_path / "x")


# Reading and writing


def test_what_is_saved_is_read(tmp_path):
    torch.manual_seed(0)
    tensors = {name: torch.randn(3, 5).to(dtype) for name, dtype in checkpoint.DTYPES.items()}
    tensors |= {"scalar": torch.tensor(2.0), "empty": torch.ones(0, 3), "strided": torch.randn(4, 6).T}
    save(tmp_path / "x", tensors, {"who": "minflux"})
    assert_equal(read(tmp_path / "x"), tensors)
    assert_equal(load_file(tmp_path / "x"), tensors)  # the reference reader agrees
    assert checkpoint.read_header(tmp_path / "x").metadata == {"format": "pt", "who": "minflux"}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "y")
    assert_equal(read(tmp_path / "y"), tensors)


def test_tensors_stay_on_disk_and_the_file_as_it_is(tmp_path):
    path = tmp_path / "x"
    save(path, {"a": torch.zeros(8)})
    before, tensors = path.read_bytes(), read(path)
    with open(path, "r+b") as file:
        file.seek(-32, os.SEEK_END)
        file.write(torch.ones(8).numpy())
    assert tensors["a"].sum() == 8  # nothing was read before it was touched
    tensors["a"].fill_(3)
    assert path.read_bytes()[-32:] == torch.ones(8).numpy().tobytes() and tensors["a"].sum() == 24
    assert path.read_bytes()[:-32] == before[:-32]


def test_a_tensor_between_the_bounds_of_its_numbers(tmp_path):
    """Old writers did not pad the header. Such a tensor must be copied, but no sooner than it is asked for."""
    path, text = tmp_path / "x", json.dumps({"b": entry()}).encode()
    text += b" " * (1 - len(text) % 2)
    path.write_bytes(raw(text, torch.tensor([1.5, -2.0]).numpy().tobytes()))
    tensors = read(path)
    assert tensors["b"].tolist() == [1.5, -2.0] and "b" in tensors and tensors.layout()["b"].is_meta
    with open(path, "r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write(torch.tensor([3.0, 4.0]).numpy())
    assert tensors["b"].tolist() == [3, 4]


def test_saving_is_whole_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    save(path, {"a": torch.zeros(2)})

    def fail(number):
        def fsync(handle):
            raise OSError(number, os.strerror(number))
        return fsync
    monkeypatch.setattr(os, "fsync", fail(errno.ENOSPC))
    with pytest.raises(OSError, match=r"\d+ bytes needed, \d+ free") as error:
        save(path, {"a": torch.ones(1000)})
    assert error.value.errno == errno.ENOSPC
    needed = int(error.value.strerror.split("room: ")[1].split()[0])
    monkeypatch.setattr(os, "fsync", fail(errno.EIO))
    with pytest.raises(CheckpointError, match="cannot be written"):
        save(path, {"a": torch.ones(1000)})
    monkeypatch.undo()
    assert os.listdir(tmp_path) == [path.name] and read(path)["a"].sum() == 0

    class Interrupted(dict):
        def __getitem__(self, name):
            raise KeyboardInterrupt
    monkeypatch.setattr(checkpoint, "layout", lambda tensors: {"a": torch.empty(2, device="meta")})
    with pytest.raises(KeyboardInterrupt):
        save(path, Interrupted())
    monkeypatch.undo()
    assert os.listdir(tmp_path) == [path.name] and read(path)["a"].sum() == 0
    save(path, {"a": torch.ones(1000)})
    assert path.stat().st_size == needed
    for bad in (tmp_path / "no" / "x", path / "x"):
        with pytest.raises(CheckpointError, match="cannot be written"):
            save(bad, {"a": torch.ones(1)})


def test_a_disk_that_fills_up(tmp_path):
    """A real write that fails half-way: the system limits the size of files."""
    soft, hard_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard_limit))
    try:
        with pytest.raises(OSError, match="400104 bytes needed") as error:
            save(tmp_path / "x", {"a": torch.ones(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard_limit))
    assert error.value.errno == errno.ENOSPC and os.listdir(tmp_path) == []


def write_shards(folder, files, table=None):
    folder.mkdir(exist_ok=True)
    for name, tensors in files.items():
        save(folder / name, tensors)
    table = table or {key: name for name, tensors in files.items() for key in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))


def test_shards(tmp_path):
    folder, (one, two) = tmp_path / "t5", ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    tensors = {"a": torch.ones(2), "b": torch.zeros(3), "c": torch.arange(4)}
    files = {one: {"a": tensors["a"]}, two: {"b": tensors["b"], "c": tensors["c"]}}
    write_shards(folder, files)
    assert_equal(read(folder), tensors)
    assert_equal(read(folder / "model.safetensors.index.json"), tensors)
    assert weights._size(folder, "t5") == sum((folder / name).stat().st_size for name in files)
    with pytest.raises(CheckpointError, match="one shard, 00001-of-00002"):
        read(folder / one)
    write_shards(folder, files, {"a": one, "b": one, "c": two})
    with pytest.raises(CheckpointError, match="places b, b elsewhere"):
        read(folder)
    write_shards(folder, files, {"a": one, "b": two})
    with pytest.raises(CheckpointError, match="places c elsewhere"):
        read(folder)
    write_shards(folder, files)
    (folder / two).unlink()
    with pytest.raises(CheckpointError, match=f"needs {two}, which is missing"):
        read(folder)


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..\\x.safetensors",
                                  "..", ".safetensors", "C:x.safetensors", "a\0.safetensors", "x.bin", "", 7, None, ["a"]])
def test_shards_stay_in_their_folder(name, tmp_path):
    save(tmp_path / "x.safetensors", {"a": torch.ones(1)})
    write_shards(tmp_path / "t5", {}, {"a": name})
    with pytest.raises(CheckpointError, match="points to|no index"):
        read(tmp_path / "t5")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a":"b","a":"c"}}', "\0",
                                  "[" * 99999], ids=lambda text: text[:20])
def test_a_broken_index(text, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match="no index of shards"):
        read(tmp_path)


# Loading


def test_loading_shares_memory_with_the_file_and_casts(tmp_path):
    tensors = weights_of(Flux, SMALL, torch.bfloat16)
    save(tmp_path / "x", tensors)
    mapped = read(tmp_path / "x")
    model = weights.load(lambda: Flux(SMALL), mapped)
    assert all(parameter.data_ptr() == mapped[name].data_ptr() for name, parameter in model.named_parameters())
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    assert_equal(model.state_dict(), tensors)
    model = weights.load_flux(at("flux", tmp_path / "x"), SMALL, torch.float32)
    assert_equal(model.state_dict(), {name: tensor.float() for name, tensor in tensors.items()})


def test_buffers_are_real_after_loading():
    class Tower(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.norm = nn.Linear(2, 2), nn.BatchNorm1d(2)
            self.register_buffer("table", torch.arange(4.0).outer(torch.ones(2)), persistent=False)
    expected = Tower()
    model = weights.load(Tower, expected.state_dict(), torch.bfloat16)
    assert torch.equal(model.table, expected.table) and model.norm.num_batches_tracked.dtype == torch.int64
    assert model.linear.weight.dtype == torch.bfloat16 and not any(tensor.is_meta for tensor in model.buffers())


def test_loading_is_strict(tmp_path):
    tensors = weights_of(Flux, SMALL)
    name = "double_blocks.0.img_attn.proj.weight"
    for change, words in (({name: None}, rf"1 missing \({name}\)"),
                          ({"vision.x": torch.ones(1)}, r"1 unexpected \(vision.x\)"),
                          ({name: torch.ones(16, 17)}, rf"1 of another shape \({name} \(16, 17\) for \(16, 16\)\)"),
                          ({f"z.{i}": torch.ones(1) for i in range(9)}, "9 unexpected .* and 5 more")):
        save(tmp_path / "x", {key: value for key, value in (tensors | change).items() if value is not None})
        with pytest.raises(CheckpointError, match=words) as error:
            weights.load_flux(at("flux", tmp_path / "x"), SMALL)
        assert str(error.value).startswith(str(tmp_path / "x does not fit"))
    save(tmp_path / "x", tensors)
    with pytest.raises(CheckpointError, match="does not fit FLUX.1 schnell, it looks like dev: 4 unexpected"):
        weights.load_flux(at("flux", tmp_path / "x"), replace(SMALL, guidance_embed=False))
    with pytest.raises(CheckpointError, match="does not fit FLUX.1 Fill, it looks like dev"):
        weights.load_flux(at("flux", tmp_path / "x"), replace(SMALL, in_channels=384))


def test_24_gigabytes_open_at_once(tmp_path):
    """FLUX.1-dev in bf16 as a sparse file: under 5 s and 1 GiB of memory; diffusers' form is joined when asked for."""
    for form in ("bfl", "diffusers"):
        header, end = {}, 0
        for name, tensor in manifest(f"flux_dev_{form}").items():
            header[name], end = entry("BF16", tensor.shape, (end, end + tensor.nbytes)), end + tensor.nbytes
        with open(tmp_path / form, "wb") as file:
            file.truncate(file.write(raw(header)) + end)
        assert (tmp_path / form).stat().st_size > 23.8e9 and (tmp_path / form).stat().st_blocks * 512 < 1e6
    script = f"""
        import os, threading, time, torch
        from flux import weights
        from flux.config import FluxConfig

        def memory():
            line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
            return int(line.split()[1]) * 1024

        def watch():  # a regression must fail here, not take the machine's memory
            while memory() < 2**30:
                time.sleep(0.01)
            os._exit(3)

        threading.Thread(target=watch, daemon=True).start()
        start = time.process_time()
        model = weights.load_flux(weights.find(weights.PRESETS["dev"], None, {{"flux": "{tmp_path}/bfl"}}, {{}}),
                                  FluxConfig(), torch.bfloat16)
        print(time.process_time() - start)
        assert sum(parameter.numel() for parameter in model.parameters()) == 11_901_408_320
        assert not any(tensor.is_meta for tensor in model.parameters())
        found = weights.find(weights.PRESETS["dev"], None, {{"flux": "{tmp_path}/diffusers"}}, {{}})
        state = weights.state_of(found, "flux")
        assert len(state) == 780 and state["double_blocks.3.img_attn.qkv.weight"].shape == (9216, 3072)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=ROOT, text=True, capture_output=True,
                          timeout=120)
    for form in ("bfl", "diffusers"):
        (tmp_path / form).unlink()
    assert done.returncode == 0, done.stderr or "more than 1 GiB of memory"
    assert float(done.stdout) < 5


def test_a_file_larger_than_memory_is_mapped(tmp_path):
    with open(tmp_path / "x", "wb") as file:
        file.truncate(file.write(raw({"a": entry("U8", (2**40,), (0, 2**40))})) + 2**40)
    assert read(tmp_path / "x")["a"][-1] == 0
    (tmp_path / "x").unlink()


# Names


def test_the_transformer_converts_bit_for_bit():
    file = golden.load("flux_dev_diffusers")
    ours, theirs = file.part("weights."), file.part("diffusers.")
    assert_equal(dict(naming.to_bfl(theirs, "flux", "x")), ours)
    assert_equal(dict(naming.to_diffusers(ours, "flux", "x")), theirs)
    assert not torch.equal(ours["final_layer.adaLN_modulation.1.weight"], theirs["norm_out.linear.weight"])


def test_the_autoencoder_converts_bit_for_bit():
    file = golden.load("ae_diffusers")
    theirs, key_map = file.part("weights."), json.loads(file.metadata["key_map"])
    ours = naming.to_bfl(theirs, "ae", "x")
    assert ours.keys() == key_map.keys()
    for name, source in key_map.items():
        assert torch.equal(ours[name].flatten(), theirs[source].flatten()), name
    assert ours["decoder.mid.attn_1.q.weight"].ndim == 4
    assert_equal(dict(naming.to_diffusers(dict(ours), "ae", "x")), theirs)


@pytest.mark.parametrize("name", ["flux_dev", "flux_schnell", "flux_fill", "ae"])
def test_full_size_names_and_shapes(name):
    part = name.partition("_")[0]
    bfl, diffusers = manifest(f"{name}_bfl"), manifest(f"{name}_diffusers")
    assert shapes(naming.to_bfl(diffusers, part, "x")) == shapes(bfl)
    assert shapes(naming.to_diffusers(bfl, part, "x")) == shapes(diffusers)


@pytest.mark.parametrize(("name", "part", "build"), [
    ("flux_dev_bfl", "flux", lambda: Flux(DEV.flux)), ("flux_dev_diffusers", "flux", lambda: Flux(DEV.flux)),
    ("flux_schnell_bfl", "flux", lambda: Flux(SCHNELL.flux)),
    ("flux_fill_bfl", "flux", lambda: Flux(replace(DEV.flux, in_channels=384))),
    ("ae_bfl", "ae", lambda: AutoEncoder(DEV.autoencoder)),
    ("ae_diffusers", "ae", lambda: AutoEncoder(DEV.autoencoder)),
    ("clip_l_text", "clip", lambda: ClipText(DEV.clip)), ("t5_xxl_encoder", "t5", lambda: T5Encoder(DEV.t5)),
    ("siglip_so400m_patch14_384", "siglip", lambda: SiglipVision(DEV.siglip)),
    ("redux_connector", "redux", lambda: Redux(DEV.siglip.hidden_size, DEV.t5.d_model)),
])
def test_released_files_fit_our_modules(name, part, build):
    with torch.device("meta"):
        expected = shapes(build().state_dict())
    assert shapes(checkpoint.layout(naming.select(manifest(name), part, "x"))) == expected


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model.", "transformer."])
@pytest.mark.parametrize("form", ["bfl", "diffusers"])
def test_prefixes(prefix, form):
    tensors = weights_of(Flux, SMALL)
    file = dict(naming.to_diffusers(tensors, "flux", "x")) if form == "diffusers" else tensors
    assert_equal(dict(naming.select({prefix + name: tensor for name, tensor in file.items()}, "flux", "x")), tensors)
    mixed = {prefix + name: tensor for name, tensor in tensors.items()} | {"img_in.weight": torch.ones(1)}
    with pytest.raises(CheckpointError, match="both mean img_in.weight"):
        naming.select(mixed, "flux", "x")


def test_clip_and_t5_in_their_many_forms():
    clip, t5 = weights_of(ClipText, CLIP), weights_of(T5Encoder, T5)
    ballast = {"text_model.embeddings.position_ids": torch.arange(77), "text_projection.weight": torch.ones(2, 2),
               "logit_scale": torch.ones(()), "vision_model.embeddings.class_embedding": torch.ones(2),
               "visual_projection.weight": torch.ones(2, 2)}
    assert_equal(dict(naming.select(clip | ballast, "clip", "x")), clip)
    short = {name.removeprefix("text_model."): tensor for name, tensor in clip.items()}
    assert_equal(dict(naming.select(short, "clip", "x")), clip)
    assert_equal(dict(naming.select(t5 | {"encoder.embed_tokens.weight": t5["shared.weight"]}, "t5", "x")), t5)
    tied = {"encoder.embed_tokens.weight" if name == "shared.weight" else name: tensor for name, tensor in t5.items()}
    assert_equal(dict(naming.select(tied, "t5", "x")), t5)
    siglip = weights_of(SiglipVision, SIGLIP)
    both = siglip | {"text_model.head.weight": torch.ones(2), "logit_bias": torch.ones(1)}
    assert_equal(dict(naming.select(both, "siglip", "x")), siglip)
    for part, tensors in (("clip", clip), ("t5", t5)):
        assert "odd.weight" in naming.select(tensors | {"odd.weight": torch.ones(1)}, part, "x")  # unexpected in load


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16])
def test_small_dtypes_are_cast(dtype, tmp_path):
    tensors = weights_of(T5Encoder, T5, dtype)
    save(tmp_path / "t5xxl_fp8.safetensors", tensors)
    model = weights.load_t5(at("t5", tmp_path / "t5xxl_fp8.safetensors"), T5, torch.bfloat16)
    assert_equal(model.state_dict(), {name: tensor.bfloat16() for name, tensor in tensors.items()})


def test_scaled_fp8(tmp_path):
    tensors, stored = weights_of(Flux, SMALL), {"scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)}
    for name, tensor in tensors.items():
        if name.endswith("weight"):
            scale = tensor.abs().max() / 448
            stored |= {name: (tensor / scale).to(torch.float8_e4m3fn), name.replace("weight", "scale_weight"): scale,
                       name.replace("weight", "scale_input"): torch.ones(())}
        else:
            stored[name] = tensor
    save(tmp_path / "x", {f"model.diffusion_model.{name}": tensor for name, tensor in stored.items()})
    model = weights.load_flux(at("flux", tmp_path / "x"), SMALL, torch.float32)
    for name, tensor in tensors.items():
        assert (model.state_dict()[name] - tensor).abs().max() <= 0.04 * tensor.abs().max(), name
    for name, tensor, words in (("img_in.scale_weight", torch.ones(16), r"no img_in.weight can be made"),
                                ("txt_in.comfy_quant", torch.ones(3), "quantised in a form"),
                                ("lost.scale_weight", torch.ones(()), "1 unexpected .lost.scale_weight")):
        save(tmp_path / "y", stored | {name: tensor})
        with pytest.raises(CheckpointError, match=words):
            weights.load_flux(at("flux", tmp_path / "y"), SMALL, torch.float32)


def test_shapes_that_cannot_be_joined(tmp_path):
    tensors = dict(naming.to_diffusers(weights_of(Flux, SMALL), "flux", "x"))
    save(tmp_path / "x", tensors | {"transformer_blocks.0.attn.to_k.weight": torch.ones(16, 5)})
    with pytest.raises(CheckpointError, match="no double_blocks.0.img_attn.qkv.weight can be made"):
        weights.load_flux(at("flux", tmp_path / "x"), SMALL)
    del tensors["transformer_blocks.0.attn.to_k.weight"]
    save(tmp_path / "x", tensors)
    with pytest.raises(CheckpointError, match="1 missing .double_blocks.0.img_attn.qkv.weight.; 2 unexpected"):
        weights.load_flux(at("flux", tmp_path / "x"), SMALL)


# Finding


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".safetensors"):
            (folder / name).write_bytes(WHOLE)
        else:
            (folder / name).write_text("{}")


LAYOUTS = {
    "bfl": {"flux": "flux1-dev.safetensors", "ae": "ae.safetensors"},
    "comfyui": {"flux": "models/unet/flux1-dev.safetensors", "ae": "models/vae/ae.safetensors",
                "clip": "models/clip/clip_l.safetensors", "t5": "models/text_encoders/t5xxl_fp8_e4m3fn.safetensors",
                "siglip": "models/clip_vision/sigclip_vision_patch14_384.safetensors",
                "redux": "models/style_models/flux1-redux-dev.safetensors"},
    "comfyui models": {"flux": "diffusion_models/flux1-dev-fp8.safetensors", "ae": "vae/ae.safetensors",
                       "clip": "text_encoders/clip_l.safetensors", "t5": "clip/t5xxl_fp16.safetensors"},
    "diffusers": {"flux": "transformer/diffusion_pytorch_model.safetensors",
                  "ae": "vae/diffusion_pytorch_model.safetensors",
                  "clip": "text_encoder/model.safetensors", "t5": "text_encoder_2/model.safetensors",
                  "siglip": "image_encoder/model.safetensors",
                  "redux": "image_embedder/diffusion_pytorch_model.safetensors"},
    "diffusers inside": {"flux": "FLUX.1-dev/transformer/diffusion_pytorch_model.safetensors",
                         "siglip": "FLUX.1-Redux-dev/image_encoder/model.safetensors"},
    "bfl inside": {"redux": "FLUX.1-Redux-dev/flux1-redux-dev.safetensors"},
}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_finding_in_each_layout(kind, tmp_path):
    touch(tmp_path, *LAYOUTS[kind].values(), "models/vae/sdxl_vae.safetensors", "vae/other.safetensors",
          "unet/flux1-dev-kontext.safetensors")
    for found in (weights.find(DEV, tmp_path, env={}), weights.find(DEV, env={"FLUX_WEIGHTS": str(tmp_path)})):
        for part in weights.PARTS:
            place, name = found[part], LAYOUTS[kind].get(part)
            assert (place.kind == "missing") == (name is None), place
            if name:
                assert place.kind == kind.split()[0] and place.size == len(WHOLE)
                assert place.path in (tmp_path / name, (tmp_path / name).parent)
    assert weights.find(KREA, tmp_path, env={})["flux"].kind == ("diffusers" if kind == "diffusers" else "missing")


def test_finding_tokenizers(tmp_path):
    touch(tmp_path, "tokenizer/vocab.json", "tokenizer_2/spiece.model")
    assert weights.find(DEV, tmp_path, env={})["tokenizer"].path is None  # merges.txt is missing
    touch(tmp_path, "tokenizer/merges.txt")
    found = weights.find(DEV, tmp_path, env={})
    assert found["tokenizer"].path == tmp_path / "tokenizer" and found["tokenizer_2"].path == tmp_path / "tokenizer_2"


def test_what_is_named_comes_first(tmp_path):
    touch(tmp_path, "a/flux1-dev.safetensors", "b/flux1-dev.safetensors", "c.safetensors", "d.safetensors",
          "e/transformer/model.safetensors")
    everything = {"FLUX_MODEL": str(tmp_path / "c.safetensors"), "FLUX_WEIGHTS": str(tmp_path / "b")}

    def path(*args, env=everything):
        return weights.find(DEV, *args, env=env)["flux"].path
    assert path(tmp_path / "a", {"flux": tmp_path / "d.safetensors"}) == tmp_path / "d.safetensors"
    assert path(tmp_path / "a") == tmp_path / "a/flux1-dev.safetensors"
    assert path() == tmp_path / "c.safetensors"
    assert path(env={"FLUX_WEIGHTS": str(tmp_path / "b"), "FLUX_MODEL": ""}) == tmp_path / "b/flux1-dev.safetensors"
    assert path(None, {"flux": tmp_path / "e"}) == tmp_path / "e/transformer"
    assert weights.find(DEMO, env=everything)["flux"].path != tmp_path / "c.safetensors"
    for arguments in ({"overrides": {"ae": tmp_path / "no"}}, {"env": {"FLUX_AE": "no"}}, {"weights": tmp_path / "no"},
                      {"env": {"FLUX_WEIGHTS": "no"}}, {"overrides": {"flux": ""}, "env": {"FLUX_MODEL": "no"}}):
        with pytest.raises(UserError, match="is not there, expected|is no folder, expected"):
            weights.find(DEV, **({"env": {}} | arguments))


def test_a_missing_part_says_where_to_get_it(tmp_path):
    found = weights.find(DEV, tmp_path, env={})
    with pytest.raises(UserError) as error:
        weights.load_autoencoder(found, AE)
    assert str(error.value) == (f"the FLUX.1 autoencoder is missing (not in {tmp_path}), expected huggingface.co/"
                                "black-forest-labs/FLUX.1-dev ae.safetensors; put it there, or name it with --ae")
    with pytest.raises(UserError, match="no --weights DIR and no FLUX_WEIGHTS.*FLUX.1-schnell flux1-schnell.safeten"):
        weights.require(weights.find(SCHNELL, env={}), "flux")


def test_one_file_with_every_part(tmp_path):
    parts = {"flux": weights_of(Flux, SMALL), "ae": weights_of(AutoEncoder, AE), "clip": weights_of(ClipText, CLIP),
             "t5": weights_of(T5Encoder, T5)}
    tensors = {naming.PREFIXES[part][0] + name: tensor for part, state in parts.items() for name, tensor in state.items()}
    tensors["text_encoders.clip_l.logit_scale"] = torch.ones(())
    (tmp_path / "checkpoints").mkdir()
    save(tmp_path / "checkpoints/flux1-dev-fp8.safetensors", tensors)
    found = weights.find(DEV, tmp_path, env={})
    assert {found[part].path for part in parts} == {tmp_path / "checkpoints/flux1-dev-fp8.safetensors"}
    for part, load, config in (("flux", weights.load_flux, SMALL), ("ae", weights.load_autoencoder, AE),
                               ("clip", weights.load_clip, CLIP), ("t5", weights.load_t5, T5)):
        assert_equal(load(found, config).state_dict(), parts[part])


def test_the_demo_lies_in_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "DEMO", tmp_path)
    names = ["flux", "ae", "clip", "t5", "siglip"]
    touch(tmp_path, *(f"{name}.safetensors" for name in names), "tokenizer/vocab.json", "tokenizer/merges.txt",
          "tokenizer_2/spiece.model")
    found = weights.find(DEMO)
    assert {part: place.path for part, place in found.items()} == {
        **{name: tmp_path / f"{name}.safetensors" for name in names},
        "tokenizer": tmp_path / "tokenizer", "tokenizer_2": tmp_path / "tokenizer_2", "redux": None}
    save(tmp_path / "siglip.safetensors", weights_of(SiglipVision, SIGLIP))
    weights.load_siglip(found, SIGLIP)


# The command


def test_the_command_lists_and_converts(tmp_path, monkeypatch, capsys):
    touch(tmp_path, "ae.safetensors")
    weights.main(["--model", "dev", "--weights", str(tmp_path)])
    text = capsys.readouterr().out
    assert f"bfl      {tmp_path}/ae.safetensors" in text
    assert "huggingface.co/black-forest-labs/FLUX.1-dev flux1-dev.safetensors" in text
    with pytest.raises(CheckpointError, match="is an unknown model"):
        weights.main(["convert", str(tmp_path / "ae.safetensors"), str(tmp_path / "x"), "--to", "bfl"])
    assert not (tmp_path / "x").exists()
    done = subprocess.run([sys.executable, "-m", "flux.weights", "--model", "dev"], cwd=ROOT, text=True, capture_output=True,
                          env=os.environ | {"FLUX_AE": "nowhere"})
    assert done.returncode == 2
    assert done.stderr == "error: FLUX_AE nowhere is not there, expected a weights file; check the name\n"


@pytest.mark.parametrize(("part", "module", "config"), [("flux", Flux, SMALL), ("ae", AutoEncoder, AE)])
def test_converting_files(part, module, config, tmp_path):
    tensors = weights_of(module, config, torch.bfloat16)
    save(tmp_path / "bfl", tensors)
    weights.main(["convert", str(tmp_path / "bfl"), str(tmp_path / "diffusers"), "--to", "diffusers"])
    assert_equal(read(tmp_path / "diffusers"), dict(naming.to_diffusers(tensors, part, "x")))
    weights.main(["convert", str(tmp_path / "diffusers"), str(tmp_path / "back"), "--to", "bfl"])
    assert (tmp_path / "back").read_bytes() == (tmp_path / "bfl").read_bytes()
    with pytest.raises(UserError, match="there already"):
        weights.convert(tmp_path / "bfl", tmp_path / "back", "bfl")
    if part == "flux":
        save(tmp_path / "holes", {name: tensor for name, tensor in tensors.items() if name != "img_in.bias"})
        with pytest.raises(CheckpointError, match="no transformer_blocks.0.attn.to_q.weight can be made"):
            weights.convert(tmp_path / "holes", tmp_path / "no", "diffusers")
        assert not (tmp_path / "no").exists()
