"""Tokenizers on vocabularies small enough to work out by hand, on broken files, and on vocabularies trained here."""

import json

import pytest
import sentencepiece
import torch

from flux.clip import ClipText
from flux.config import DEMO
from flux.errors import UserError
from flux.tokenizers import BOS, EOS, ClipTokenizer, T5Tokenizer, train_clip_bpe, train_t5_unigram

# "é" is the bytes C3 A9, which byte-level BPE writes as "Ã" and "©"
MERGES = (("r", "e"), ("re", "d</w>"), ("c", "a"), ("ca", "t</w>"), ("'", "s</w>"), ("!", "!</w>"), ("Ã", "©</w>"))
CHARACTERS = tuple("acderst12'!Ã©")
VOCAB = (*CHARACTERS, *(f"{c}</w>" for c in CHARACTERS), *("".join(pair) for pair in MERGES), BOS, EOS)
COLOURS = ("red", "green", "blue", "dark blue", "yellow", "white")
SHAPES = ("circle", "star", "heart", "crescent", "ring")
CAPTIONS = [f"a {size} {colour} {shape} on a {ground} background" for size in ("small", "large") for colour in COLOURS
            for shape in SHAPES for ground in COLOURS]


def write_clip(folder, vocab=VOCAB, merges=MERGES):
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocab)}), "utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(" ".join(pair) + "\n" for pair in merges), "utf-8")
    return folder


@pytest.mark.parametrize(("prompt", "pieces"), [
    ("", []),
    ("red", ["red</w>"]),
    ("RED  \n\t cat ", ["red</w>", "cat</w>"]),  # lower case, one space
    ("cat's", ["cat</w>", "'s</w>"]),
    ("reds", ["re", "d", "s</w>"]),  # "d</w>" is only the end of a word
    ("rere", ["re", "r", "e</w>"]),
    ("12", ["1</w>", "2</w>"]),  # digits stand alone
    ("cat!!!", ["cat</w>", "!", "!!</w>"]),
    ("red,cat", ["red</w>", "cat</w>"]),  # this vocabulary has no comma
    ("\u00e9", ["Ã©</w>"]),
    ("e\u0301", ["Ã©</w>"]),  # composed by NFC
    (f"red{EOS}cat", ["red</w>", EOS, "cat</w>"]),
])
def test_clip_by_hand(tmp_path, prompt, pieces):
    tokenizer = ClipTokenizer(write_clip(tmp_path))
    ids = tokenizer([prompt], length=8)[0]
    assert [VOCAB[i] for i in ids] == [BOS, *pieces] + [EOS] * (7 - len(pieces))


def test_clip_is_cut_to_length_and_says_what_it_dropped(tmp_path):
    tokenizer = ClipTokenizer(write_clip(tmp_path))
    prompts = ["red cat", "Red  cat 12 reds Cat"]  # 2 and 7 pieces
    ids = tokenizer(prompts, length=7)
    assert ids.dtype == torch.int64
    assert [VOCAB[i] for i in ids[0]] == [BOS, "red</w>", "cat</w>", EOS, EOS, EOS, EOS]
    assert [VOCAB[i] for i in ids[1]] == [BOS, "red</w>", "cat</w>", "1</w>", "2</w>", "re", EOS]
    assert tokenizer.dropped(prompts[0], length=7) == (4, "")
    assert tokenizer.dropped(prompts[1], length=7) == (10, "ds Cat")
    assert tokenizer.dropped(prompts[1], length=10) == (10, "")
    assert tokenizer.dropped(prompts[1], length=9) == (10, "Cat")
    assert tokenizer([""]).shape == (1, 77)


@pytest.mark.parametrize("merge", (list, " ".join), ids=("pairs", "text"))
def test_clip_from_a_single_file(tmp_path, merge):
    two = ClipTokenizer(write_clip(tmp_path))
    (tmp_path / "one").mkdir()
    file = tmp_path / "one" / "tokenizer.json"
    file.write_text(json.dumps({"model": {"vocab": {token: i for i, token in enumerate(VOCAB)},
                                          "merges": [merge(pair) for pair in MERGES]}}))
    for source in (file, file.parent, str(file.parent)):
        assert torch.equal(ClipTokenizer(source)(["a red cat's 12"]), two(["a red cat's 12"]))


VOCAB_JSON = json.dumps({token: i for i, token in enumerate(VOCAB)})
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"


@pytest.mark.parametrize(("name", "content"), [
    ("vocab.json", None),
    ("merges.txt", None),
    ("vocab.json", b""),
    ("vocab.json", b"<html>not found</html>"),
    ("vocab.json", POINTER.encode()),
    ("vocab.json", VOCAB_JSON[:40].encode()),
    ("vocab.json", b"\x80\x04K\x01."),
    ("vocab.json", b"[1, 2]"),
    ("vocab.json", b"[" * 100_000),
    ("vocab.json", VOCAB_JSON.replace(EOS, "end").encode()),
    ("vocab.json", VOCAB_JSON.replace(": 3,", ": 4,").encode()),
    ("vocab.json", VOCAB_JSON.replace(": 3,", ': "3",').encode()),
    ("merges.txt", POINTER.encode()),
    ("merges.txt", b"#version: 0.2\nr e d\n"),
    ("merges.txt", b"#version: 0.2\nr x\n"),
    ("merges.txt", b"#version: 0.2\na a\n"),
    ("merges.txt", b"\xff\xfe"),
])
def test_broken_clip_files_are_named(tmp_path, name, content):
    write_clip(tmp_path)
    (tmp_path / name).unlink() if content is None else (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match="expected .*; fetch tokenizer/ of .*FLUX.1-dev") as error:
        ClipTokenizer(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("model", ({}, [], {"model": 3}, {"model": {"vocab": {}, "merges": 3}},
                                   {"model": {"vocab": dict.fromkeys(VOCAB, 0), "merges": []}},
                                   {"model": {"vocab": {BOS: 0, EOS: 1}, "merges": [[["a"], "b"]]}}))
def test_broken_single_files_are_named(tmp_path, model):
    (tmp_path / "tokenizer.json").write_text(json.dumps(model))
    with pytest.raises(UserError, match="FLUX.1-dev"):
        ClipTokenizer(tmp_path)


def test_byte_pairs_are_learned_as_by_hand(tmp_path):
    """abd 4 times, ab 3 times, bd once: the pairs are a+b 4, b+d</w> 5, a+b</w> 3; then a+bd</w> 4; at last a tie."""
    train_clip_bpe(["zw abd abd ABD", "abd ab ab", "ab  bd xy"], 1000, tmp_path)
    merges = (tmp_path / "merges.txt").read_text().splitlines()
    assert merges == ["#version: 0.2", "b d</w>", "a bd</w>", "a b</w>", "x y</w>", "z w</w>"]
    vocab = json.loads((tmp_path / "vocab.json").read_text())
    single = len(vocab) - 5 - 2
    assert single == 2 * (94 - 26)  # printable ASCII without capitals, inside and at the end of a word
    assert list(vocab.items())[single:] == [(token, single + i) for i, token in enumerate(
        ("bd</w>", "abd</w>", "ab</w>", "xy</w>", "zw</w>", BOS, EOS))]


@pytest.mark.parametrize("size", (138, 160, DEMO.clip.vocab_size))
def test_a_trained_clip_vocabulary_fits_and_ends_with_the_marks(tmp_path, size):
    for name in ("one", "two"):
        train_clip_bpe(iter(CAPTIONS), size, tmp_path / name)
    for file in ("vocab.json", "merges.txt"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    tokenizer = ClipTokenizer(tmp_path / "one")
    words = {word for caption in CAPTIONS for word in caption.split()}
    room = size == DEMO.clip.vocab_size  # for all words to become one token each
    assert tokenizer.vocab_size < size if room else tokenizer.vocab_size == size
    assert (tokenizer.bos, tokenizer.eos) == (tokenizer.vocab_size - 2, tokenizer.vocab_size - 1)
    needed, _ = tokenizer.dropped(" ".join(words))
    assert needed == 2 + len(words) if room else needed > 2 + len(words)
    assert sorted(p.name for p in (tmp_path / "one").iterdir()) == ["merges.txt", "vocab.json"]


def test_no_room_for_the_characters(tmp_path):
    with pytest.raises(UserError, match="vocab_size 137, expected 138"):
        train_clip_bpe(CAPTIONS, 137, tmp_path)
    with pytest.raises(UserError, match="no T5 vocabulary of 20 pieces"):
        train_t5_unigram(CAPTIONS, 20, tmp_path / "spiece.model")
    with pytest.raises(UserError, match="no T5 vocabulary"):
        train_t5_unigram([], 256, tmp_path / "spiece.model")
    assert not list(tmp_path.iterdir())


def test_the_pooled_row_of_the_demo_is_its_captions_end(tmp_path):
    train_clip_bpe(CAPTIONS, DEMO.clip.vocab_size, tmp_path)
    ids = ClipTokenizer(tmp_path)(CAPTIONS[:2] + ["unseen words: \u732b \u00dc"])
    assert ids.max() < DEMO.clip.vocab_size
    last, pooled = ClipText(DEMO.clip)(ids)
    ends = [row.index(ids.max()) for row in ids.tolist()]
    assert torch.equal(pooled, last[torch.arange(3), ends])


@pytest.mark.parametrize("corpus", (["a"], ["red circle"], ["red red red"], CAPTIONS), ids=lambda corpus: corpus[-1])
def test_t5_trains_pads_and_cuts(tmp_path, corpus):
    for name in ("one.model", "two.model"):
        train_t5_unigram(iter(corpus), DEMO.t5.vocab_size, tmp_path / name)
    assert (tmp_path / "one.model").read_bytes() == (tmp_path / "two.model").read_bytes()
    tokenizer = T5Tokenizer(tmp_path / "one.model")
    assert tokenizer.vocab_size <= DEMO.t5.vocab_size
    pieces = tokenizer.pieces
    assert [pieces.id_to_piece(i) for i in range(3)] == ["<pad>", "</s>", "<unk>"] and pieces.bos_id() == -1

    prompts = ["Red circle", "red circle " * 30, "", "Unseen, vex! (2) \u732b"]
    ids = tokenizer(prompts, DEMO.t5_length)
    own = pieces.encode("red circle")
    assert ids.dtype == torch.int64 and ids.shape == (4, DEMO.t5_length)
    assert ids[0].tolist() == own + [1] + [0] * (DEMO.t5_length - len(own) - 1)  # capitals are folded
    assert ids[1].tolist() == pieces.encode(prompts[1])[:DEMO.t5_length - 1] + [1]
    assert ids[2].tolist() == [1] + [0] * (DEMO.t5_length - 1)
    assert (ids[3] == 2).sum() == 1  # only the cat is unknown

    assert tokenizer.dropped(prompts[0], DEMO.t5_length) == (len(own) + 1, "")
    needed, text = tokenizer.dropped("red circle  red \u732b", len(own) + 1)
    assert (needed, text) == (len(pieces.encode("red circle red \u732b")) + 1, "red \u732b")


def test_t5_pieces_are_words_where_the_corpus_repeats_them(tmp_path):
    train_t5_unigram(CAPTIONS, DEMO.t5.vocab_size, tmp_path / "spiece.model")
    tokenizer = T5Tokenizer(tmp_path)  # the folder will do
    for caption in CAPTIONS:
        assert tokenizer.pieces.encode(caption, out_type=str) == ["\u2581" + word for word in caption.split()]


@pytest.mark.parametrize(("content", "what"), [
    (None, "no T5 tokenizer"), (b"", "is empty"), (b"<html>not found</html>", "cannot be read"),
    (POINTER.encode(), "cannot be read"), (b"\x80\x04K\x01.", "cannot be read")])
def test_broken_t5_files_are_named(tmp_path, content, what):
    file = tmp_path / "spiece.model"
    if content is not None:
        file.write_bytes(content)
    expected = "expected T5's spiece.model; fetch tokenizer_2/ of .*FLUX.1-dev"
    with pytest.raises(UserError, match=f"{what}.* {expected}") as error:
        T5Tokenizer(file)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_a_cut_t5_file_and_that_of_another_model_are_named(tmp_path):
    file = tmp_path / "spiece.model"
    train_t5_unigram(CAPTIONS, DEMO.t5.vocab_size, file)
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(UserError, match="cannot be read as a sentencepiece model"):
        T5Tokenizer(file)
    with file.open("wb") as writer:
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(CAPTIONS), model_writer=writer, vocab_size=60,
                                                 hard_vocab_limit=False, minloglevel=2)
    with pytest.raises(UserError, match="pad -1 and eos 2, not 0 and 1"):
        T5Tokenizer(file)
