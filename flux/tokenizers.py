"""Text to token ids: CLIP's byte pairs (arXiv 2103.00020, section 2.4) and T5's unigram pieces (arXiv 1808.06226).

Both cut a prompt to `length` ids, marks included, and pad it; `dropped` says what was cut, so that the caller can warn.
The last two functions train small vocabularies in the same two formats, for the demo world.
"""

import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterable
from itertools import chain, pairwise
from pathlib import Path

import sentencepiece
import torch
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor

from flux.errors import UserError

BOS, EOS, END_OF_WORD = "<|startoftext|>", "<|endoftext|>", "</w>"
CLIP_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
FETCH = "fetch {folder}/ of huggingface.co/black-forest-labs/FLUX.1-dev and put it beside the weights"


class ClipTokenizer:
    """Byte pairs of lower-cased words, between <|startoftext|> and <|endoftext|>, and more of the latter as padding."""

    def __init__(self, source: str | Path):
        """source: a folder with vocab.json and merges.txt, or with tokenizer.json, or the latter itself.

        UserError if they are missing, broken or do not belong together.
        """
        vocab, merges = _read_clip(Path(source))
        self.bpe = _byte_pairs(vocab, merges)
        self.bos, self.eos, self.vocab_size = vocab[BOS], vocab[EOS], len(vocab)

    def __call__(self, prompts: list[str], length: int = 77) -> Tensor:
        """B prompts -> (B, length) int64."""
        assert not isinstance(prompts, str), "a list of prompts"
        rows = [[self.bos, *self.bpe.encode(prompt).ids[:length - 2], self.eos] for prompt in prompts]
        return torch.tensor([row + [self.eos] * (length - len(row)) for row in rows])

    def dropped(self, prompt: str, length: int = 77) -> tuple[int, str]:
        """Ids the whole prompt needs, both marks included, and the text that `length` cuts off: '' when it all fits."""
        encoding = self.bpe.encode(prompt)
        needed = len(encoding.ids) + 2
        return needed, prompt[encoding.offsets[length - 2][0]:].strip() if needed > length else ""


class T5Tokenizer:
    """Sentencepiece, then eos (1); padded with 0."""

    def __init__(self, source: str | Path):
        """source: spiece.model, or the folder that holds it. UserError if missing, broken or of another model."""
        path = Path(source)
        path = path / "spiece.model" if path.is_dir() else path
        expected = f"expected T5's spiece.model; {FETCH.format(folder='tokenizer_2')}"
        if not path.is_file():
            raise UserError(f"no T5 tokenizer at {path}, {expected}")
        if not path.stat().st_size:
            raise UserError(f"{path} is empty, {expected}")
        try:
            self.pieces = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
        except (OSError, RuntimeError) as error:
            raise UserError(f"{path} cannot be read as a sentencepiece model, {expected}") from error
        self.pad, self.eos = self.pieces.pad_id(), self.pieces.eos_id()
        if (self.pad, self.eos) != (0, 1):
            raise UserError(f"{path} has pad {self.pad} and eos {self.eos}, not 0 and 1, {expected}")
        self.vocab_size = self.pieces.get_piece_size()

    def __call__(self, prompts: list[str], length: int) -> Tensor:
        """B prompts -> (B, length) int64."""
        assert not isinstance(prompts, str), "a list of prompts"
        rows = [[*self.pieces.encode(prompt)[:length - 1], self.eos] for prompt in prompts]
        return torch.tensor([row + [self.pad] * (length - len(row)) for row in rows])

    def dropped(self, prompt: str, length: int) -> tuple[int, str]:
        """Ids the whole prompt needs, eos included, and the text that `length` cuts off: '' when it all fits.

        The text is as T5 reads it, without what its pieces cannot tell apart (double spaces, ligatures).
        """
        pieces = self.pieces.encode(prompt, out_type=str)
        needed = len(pieces) + 1
        return needed, "".join(pieces[length - 1:]).replace("\u2581", " ").strip() if needed > length else ""


def _clip_normalizer():
    return normalizers.Sequence([normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])


def _clip_words():
    """Splits normalised text and writes each byte of a word as one printable character, as GPT-2 does."""
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(CLIP_WORDS), behavior="removed", invert=True),
                                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _byte_pairs(vocab: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    # No token for the unknown: the released vocabulary has all bytes; a small one skips a byte rather than end at it.
    bpe = Tokenizer(models.BPE(vocab=vocab, merges=merges, end_of_word_suffix=END_OF_WORD))
    bpe.normalizer = _clip_normalizer()
    bpe.pre_tokenizer = _clip_words()
    bpe.add_special_tokens([AddedToken(mark, special=True, normalized=True) for mark in (BOS, EOS)])
    return bpe


def _read_clip(source: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The vocabulary and the merges in their order, of either file format, checked."""
    fetch = FETCH.format(folder="tokenizer")
    words, rules = source / "vocab.json", source / "merges.txt"
    single = source / "tokenizer.json" if source.is_dir() else source
    in_two = words.is_file() and rules.is_file()
    if not in_two and not single.is_file():
        raise UserError(f"no CLIP tokenizer at {source}, expected vocab.json and merges.txt or tokenizer.json; {fetch}")
    try:
        if in_two:
            vocab = json.loads(words.read_text("utf-8"))
            merges = [line for line in rules.read_text("utf-8").split("\n") if line and not line.startswith("#version")]
        else:
            model = json.loads(single.read_text("utf-8"))["model"]
            vocab, merges = model["vocab"], model["merges"]
        pairs = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in merges]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"the CLIP tokenizer at {source} cannot be read ({type(error).__name__}: {error}), expected "
                        f"vocab.json and merges.txt, or tokenizer.json; {fetch}") from error
    fault = _fault(vocab, pairs)
    if fault:
        raise UserError(f"the CLIP tokenizer at {source} has {fault}, expected the files of one release; {fetch}")
    return vocab, pairs


def _fault(vocab, pairs: list[tuple]) -> str | None:
    """What is wrong with a vocabulary and its merges, in words."""
    if not isinstance(vocab, dict) or any(type(i) is not int for i in vocab.values()):
        return "a vocabulary that does not map text to ids"
    if sorted(vocab.values()) != list(range(len(vocab))):
        return f"{len(vocab)} entries whose ids are not 0 to {len(vocab) - 1}"
    if BOS not in vocab or EOS not in vocab:
        return f"no {BOS} or no {EOS}"
    for pair in pairs:
        text = all(isinstance(part, str) for part in pair)
        if len(pair) != 2 or not text or not {*pair, "".join(pair)} <= vocab.keys():
            return f"a merge {pair} outside its vocabulary"
    return None


def train_clip_bpe(corpus: Iterable[str], vocab_size: int, out_folder: str | Path) -> None:
    """Byte pair encoding (arXiv 1508.07909, algorithm 1) of the corpus' words: vocab.json and merges.txt in out_folder.

    Ids in the released order: characters, characters that end a word, merges, <|startoftext|>, <|endoftext|>. At most
    vocab_size, fewer when every word has become one token. The characters are printable ASCII and what the corpus has.
    Of pairs met equally often the alphabetically first is merged, so that a corpus always gives the same files.
    """
    normalizer, splitter = _clip_normalizer(), _clip_words()
    met = Counter(word for text in corpus for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)))
    ascii_lower = {chr(i) for i in range(33, 127)} - {chr(i) for i in range(65, 91)}
    characters = sorted(ascii_lower.union(*met))
    vocab = characters + [character + END_OF_WORD for character in characters]
    if len(vocab) + 2 > vocab_size:
        raise UserError(f"vocab_size {vocab_size}, expected {len(vocab) + 2} for the characters alone; raise it")

    words = {word: (*word[:-1], word[-1] + END_OF_WORD) for word in met}
    merges = []
    while len(vocab) + 2 < vocab_size:
        pairs = Counter()
        for word, parts in words.items():
            for pair in pairwise(parts):
                pairs[pair] += met[word]
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        words = {word: _merge(parts, best) for word, parts in words.items()}
        merges.append(best)
        if "".join(best) not in vocab:  # two pairs may give one text
            vocab.append("".join(best))

    folder = Path(out_folder)
    folder.mkdir(parents=True, exist_ok=True)
    ids = {token: i for i, token in enumerate((*vocab, BOS, EOS))}
    _write(folder / "vocab.json", json.dumps(ids, ensure_ascii=False).encode())
    _write(folder / "merges.txt", "\n".join(("#version: 0.2", *(" ".join(pair) for pair in merges), "")).encode())


def _merge(parts: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    merged, i = [], 0
    while i < len(parts):
        size = 2 if parts[i:i + 2] == pair else 1
        merged.append("".join(parts[i:i + size]))
        i += size
    return tuple(merged)


def train_t5_unigram(corpus: Iterable[str], vocab_size: int, out_path: str | Path) -> None:
    """Sentencepiece's unigram model (arXiv 1804.10959) of the corpus at out_path: pad 0, eos 1, unk 2, no bos.

    At most vocab_size pieces, fewer when the corpus has no more to offer. Unlike the released model it folds case: the
    captions of a small world teach nothing about capitals. Letters, digits and common marks are always pieces.
    """
    corpus = list(corpus)
    words = sorted({word for text in corpus for word in re.findall(r"[^\W\d_]+", text)})
    # Sentencepiece looks for pieces in the list of distinct words and drops what stands there once: of few words, most.
    # So each is listed twice more, beside a digit, which it never joins to letters.
    again = (word + digit for word in words for digit in "01")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=chain(corpus, again), model_writer=model, model_type="unigram", vocab_size=vocab_size,
            hard_vocab_limit=False, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, character_coverage=1.0,
            required_chars="abcdefghijklmnopqrstuvwxyz0123456789.,:;!?'\"()/-", minloglevel=2,
            normalization_rule_name="nmt_nfkc_cf",
            num_threads=1,  # the sums of several threads come in no fixed order
        )
    except RuntimeError as error:
        raise UserError(f"no T5 vocabulary of {vocab_size} pieces from this corpus ({error}), expected some text and "
                        "room for its characters; raise vocab_size or give more text") from error
    out_path = Path(out_path)
    out_path.parent.mkdir(parents=True, exist_ok=True)
    _write(out_path, model.getvalue())


def _write(path: Path, data: bytes) -> None:
    """Whole or not at all: written beside its place, synced, renamed."""
    beside = path.with_name(path.name + ".tmp")
    with beside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
